"""Inputs that are nearly true: valid replies of every event and tag, and what can be done to them.

A mutation knows the shape of what it changes: the tree of JSON, the numbers in the tables, a frame's header, the
preface that says which descriptors come. What knows nothing of that (flipped bytes) is one of them.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from random import Random
from typing import Any

from isohub.wire.codec import TAGS
from isohub.wire.protocol import HEADER, pack
from tests.attacks.liar import READY, frame, value
from tests.fuzzing.harness import DRIP, FRAMES, INPUT, PARCEL, PREFACE, SMALL, STARTING, frame_starts, preface

__all__ = ["mutated", "seeds"]

#: The longest input that mutations are made of.
LONGEST = 1 << 14

_TABLE = [[[0, 16], [64, 8], [128, 4]], [[0, "float32", 0, [4], [1]], [1, "bool", 0, [2, 4], [4, 1]]]]
_DTYPES = ("float32", "bool", "int8", "complex32", "complex128", "bfloat16", "uint64", "float8_e5m2", "qint8", "load")

# For memory of zeros: values and indices of a sparse tensor, nothing of one, and numbers of a quantised one.
_PARTS = [
    [[0, 8], [64, 16], [128, 24], [192, 2], [256, 0]],
    [
        [0, "float32", 0, [2], [1]], [1, "int64", 0, [1, 2], [2, 1]], [2, "int64", 0, [3], [1]],
        [3, "uint8", 0, [2], [1]], [4, "int64", 0, [0], [1]], [4, "float32", 0, [0], [1]],
        [4, "float64", 0, [0], [1]], [4, "uint8", 0, [2, 0], [1, 1]],
    ],
]  # fmt: skip
_FORMS: dict[str, Any] = {
    "K": ["l", ["K", "coo", ["Z", 3], ["T", 1], ["T", 0], False], ["K", "csr", ["Z", 2, 5], ["T", 2], ["T", 4], ["T", 5]],
          ["K", "meta", "float16", ["Z", 2, 3], ["Z", 3, 1]]],
    "Q": ["l", ["Q", "quint8", ["T", 3], 0.5, 3], ["Q", "quint8", ["T", 7], ["T", 6], ["T", 4], 1]],
}  # fmt: skip

_TREES: dict[str, Any] = {
    "null": None,
    "number": 1,
    "text": "x",
    "l": ["l", 1, 2.5, True, None, "x"],
    "t": ["t", 1, ["t"], ["t", ["l"]]],
    "d": ["d", "a", 1, 2, ["l"], ["t", 1, 2], None],
    "o": ["o", "a", 1, "b", 2],
    "s": ["s", 1, "a", ["t", 1], ["z"]],
    "z": ["z", 1, 2],
    "c": ["c", 1.0, ["f", "nan"]],
    "f": ["l", ["f", "nan"], ["f", "inf"], ["f", "-inf"]],
    "i": ["i", "-1f2e3d4c5b6a79881726"],
    "S": ["S", 0],
    "u": ["u", "eda080"],
    "b": ["l", ["b", 0], ["b", 1]],
    "B": ["B", 1],
    "x": ["x", 1, None, ["l"]],
    "g": ["g", 0, 10, 3],
    "e": ["e"],
    "T": ["l", ["T", 0], ["T", 0], ["T", 1]],
    "Z": ["Z", 1, 2, 3],
    "y": ["y", "bfloat16"],
    "v": ["v", "cuda:1"],
    "A": ["l", ["A", 0], ["A", 1]],
    "n": ["l", *(["n", kind, 1] for kind in ("int8", "float16", "bool", "complex64", "uint64"))],
    "D": [
        "l",
        ["D", True, "<M8[ns]", ["Z"], ["b", 1]],
        ["D", False, [4, False, [["a", "|b1", [2], 0], ["b", "<u2", [], 2]]], ["Z", 1], ["b", 2]],
    ],
    "h": [
        "l",
        *(
            ["h", *one]
            for one in (
                ("datetime", "2020-01-02T03:04:05+01:00"),
                ("date", "2020-01-02"),
                ("time", "03:04:05.000006"),
                ("timedelta", "-1 2 3"),
                ("Decimal", "1.50"),
                ("Fraction", "-1/3"),
                ("path", "a/b"),
                ("UUID", "12345678-1234-5678-1234-567812345678"),
            )
        ),
    ],
    "E": ["E", "Kind", "CAT", ["l", 1]],
    "I": ["I", "L", 2, 2, ["b", 2], None, ["d"]],
    "R": ["R", "Point", ["x", "y"], 1, ["l"]],
    "M": ["M", "Output", "logits", ["T", 0], "loss", None],
    "m": ["m", "Output", ["loss", "cache"], "logits", ["T", 0]],
    "r": [
        "l",
        ["r", 1, "module", "x.Net", True],
        ["r", 2, "object", "x.Y", False],
        ["r", 1, "module", "x.Net", True],
        *(
            ["r", 3 + number, sort, "x", False]
            for number, sort in enumerate(("function", "iterator", "stream", "awaitable"))
        ),
    ],
    "p": ["p", 0],
}

_FAULT = {
    "event": "error", "number": 1, "kind": "raised", "details": ["a"], "type": "ValueError",
    "bases": ["ValueError", "Exception"], "message": "told", "traceback": "Traceback", "kept": False,
}  # fmt: skip
_WANT = {
    "event": "want", "number": 1, "wish": 1, "what": "file", "address": "https://localhost/w.pt",
    "hash_prefix": "0123abcd", "progress": True,
}  # fmt: skip


def seeds() -> dict[str, bytes]:
    """Inputs that are true, by name: what every mutation begins with."""
    made = {
        f"value-{name if name.islower() or len(name) > 1 else 'upper-' + name.lower()}": preface(fill=1)
        + frame(value(tree, claims=_TABLE, via="outbox"))
        for name, tree in _TREES.items()
    }
    for name, tree in _FORMS.items():
        made[f"value-upper-{name.lower()}"] = preface() + frame(value(tree, claims=_PARTS, via="outbox"))
    answers = b"".join(frame(value(number, number=number)) for number in range(1, 5))
    alike = b"".join(frame(value(["T", 0], number, claims=_TABLE, via="outbox")) for number in range(1, 5))
    parcel = frame(value(["l", ["T", 0], ["b", 2]], claims=_TABLE, via="parcel"), 1)
    bare = preface(fill=1) + frame(value(["l", ["l", 1]]))
    return {
        **made,
        "value-none": bare,
        "value-recorded": preface(INPUT | FRAMES, fill=1)
        + frame(value(["l", ["T", 0]], claims=_TABLE, via="outbox", recorded=[0]))
        + frame(value(["l", ["T", 0]], number=2, claims=_TABLE, via="outbox"))
        + frame(value(["T", 0], number=3, claims=_TABLE, via="outbox", recorded=[0]))
        + frame(value(["l", None], number=4)),
        "value-kept": preface(INPUT) + frame(value(1, kept=True)),
        "values": preface(FRAMES) + answers,
        "values-alike": preface(FRAMES, fill=1) + alike,
        "values-at-once": preface() + answers,
        "parcel": preface(PARCEL, descriptors=1, fill=1) + parcel,
        "parcel-by-byte": preface(PARCEL | DRIP, descriptors=1) + parcel,
        "parcel-too-long": preface(SMALL, descriptors=1) + parcel,
        "parcel-empty": preface(descriptors=1, kind=4) + frame(value(None, via="parcel"), 1),
        "parcel-pipe": preface(descriptors=1, kind=5) + parcel,
        "parcels": preface(descriptors=4) + frame(value(1, via="parcel"), 4),
        "descriptors-many": preface(descriptors=31) + frame(value(1)),
        "fault": preface() + frame(_FAULT),
        "fault-then-value": preface(FRAMES) + frame(_FAULT) + frame(value(2, number=2)),
        "want": preface(FRAMES) + frame(_WANT) + frame(value(1)),
        "wants": preface(FRAMES)
        + frame(_WANT)
        + frame({**_WANT, "wish": 2, "what": "repo", "address": "org/repo", "hash_prefix": None})
        + frame(value(1)),
        "ready": preface(STARTING | FRAMES)
        + frame({**READY, "layers": [["descriptors"], ["landlock"]], "details": {"landlock": "why"}})
        + frame(value(1)),
        "ready-twice": preface(FRAMES) + frame(READY) + frame(READY),
    }


_SEEDS = list(seeds().values())

_NUMBERS = (
    0, 1, -1, 2, 3, 7, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32,
    (1 << 53), (1 << 61) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1,
    10**30, 10**4000, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e300, -1e300, 6e4, 7e4, 3.5e38, float("nan"), float("inf"),
)  # fmt: skip
_TEXTS = (
    "", "x", "\x00", "\x1b[2J", "\u202e", "\ud800", "é", "nan", "inf", "-inf", "os.system", "__class__", "_fields",
    "class_name", "x" * 1001, "f" * 5000, "-", "-0", "0x1", "1_0", "cpu", "cuda:9999", "meta", "privateuseone", "none",
    "outbox", "parcel", "value", "error", "want", "ready", "request", "raised", "no_entrypoint", "too_large", "module",
    "object", "function", "iterator", "stream", "awaitable", "SystemExit", "KeyError", "file", "repo", "http://[::1", "ff", "eda080", "edb080",
)  # fmt: skip


def _leaf(chance: Random) -> Any:
    pick = chance.random()
    if pick < 0.4:
        return chance.choice(_NUMBERS)
    if pick < 0.5:
        return chance.randint(-3, 300)
    if pick < 0.7:
        return chance.choice(_TEXTS)
    if pick < 0.8:
        return chance.choice(_DTYPES)
    if pick < 0.9:
        return chance.choice((None, True, False, [], {}, [[]], {"a": 1}))
    return copy.deepcopy(chance.choice(list(_TREES.values())))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below this one."""
    left = [tree]
    while left:
        holder = left.pop()
        for key in range(len(holder)) if type(holder) is list else list(holder):
            yield holder, key
            if type(holder[key]) in (list, dict):
                left.append(holder[key])


def _change_tree(chance: Random, message: Any) -> Any:
    places = list(_places(message)) if type(message) in (list, dict) else []
    if not places:
        return _leaf(chance)
    holder, key = chance.choice(places)
    old = holder[key]
    what = chance.randrange(9)
    if what == 0:
        holder[key] = _leaf(chance)
    elif what == 1:
        del holder[key]
    elif what == 2 and type(holder) is list:
        holder.insert(key, copy.deepcopy(old) if chance.random() < 0.5 else _leaf(chance))
    elif what == 2:
        holder[chance.choice(_TEXTS)] = copy.deepcopy(old)
    elif what == 3:
        holder[key] = [chance.choice(list(TAGS)), old]
    elif what == 4:
        other, place = chance.choice(places)
        holder[key] = copy.deepcopy(other[place])
    elif what == 5 and type(old) in (int, float):
        holder[key] = chance.choice((old + 1, old - 1, -old, old * 64, float(old), str(old), bool(old)))
    elif what == 5 and type(old) is str:
        holder[key] = chance.choice((old + chance.choice(_TEXTS), old[1:], old * 40, old.upper()))
    elif what == 6 and type(old) is list:
        chance.shuffle(old)
    elif what == 6:
        for _ in range(chance.choice((1, 3, 62, 64, 70))):
            old = [chance.choice("ltozsR"), old]
        holder[key] = old
    elif what == 7 and type(old) is list and old:
        old.extend(copy.deepcopy(old[-1]) for _ in range(chance.choice((1, 2, 70, 300))))
    else:
        holder[key] = copy.deepcopy(chance.choice(list(_TREES.values())))
    return message


_DEVICES = ("cuda:0", "cuda:0", "cuda:1", "cuda:999", "cuda", "cpu", "meta", "cuda:0\x1b[2J", "")


def _change_claims(chance: Random, message: Any) -> Any:
    """Change a number in the tables, or add a row."""
    claims = message.get("claims") if type(message) is dict else None
    if type(claims) is not list or len(claims) != 2 or type(claims[1]) is not list:
        return _change_tree(chance, message)
    if chance.random() < 0.3:
        sizes = [chance.choice((0, 1, 2, 4, 64, 1 << 31, 1 << 61)) for _ in range(chance.choice((0, 1, 2, 3, 64, 65)))]
        strides = [chance.choice((0, 0, 1, 2, 64, 1 << 61)) for _ in sizes]
        claims[1].append(
            [chance.randint(0, 3), chance.choice(_DTYPES), chance.choice((0, 0, 1, 1 << 40)), sizes, strides]
        )
        return message
    if chance.random() < 0.1:
        rows = message.setdefault("devices", [])
        if type(rows) is list:
            rows.append([chance.randint(-1, 3), chance.choice(_DEVICES), chance.random() < 0.3])
        if chance.random() < 0.2:
            message["took"] = chance.choice(_DEVICES)
        return message
    rows = [row for row in claims[chance.randrange(2)] if type(row) is list and row] if type(claims[0]) is list else []
    if not rows:
        return _change_tree(chance, message)
    row = chance.choice(rows)
    place = chance.randrange(len(row))
    if type(row[place]) is list and row[place]:
        row[place][chance.randrange(len(row[place]))] = chance.choice(_NUMBERS)
    elif type(row[place]) is str:
        row[place] = chance.choice(_DTYPES)
    else:
        row[place] = chance.choice(_NUMBERS)
    return message


def _dump(message: Any) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _change_body(chance: Random, body: bytes) -> bytes:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return _change_bytes(chance, body)
    try:
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            change = _change_claims if chance.random() < 0.25 else _change_tree
            message = change(chance, message)
        changed = _dump(message)
    except (ValueError, OverflowError, RecursionError):
        return body  # grown too deep, or a number of more digits than Python writes
    if chance.random() < 0.01:  # deeper than Python's own recursion
        depth = chance.choice((500, 2000, 8000))
        changed = changed.replace(b"1", b"[" * depth + b"]" * depth, 1)
    return changed


def _change_bytes(chance: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(changed) + 1)
        what = chance.randrange(4)
        if what == 0 and changed:
            changed[place % len(changed)] = chance.randrange(256)
        elif what == 1 and changed:
            changed[place % len(changed)] ^= 1 << chance.randrange(8)
        elif what == 2:
            del changed[place : place + chance.randint(1, 8)]
        else:
            changed[place:place] = chance.randbytes(chance.randint(1, 8))
    return bytes(changed)


def _change_header(chance: Random, spoken: bytes) -> bytes:
    if len(spoken) < HEADER.size:
        return spoken
    magic, version, count, length, number = HEADER.unpack_from(spoken)
    what = chance.randrange(5)
    if what == 0:
        length = chance.choice((0, 1, length - 1, length + 1, length * 2, 64 << 20, (64 << 20) + 1, -1)) & 0xFFFFFFFF
    elif what == 1:
        count = chance.choice((0, 1, 2, 4, 5, 255))
    elif what == 2:
        version = chance.randrange(256)
    elif what == 3:
        magic = chance.randbytes(2)
    else:
        number = chance.choice((0, 1, number - 1, number + 1, 1 << 32, 1 << 63, -1)) & 0xFFFFFFFFFFFFFFFF
    return HEADER.pack(magic, version, count, length, number) + spoken[HEADER.size :]


def _reframed(chance: Random, body: bytes, spoken: bytes) -> bytes:
    _, _, count, _, number = HEADER.unpack_from(spoken.ljust(HEADER.size, b"\0"))
    return pack(number, body, count if chance.random() < 0.9 else chance.randrange(6))


def _change_frames(chance: Random, frames: list[bytes]) -> None:
    place = chance.randrange(len(frames))
    what = chance.random()
    if what < 0.7:
        frames[place] = _reframed(chance, _change_body(chance, frames[place][HEADER.size :]), frames[place])
    elif what < 0.8:
        frames[place] = _change_header(chance, frames[place])
    elif what < 0.86:
        frames[place] = _change_bytes(chance, frames[place])
    elif what < 0.9:
        frames.insert(place, frames[place])
    elif what < 0.93:
        chance.shuffle(frames)
    elif what < 0.96:
        frames.extend(_frames(chance.choice(_SEEDS)[PREFACE:]))
    else:
        frames[place] = frames[place][: chance.randrange(len(frames[place]) + 1)]


def _frames(stream: bytes) -> list[bytes]:
    starts = [*frame_starts(stream), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(starts)] or [b""]


def _change_preface(chance: Random, head: bytes) -> bytes:
    changed = bytearray(head)
    place = chance.randrange(PREFACE)
    if place == 0:
        changed[0] ^= 1 << chance.randrange(8)
    elif place == 1:
        changed[1] = chance.choice((0, 1, 1, 1, 2, 3, 4, 5, 6, 31)) | chance.randrange(8) << 5
    elif place == 2:
        changed[2] = chance.choice((0, 0, 1, 2, 9))
    else:
        changed[3] = chance.choice((0, 1, 2, 65, 128, 255))
    return bytes(changed)


def mutated(chance: Random, data: bytes | None = None) -> bytes:
    """An input made of `data`, or of a true one."""
    if data is None:
        data = chance.choice(_SEEDS)
    data = data[:LONGEST].ljust(PREFACE, b"\0")
    head, frames = data[:PREFACE], _frames(data[PREFACE:])
    if chance.random() < 0.25:
        head = _change_preface(chance, head)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        _change_frames(chance, frames)
    return head + b"".join(frames)
