"""Copies of memory; long ones by several processors at once.

Where a long copy is made the process waits for it, and another processor is idle: the other side of the wire waits too.
In the caller threads of this module's own do it, and not torch's: those of OpenMP would go on spinning afterwards,
against the worker's (p99 of 8 ms for a call of 600 kB). In a worker torch's do it, which are there, and forks of a
repo's find no thread of isohub's.

Side: each function says which.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from typing import Any, Callable, List, Tuple

__all__ = ["Move", "move", "move_by_torch"]

#: Copies bytes: (destination, source, how many), between addresses that do not overlap.
Move = Callable[[int, int, int], Any]

#: What it takes to hand a part over is as long as a copy of half a megabyte.
_SMALLEST_SHARED_BYTES = 8 << 20
#: More do not go faster: two or three take all that the memory gives.
_MOST_PARTS = 3
_PART_STEP_BYTES = 4096

_Task = Tuple[int, int, int, threading.Semaphore]


class _Threads:
    """Those of this process, once they are needed."""

    def __init__(self) -> None:
        self.tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self.count = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Have them, however many there can be: 0 where there is one processor."""
        with self._lock:
            wanted = min(len(os.sched_getaffinity(0)), _MOST_PARTS) - 1
            while self.count < wanted:
                threading.Thread(target=_work, args=(self.tasks,), name="isohub-copy", daemon=True).start()
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
    part = -(-size_bytes // (_threads.count + 1) // _PART_STEP_BYTES) * _PART_STEP_BYTES
    starts = range(part, size_bytes, part)
    done = threading.Semaphore(0)
    for start in starts:
        _threads.tasks.put((destination + start, source + start, min(part, size_bytes - start), done))
    ctypes.memmove(destination, source, min(part, size_bytes))
    interrupted: List[BaseException] = []
    for _ in starts:
        _wait(done, interrupted)
    if interrupted:
        raise interrupted[0]


def _wait(done: threading.Semaphore, interrupted: List[BaseException]) -> None:
    while True:
        try:
            done.acquire()
        except BaseException as error:  # noqa: BLE001 - Ctrl-C: the memory must outlive what is still written to it
            interrupted.append(error)
        else:
            return


def _work(tasks: Any) -> None:
    while True:
        destination, source, size_bytes, done = tasks.get()
        ctypes.memmove(destination, source, size_bytes)
        done.release()
