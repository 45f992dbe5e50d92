"""Files by their content: each once, whatever it is called and whoever brought it.

    <root>/weights/blobs/<first 2 hex>/<sha256>         mode 0444

Rules:
  1. A blob gets its name by one rename or link after its bytes were flushed, so that a name is a promise about
     the content. No blob is ever written to: what has its name may be another file, never another content.
  2. A file elsewhere in the store is a hard link to its blob, or a copy where links are not possible.
  3. Whoever was told a blob's path has `hold` of it. Whoever removes a blob has locked it for himself before,
     and looks only then whether anything links to it.

OSErrors pass through. Runs in the caller. Trust: file names and contents come from the network.

Source: link(2), flock(2), copy_file_range(2), inode(7) for what the times mean.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import stat
import time
from typing import TYPE_CHECKING

import msgspec

from isohub.repos.disk import flush_directory

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Blobs", "Stamp", "copy_into", "hash_file", "hash_known", "open_regular"]

_log = logging.getLogger("isohub.repos")
_CHUNK_BYTES = 1 << 20
# What link(2) says where it will not: no such operation, another file system, too many links, or
# protected_hardlinks and a file of another user's (proc(5)).
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EACCES})
# What copy_file_range(2) says where read and write do it instead.
_NO_RANGE_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})
# Whoever looks whether a blob is in use, or removes it, has it for himself for less than this together.
_HOLD_TRIES = 20
_HOLD_WAIT_S = 0.01
# A change within the same tick of the file system's clock leaves the times as they are. exFAT's ticks are of 2 s.
_SETTLED_NS = 2_000_000_000
# So many files are remembered: more than anybody loads in one process.
_KNOWN_LIMIT = 4096
_known: dict[tuple[int, Stamp], str] = {}


class Stamp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What tells without reading that a file is as it was when it was hashed.

    The kernel sets `ctime_ns` at every change of the bytes, the mode or the number of links, and nobody
    else can: bytes that were changed and given their old time back are noticed too.
    """

    inode: int
    bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp of a file by its status."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Blobs:
    """The blobs of a store.

    Args:
        root: The store's directory.
    """

    def __init__(self, root: Path) -> None:
        self.directory = root / "weights" / "blobs"

    def path(self, sha256: str) -> Path:
        """Where a blob is, if it is here."""
        return self.directory / sha256[:2] / sha256

    def add(self, file: Path, sha256: str, *, move: bool) -> None:
        """Have a file among the blobs, unless it is there already and sound.

        Args:
            file: On the store's file system; made read-only. It stays, unless it may and must be moved.
            sha256: Of its bytes, computed from them by the caller.
            move: Whether it may be moved where it cannot be linked.
        """
        blob = self.path(sha256)
        if blob.exists():
            if blob.samefile(file) or hash_file(blob)[0] == sha256:
                return
            _log.warning("%s is damaged and replaced", blob)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as stream:
            os.fchmod(stream.fileno(), 0o444)
            os.fsync(stream.fileno())
        _put(file, blob, move=move)
        flush_directory(blob.parent)

    def hold(self, sha256: str, file: Path) -> int | None:
        """Say that a blob is in use, for as long as the descriptor stays open, whatever ends its holder.

        Args:
            sha256: Which one.
            file: Its content, from which it is made again if it is gone or another.

        Returns:
            A descriptor of the caller's, or None where nobody can be kept out: the file system has no such locks,
            or somebody has it for himself and does not give it back. A worker that was given the file can do
            that; it keeps the blob from being removed all the same.
        """
        for _ in range(_HOLD_TRIES):
            if not self._has(sha256, file):
                self.add(file, sha256, move=False)
            try:
                return _shared(self.path(sha256))
            except FileNotFoundError:
                continue  # somebody has just removed it
            except BlockingIOError:
                time.sleep(_HOLD_WAIT_S)
        return None

    def _has(self, sha256: str, file: Path) -> bool:
        blob = self.path(sha256)
        try:
            # A copy, where links are not possible, is another file, and so is a restored backup.
            return os.path.samestat(file.lstat(), blob.lstat()) or hash_known(blob)[0] == sha256
        except FileNotFoundError:
            return False

    def link(self, sha256: str, target: Path) -> None:
        """Give a blob another name; what had the name before has it no longer.

        Raises:
            FileNotFoundError: There is no such blob.
        """
        _put(self.path(sha256), target, move=False)
        flush_directory(target.parent)


def hash_file(path: Path) -> tuple[str, Stamp]:
    """SHA-256 of a regular file, in hex, and its stamp from before it was read.

    About 1.4 GB/s with the processor's SHA instructions: as long as reading it from a fast disk.
    """
    descriptor = open_regular(path)
    try:
        stamp = Stamp.of(os.fstat(descriptor))
        digest = hashlib.sha256()
        buffer = bytearray(_CHUNK_BYTES)
        view = memoryview(buffer)
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as stream:
            while count := stream.readinto(buffer):
                digest.update(view[:count])
        return digest.hexdigest(), stamp
    finally:
        os.close(descriptor)


def hash_known(path: Path) -> tuple[str, int]:
    """SHA-256 of a regular file, in hex, and its size, as it is now: hashed, unless this process has done so.

    What was hashed is remembered by its device and stamp, once its times are old enough to show every change.
    """
    status = path.lstat()
    known = (status.st_dev, Stamp.of(status))
    digest = _known.get(known)
    if digest is not None:
        return digest, status.st_size
    began_ns = time.time_ns()
    digest, _ = hash_file(path)
    after = path.lstat()
    if known == (after.st_dev, Stamp.of(after)) and began_ns - after.st_ctime_ns > _SETTLED_NS:
        if len(_known) >= _KNOWN_LIMIT:
            _known.clear()
        _known[known] = digest
    return digest, after.st_size


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file with; OSError if it is a link, a pipe, a device or a directory."""
    # NOFOLLOW: a link chooses for us. NONBLOCK: a pipe would be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def copy_into(source: int, target: Path, size_bytes: int) -> None:
    """Copy so many bytes of a file into a new one; they are shared where the file system can (reflink).

    Args:
        source: A descriptor at its beginning.
        target: Must not exist.
        size_bytes: What is beyond is left.
    """
    with target.open("xb") as stream:
        left = size_bytes
        copy_range = getattr(os, "copy_file_range", None)
        while left and copy_range is not None:
            try:
                count = copy_range(source, stream.fileno(), left)
            except OSError as error:
                if error.errno not in _NO_RANGE_COPY:
                    raise
                break
            if not count:
                return
            left -= count
        while left and (chunk := os.read(source, min(left, _CHUNK_BYTES))):
            stream.write(chunk)
            left -= len(chunk)


def _shared(path: Path) -> int | None:
    descriptor = open_regular(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.lstat()):
            raise FileNotFoundError(errno.ENOENT, "it was replaced", str(path))
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except OSError:  # ENOLCK, EBADF, ENOSYS: network file systems
        os.close(descriptor)
        return None
    return descriptor


def _put(source: Path, target: Path, *, move: bool) -> None:
    """Give a file the target's name as well, in one step."""
    staging = target.with_name(f".{secrets.token_hex(8)}")
    try:
        try:
            os.link(source, staging, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if move:
                source.replace(target)
                return
            _copy(source, staging)
        staging.replace(target)
    finally:
        # rename(2) of two names of one file does nothing and leaves both.
        staging.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    descriptor = open_regular(source)
    try:
        copy_into(descriptor, target, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
    with target.open("rb") as stream:
        os.fchmod(stream.fileno(), 0o444)
        os.fsync(stream.fileno())
