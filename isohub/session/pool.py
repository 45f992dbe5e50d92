"""Which worker serves what: one for each environment, checkout and device, for as long as it is needed.

Rules:

1. A worker lives while somebody holds a lease on it (a load under way) or a handle to something in it. When
   the last goes, it is killed: only a process's end gives all of its memory back.
2. Two loads of one checkout at once share a worker; the second waits for the first to start it.
3. One zygote an environment, started ahead of need.

Side: caller.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

from isohub.errors import SessionClosedError
from isohub.sandbox.policy import NONE
from isohub.session.background import Background
from isohub.session.request import Placement
from isohub.session.spawn import Zygote
from isohub.session.supervisor import Worker

__all__ = ["Pool", "WorkerKey"]


@dataclass(frozen=True)
class WorkerKey:
    """What two loads must have in common to share a worker.

    Attributes:
        python: The interpreter.
        path: The checkout's directory.
        commit: Its commit: a local directory has another one after each change.
        place: Device and inode of that directory: after a forced refetch it is another one.
        placement: What it is confined to.
        bound: What of a lockfile binds it: two references of one commit may be locked to different weights.
        name: For people: ``org/repo@1a2b3c4``.
    """

    python: str
    path: str
    commit: str
    place: tuple[int, int]
    placement: Placement
    bound: tuple[str, ...]
    name: str = field(compare=False)


@dataclass
class _Entry:
    """A worker and who needs it. Changed under the pool's lock alone."""

    worker: Worker | None = None
    leases: int = 0
    handles: int = 0
    starting: threading.Lock = field(default_factory=threading.Lock)


class Pool:
    """The workers and zygotes of one session. Thread-safe."""

    def __init__(self) -> None:
        self.background = Background()
        self._lock = threading.Lock()
        self._entries: dict[WorkerKey, _Entry] = {}
        self._zygotes: dict[tuple[str, bool], Zygote] = {}
        self._closed = False
        # At the latest when nobody can reach the pool any more, or Python ends.
        self._finalizer = weakref.finalize(self, _end, os.getpid(), self._entries, self._zygotes, self.background)

    def warm(self, python: str = sys.executable, *, confined: bool = True) -> Zygote:
        """The environment's zygote, started if need be. Returns before it is ready.

        Args:
            python: The environment's interpreter.
            confined: Whether for workers that get namespaces; those without are another zygote's.
        """
        key = python, confined
        with self._lock:
            self._check_open()
            zygote = self._zygotes.get(key)
            if zygote is None or not zygote.alive():
                if zygote is not None:
                    zygote.close()
                zygote = self._zygotes[key] = Zygote(python, self.background, confined=confined)
            return zygote

    @contextlib.contextmanager
    def lease(self, key: WorkerKey, timeout_s: float | None) -> Iterator[Worker]:
        """The checkout's worker, kept alive at least until the end of the block.

        Raises:
            WorkerStartError, WorkerTimeoutError: It could not be started.
            SessionClosedError: The pool is closed.
        """
        with self._lock:
            self._check_open()
            entry = self._entries.get(key)
            if entry is None or (entry.worker is not None and not entry.worker.alive):
                # A dead worker's entry goes: handles to it no longer count.
                entry = self._entries[key] = _Entry()
            entry.leases += 1
        try:
            with entry.starting:
                if entry.worker is None:
                    zygote = self.warm(key.python, confined=key.placement.policy != NONE)
                    worker = zygote.spawn(key.name, key.commit, timeout_s, key.placement)
                    with self._lock:
                        entry.worker = worker
                        closed = self._closed
                    if closed:
                        worker.close()
                        self._check_open()
            assert entry.worker is not None
            yield entry.worker
        finally:
            self._give_back(key, entry, leases=1)

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
        if entry.worker is not None:
            entry.worker.close()

    def workers(self) -> list[Worker]:
        """Those that are alive."""
        with self._lock:
            return [entry.worker for entry in self._entries.values() if entry.worker is not None and entry.worker.alive]

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("the session is closed", hint="open another: isohub.Session()")

    def close(self) -> None:
        """End every worker and zygote. Returns when they are gone."""
        with self._lock:
            self._closed = True
        self._finalizer()


def _end(
    pid: int, entries: dict[WorkerKey, _Entry], zygotes: dict[tuple[str, bool], Zygote], background: Background
) -> None:
    """End what a pool has started, unless this is a fork of the process that started it."""
    if os.getpid() != pid:
        return
    for entry in [*entries.values()]:
        if entry.worker is not None:
            entry.worker.close()
    entries.clear()
    for zygote in [*zygotes.values()]:
        zygote.close()
    zygotes.clear()
    background.close()
