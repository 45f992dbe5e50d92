"""Memory that a model is built in and that is then sent as it is: a parcel that lies under its large tensors.

torch allocates each large tensor as it always does. When a module takes one as a parameter or a buffer, before
anything was written to it, its pages are exchanged for pages of a memfd, at the same address. The tensor, its storage
and what the allocator knows of it stay as they are; no function of torch's is replaced, and no value differs.

Rules:

1. Pages are exchanged only under a whole allocation of glibc's that is a mapping of its own, that torch's CPU
   allocator made, and in which no page was used so far. Everything else is copied when the state is sent, and so is
   what gets other memory later.
2. No other Python thread may be there when pages are exchanged: what it writes meanwhile would be lost.
3. Before a fork of the process's, and before the parcel is sent, every mapping becomes private, in place: what is
   read stays the same, and nobody sees what is written from then on.
4. The kernel's own list of mappings says what lies in the file, never a note that was taken earlier.
5. Pages that no tensor of the state has go back to the machine: when their tensor goes, or before the parcel is sent.
6. Shared pages do not count for RLIMIT_DATA. The limit is lowered by what is exchanged and raised when that goes, so
   that a build may take as much memory as without, and fails in the same way.

Side: worker. Trust: the repo's code runs in between, and can at most hurt its own worker: the caller seals and checks
what comes like any parcel. Source: glibc's malloc/malloc.c (chunks that are mapped), mallopt(3), mmap(2), mremap(2),
proc(5); torch.nn.modules.module (registration hooks, torch 2.0).
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import mmap
import os
import resource
import sys
import threading
import weakref
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

from isohub.wire.arena import ALIGNMENT, Cargo, new_parcel, storage_of
from isohub.wire.pages import (
    HUGE_BYTES,
    PRIVATE,
    SHARED,
    allocate,
    drop,
    fill,
    map_aside,
    map_pages,
    move,
    punch,
    unmap,
    used_bytes,
)
from isohub.worker.helper import Helper

__all__ = ["Backing"]

# glibc's own M_MMAP_THRESHOLD to begin with: from here on an allocation is a mapping of its own.
_SMALLEST_BYTES = 128 << 10
# mallopt(3). Setting one ends their growth by themselves, so they are left where that would have led at most.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD_BYTES = 32 << 20
# A chunk that is a mapping, malloc.c: two words before the memory, of which the first is what lies before them and
# the second the rest, with a bit that says so. Alignment at 64 leaves 48 bytes before.
_WORDS_BYTES = 16
_BEFORE_BYTES = 48
_IS_MAPPED, _FLAGS = 2, 7
# The kernel allows a process 65,530 mappings.
_MOST_TAKEN = 10_000
# What is freed is given back by this much at a time, since looking at all mappings takes a millisecond.
_SWEEP_BYTES = 16 << 20
# From here on a second thread pays.
_SMALLEST_HELPED_BYTES = 4 << 20
# Of a storage, what may be sent along without being asked for: one part in so many.
_SLACK = 8


class _Pages(NamedTuple):
    """Pages of this process: an allocation that is a mapping of its own, or a part of one."""

    start: int
    size_bytes: int

    @property
    def end(self) -> int:
        return self.start + self.size_bytes


class _Mapping(NamedTuple):
    """A line of the kernel's list of mappings: from which address to which, from where in the file, and how."""

    start: int
    end: int
    offset: int
    shared: bool


class Backing:
    """A parcel under the tensors of what is built.

    `begin`, then build, then `end`; then either `giving` for the message that has the state, or `abandon`.
    """

    def __init__(self) -> None:
        # Both from the beginning: later there may be no descriptor left.
        self._maps = open("/proc/self/maps", "rb")  # noqa: SIM115
        self._descriptor = new_parcel()
        self._end = 0  # of what lies in the file
        self._taken = 0
        self._freed_bytes = 0
        self._uncounted_bytes = 0  # by RLIMIT_DATA
        self._hooks: List[Any] = []
        self._helper: Optional[Helper] = None
        self._giving = False
        self._lines: List[_Mapping] = []
        self._adopted: List[Tuple[_Pages, int]] = []  # and where in the file
        self._given: List[_Pages] = []

    @classmethod
    def begin(cls) -> Optional[Backing]:
        """One that takes what modules register from now on; None where torch or the kernel lacks what it needs."""
        import torch
        from torch.nn.modules import module

        ways = [getattr(module, f"register_module_{what}_registration_hook", None) for what in ("parameter", "buffer")]
        if None in ways or not hasattr(getattr(torch, "UntypedStorage", None), "resizable") or _mallopt is None:
            return None
        try:
            backing = cls()
        except OSError:
            return None
        try:
            backing._probe()
        except OSError:
            backing.abandon()
            return None
        _mallopt(_M_MMAP_THRESHOLD, _SMALLEST_BYTES)
        backing._hooks = [way(backing._registered) for way in ways if way is not None]
        _watch_forks(backing)
        return backing

    def _probe(self) -> None:
        """Raise where this kernel does not fill pages on request, or does not say what is mapped."""
        os.ftruncate(self._descriptor, mmap.PAGESIZE)
        address = map_pages(self._descriptor, mmap.PAGESIZE, SHARED)
        try:
            fill(address, mmap.PAGESIZE)
            if [line.start for line in self._mappings()] != [address]:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        finally:
            unmap(address, mmap.PAGESIZE)
        punch(self._descriptor, 0, mmap.PAGESIZE)

    def end(self) -> None:
        """Take no more."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks and _mallopt is not None:
            _mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD_BYTES)
            _mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD_BYTES)
        self._hooks = []

    # While it is built.

    def _registered(self, _: Any, __: str, tensor: Any) -> None:
        # Whatever the matter is, the repo's code goes on as if nobody had looked.
        with contextlib.suppress(Exception):
            self._take(tensor)

    def _take(self, tensor: Any) -> None:
        """Exchange the pages of a tensor that has just been made."""
        if not self._hooks or tensor is None or tensor.device.type != "cpu" or self._taken >= _MOST_TAKEN:
            return
        storage = storage_of(tensor)
        if storage.nbytes() < _SMALLEST_BYTES or not self._alone():
            return
        chunk = _chunk_of(storage)
        if chunk is None:
            return
        used = used_bytes(*chunk)  # the first page at least, which has the allocator's words
        if used > HUGE_BYTES:
            return
        offset = self._room(chunk)
        os.ftruncate(self._descriptor, offset + chunk.size_bytes)
        aside = map_aside(self._descriptor, chunk.size_bytes, offset)
        try:
            ready = used if self._helps(chunk.size_bytes) else chunk.size_bytes
            fill(aside, ready)
            ctypes.memmove(aside, chunk.start, used)
            move(aside, chunk.size_bytes, chunk.start)
        except OSError:
            unmap(aside, chunk.size_bytes)
            punch(self._descriptor, offset, chunk.size_bytes)
            raise
        if ready < chunk.size_bytes and self._helper is not None:
            self._helper.do(fill, chunk.start + ready, chunk.size_bytes - ready)
        self._end = offset + chunk.size_bytes
        self._taken += 1
        self._uncount(chunk.size_bytes)
        weakref.finalize(storage, self._freed, chunk.size_bytes).atexit = False

    def _helps(self, size_bytes: int) -> bool:
        """Whether a second thread has so many pages there before the build comes to them."""
        if size_bytes >= _SMALLEST_HELPED_BYTES and self._helper is None and not _strict_commit():
            self._helper = Helper.start()
        return size_bytes >= _SMALLEST_HELPED_BYTES and self._helper is not None

    def _alone(self) -> bool:
        """Whether no other Python thread is there."""
        own = {threading.get_ident()} | ({self._helper.identity} if self._helper is not None else set())
        return not sys._current_frames().keys() - own

    def _room(self, chunk: _Pages) -> int:
        """Where in the file, after all that is there, a chunk's pages can be huge ones."""
        if chunk.size_bytes < HUGE_BYTES:
            return self._end
        return self._end + (chunk.start - self._end) % HUGE_BYTES

    def _freed(self, size_bytes: int) -> None:
        # Its memory goes a little later, so it is found free by the next one's end.
        self._freed_bytes += size_bytes
        if self._freed_bytes >= _SWEEP_BYTES and self._descriptor >= 0 and not self._giving:
            self._freed_bytes = 0
            with contextlib.suppress(OSError):
                self._sweep()

    def _sweep(self) -> None:
        """Give back the pages of the file that nothing maps."""
        free, mapped = 0, 0
        for line in sorted(self._mappings(), key=lambda line: line.offset):
            if line.offset > free:
                punch(self._descriptor, free, line.offset - free)
            free = max(free, line.offset + line.end - line.start)
            mapped += line.end - line.start if line.shared else 0
        if self._end > free:
            punch(self._descriptor, free, self._end - free)
        self._uncount(mapped - self._uncounted_bytes)

    def _uncount(self, size_bytes: int) -> None:
        """Lower the limit of data by that much, which is in shared memory and else would count."""
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if soft != resource.RLIM_INFINITY:
            self._uncounted_bytes += size_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (max(0, soft - size_bytes), hard))

    # When it is sent.

    @classmethod
    def to_give(cls, built_in: Optional[Backing], limit_bytes: int) -> Optional[Backing]:
        """The one that a state goes out in: that of the build, if it is still of use, or a new one.

        Args:
            built_in: What the model was built in, if anything.
            limit_bytes: The longest parcel that the caller takes.
        """
        if built_in is not None and built_in._descriptor >= 0:
            if built_in._end <= limit_bytes:
                return built_in
            built_in.abandon()
        new = cls.begin()
        if new is not None:
            new.end()
        return new

    @contextlib.contextmanager
    def giving(self) -> Iterator[None]:
        """In this, a cargo is laid out and becomes a parcel (`finish`). Afterwards this is of no use any more."""
        try:
            self._giving = True
            self._lines = sorted(self._mappings())
            yield
        finally:
            self.abandon()

    @property
    def size_bytes(self) -> int:
        """As `isohub.wire.arena.Backing` has it."""
        return self._end

    def place(self, storage: Any, start: int, size_bytes: int) -> Optional[int]:
        """As `isohub.wire.arena.Backing` has it. What can still be moved to the file will be."""
        whole = storage.nbytes()
        if size_bytes < _SMALLEST_BYTES or whole - size_bytes > whole // _SLACK or self._descriptor < 0:
            return None
        chunk = _chunk_of(storage)
        if chunk is None:
            return None
        index = bisect.bisect_right(self._lines, (chunk.start, _HIGHEST)) - 1
        line = self._lines[index] if index >= 0 else None
        if line is not None and line.start <= chunk.start and chunk.end <= line.end:
            offset = line.offset + chunk.start - line.start
            self._given.append(chunk)
        elif self._alone() and len(self._adopted) < _MOST_TAKEN:
            offset = self._room(chunk)
            self._end = offset + chunk.size_bytes
            self._adopted.append((chunk, offset))
        else:
            return None
        return offset + int(storage.data_ptr()) - chunk.start + start

    def finish(self, cargo: Cargo) -> int:
        """The parcel of a cargo that was laid out with this; the receiver seals it.

        Raises:
            OSError: The memory is exhausted.
        """
        cargo.write_file(self._descriptor)
        for chunk, offset in self._adopted:
            self._adopt(chunk, offset)
        self._settle()
        if self._alone():
            with contextlib.suppress(OSError):
                self._evict()
        self._sweep()
        return os.dup(self._descriptor)

    def abandon(self) -> None:
        """Leave every tensor with what it holds, and share no memory any more."""
        self.end()
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                self._settle()
            os.close(self._descriptor)
            self._descriptor = -1
            self._maps.close()

    def _adopt(self, chunk: _Pages, offset: int) -> None:
        """Move a chunk with what it holds to the file."""
        aside = map_aside(self._descriptor, chunk.size_bytes, offset)
        try:
            fill(aside, chunk.size_bytes)
            ctypes.memmove(aside, chunk.start, chunk.size_bytes)
        finally:
            unmap(aside, chunk.size_bytes)
        map_pages(self._descriptor, chunk.size_bytes, PRIVATE, offset, at=chunk.start)

    def _settle(self) -> None:
        """Make every mapping of the file a private one, in place."""
        shared = [line for line in self._mappings() if line.shared]
        helper = self._helper
        if helper is not None:
            helper.stop()
        # What takes the time is taking the pages out of this process's tables.
        if sum(line.end - line.start for line in shared) >= _SMALLEST_HELPED_BYTES:
            helper = self._helper = Helper.start()
            if helper is not None:
                for line in shared[::2]:
                    helper.do(drop, line.start, line.end - line.start)
                for line in shared[1::2]:
                    drop(line.start, line.end - line.start)
                helper.stop(finish=True)
        self._uncount(-self._uncounted_bytes)
        for line in shared:
            map_pages(self._descriptor, line.end - line.start, PRIVATE, line.offset, at=line.start)

    def _evict(self) -> None:
        """Move out of the file what is not given, with what it holds, as far as there is room for it."""
        kept = sorted([*self._given, *(chunk for chunk, _ in self._adopted)])
        for line in sorted(self._mappings()):
            start, index = line.start, bisect.bisect_left(kept, (line.start, 0))
            while start < line.end:
                chunk = kept[index] if index < len(kept) else _Pages(_HIGHEST, 0)
                end = min(chunk.start, line.end)
                if end > start:
                    aside = allocate(end - start)
                    ctypes.memmove(aside, start, end - start)
                    move(aside, end - start, start)
                start, index = chunk.end, index + 1

    def _mappings(self) -> List[_Mapping]:
        """Where this file is mapped.

        Raises:
            OSError: The kernel does not say.
        """
        number = b"%d" % os.fstat(self._descriptor).st_ino
        found = []
        self._maps.seek(0)
        for line in self._maps.readlines():
            # address permissions offset device inode path: proc(5)
            fields = line.split(None, 5)
            if fields[4] == number and fields[-1].startswith(b"/memfd:"):
                start, _, end = fields[0].partition(b"-")
                found.append(_Mapping(int(start, 16), int(end, 16), int(fields[2], 16), fields[1][3:] == b"s"))
        return found


def _strict_commit() -> bool:
    """Whether the machine counts what memory may come to, so that a touch may find none left: proc(5)."""
    try:
        with open("/proc/sys/vm/overcommit_memory") as file:
            return file.read().strip() == "2"
    except OSError:
        return True


def _chunk_of(storage: Any) -> Optional[_Pages]:
    """The allocation that a storage is, if it is a mapping of its own that torch's allocator of the CPU made."""
    address, size = storage.data_ptr(), storage.nbytes()
    # The words before the memory are in the same page, so that reading them is safe.
    if address % mmap.PAGESIZE != _BEFORE_BYTES + _WORDS_BYTES or not storage.resizable():
        return None
    before, rest = (ctypes.c_size_t * 2).from_address(address - _WORDS_BYTES)
    whole = before + (rest & ~_FLAGS)
    if before != _BEFORE_BYTES or rest & _FLAGS != _IS_MAPPED or whole % mmap.PAGESIZE:
        return None
    needed = address % mmap.PAGESIZE + size
    if not needed <= whole <= needed + mmap.PAGESIZE + ALIGNMENT:
        return None
    return _Pages(address - address % mmap.PAGESIZE, whole)


#: Above every address.
_HIGHEST = 1 << 64

_mallopt: Optional[Callable[[int, int], int]] = getattr(ctypes.CDLL(None), "mallopt", None)

_watched: List[weakref.ReferenceType[Backing]] = []


def _watch_forks(backing: Backing) -> None:
    """Have it abandoned before this process forks."""
    if not _watched:
        os.register_at_fork(before=_abandon_watched)
    _watched[:] = [weakref.ref(backing)]


def _abandon_watched() -> None:
    for reference in _watched:
        backing = reference()
        if backing is not None:
            backing.abandon()
