"""What a directory holds: its git tree id, counts, empty directories and LFS pointer files.

It reads the disk back, so that what counts is what is there and not what was meant to be
written. The id is the one that ``git write-tree`` gives in a repository of the same object
format, which makes it checkable with git itself. Follows no links, changes nothing. Runs in
the caller.

Source: git's hash-object and tree format (gitformat-pack(5), Documentation/technical/hash-function-transition).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Measured", "blob_id", "measure"]

_CHUNK_BYTES = 1 << 20
# Far beyond what TreeWriter lets through; bounds the recursion for local directories.
_DEPTH_LIMIT = 500
# What a pointer file starts with, and the bound on its size. Source: git-lfs' docs/spec.md.
_LFS_MARK = b"version https://git-lfs.github.com/spec/"
_LFS_LIMIT_BYTES = 1024
_LFS_NAMED = 100


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


@dataclass(frozen=True)
class Measured:
    """What a directory holds.

    Attributes:
        digest: git's tree id in the object format of the hash, in hex.
        files: How many files and symlinks.
        bytes: Their sizes together.
        empty: Directories without any entry, sorted; git has none, so these were submodules.
        lfs_pointers: Git LFS pointer files, sorted, at most 100.
    """

    digest: str
    files: int
    bytes: int
    empty: tuple[str, ...]
    lfs_pointers: tuple[str, ...]


@dataclass
class _Tally:
    files: int = 0
    bytes: int = 0
    empty: list[str] = field(default_factory=list)
    lfs: list[str] = field(default_factory=list)


def blob_id(path: bytes, size: int, algorithm: str) -> bytes | None:
    """The id that git gives a file's content, or None if its size is not what was said.

    Args:
        path: A regular file.
        size: Its size in bytes as the caller saw it.
        algorithm: ``sha1`` or ``sha256``, git's two object formats.
    """
    digest = _new_hash(algorithm)
    digest.update(b"blob %d\0" % size)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        count = 0
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            count += len(chunk)
            digest.update(chunk)
    finally:
        os.close(descriptor)
    return digest.digest() if count == size else None


def measure(
    root: Path,
    *,
    algorithm: str = "sha256",
    skip: frozenset[bytes] = frozenset(),
    read: Callable[[bytes, os.stat_result], bytes | None] | None = None,
) -> Measured:
    """Hash a directory as git would, following no links.

    Args:
        root: The directory.
        algorithm: ``sha1`` or ``sha256``.
        skip: Names to leave out at every depth.
        read: Gives a file's blob id; the default reads the file. None means that it changed meanwhile.

    Raises:
        OSError: A part cannot be read, or (EBUSY) changes while it is read.
    """
    tally = _Tally()

    def default_read(path: bytes, info: os.stat_result) -> bytes | None:
        return blob_id(path, info.st_size, algorithm)

    digest = _measure(os.fsencode(root), b"", algorithm, skip, read or default_read, tally)
    return Measured(
        digest=(digest or _object_id(b"tree", b"", algorithm)).hex(),
        files=tally.files,
        bytes=tally.bytes,
        empty=tuple(sorted(tally.empty)),
        lfs_pointers=tuple(sorted(tally.lfs)),
    )


def _measure(
    root: bytes,
    inside: bytes,
    algorithm: str,
    skip: frozenset[bytes],
    read: Callable[[bytes, os.stat_result], bytes | None],
    tally: _Tally,
) -> bytes | None:
    """Tree id of a directory, or None if git would not record it."""
    if inside.count(b"/") > _DEPTH_LIMIT:
        raise OSError(errno.ELOOP, "nested too deeply", os.fsdecode(root))
    entries: list[tuple[bytes, bytes]] = []
    empty = True
    with os.scandir(root) as scan:
        for entry in scan:
            name = entry.name
            if name in skip:
                continue
            empty = False
            path = inside + name
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                tree = _measure(entry.path, path + b"/", algorithm, skip, read, tally)
                if tree is not None:
                    # git sorts a directory as if its name ended in a slash.
                    entries.append((name + b"/", b"40000 " + name + b"\0" + tree))
                continue
            if stat.S_ISLNK(info.st_mode):
                target = os.readlink(entry.path)  # noqa: PTH115  # bytes, which Path has not
                identity = _object_id(b"blob", target, algorithm)
                entries.append((name, b"120000 " + name + b"\0" + identity))
            elif stat.S_ISREG(info.st_mode):
                mode = b"100755 " if info.st_mode & 0o100 else b"100644 "
                entries.append((name, mode + name + b"\0" + _stable_read(entry, info, read)))
                if info.st_size < _LFS_LIMIT_BYTES and len(tally.lfs) < _LFS_NAMED and _is_lfs_pointer(entry.path):
                    tally.lfs.append(os.fsdecode(path))
            else:
                continue  # git records no sockets, pipes and devices
            tally.files += 1
            tally.bytes += info.st_size
    if empty and inside:
        tally.empty.append(os.fsdecode(inside[:-1]))
    if not entries:
        return None
    return _object_id(b"tree", b"".join(data for _, data in sorted(entries)), algorithm)


def _stable_read(
    entry: os.DirEntry[bytes], info: os.stat_result, read: Callable[[bytes, os.stat_result], bytes | None]
) -> bytes:
    for _ in range(3):
        identity = read(entry.path, info)
        if identity is not None:
            return identity
        info = os.lstat(entry.path)
    raise OSError(errno.EBUSY, "the file changes while it is read", os.fsdecode(entry.path))


def _is_lfs_pointer(path: bytes) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(descriptor, len(_LFS_MARK)) == _LFS_MARK
    finally:
        os.close(descriptor)


def _new_hash(algorithm: str) -> _Hash:
    # git's object ids, of which SHA-1 is the common kind; what must withstand an attacker uses sha256.
    new: Any = hashlib.sha1(usedforsecurity=False) if algorithm == "sha1" else hashlib.sha256()
    result: _Hash = new
    return result


def _object_id(kind: bytes, data: bytes, algorithm: str) -> bytes:
    digest = _new_hash(algorithm)
    digest.update(b"%s %d\0" % (kind, len(data)))
    digest.update(data)
    return digest.digest()
