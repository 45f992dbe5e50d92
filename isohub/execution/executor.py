"""Lanes: places that do one piece of work at a time, each with workers of its own. This machine's are here.

Rules:

1. A piece of work is ``work(place, *args)``: a function of isohub's and plain arguments. It finds in the place what it
   left there, and brings what is missing: a place that was lost and made again needs no care.
2. What the work gives are plain values and isohub's own records. Handles stay in the place.
3. All lanes together take the cores once: each may use so many threads as its share.

Side: caller.
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from isohub.checking import checked_count
from isohub.errors import IsohubError, SessionClosedError
from isohub.hub import default_session

if TYPE_CHECKING:
    from isohub.hub import Session
    from isohub.session.options import Interruption

__all__ = ["Executor", "Lane", "LaneLostError", "LocalExecutor", "Place", "cores", "done_once", "load_options"]

_T = TypeVar("_T")
#: Memory that is left beside a further worker: it may come to need more than one has so far.
_MEMORY_FACTOR = 2.0
# Each is a machine's death, and none of the work's doing.
_MOST_LOSSES = 10


class LaneLostError(IsohubError):
    """The place of a lane is gone, with what it did. `Lane.ready` finds it another one."""


@dataclass
class Place:
    """Where work is done.

    Attributes:
        session: Its workers are this place's own.
        threads: How many threads a worker's operators may take; None leaves that alone.
        kept: What work leaves for the work that follows, by key.
    """

    session: Session
    threads: int | None
    kept: dict[Any, Any] = field(default_factory=dict)


class Lane(Protocol):
    """Does one piece of work at a time. Its methods are called by one thread at a time, but for `stop`."""

    @property
    def threads(self) -> int | None:
        """How many threads a worker's operators may take there; None where that is left alone."""
        ...

    def ready(self) -> bool:
        """Whether there is a place; waits for one after it was lost. False: there is none any more."""
        ...

    def do(self, work: Callable[..., _T], *args: Any) -> _T:
        """Give what ``work(place, *args)`` gives.

        Raises:
            LaneLostError: The place was lost meanwhile.
        """
        ...

    def stop(self) -> None:
        """End what is under way, from another thread; nothing more is done here."""
        ...

    def close(self) -> None:
        """Give back what the place keeps."""
        ...


class Executor(Protocol):
    """Opens lanes."""

    @property
    def session(self) -> Session:
        """Resolves references in this process."""
        ...

    @property
    def here(self) -> bool:
        """Whether lanes share this machine's files, so that a checkout of this process's is one of theirs."""
        ...

    def open(self, most: int | None) -> Sequence[Lane]:
        """As many lanes as there is room for.

        Args:
            most: How many can be used; None for no limit.
        """
        ...

    def share(self, value: Any) -> Any:
        """A value that several pieces of work take, to be given to `Lane.do` in its place."""
        ...

    def fits(self, size_bytes: int) -> bool:
        """Whether one more worker of that size has room beside those that run."""
        ...


class LocalExecutor:
    """Lanes of this machine.

    Args:
        workers: How many at most; None for one each core.
        session: Whose cache, rules and zygotes; the default session unless given.
    """

    here = True

    def __init__(self, workers: int | None = None, session: Session | None = None) -> None:
        self._workers = checked_count("workers", workers)
        self.session = default_session() if session is None else session

    def open(self, most: int | None) -> Sequence[Lane]:
        """Lanes that share the cores, at most as many as the session may have workers."""
        limits = [limit for limit in (most, self.session.max_workers) if limit is not None]
        count = max(1, min([cores() if self._workers is None else self._workers, *limits]))
        threads = max(1, cores() // count)
        return [_LocalLane(Place(self.session.replica(number + 1), threads)) for number in range(count)]

    def share(self, value: Any) -> Any:
        """The value."""
        return value

    def fits(self, size_bytes: int) -> bool:
        """Whether the machine has twice that free."""
        import psutil

        return bool(psutil.virtual_memory().available >= _MEMORY_FACTOR * size_bytes)


class _LocalLane:
    """One place of this process."""

    def __init__(self, place: Place) -> None:
        from isohub.session.options import Interruption

        self._place = place
        self.threads = place.threads
        self._interruption: Interruption = Interruption()
        self._stopped = False

    def ready(self) -> bool:
        """Until it is stopped."""
        return not self._stopped

    def do(self, work: Callable[..., _T], *args: Any) -> _T:
        """Do it in this thread."""
        from isohub.session.options import interruptible
        from isohub.session.question import CallInterrupted

        if self._stopped:
            raise SessionClosedError("the lane was stopped")
        try:
            given: _T = contextvars.copy_context().run(interruptible, self._interruption, work, self._place, *args)
        except CallInterrupted:
            raise SessionClosedError("the lane was stopped") from None
        return given

    def stop(self) -> None:
        """Interrupt the question that is open."""
        self._stopped = True
        self._interruption.set()

    def close(self) -> None:
        """Close what has a ``close``: the last handle to a worker ends it."""
        while self._place.kept:
            _, kept = self._place.kept.popitem()
            kept.close()
        self._interruption.close()


def done_once(executor: Executor, work: Callable[..., _T], *args: Any) -> _T:
    """What one piece of work gives, on a lane that is opened for it.

    Raises:
        LaneLostError: Its place was lost, and so were those that followed, or there is no other one.
    """
    (lane,) = executor.open(1)
    try:
        for losses in range(_MOST_LOSSES + 1):
            try:
                return lane.do(work, *args)
            except LaneLostError:
                if losses == _MOST_LOSSES or not lane.ready():
                    raise
        raise AssertionError("a loop that returns or raises")
    finally:
        lane.close()


def load_options(executor: Executor, **given: Any) -> dict[str, Any]:
    """Keywords of `Session.load` for where the work is done: what the caller's session says holds there too.

    Args:
        executor: Where.
        **given: What the caller gave; None leaves it to the session.
    """
    if not executor.here:
        for name in ("sandbox", "environment", "timeout_s"):
            if given[name] is None:
                given[name] = getattr(executor.session, name)
    return given


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))
