"""Pages of memory: mapping them, filling them at once, and moving them under what is there.

Side: both. Trust: every number is this side's own. Source: mmap(2), mremap(2), madvise(2), mincore(2), fallocate(2);
kernel commit 4ca9b3859dac (MADV_POPULATE_WRITE, 5.14), Documentation/admin-guide/mm/transhuge.rst.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any, Optional

__all__ = [
    "HUGE_BYTES",
    "PRIVATE",
    "SHARED",
    "allocate",
    "drop",
    "fill",
    "map_array",
    "map_aside",
    "map_pages",
    "move",
    "punch",
    "unmap",
    "used_bytes",
    "whole_pages",
]

#: A huge page on x86_64, and on aarch64 with pages of 4 KiB. With others the requests for them do nothing.
HUGE_BYTES = 2 << 20
PRIVATE, SHARED = mmap.MAP_PRIVATE, mmap.MAP_SHARED

_MAP_FIXED = 0x10
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 4, 14, 23
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_array(descriptor: int, size_bytes: int, sharing: int) -> Any:
    """The whole file, readable and writable, as a ctypes array that is unmapped with its last reference.

    Not Python's mmap: that keeps a descriptor of its own for each mapping, and a harness that keeps a thousand
    state dicts would run out of them.
    """
    address = map_pages(descriptor, size_bytes, sharing)
    carrier = (ctypes.c_char * size_bytes).from_address(address)
    weakref.finalize(carrier, _libc.munmap, address, size_bytes).atexit = False
    return carrier


def allocate(size_bytes: int) -> int:
    """Fresh private memory; its address.

    Raises:
        OSError: There is none left (ENOMEM).
    """
    return map_pages(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def map_pages(descriptor: int, size_bytes: int, sharing: int, offset: int = 0, at: Optional[int] = None) -> int:
    """Map a part of a file, readable and writable; its address.

    Args:
        descriptor: The file.
        size_bytes: Of the part.
        sharing: PRIVATE or SHARED.
        offset: Where the part begins, a multiple of the page.
        at: Where to map it, in place of whatever is mapped there.

    Raises:
        OSError: The kernel refused; then nothing has changed.
    """
    return _mapped(at, size_bytes, _READ_WRITE, sharing | (_MAP_FIXED if at is not None else 0), descriptor, offset)


def _mapped(at: Optional[int], size_bytes: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    return _address(_libc.mmap(at, size_bytes, protection, flags, descriptor, offset))


def _address(answer: Optional[int]) -> int:
    if answer is None or answer == _MAP_FAILED:
        raise _error()
    return int(answer)


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def unmap(address: int, size_bytes: int) -> None:
    """Let pages go."""
    _libc.munmap(address, size_bytes)


def map_aside(descriptor: int, size_bytes: int, offset: int) -> int:
    """Map a part of a file shared, where it can have huge pages; its address.

    A huge page lies at a multiple of its size, in the file and in memory. They are asked for, and come where the
    machine's settings give them to memfds; MADV_COLLAPSE would force them. In a virtual machine that gives free memory
    back to its host, memory that is free by the huge page is the slow one.

    Raises:
        OSError: The kernel refused.
    """
    size_bytes = whole_pages(size_bytes)
    reserved_bytes = size_bytes + HUGE_BYTES
    reserved = _mapped(None, reserved_bytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    before = (offset - reserved) % HUGE_BYTES
    address = reserved + before
    # At once: whoever maps something later may be given what lies beside.
    if before:
        unmap(reserved, before)
    unmap(address + size_bytes, HUGE_BYTES - before)
    try:
        map_pages(descriptor, size_bytes, SHARED, offset, at=address)
    except OSError:
        unmap(address, size_bytes)
        raise
    if size_bytes >= HUGE_BYTES:
        _libc.madvise(address, size_bytes, _MADV_HUGEPAGE)  # of all: a part would be a mapping of its own
    return address


def fill(address: int, size_bytes: int) -> None:
    """Have a mapped file's pages there, writable.

    Raises:
        OSError: No memory is left for them, which would be a SIGBUS at a later touch; or EINVAL, from a kernel that
            is older than 5.14.
    """
    if _libc.madvise(address, size_bytes, _MADV_POPULATE_WRITE):
        raise _error()


def drop(address: int, size_bytes: int) -> None:
    """Take pages of a shared mapping out of this process's tables. The file keeps them, and a touch brings them back.

    Raises:
        OSError: Nothing is mapped there.
    """
    if _libc.madvise(address, size_bytes, _MADV_DONTNEED):
        raise _error()


def used_bytes(address: int, size_bytes: int) -> int:
    """Up to where these pages of private memory were used so far: all of it where that cannot be told."""
    seen = ctypes.create_string_buffer(whole_pages(size_bytes) // mmap.PAGESIZE)
    words = (ctypes.c_ulong * _SYSINFO_WORDS)()
    # A page that was written to disk is not resident either.
    if _libc.mincore(address, size_bytes, seen) or _libc.sysinfo(words) or words[_TOTAL_SWAP] != words[_FREE_SWAP]:
        return size_bytes
    return len(seen.raw.rstrip(b"\x00")) * mmap.PAGESIZE


#: struct sysinfo of sysinfo(2): longs up to the second of these, and less than this many in all.
_TOTAL_SWAP, _FREE_SWAP, _SYSINFO_WORDS = 8, 9, 32


def whole_pages(size_bytes: int) -> int:
    """That size, rounded up to pages."""
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def move(address: int, size_bytes: int, to: int) -> None:
    """Move mapped pages to another address, in place of what is mapped there.

    Raises:
        OSError: The kernel refused; then nothing has changed.
    """
    _address(_libc.mremap(address, size_bytes, size_bytes, _MREMAP_MAYMOVE | _MREMAP_FIXED, to))


def punch(descriptor: int, offset: int, size_bytes: int) -> None:
    """Give a part of a file back to the machine; it reads as zeros from now on."""
    if _libc.fallocate(descriptor, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, size_bytes):
        raise _error()
