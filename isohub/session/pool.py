"""Which worker serves what: one for each environment, checkout and device, for as long as it is needed.

Rules:

1. A worker lives while somebody holds a lease on it (a load under way) or a handle to something in it. When
   the last goes, it is killed: only a process's end gives all of its memory back.
2. Two loads of one checkout at once share a worker; the second waits for the first to start it.
3. One zygote an environment, started ahead of need.
4. At most `max_workers` have a process at once, those that are starting or ending included. One that is busy, or
   that a load needs, is never ended for another.

Side: caller.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from isohub.environments.runtime import HOST, Runtime
from isohub.errors import SessionClosedError, WorkerStartError, WorkerTimeoutError
from isohub.sandbox.policy import NONE
from isohub.session.background import Background
from isohub.session.ending import refused
from isohub.session.request import Placement
from isohub.session.spawn import Zygote
from isohub.session.watchdog import Watchdog

if TYPE_CHECKING:
    from isohub.session.register import Register
    from isohub.session.supervisor import Worker
    from isohub.session.worker_info import WorkerInfo

__all__ = ["Pool", "WhenFull", "WorkerKey"]

_log = logging.getLogger("isohub.session")

#: What a load does that finds `max_workers` workers: wait, end the one that was idle for longest, or raise.
WhenFull = Literal["wait", "evict", "error"]
# Whether a worker has become idle or has died is nobody's to tell; a load that waits looks this often.
_LOOK_S = 0.05
# Who waits longer, and without a deadline, is told what for.
_WAIT_NOTICE_S = 10.0


@dataclass(frozen=True)
class WorkerKey:
    """What two loads must have in common to share a worker.

    Attributes:
        runtime: The environment that it runs on.
        path: The checkout's directory.
        commit: Its commit: a local directory has another one after each change.
        place: Device and inode of that directory: after a forced refetch it is another one.
        placement: What it is confined to.
        bound: What of a lockfile binds it: two references of one commit may be locked to different weights.
        name: For people: ``org/repo@1a2b3c4``.
        reference: For people: what was loaded.
        replica: Number of the replica; those of one checkout share nothing.
    """

    runtime: Runtime
    path: str
    commit: str
    place: tuple[int, int]
    placement: Placement
    bound: tuple[str, ...]
    name: str = field(compare=False)
    reference: str = field(compare=False)
    replica: int = 0


@dataclass
class _Entry:
    """A worker and who needs it. Changed under the pool's lock alone."""

    worker: Worker | None = None
    leases: int = 0
    handles: int = 0
    starting: threading.Lock = field(default_factory=threading.Lock)


class Pool:
    """The workers and zygotes of one session. Thread-safe.

    Args:
        max_workers: The most workers at once; None is no limit.
        when_full: What a load does that would need one more.
    """

    def __init__(self, max_workers: int | None = None, when_full: WhenFull = "error") -> None:
        self.background = Background()
        self._watchdog = Watchdog()
        self._registers: list[Register] = []  # one, from the first worker on
        self._max_workers = math.inf if max_workers is None else max_workers
        self._when_full = when_full
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._ending = 0  # workers that have left the entries and are not gone yet
        self._entries: dict[WorkerKey, _Entry] = {}
        self._zygotes: dict[tuple[Runtime, bool], Zygote] = {}
        self._closed = False
        # At the latest when nobody can reach the pool any more, or Python ends.
        self._finalizer = weakref.finalize(
            self, _end, os.getpid(), self._entries, self._zygotes, self.background, self._watchdog, self._registers
        )

    def warm(self, runtime: Runtime = HOST, *, confined: bool = True) -> Zygote:
        """The environment's zygote, started if need be. Returns before it is ready.

        Args:
            runtime: The environment's interpreter and packages.
            confined: Whether for workers that get namespaces; those without are another zygote's.
        """
        key = runtime, confined
        with self._lock:
            self._check_open()
            zygote = self._zygotes.get(key)
            if zygote is None or not zygote.alive():
                if zygote is not None:
                    zygote.close()
                zygote = self._zygotes[key] = Zygote(runtime, self.background, confined=confined)
            return zygote

    @contextlib.contextmanager
    def lease(self, key: WorkerKey, timeout_s: float | None, check: Callable[[Worker], None]) -> Iterator[Worker]:
        """The checkout's worker, kept alive at least until the end of the block.

        Args:
            key: Which.
            timeout_s: Seconds that each step of starting it may take.
            check: Raises unless a worker is confined as it has to be. A new one is given to it before a package of
                its environment's is imported.

        Raises:
            WorkerStartError, WorkerTimeoutError: It could not be started, or there was no room for it.
            SessionClosedError: The pool is closed.
        """
        entry = self._admit(key, timeout_s)
        try:
            with entry.starting:
                if entry.worker is None:
                    zygote = self.warm(key.runtime, confined=key.placement.policy != NONE)
                    worker = zygote.spawn(key.name, key.commit, timeout_s, key.placement, self._watchdog)
                    from isohub.session.preparing import prepare

                    try:
                        check(worker)
                        prepare(worker, timeout_s)
                    except BaseException:
                        worker.close()
                        raise
                    worker.row = self._register().enter(
                        name=key.name,
                        reference=key.reference,
                        commit=key.commit,
                        pid=worker.pid,
                        ticks=worker.ticks,
                        active=tuple(worker.confinement.active),
                        missing=tuple(worker.confinement.missing),
                        environment=worker.runtime.key,
                        python=worker.versions.python,
                        torch=worker.versions.torch,
                    )
                    with self._lock:
                        entry.worker = worker
                        closed = self._closed
                    if closed:
                        worker.close()
                        self._check_open()
            assert entry.worker is not None
            check(entry.worker)  # that was started for another load, perhaps, of which less was asked
            yield entry.worker
        finally:
            self._give_back(key, entry, leases=1)

    def _register(self) -> Register:
        from isohub.session.register import Register

        with self._lock:
            if not self._registers:
                self._registers.append(Register())
            return self._registers[0]

    def _admit(self, key: WorkerKey, timeout_s: float | None) -> _Entry:
        """The key's entry with one more lease, once there is room for it."""
        began = time.monotonic()
        noticed = timeout_s is not None
        with self._room:
            while True:
                self._check_open()
                entry = self._entries.get(key)
                if entry is not None and entry.worker is not None and not entry.worker.look():
                    entry = None  # a dead worker's entry goes: handles to it no longer count
                if entry is None and (self._count(key) < self._max_workers or self._evicted(key)):
                    entry = self._entries[key] = _Entry()
                if entry is not None:
                    entry.leases += 1
                    return entry
                waited = time.monotonic() - began
                if self._when_full == "error" or (timeout_s is not None and waited >= timeout_s):
                    raise self._full(key, timeout_s)
                if not noticed and waited > _WAIT_NOTICE_S:
                    noticed = True
                    _log.warning("%s waits for one of these to end: %s", key.name, ", ".join(self._names()))
                self._room.wait(_LOOK_S if timeout_s is None else min(_LOOK_S, timeout_s - waited))

    def _count(self, beside: WorkerKey) -> int:
        """Workers beside this key's that have a process, will have one or have not lost it yet."""
        others = [entry for key, entry in self._entries.items() if key != beside]
        return self._ending + sum(entry.worker is None or entry.worker.look() for entry in others)

    def has_room(self) -> bool:
        """Whether one more worker could live beside those that there are."""
        with self._lock:
            others = [entry for entry in self._entries.values() if entry.worker is None or entry.worker.look()]
            return not self._closed and self._ending + len(others) < self._max_workers

    def _names(self) -> list[str]:
        return [key.name for key, entry in self._entries.items() if entry.worker is None or entry.worker.alive]

    def _full(self, key: WorkerKey, timeout_s: float | None) -> WorkerStartError | WorkerTimeoutError:
        fields = {"reference": key.name, "commit": key.commit, "phase": "waiting for room"}
        words = f"no worker for {key.name}: max_workers={self._max_workers}, and these live: {', '.join(self._names())}"
        hint = "close handles that are not needed, or Session.close_idle(); when_full='evict' does that by itself"
        if self._when_full == "error":
            return WorkerStartError(words, hint=hint, **fields)
        return WorkerTimeoutError(f"{words}; for {timeout_s:g} s none ended", hint=hint, timeout_s=timeout_s, **fields)

    def _evicted(self, key: WorkerKey) -> bool:
        """Whether a worker was ended to make room; under the lock."""
        if self._when_full != "evict":
            return False
        for victim, entry in self._idle():
            words = f"the worker of {victim.name} was ended to make room for {key.name}"
            if self._retire(victim, entry, f"{words} (max_workers={self._max_workers})"):
                return True
        return False

    def _idle(self) -> list[tuple[WorkerKey, _Entry]]:
        """Entries whose workers nobody asks or loads from, those first that were used least recently."""
        idle = [
            (entry.worker.used, key, entry)
            for key, entry in self._entries.items()
            if entry.leases == 0 and entry.worker is not None and entry.worker.alive and not entry.worker.busy
        ]
        return [(key, entry) for _, key, entry in sorted(idle, key=lambda each: each[0])]

    def _retire(self, key: WorkerKey, entry: _Entry, words: str) -> bool:
        hint = "load it again, as load(..., restart='on-death') does by itself"
        if entry.worker is None or not entry.worker.retire(SessionClosedError(words, hint=hint)):
            return False
        del self._entries[key]
        return True

    def close_idle(self, older_than_s: float) -> list[str]:
        """End workers that nobody asks, and that were idle for as long; their names."""
        with self._room:
            self._check_open()
            ended = [
                key.name
                for key, entry in self._idle()
                if entry.worker is not None
                and time.monotonic() - entry.worker.used >= older_than_s
                and self._retire(key, entry, f"the worker of {key.name} was idle and ended by close_idle()")
            ]
            self._room.notify_all()
        return ended

    def hold(self, worker: Worker) -> None:
        """Count one more handle to something in this worker."""
        with self._lock:
            for entry in self._entries.values():
                if entry.worker is worker:
                    entry.handles += 1

    def drop(self, worker: Worker) -> None:
        """Count one handle less; the last one ends the worker."""
        with self._lock:
            found = [(key, entry) for key, entry in self._entries.items() if entry.worker is worker]
        for key, entry in found:
            self._give_back(key, entry, handles=1)

    def _give_back(self, key: WorkerKey, entry: _Entry, leases: int = 0, handles: int = 0) -> None:
        with self._lock:
            entry.leases -= leases
            entry.handles -= handles
            if entry.leases > 0 or (entry.handles > 0 and entry.worker is not None and entry.worker.alive):
                return
            if self._entries.get(key) is entry:
                del self._entries[key]
            self._ending += 1
        try:
            if entry.worker is not None:
                entry.worker.close()
        finally:
            with self._room:
                self._ending -= 1
                self._room.notify_all()

    def workers(self) -> list[Worker]:
        """Those that are alive."""
        with self._lock:
            return [entry.worker for entry in self._entries.values() if entry.worker is not None and entry.worker.alive]

    def infos(self) -> list[WorkerInfo]:
        """What can be said of those, without asking them."""
        from isohub.session.worker_info import info_of

        with self._lock:
            entries = [*self._entries.items()]
        return [
            info_of(entry.worker, key.reference)
            for key, entry in entries
            if entry.worker is not None and entry.worker.look()
        ]

    def _check_open(self) -> None:
        if self._closed:
            raise refused(SessionClosedError("the session is closed", hint="open another: isohub.Session()"))

    def close(self) -> None:
        """End every worker and zygote. Returns when they are gone."""
        with self._lock:
            self._closed = True
            self._room.notify_all()
        self._finalizer()


def _end(
    pid: int,
    entries: dict[WorkerKey, _Entry],
    zygotes: dict[tuple[Runtime, bool], Zygote],
    background: Background,
    watchdog: Watchdog,
    registers: list[Register],
) -> None:
    """End what a pool has started, unless this is a fork of the process that started it."""
    if os.getpid() != pid:
        return
    workers = [entry.worker for entry in [*entries.values()] if entry.worker is not None]
    for worker in workers:  # all at once, and then each is waited for
        worker.begin_to_close()
    for zygote in [*zygotes.values()]:
        zygote.begin_to_close()
    for worker in workers:
        worker.close()
    entries.clear()
    for zygote in [*zygotes.values()]:
        zygote.close()
    zygotes.clear()
    for register in registers:
        register.close()
    watchdog.close()
    background.close()
