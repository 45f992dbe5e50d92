"""Looks at what each worker uses as a whole, and ends the one that uses more than its policy allows.

The kernel's rlimits count for each process; what several processes, or memory that nothing has mapped, add up to
is counted here, from ``/proc``. A limit that is passed kills the worker, and whoever waits for it gets
`WorkerLimitError`.

Rules:

1. One daemon thread a session, from its first confined worker on. At a worker that has a question open, or has had
   one since the last look, it looks ten times a second; at any other every two seconds,
   and less often where one uses no processor time.
2. The cheap sums first, of all workers: processes, processor time, and resident sizes, which count shared pages for
   each process. Only where that is too much are pages counted by share (``smaps_rollup``), of the largest processes,
   and for a tenth of the time at most: many processes of one worker must not hide another.
3. What it cannot read is not there: a process that has ended, or another's.

It cannot see memory that is in no mapping and behind no descriptor of the worker's (descriptors in flight, pages that
a mapping has let go of); SECURITY.md says so. Side: caller. Source: proc(5).
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isohub.errors import printable
from isohub.session.request import memory_limit_bytes

if TYPE_CHECKING:
    from isohub.session.supervisor import Worker

__all__ = ["Excess", "Usage", "Watchdog", "measure"]

_BUSY_S = 0.1
_IDLE_S = 2.0
# What has used no processor time since the last look has taken no memory either: the next look is twice as far off, up
# to this.
_QUIET_S = 16.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# More than any worker's limit of processes lets it have.
_MOST_PROCESSES = 65_536
# Of one worker; each takes the kernel about five milliseconds where a torch process was forked.
_MOST_EXACT = 128
# Of one worker at one look; each takes about ten microseconds.
_MOST_DESCRIPTORS = 20_000
_EXACT_SHARE = 10


@dataclass(frozen=True)
class Excess:
    """A limit that was passed.

    Attributes:
        limit: The policy's field.
        allowed: Its value.
        used: What was used when that was seen; None where the kernel ended it.
        words: What happened, as a clause that follows the worker's name.
    """

    limit: str
    allowed: float
    used: float | None
    words: str


@dataclass(frozen=True)
class Usage:
    """What a worker and its processes use.

    Attributes:
        processes: Processes and threads.
        cpu_s: Processor time so far, of those that have ended too.
        resident_bytes: Of each process, largest first, by its number; pages that several share count for each.
        table_bytes: Page tables of all of them.
    """

    processes: int
    cpu_s: float
    resident_bytes: dict[int, int]
    table_bytes: int

    def file_bytes(self) -> int:
        """Memory files that are open, each once. Looks at every descriptor."""
        return _memory_file_bytes(self.resident_bytes)

    def most_bytes(self, file_bytes: int) -> int:
        """Memory with these files, and no less."""
        return sum(self.resident_bytes.values()) + self.table_bytes + file_bytes

    def memory_bytes(self, file_bytes: int) -> int:
        """Memory with these files, each shared page divided among its users. Has the kernel look at each page."""
        return _shared_out_bytes([*self.resident_bytes][:_MOST_EXACT], file_bytes) + self.table_bytes


def measure(roots: Iterable[int]) -> Usage:
    """What these processes and their descendants use.

    Args:
        roots: Process numbers.
    """
    processes, ticks, tables, resident = 0, 0, 0, {}
    for pid in _family(roots):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        # Field 3 of proc(5) is the first after the name.
        ticks += sum(int(field) for field in fields[11:15])
        processes += int(fields[17])
        resident[pid] = int(fields[21]) * _PAGE_BYTES
        tables += _table_bytes(pid)
    largest = dict(sorted(resident.items(), key=lambda item: -item[1]))
    return Usage(processes, ticks / _TICKS, largest, tables)


def _table_bytes(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"VmPTE:"):
                return int(line.split()[1]) << 10
    return 0


def _family(roots: Iterable[int]) -> list[int]:
    """Those processes and all below them."""
    found: dict[int, None] = {}
    left = [*roots]
    while left and len(found) < _MOST_PROCESSES:
        pid = left.pop()
        if pid in found:
            continue
        found[pid] = None
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                    left.extend(int(child) for child in file.read().split())
    return [*found]


def _memory_file_bytes(pids: Iterable[int]) -> int:
    """Of memory files (memfd_create(2)) that these have open, each once."""
    sizes: dict[tuple[int, int], int] = {}
    left = _MOST_DESCRIPTORS
    for pid in pids:
        with contextlib.suppress(OSError):
            names = os.listdir(f"/proc/{pid}/fd")[: max(left, 0)]
            left -= len(names)
            for name in names:
                place = f"/proc/{pid}/fd/{name}"
                with contextlib.suppress(OSError):
                    if os.readlink(place).startswith("/memfd:"):
                        status = os.stat(place)
                        if stat.S_ISREG(status.st_mode):
                            sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def _shared_out_bytes(pids: Iterable[int], files_bytes: int) -> int:
    """Each shared page divided among its users; memory files count once, mapped or not."""
    private, shared = 0, 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                rows = dict(line.split()[:2] for line in file if line.startswith(b"Pss"))
        except (OSError, ValueError):
            continue
        of_files = int(rows.get(b"Pss_Shmem:", 0)) << 10
        private += (int(rows.get(b"Pss:", 0)) << 10) - of_files
        shared += of_files
    return private + max(shared, files_bytes)


class Watchdog:
    """The thread, and the workers that it looks at."""

    def __init__(self) -> None:
        self._workers: weakref.WeakKeyDictionary[Worker, float] = weakref.WeakKeyDictionary()  # when to count pages
        self._looked: weakref.WeakKeyDictionary[Worker, float] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._pauses: weakref.WeakKeyDictionary[Worker, tuple[float, float]] = weakref.WeakKeyDictionary()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._asleep = False

    def watch(self, worker: Worker) -> None:
        """Look at this worker from now on, until it ends."""
        if isinstance(worker.placement.policy, str):
            return  # "none"
        with self._lock:
            self._workers[worker] = 0.0
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(
                    target=_run, args=(weakref.ref(self),), name="isohub-watchdog", daemon=True
                )
                self._thread.start()

    def nudge(self) -> None:
        """A question is about to be asked: look more often."""
        if self._asleep:
            self._wake.set()

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def look(self) -> None:
        """Look once at every worker whose turn it is."""
        now = time.monotonic()
        with self._lock:
            workers = [worker for worker in self._workers if worker.alive and self._due(worker, now)]
            for worker in workers:
                self._looked[worker] = now
        used = [(worker, measure([pid for pid in (worker.pid, worker.init_pid) if pid > 0])) for worker in workers]
        for worker, usage in used:
            pause_s, cpu_s = self._pauses.get(worker, (_IDLE_S, -1.0))
            pause_s = min(2 * pause_s, _QUIET_S) if usage.cpu_s == cpu_s and not worker.busy else _IDLE_S
            self._pauses[worker] = pause_s, usage.cpu_s
            excess = _counted_excess(worker, usage)
            if excess is not None:
                worker.end_for(excess)
        for worker, usage in used:
            excess = self._memory_excess(worker, usage)
            if excess is not None:
                worker.end_for(excess)

    def _due(self, worker: Worker, now: float) -> bool:
        looked = self._looked.get(worker, 0.0)
        return worker.busy or worker.used >= looked or now - looked >= self._pauses.get(worker, (_IDLE_S,))[0]

    def _idle_s(self) -> float:
        """Seconds until the first worker's turn comes, if nobody asks one."""
        now = time.monotonic()
        with self._lock:
            due = [
                self._looked.get(worker, now) + self._pauses.get(worker, (_IDLE_S,))[0] - now
                for worker in self._workers
                if worker.alive
            ]
        return min(max(min(due, default=_QUIET_S), _BUSY_S), _QUIET_S)

    def _any_busy(self) -> bool:
        with self._lock:
            return any(worker.busy for worker in self._workers)

    def _memory_excess(self, worker: Worker, usage: Usage) -> Excess | None:
        policy = worker.placement.policy
        assert not isinstance(policy, str)
        memory, began = memory_limit_bytes(policy), time.monotonic()
        if began < self._workers.get(worker, 0.0):
            return None
        files = usage.file_bytes()
        used = usage.most_bytes(files)
        if used > memory:
            used = usage.memory_bytes(files)
        ended = time.monotonic()
        with self._lock:
            self._workers[worker] = ended + _EXACT_SHARE * (ended - began)
        if used <= memory:
            return None
        return Excess("memory", memory, used, f"used {_size(used)} of memory, and {_size(memory)} are allowed")

    def pause(self) -> bool:
        """Wait for the next look; False at the end."""
        self._asleep = True  # first: whoever is asked from here on is seen, or nudges
        busy = self._any_busy()
        self._asleep = not busy
        nudged = self._wake.wait(_BUSY_S if busy else self._idle_s())
        self._wake.clear()
        self._asleep = False
        if nudged and not self._closed:
            # The question has used nothing yet. Without this, short calls would each have one look of this thread's,
            # in the middle of them.
            self._wake.wait(_BUSY_S)
            self._wake.clear()
        return not self._closed


def _run(watchdog: Callable[[], Watchdog | None]) -> None:
    while True:
        watching = watchdog()
        if watching is None or not watching.pause():
            return
        watching.look()
        del watching


def _counted_excess(worker: Worker, used: Usage) -> Excess | None:
    policy = worker.placement.policy
    assert not isinstance(policy, str)
    if policy.cpu_time_s is not None and used.cpu_s > policy.cpu_time_s:
        words = f"used {used.cpu_s:.1f} s of processor time, and {policy.cpu_time_s:g} s are allowed"
        return Excess("cpu_time_s", policy.cpu_time_s, used.cpu_s, words)
    own = 1 if worker.init_pid > 0 else 0  # its init is ours
    if used.processes - own > policy.processes:
        words = f"had {used.processes - own} processes and threads, and {policy.processes} are allowed"
        return Excess("processes", policy.processes, used.processes - own, words)
    return None


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return printable(f"{number:.4g} {unit}")
        number /= 1024
    raise AssertionError
