"""What the store asks of the file system beyond the standard library.

Read-only trees and their removal, the atomic exchange of two directories, flushing, locks, who uses a
directory, and what to do when the disk refuses. Runs in the caller.

Source: renameat2(2), syncfs(2), flock(2), path_resolution(7).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import logging
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from filelock import BaseFileLock, FileLock, Timeout

from isohub.errors import SourceUnavailableError, printable
from isohub.repos.cancellation import is_cancelled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "claim",
    "disk_errors",
    "exchange",
    "flush_directory",
    "flush_file_system",
    "freeze",
    "gives_no_locks",
    "hold",
    "lock_file",
    "locked",
    "make_root",
    "remove_tree",
]

_log = logging.getLogger("isohub.repos")
# Who waits longer for another writer is told so; GitHub gives 1 GB in about as long.
_WAIT_NOTICE_S = 10.0
# Who removes or verifies has a directory for himself for less than this; a worker may keep it.
_SHARE_S, _SHARE_PAUSE_S = 5.0, 0.005
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


def freeze(root: Path) -> None:
    """Take all write permission from a tree: files 0444 or 0555, directories 0555."""
    for directory, _, files in os.walk(root, topdown=False, onerror=_raise):
        for name in files:
            path = os.path.join(directory, name)  # noqa: PTH118  # called for every file
            mode = os.lstat(path).st_mode
            if mode & 0o170000 == 0o100000 and mode & 0o222:
                os.chmod(path, 0o555 if mode & 0o100 else 0o444)  # noqa: PTH101
        os.chmod(directory, 0o555)  # noqa: PTH101, S103  # no one may write


def remove_tree(root: Path) -> None:
    """Remove a tree that may be read-only; follows no links, and what is gone already is fine."""
    if root.is_symlink() or not root.is_dir():
        root.unlink(missing_ok=True)
        return
    # An ordinary user may not delete from a directory without write permission, even an own one.
    root.chmod(0o700)
    for directory, names, _ in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)  # noqa: PTH118
            if not os.path.islink(path):  # noqa: PTH114
                os.chmod(path, 0o700)  # noqa: PTH101
    shutil.rmtree(root)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, so that both names always exist.

    Returns:
        False where the kernel or the file system has no such operation; nothing was done then.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2  # glibc 2.28, musl 1.2.5
    except (OSError, AttributeError):
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _share(descriptor: int) -> bool:
    """Lock it with others; False if somebody does not let go."""
    deadline = time.monotonic() + _SHARE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_SHARE_PAUSE_S)
        else:
            return True


def hold(directory: Path) -> int | None:
    """Say that a directory is in use, for as long as the descriptor stays open, whatever ends its holder.

    Returns:
        A descriptor of the caller's, or None where the file system has no such locks, or somebody has it for himself
        and keeps it: who does so honestly only looks whether it is in use, or renames it away, but a worker can lock
        whatever it may read.

    Raises:
        FileNotFoundError: It is gone, or was removed while this waited.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        if not _share(descriptor):
            os.close(descriptor)
            return None
        if not os.path.samestat(os.fstat(descriptor), os.stat(directory)):  # noqa: PTH116  # one call, no Path
            raise FileNotFoundError(errno.ENOENT, "it was replaced", str(directory))
    except FileNotFoundError:
        os.close(descriptor)
        raise
    except OSError:  # ENOLCK, EBADF, ENOSYS: network file systems
        os.close(descriptor)
        return None
    return descriptor


def claim(directory: Path) -> int | None:
    """Have a directory for oneself, to remove it.

    Who uses an earlier one of that name, which a forced fetch has put aside as ``.trash-<name>-*``, uses this.

    Returns:
        A descriptor of the caller's, or None where the file system has no such locks.

    Raises:
        BlockingIOError: Somebody uses it.
        FileNotFoundError: It is gone.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for earlier in directory.parent.glob(f".trash-{glob.escape(directory.name)}-*"):
            with suppress(FileNotFoundError, NotADirectoryError):
                beside = claim(earlier)
                if beside is not None:
                    os.close(beside)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def flush_file_system(directory: Path) -> None:
    """Bring everything that was written to the directory's file system to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        try:
            call = ctypes.CDLL(None, use_errno=True).syncfs  # one call where fsync would be one for each file
        except (OSError, AttributeError):
            os.sync()
            return
        if call(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(directory))
    finally:
        os.close(descriptor)


def flush_directory(directory: Path) -> None:
    """Bring a directory's own entries, and so a rename in it, to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise(error: OSError) -> None:
    raise error


def make_root(root: Path) -> None:
    """Make the store's directory, for its user alone; one that is there stays as it is."""
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)


def lock_file(path: Path, *, timeout_s: float = -1, mode: int = -1) -> BaseFileLock:
    """A lock of the kernel's on a file: whatever kills its holder gives it back.

    Args:
        path: The file; made, and left.
        timeout_s: How long `acquire` waits; negative is for ever.
        mode: Of the file if it is made; negative is as the umask says.
    """
    # A file system without flock(2) is an error: a lock that is a file's existence outlives a killed holder.
    return FileLock(path, timeout=timeout_s, mode=mode, fallback_to_soft=False)


@contextmanager
def locked(directory: Path, name: str = ".lock") -> Iterator[None]:
    """Hold a directory's lock; the kernel gives it back whatever kills its holder.

    Raises:
        NotImplementedError, OSError: The file system has no locks; `disk_errors` says it in words.
    """
    lock = lock_file(directory / name)
    for wait_s, say in ((0, _log.info), (_WAIT_NOTICE_S, _log.warning), (-1, None)):
        try:
            lock.acquire(timeout=wait_s, cancel_check=is_cancelled)
            break
        except Timeout:
            if is_cancelled():
                raise SourceUnavailableError(f"the wait for another writer to {directory} was given up") from None
            assert say is not None
            say("waiting for another process or thread that writes to %s", directory)
    try:
        yield
    finally:
        lock.release()


# What flock(2) says on network file systems and some of FUSE's.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def gives_no_locks(error: OSError | NotImplementedError) -> bool:
    """Whether an error of `locked` is about a file system without locks."""
    # filelock makes a NotImplementedError of ENOSYS.
    return isinstance(error, NotImplementedError) or error.errno in _NO_LOCKS


_HINTS = {
    errno.ENOSPC: "make room (isohub cache prune), or set ISOHUB_HOME to a directory on a disk that has some",
    errno.EFBIG: "a limit on the size of files holds here (ulimit -f); raise it",
    errno.EDQUOT: "make room (isohub cache prune), or set ISOHUB_HOME to a directory without that quota",
    **dict.fromkeys(_NO_LOCKS, "this file system gives no locks: set ISOHUB_HOME to a directory on a local disk"),
}


@contextmanager
def disk_errors(root: Path, what: str) -> Iterator[None]:
    """Say what the disk refused, and what helps.

    Args:
        root: The store's directory.
        what: The reference or address that it was used for.
    """
    try:
        yield
    except NotImplementedError as error:  # filelock's word for a file system without flock(2)
        raise _disk_error(root, what, OSError(errno.ENOSYS, str(error))) from error
    except OSError as error:
        raise _disk_error(root, what, error) from error


def _disk_error(root: Path, what: str, error: OSError) -> SourceUnavailableError:
    where = f" ({printable(os.fsdecode(error.filename), newlines=False)})" if error.filename else ""
    return SourceUnavailableError(
        f"the store at {root} cannot be used: {error.strerror or error}{where}",
        hint=_HINTS.get(error.errno or 0, "set ISOHUB_HOME to a directory that can be written"),
        reference=what,
    )
