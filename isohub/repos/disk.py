"""What the store asks of the file system beyond the standard library.

Read-only trees and their removal, the atomic exchange of two directories, and flushing. Runs
in the caller.

Source: renameat2(2), syncfs(2), path_resolution(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["exchange", "flush_directory", "flush_file_system", "freeze", "remove_tree"]

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
