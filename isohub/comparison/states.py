"""The states of several models against the first one's, in parts, so that nobody holds a whole one.

Rules:

1. A state is first listed (names, dtypes, shapes), then read in parts of `PART_BYTES`; a tensor that is larger is a
   part by itself. Of each model one part is here at a time.
2. What comes must be what was listed; else the worker is refused.
3. An entry that is missing and one that was added are one that was renamed, if dtype, shape and every byte are equal.
   The hashes are made here.

Side: caller. Trust: names and values are the workers'; names are escaped in what is found.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from isohub.comparison.leaves import leaves_by_place
from isohub.comparison.outputs import OutputPair
from isohub.comparison.tally import Tally
from isohub.errors import IsohubError, printable

if TYPE_CHECKING:
    from isohub.session.link import Remote

__all__ = ["PART_BYTES", "Entry", "EntryChange", "State", "StateDifference", "compare_states", "read_state"]

PART_BYTES = 64 << 20
_PHASE = "reading its state"
_DTYPE = re.compile(r"torch\.[a-z0-9_]{1,40}")
_NAME_CHARS = 300


@dataclass(frozen=True)
class Entry:
    """One entry of a state.

    Attributes:
        name: Its name, escaped.
        dtype: Such as ``float32``; None for what is no tensor.
        shape: Of a tensor.
        size_bytes: Of its values.
    """

    name: str
    dtype: str | None
    shape: tuple[int, ...]
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.name} {self.form}"

    @property
    def form(self) -> str:
        """Dtype and shape in a few words."""
        return "(no tensor)" if self.dtype is None else f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class EntryChange:
    """An entry that both have, with other values.

    Attributes:
        name: Its name, escaped.
        elements: How many numbers it has.
        differing: How many are not equal.
        max_abs: The largest difference.
        norm: Euclidean length of the difference.
        relative_norm: That, divided by the length of the base's; None where that is 0.
    """

    name: str
    elements: int
    differing: int
    max_abs: float
    norm: float
    relative_norm: float | None


@dataclass(frozen=True)
class StateDifference:
    """What differs between two states.

    Attributes:
        expected: Entries of the base's.
        got: Entries of the other's.
        equal: How many are equal in name, dtype, shape and every value.
        missing: Entries that the base alone has.
        added: Entries that the other alone has.
        renamed: Names of entries whose content is the same: before, after.
        reshaped: Name, before and after, of entries of another shape.
        retyped: Name, dtype before and after; those may be among the changed as well.
        changed: Entries with other values.
        tied: Names that are one tensor in the base alone, joined; and those that are in the other alone.
    """

    expected: int
    got: int
    equal: int
    missing: tuple[Entry, ...]
    added: tuple[Entry, ...]
    renamed: tuple[tuple[str, str], ...]
    reshaped: tuple[tuple[str, str, str], ...]
    retyped: tuple[tuple[str, str, str], ...]
    changed: tuple[EntryChange, ...]
    tied: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def any(self) -> bool:
        """Whether anything differs."""
        lists = self.missing, self.added, self.renamed, self.reshaped, self.retyped, self.changed, *self.tied
        return any(lists)

    @property
    def max_abs(self) -> float:
        """The largest difference of a value."""
        return max((entry.max_abs for entry in self.changed), default=0.0)


@dataclass(frozen=True)
class State:
    """What a model's state has, without the values.

    Attributes:
        remote: Whose it is.
        entries: By the name as the worker has it.
        memories: Number of the memory of each entry; entries with one number are tied.
    """

    remote: Remote
    entries: dict[str, Entry]
    memories: dict[str, int]

    @property
    def size_bytes(self) -> int:
        """Of all values, tied ones once."""
        once = {self.memories[name]: entry.size_bytes for name, entry in self.entries.items()}
        return sum(once.values())

    def tied(self, among: Collection[str]) -> set[str]:
        """Those of these names that are one tensor, joined by `` = ``."""
        groups: dict[int, list[str]] = {}
        for name, memory in self.memories.items():
            if memory >= 0 and name in among:
                groups.setdefault(memory, []).append(self.entries[name].name)
        return {" = ".join(sorted(names)) for names in groups.values() if len(names) > 1}


def read_state(remote: Remote) -> State:
    """List a module's state.

    Raises:
        RemoteError: The module's own ``state_dict`` raised.
        ProtocolError: What came is no such list.
    """
    rows: Any = remote.ask("state_index", phase=_PHASE)
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise remote.refuse("a list of a state", _PHASE)
    entries = {
        name: Entry(
            printable(name, limit_chars=_NAME_CHARS, newlines=False),
            None if dtype is None else dtype.removeprefix("torch."),
            tuple(shape),
            size_bytes,
        )
        for name, dtype, shape, size_bytes, _ in rows
    }
    return State(remote, entries, {row[0]: row[4] for row in rows})


def _is_row(row: Any) -> bool:
    if not isinstance(row, tuple) or len(row) != 5 or type(row[0]) is not str:
        return False
    _, dtype, shape, *numbers = row
    if dtype is not None and not (type(dtype) is str and _DTYPE.fullmatch(dtype)):
        return False
    whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    return whole and all(type(number) is int and number >= -1 for number in numbers)


@dataclass
class _Pair:
    """One other state, while it is compared."""

    state: State
    common: frozenset[str]  # names of the same shape in both
    missing: dict[str, str] = field(default_factory=dict)  # name: digest, "" where there is none
    added: dict[str, str] = field(default_factory=dict)
    changed: list[EntryChange] = field(default_factory=list)
    equal: int = 0


def compare_states(
    base: State,
    others: Sequence[State],
    failed: Callable[[State, IsohubError], None],
) -> list[StateDifference | None]:
    """Every other state against the base's.

    Args:
        base: What is expected.
        others: What was got.
        failed: Told of a worker that fails at it; the others go on. If it is the base's, none do.

    Returns:
        One for each of `others`; None for those that failed.
    """
    pairs = {number: _pair(base, state) for number, state in enumerate(others)}

    def attempt(state: State, names: Sequence[str]) -> dict[str, Any] | None:
        try:
            return _part(state, names)
        except IsohubError as error:
            failed(state, error)
            return None

    for names in _parts(base, [name for name in base.entries if any(_needs(pair, name) for pair in pairs.values())]):
        expected = attempt(base, names)
        if expected is None:
            return [None] * len(others)
        digests = {name: _digest(expected[name]) for name in names if any(name in p.missing for p in pairs.values())}
        for number, pair in [*pairs.items()]:
            pair.missing.update({name: digests[name] for name in names if name in pair.missing})
            shared = [name for name in names if name in pair.common]
            got = attempt(pair.state, shared) if shared else {}
            if got is None:
                del pairs[number]
                continue
            for name in shared:
                _compare(pair, name, expected[name], got[name])
            del got
        del expected
    for number, pair in [*pairs.items()]:
        for names in _parts(pair.state, [*pair.added] if pair.missing else []):
            got = attempt(pair.state, names)
            if got is None:
                del pairs[number]
                break
            pair.added.update({name: _digest(got[name]) for name in names})
            del got
    return [_difference(base, pairs[number]) if number in pairs else None for number in range(len(others))]


def _pair(base: State, state: State) -> _Pair:
    common = frozenset(
        name
        for name, entry in base.entries.items()
        if name in state.entries
        and state.entries[name].shape == entry.shape
        and (state.entries[name].dtype is None) == (entry.dtype is None)
    )
    pair = _Pair(state, common)
    pair.missing = dict.fromkeys((name for name in base.entries if name not in state.entries), "")
    pair.added = dict.fromkeys((name for name in state.entries if name not in base.entries), "")
    return pair


def _needs(pair: _Pair, name: str) -> bool:
    """Whether the base's values of that name are compared with something, or hashed."""
    return name in pair.common or (name in pair.missing and bool(pair.added))


def _parts(state: State, names: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name in names:
        own = state.entries[name].size_bytes
        if part and size + own > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += own
    if part:
        yield part


def _part(state: State, names: Sequence[str]) -> dict[str, Any]:
    limit = sum(state.entries[name].size_bytes for name in names)
    # An arena's alignment is added to each, and sparse ones take their indices.
    limit = 4 * limit + 4096 * len(names) + PART_BYTES
    values = state.remote.ask("state_part", list(names), phase=_PHASE, parcel=True, limit_bytes=limit)
    if not isinstance(values, dict) or list(values) != list(names):
        raise state.remote.refuse("a part of a state", _PHASE)
    for name, value in values.items():
        entry = state.entries[name]
        is_tensor = isinstance(value, torch.Tensor)
        if is_tensor != (entry.dtype is not None) or (
            is_tensor and (tuple(value.shape) != entry.shape or str(value.dtype) != f"torch.{entry.dtype}")
        ):
            raise state.remote.refuse("a part of a state", _PHASE)
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _compare(pair: _Pair, name: str, expected: Any, got: Any) -> None:
    entry = pair.state.entries[name]
    if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
        if _same_value(expected, got):
            pair.equal += 1
        else:
            pair.changed.append(EntryChange(entry.name, 1, 1, 0.0, 0.0, None))
        return
    tally = Tally()
    if not (expected.is_meta or got.is_meta or _same_bits(expected, got)):
        tally.add(expected, got)
    found = tally.result()
    if found.differing:
        relative = found.norm / found.expected_norm if found.expected_norm else None
        change = EntryChange(entry.name, found.elements, found.differing, found.max_abs, found.norm, relative)
        pair.changed.append(change)
    elif expected.dtype == got.dtype:
        pair.equal += 1


def _same_bits(expected: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether they are equal by a quick look: a large model has few entries that are not."""
    plain = all(tensor.layout is torch.strided and not tensor.is_quantized for tensor in (expected, got))
    return plain and expected.dtype == got.dtype and torch.equal(expected, got)


def _same_value(expected: Any, got: Any) -> bool:
    """Whether two entries that are no tensors are equal in every place; of what stays in its worker, the class is."""
    pair = OutputPair()
    try:
        pair.add(leaves_by_place(expected), leaves_by_place(got))
    except IsohubError:  # more places than are compared
        return False
    return all(each.verdict in ("same", "opaque") for each in pair.result())


def _digest(value: Any) -> str:
    """A hash of every byte of a tensor; empty where there are no bytes to hash."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_meta or value.is_quantized:
        return ""
    flat = value.detach().contiguous().reshape(-1)
    content: Any = flat.view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest() if flat.numel() else ""


def _difference(base: State, pair: _Pair) -> StateDifference:
    renamed = _renamed(base.entries, pair)
    gone, new = {old for old, _ in renamed}, {name for _, name in renamed}
    both = [(entry, pair.state.entries[name]) for name, entry in base.entries.items() if name in pair.state.entries]
    shared = base.entries.keys() & pair.state.entries.keys()
    tied, tied_there = base.tied(shared), pair.state.tied(shared)
    return StateDifference(
        expected=len(base.entries),
        got=len(pair.state.entries),
        equal=pair.equal,
        missing=tuple(base.entries[name] for name in pair.missing if name not in gone),
        added=tuple(pair.state.entries[name] for name in pair.added if name not in new),
        renamed=tuple((base.entries[old].name, pair.state.entries[name].name) for old, name in renamed),
        reshaped=tuple((a.name, a.form, b.form) for a, b in both if a.shape != b.shape),
        retyped=tuple((a.name, str(a.dtype), str(b.dtype)) for a, b in both if a.dtype != b.dtype),
        changed=tuple(pair.changed),
        tied=(tuple(sorted(tied - tied_there)), tuple(sorted(tied_there - tied))),
    )


def _renamed(entries: Mapping[str, Entry], pair: _Pair) -> list[tuple[str, str]]:
    waiting: dict[tuple[Any, ...], list[str]] = {}
    for name, digest in pair.added.items():
        if digest:
            entry = pair.state.entries[name]
            waiting.setdefault((digest, entry.dtype, entry.shape), []).append(name)
    found = []
    for name, digest in pair.missing.items():
        same = waiting.get((digest, entries[name].dtype, entries[name].shape)) if digest else None
        if same:
            found.append((name, same.pop(0)))
    return found
