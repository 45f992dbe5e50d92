"""Copies of memory; long ones by several processors at once.

Where a long copy is made the process waits for it, and another processor is idle: the other side of the wire waits too.
In the caller threads of this module's own do it, and not torch's: those of OpenMP would go on spinning afterwards,
against the worker's (p99 of 8 ms for a call of 600 kB). In a worker torch's do it, which are there, and forks of a
repo's find no thread of isohub's.

Side: each function says which.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import threading
from collections import deque
from typing import Any, Callable, Deque, List, Tuple

__all__ = ["Move", "move", "move_by_torch"]

#: Copies bytes: (destination, source, how many), between addresses that do not overlap.
Move = Callable[[int, int, int], Any]

#: What it takes to hand a part over is as long as a copy of half a megabyte.
_SMALLEST_SHARED_BYTES = 8 << 20
#: More do not go faster: two or three take all that the memory gives.
_MOST_PARTS = 3
_PART_STEP_BYTES = 4096


class _Job:
    """One long copy, in parts; whoever is free takes the next."""

    def __init__(self, destination: int, source: int, size_bytes: int, ways: int) -> None:
        part = -(-size_bytes // ways // _PART_STEP_BYTES) * _PART_STEP_BYTES
        self._parts: Deque[Tuple[int, int, int]] = deque(
            (destination + start, source + start, min(part, size_bytes - start)) for start in range(0, size_bytes, part)
        )
        self._under_way = 0
        self._changed = threading.Condition()

    def help(self) -> None:
        """Copy what nobody has taken. In a thread that is never interrupted: its parts are counted."""
        while True:
            with self._changed:
                try:
                    part = self._parts.popleft()
                except IndexError:
                    return
                self._under_way += 1
            ctypes.memmove(*part)
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def work(self) -> None:
        """Copy what nobody has taken. In the thread that will call `end`."""
        with contextlib.suppress(IndexError):
            while True:
                ctypes.memmove(*self._parts.popleft())

    def end(self) -> None:
        """Wait until nobody writes any more, also when interrupted: the memory may go after this."""
        interrupted: List[BaseException] = []
        while True:
            try:
                with self._changed:
                    self._parts.clear()
                    self._changed.wait_for(lambda: not self._under_way)
                break
            except BaseException as error:  # noqa: BLE001 - Ctrl-C, which is raised once it is safe
                interrupted.append(error)
        if interrupted:
            raise interrupted[0]


class _Threads:
    """Those of this process, once they are needed."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self.count = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Have them, however many there can be: 0 where there is one processor."""
        with self._lock:
            wanted = min(len(os.sched_getaffinity(0)), _MOST_PARTS) - 1
            while self.count < wanted:
                try:
                    threading.Thread(target=_work, args=(self.jobs,), name="isohub-copy", daemon=True).start()
                except RuntimeError:  # no more threads: with as many as there are
                    return
                self.count += 1


_threads = _Threads()
# A fork has none of them, and the lock may have been taken.
os.register_at_fork(after_in_child=_threads.__init__)  # type: ignore[misc]


def move_by_torch(destination: int, source: int, size_bytes: int) -> None:
    """A `Move`. Side: worker."""
    if size_bytes < _SMALLEST_SHARED_BYTES:
        ctypes.memmove(destination, source, size_bytes)
        return
    import torch

    memory = ctypes.c_char * size_bytes
    to, held = (torch.frombuffer(memory.from_address(address), dtype=torch.uint8) for address in (destination, source))
    to.copy_(held)


def move(destination: int, source: int, size_bytes: int) -> None:
    """A `Move`. Side: caller."""
    if size_bytes < _SMALLEST_SHARED_BYTES:
        ctypes.memmove(destination, source, size_bytes)
        return
    _threads.start()
    job = _Job(destination, source, size_bytes, _threads.count + 1)
    try:
        for _ in range(_threads.count):
            _threads.jobs.put(job)
        job.work()
    finally:
        job.end()


def _work(jobs: Any) -> None:
    while True:
        job = jobs.get()
        job.help()
        del job
