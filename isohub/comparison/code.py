"""Which files differ between two checkouts, and by how many lines. Nothing of either runs.

Rules:

1. Files are compared by git's blob id and by whether they are executable; symlinks by where they lead. None is
   followed. ``.git`` and ``__pycache__`` do not count.
2. Lines are counted as ``git diff --numstat`` counts them: the least number of lines that have to go and to come,
   found with Myers' algorithm; beyond `_MOST_EDITS` of them, those that the other file lacks are counted instead.
3. A file with a NUL in its beginning, or above `_LARGEST_TEXT_BYTES`, is binary: it has no lines.

Side: caller. Trust: names and contents are the repo's.
Source: E. Myers, "An O(ND) Difference Algorithm and Its Variations", 1986; git's buffer_is_binary (xdiff-interface.c).
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isohub.errors import printable
from isohub.repos.measure import blob_id

__all__ = ["CodeDifference", "FileChange", "compare_trees"]

_SKIPPED = frozenset({b".git", b"__pycache__"})
_LARGEST_TEXT_BYTES = 1 << 20
# What git looks at to tell a binary file.
_FIRST_BYTES = 8000
# A million steps of the algorithm, half a second.
_MOST_EDITS = 1000
# All files of one pair together.
_MOST_STEPS = 5_000_000


@dataclass(frozen=True)
class FileChange:
    """A file that is not the same in both.

    Attributes:
        path: Its place in the tree, escaped.
        status: "added", "removed" or "modified".
        added: Lines that came; None for a binary file.
        removed: Lines that went; None likewise.
    """

    path: str
    status: Literal["added", "removed", "modified"]
    added: int | None
    removed: int | None


@dataclass(frozen=True)
class CodeDifference:
    """What differs between two trees.

    Attributes:
        files: Those that differ, by their paths.
        fault: Why it could not be told, or None.
    """

    files: tuple[FileChange, ...]
    fault: str | None = None

    @property
    def added(self) -> int:
        """Lines that came."""
        return sum(file.added or 0 for file in self.files)

    @property
    def removed(self) -> int:
        """Lines that went."""
        return sum(file.removed or 0 for file in self.files)


@dataclass
class _Budget:
    steps: int = _MOST_STEPS


def compare_trees(base: Path, other: Path) -> CodeDifference:
    """The files of one tree against another's.

    Args:
        base: Root of the earlier one.
        other: Root of the later one.
    """
    try:
        before, after = dict(_files(os.fsencode(base))), dict(_files(os.fsencode(other)))
        budget = _Budget()
        changes = [
            _change(path, base, other, path in before, path in after, budget)
            for path in sorted({**before, **after})
            if before.get(path) != after.get(path)
        ]
    except OSError as error:
        words = printable(str(error.filename or base), newlines=False)
        return CodeDifference((), f"{words}: {error.strerror or error}")
    return CodeDifference(tuple(changes))


def _files(root: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Path within the root and what is there, as one text."""
    waiting = [b""]
    while waiting:
        inside = waiting.pop()
        with os.scandir(os.path.join(root, inside)) as entries:  # noqa: PTH118 - bytes, which Path has not
            for entry in entries:
                if entry.name in _SKIPPED:
                    continue
                path = inside + entry.name
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    waiting.append(path + b"/")
                elif stat.S_ISLNK(info.st_mode):
                    yield path, b"link " + os.readlink(entry.path)  # noqa: PTH115 - bytes
                elif stat.S_ISREG(info.st_mode):
                    mode = b"x " if info.st_mode & 0o100 else b"- "
                    yield path, mode + (blob_id(entry.path, info.st_size, "sha256") or b"changing")


def _change(path: bytes, base: Path, other: Path, was: bool, is_there: bool, budget: _Budget) -> FileChange:
    old = _lines(base, path) if was else []
    new = _lines(other, path) if is_there else []
    added, removed = (None, None) if old is None or new is None else _counts(old, new, budget)
    status: Literal["added", "removed", "modified"] = "modified" if was and is_there else "removed" if was else "added"
    return FileChange(printable(os.fsdecode(path), limit_chars=300, newlines=False), status, added, removed)


def _lines(root: Path, path: bytes) -> list[bytes] | None:
    """The lines of a text file; None for a binary one."""
    place = os.path.join(os.fsencode(root), path)  # noqa: PTH118 - bytes
    info = os.lstat(place)
    if stat.S_ISLNK(info.st_mode):
        return [os.readlink(place)]  # noqa: PTH115 - bytes
    if not stat.S_ISREG(info.st_mode) or info.st_size > _LARGEST_TEXT_BYTES:
        return None
    descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as stream:  # noqa: PTH123 - a descriptor
        data = stream.read(_LARGEST_TEXT_BYTES + 1)
    if b"\0" in data[:_FIRST_BYTES]:
        return None
    lines = data.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def _counts(old: list[bytes], new: list[bytes], budget: _Budget) -> tuple[int, int]:
    """Lines that came, lines that went."""
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    old, new = old[start : len(old) - end], new[start : len(new) - end]
    if not old or not new:
        return len(new), len(old)
    edits = _edits(old, new, budget)
    if edits is None:
        before, after = Counter(old), Counter(new)
        return (after - before).total(), (before - after).total()
    return (edits + len(new) - len(old)) // 2, (edits + len(old) - len(new)) // 2


def _edits(old: list[bytes], new: list[bytes], budget: _Budget) -> int | None:
    """How many lines have to go and to come at least; None if it is too many to find out."""
    numbers: dict[bytes, int] = {}
    a, b = ([numbers.setdefault(line, len(numbers)) for line in lines] for lines in (old, new))
    furthest = {1: 0}
    for edits in range(min(len(a) + len(b), _MOST_EDITS) + 1):
        for diagonal in range(-edits, edits + 1, 2):
            down = diagonal == -edits or (
                diagonal != edits and furthest.get(diagonal - 1, -1) < furthest.get(diagonal + 1, -1)
            )
            x = furthest.get(diagonal + 1, -1) if down else furthest.get(diagonal - 1, -1) + 1
            began = x
            while x < len(a) and x - diagonal < len(b) and a[x] == b[x - diagonal]:
                x += 1
            budget.steps -= 1 + x - began
            furthest[diagonal] = x
            if x >= len(a) and x - diagonal >= len(b):
                return edits
        if budget.steps < 0:
            return None
    return None
