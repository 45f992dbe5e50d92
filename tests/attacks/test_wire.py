"""C1 to C5 and C9: a worker that lies. Each lie has its control: the same machinery takes the truth."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys

import msgspec
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isohub import errors
from isohub.errors import ProtocolError
from isohub.session.replies import read_reply
from isohub.wire.protocol import HEADER, MAX_DESCRIPTORS, MAX_FRAME_BYTES
from tests.attacks.liar import Liar, frame, value
from tests.conftest import eventually, open_descriptors


@pytest.fixture
def liar():
    with Liar() as made:
        yield made


def memfd(data: bytes = b"", size: int | None = None) -> int:
    descriptor = os.memfd_create("lie", os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    if size is not None:
        os.ftruncate(descriptor, size)
    return descriptor


TABLE = [[[0, 16]], [[0, "float32", 0, [4], [1]]]]


def test_the_truth_is_taken(liar):
    assert liar.answer(frame(value(["l", 1, "two"]))) == [1, "two"]
    descriptor = memfd(torch.arange(4.0).numpy().tobytes())
    answer = frame(value(["T", 0], number=2, claims=TABLE, via="parcel"), 1)
    assert liar.answer(answer, descriptors=[descriptor]).tolist() == [0, 1, 2, 3]
    os.close(descriptor)
    assert liar.answer(frame(value(["T", 0], number=3, claims=TABLE, via="outbox"))).shape == (4,)
    assert liar.worker.alive


class Bomb:
    """What a pickle does when it is read."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


# C1: nothing from a worker is unpickled.


@pytest.mark.parametrize(
    "lie",
    [
        frame(pickle.dumps(Bomb())),
        frame(value(["p", 0], claims=[[[0, 64]], []], via="outbox")),
        frame(value({"__reduce__": ["os.system", "touch exploded"]})),
        frame(value({"__class__": "os.system"})),
    ],
    ids=["body", "tag", "reduce", "class"],
)
def test_c1_a_pickle_is_never_read(liar, lie, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists()  # the control: it is a bomb
    (tmp_path / "exploded").unlink()
    with pytest.raises(ProtocolError):
        liar.answer(lie)
    assert not (tmp_path / "exploded").exists()
    assert liar.dead()


# C2: tables that lie.


@pytest.mark.parametrize(
    "claims",
    [
        [[[0, 1 << 40]], []],
        [[[-64, 16]], []],
        [[[0, 16]], [[0, "float32", 0, [5], [1]]]],
        [[[0, 16]], [[0, "float32", 0, [4], [1 << 61]]]],
        [[[0, 16]], [[7, "float32", 0, [4], [1]]]],
        [[[0, 16]], [[0, "float32", 0, [1 << 61], [0]]]],
        [[[0, 1 << 20], [0, 1 << 20]], []],
        [[[0, 16]], [[0, "os.system", 0, [4], [1]]]],
        [[[0, 16]], [[0, "float32", 0, [4]]]],
        [[], []],
        [[[0.5, 16]], []],
    ],
    ids=str,
)
def test_c2_a_table_that_lies_is_refused(liar, claims):
    with pytest.raises(ProtocolError, match="liar@0000000 broke the protocol while being lied to and was killed"):
        liar.answer(frame(value(["T", 0], claims=claims, via="outbox")))
    assert liar.dead()
    with pytest.raises(ProtocolError):  # and it stays refused
        liar.link.ask("run", phase="being asked again")


# C3: memory that can still change, or is none.


def other_descriptors():
    read, write = os.pipe()
    os.close(write)
    unsealable = os.memfd_create("x")
    os.ftruncate(unsealable, 4096)
    return {
        "unsealable": unsealable,
        "directory": os.open("/", os.O_RDONLY),
        "device": os.open("/dev/zero", os.O_RDWR),
        "pipe": read,
        "proc": os.open("/proc/self/status", os.O_RDONLY),
        "eventfd": os.eventfd(0),
    }


@pytest.mark.parametrize("kind", ["unsealable", "directory", "device", "pipe", "proc", "eventfd"])
def test_c3_a_descriptor_that_is_no_sealable_memory_is_refused(liar, kind):
    descriptors = other_descriptors()
    before = open_descriptors()
    with pytest.raises(ProtocolError):
        liar.answer(frame(value(["T", 0], claims=TABLE, via="parcel"), 1), descriptors=[descriptors[kind]])
    assert liar.dead()
    assert open_descriptors() <= before
    for descriptor in descriptors.values():
        os.close(descriptor)


def test_c3_memory_that_is_still_mapped_for_writing_is_refused(liar):
    import mmap

    descriptor = memfd(size=4096)
    mapping = mmap.mmap(descriptor, 4096)
    with pytest.raises(ProtocolError, match="sealed"):
        liar.answer(frame(value(["T", 0], claims=TABLE, via="parcel"), 1), descriptors=[descriptor])
    mapping.close()
    os.close(descriptor)


def test_c3_memory_that_is_truncated_ends_nobody(liar):
    descriptor = memfd(size=8)
    with pytest.raises(ProtocolError):
        liar.answer(frame(value(["T", 0], claims=TABLE, via="parcel"), 1), descriptors=[descriptor])
    os.close(descriptor)


def test_c3_the_arenas_cannot_be_truncated_by_a_worker(session, hub):
    def truncate(module):
        refused = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                if "isohub-arena" in os.readlink(f"/proc/self/fd/{name}"):
                    try:
                        os.ftruncate(int(name), 0)
                    except OSError:
                        refused += 1
            except OSError:
                pass
        return refused

    with session.load(hub("good"), "mlp") as handle:
        handle(torch.ones(1, 4))
        assert handle.run(truncate) >= 2
        assert handle(torch.ones(1, 4)).shape == (1, 2)


# C4: sizes.


@pytest.mark.parametrize(
    "lie",
    [
        HEADER.pack(b"ih", 1, 0, MAX_FRAME_BYTES + 1),
        HEADER.pack(b"ih", 1, 0, 0xFFFFFFFF),
        HEADER.pack(b"ih", 1, MAX_DESCRIPTORS + 1, 10),
        b"GET / HTTP/1.1\r\n\r\n",
        frame(b"[" * 100_000),
        frame(value(["l", *[["e"]] * 1_100_000])),
        frame(json.dumps(value(None)).replace("null", "[" * 500 + "]" * 500).encode()),
        frame(value(["i", "f" * 100_000])),
    ],
    ids=["long", "longest", "descriptors", "http", "open", "many", "deep", "int"],
)
def test_c4_lengths_counts_and_depths_are_bounded(liar, lie):
    rss = psutil.Process().memory_info().rss
    with pytest.raises(ProtocolError):
        liar.answer(lie)
    assert liar.dead()
    assert psutil.Process().memory_info().rss - rss < 512 << 20


def test_c4_a_parcel_of_ten_gigabytes_is_refused_unread(liar):
    descriptor = memfd(size=10 << 30)
    rss = psutil.Process().memory_info().rss
    with pytest.raises(ProtocolError, match=str(10 << 30)):
        liar.answer(frame(value(["T", 0], claims=TABLE, via="parcel"), 1), descriptors=[descriptor])
    assert psutil.Process().memory_info().rss - rss < 16 << 20
    os.close(descriptor)


def test_c4_a_hundred_descriptors_are_refused_and_closed(liar):
    descriptor = memfd(size=16)
    before = open_descriptors()
    with pytest.raises(ProtocolError):
        liar.answer(frame(value(["T", 0], claims=TABLE, via="parcel"), 1), descriptors=[descriptor] * 100)
    assert eventually(lambda: open_descriptors() <= before)
    os.close(descriptor)


P = (1 << 61) - 1  # ints hash to themselves modulo this


@pytest.mark.parametrize(
    "lie",
    [
        value(["l", *[["b", 0]] * 3000], claims=[[[0, 1 << 20]], []], via="outbox"),
        value(["s", *[["i", f"{k * P:x}"] for k in range(40_000)]]),
        value(["d", *[part for k in range(500) for part in (["i", f"{k * P:x}"], 0)]]),
        value(["T", 0], claims=[[[0, 1 << 20]], [[0, "bool", 0, [1 << 20], [1]]] * 8000], via="outbox"),
        value(["l", *[["r", k + 1, "module", "x", False] for k in range(11_000)]]),
    ],
    ids=["bytes", "set", "dict", "bools", "references"],
)
def test_c4_small_frames_do_not_make_much_work(liar, lie):
    rss = psutil.Process().memory_info().rss
    with pytest.raises(ProtocolError):
        liar.answer(frame(lie))
    assert liar.dead()
    assert psutil.Process().memory_info().rss - rss < 256 << 20


def test_c4_parts_are_counted_before_they_are_built(liar):
    rss = psutil.Process().memory_info().rss
    with pytest.raises(ProtocolError, match="parts"):
        liar.answer(frame(json.dumps(value(None)).replace("null", "[" + "[]," * 16_000_000 + "[]]").encode()))
    assert psutil.Process().memory_info().rss - rss < 512 << 20


FORMS = {
    "len": lambda handle: len(handle),
    "iter": lambda handle: next(iter(handle)),
    "dir": lambda handle: dir(handle),
    "children": lambda handle: list(handle.named_children()),
    "parameters": lambda handle: list(handle.named_parameters()),
    "state": lambda handle: handle.state_dict(),
}


@pytest.mark.parametrize(
    "tree", [5, "x", -1, ["l", 1], ["t", 1, 2, 3], ["t", ["d", 1, 2], None], ["d", "a", 1]], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_c5_an_answer_of_another_form_is_refused(liar, form, tree):
    if (form, tree) in (("len", 5), ("dir", ["l", 1])):
        return  # true ones
    handle = liar.answer(frame(value(["r", 1, "module", "x.Net", True])))
    thread = liar.later(frame(value(tree, number=2)))
    with pytest.raises(ProtocolError):
        FORMS[form](handle)
    thread.join(10)
    assert liar.dead()


# C5: names.


@pytest.mark.parametrize(
    "tree",
    [
        ["r", 1, "module", "os.system"],
        ["r", 0, "module", "x", False],
        ["r", -1, "object", "x", False],
        ["r", 1.0, "object", "x", False],
        ["r", 1, ["module"], "x", False],
        ["r", 1, "class", "x", False],
        ["r", 1, "object", 5, False],
        ["r", 1, "object", "x", 1],
        ["import", "os"],
        ["y", "__loader__"],
        ["v", "__import__('os')"],
    ],
    ids=str,
)
def test_c5_a_reference_or_a_name_that_is_none_is_refused(liar, tree):
    with pytest.raises(ProtocolError):
        liar.answer(frame(value(tree)))
    assert liar.dead()


def test_c5_no_module_is_imported_for_a_name(liar):
    before = set(sys.modules)
    record = liar.answer(frame(value(["M", "antigravity.Output", "this.s", ["R", "this", ["s"], 1]])))
    assert record["this.s"].s == 1
    handle = liar.answer(frame(value(["r", 7, "object", "antigravity.Fly", False], number=2)))
    assert type(handle).__name__ == "RemoteObject"
    assert not {"antigravity", "this"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    "lie",
    [
        frame(value(1, number=2)),
        frame(value(1, number=0)),
        frame({"event": "ready", "number": 1, "layers": [[], []], "details": {}}),
        frame({"event": "request", "number": 1}),
        frame({**value(1), "extra": 1}),
        frame({key: part for key, part in value(1).items() if key != "kept"}),
        frame(value(1, via="file")),
        frame(value(1, kept="yes")),
        frame(value(1), 1),
        frame(b"\xff\xfe"),
        frame(b""),
        frame(b"{}{}"),
        frame(json.dumps(value("\ud800")).encode().replace(b"\\ud800", b"\xed\xa0\x80")),
    ],
    ids=range(13),
)
def test_c5_what_is_no_reply_is_refused(liar, lie):
    with pytest.raises(ProtocolError):
        liar.answer(lie)
    assert liar.dead()


@pytest.mark.parametrize(
    "early", [frame(value(2, number=2)), frame(value(2, number=2))[:5], b"\0"], ids=["whole", "cut", "byte"]
)
@pytest.mark.parametrize("together", [True, False])
def test_c5_an_answer_to_no_question_is_refused(liar, early, together):
    if together:
        assert liar.answer(frame(value(1)) + early) == 1
    else:
        assert liar.answer(frame(value(1))) == 1
        liar.say(early)
    with pytest.raises(ProtocolError, match="nobody asked for"):
        liar.link.ask("run", phase="asking the second question")
    assert liar.dead()


# C9: errors are text.


def fault(**changes):
    return {
        "event": "error", "number": 1, "kind": "raised", "details": [], "type": "ValueError", "bases": ["ValueError", "Exception"],
        "message": "told", "traceback": "", "kept": False, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "BaseException", "os.system", "Warning"],
)
def test_c9_an_error_is_never_what_would_end_the_caller(liar, name):
    with pytest.raises(errors.RemoteError) as caught:
        liar.answer(frame(fault(bases=[name, "BaseException"], type=name)))
    assert type(caught.value) is errors.RemoteError
    assert isinstance(caught.value, Exception)
    with pytest.raises(ValueError, match="told"):  # the control
        liar.answer(frame(fault(number=2)))
    assert liar.worker.alive


def test_c9_a_kind_of_error_that_does_not_fit_is_refused(liar):
    with pytest.raises(ProtocolError):
        liar.answer(frame(fault(kind="no_entrypoint", details=["x"] * 100_000)))
    assert liar.dead()


def test_c9_an_errors_text_is_escaped(liar):
    with pytest.raises(errors.RemoteError) as caught:
        liar.answer(frame(fault(message="\x1b]0;title\x07 \u202e", type="\x1b[31mE", traceback="\x9b2J")))
    assert "\x1b" not in str(caught.value)
    assert "\x9b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)
    assert "\\x1b[31mE" in str(caught.value)


def test_c9_an_error_may_not_carry_descriptors_or_other_kinds(liar):
    descriptor = memfd(size=16)
    with pytest.raises(ProtocolError):
        liar.answer(frame(fault(), 1), descriptors=[descriptor])
    os.close(descriptor)


# Any bytes at all.


@settings(max_examples=1500)
@given(st.binary(max_size=300))
def test_any_body_is_a_reply_or_a_protocol_error(body):
    try:
        read_reply(body)
    except ProtocolError:
        pass


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(list("ltdoszcfiubBxgeTZyvAnRMrpS")),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=50),
            st.builds(lambda tree: frame(value(tree)), TREES),
            st.builds(lambda b: frame(b), st.binary(max_size=80)),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_frames_give_a_value_or_an_error_and_nothing_is_left(frames):
    before = open_descriptors()
    with Liar() as liar:
        try:
            liar.say(b"".join(frames))
            liar.end.shutdown(1)
            liar.link.ask("run", phase="being lied to")
        except errors.IsohubError:
            pass
    del liar
    gc.collect()
    assert eventually(lambda: open_descriptors() <= before)


def test_the_caller_survives_a_million_answers_read():
    """The reader alone, over many mutations of one true answer: no growth, and only the two outcomes."""
    truth = json.dumps(value(["d", "k", ["l", 1, ["t", 2.5, "x"]]])).encode()
    import random

    chance = random.Random(0)
    for _ in range(20_000):
        body = bytearray(truth)
        for _ in range(chance.randint(1, 4)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        try:
            assert msgspec.to_builtins(read_reply(bytes(body)))
        except ProtocolError:
            pass


def test_nothing_of_the_attacks_leaves_processes():
    left = subprocess.run(["pgrep", "-P", str(os.getpid()), "sleep"], capture_output=True, text=True, check=False)
    assert left.stdout == ""
