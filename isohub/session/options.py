"""What a call carries from where it was made: its deadline, the modes of torch, and the means to interrupt it.

Rules:

1. Options hold in a block, for every question to that worker which the block's own thread or task asks, and for what
   it submits; see docs/decisions/0018-options-are-a-block.md.
2. A call that was submitted runs under the modes of the block that submitted it.
3. An interruption reaches a call that waits for its answer. One that has not begun is never sent.

Side: caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

from isohub.session.modes import held

if TYPE_CHECKING:
    from isohub.session.link import Link
    from isohub.session.supervisor import Worker

__all__ = [
    "Interruption",
    "awaited",
    "current_interruption",
    "interruptible",
    "options",
    "pipelined",
    "resumed",
    "timeout_of",
]

_timeouts: contextvars.ContextVar[tuple[tuple[Link, Worker, float | None], ...]] = contextvars.ContextVar(
    "isohub_timeouts", default=()
)
_interruption: contextvars.ContextVar[Interruption | None] = contextvars.ContextVar("isohub_interruption", default=None)


class Interruption:
    """Ends the wait of a call in another thread. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if hasattr(os, "eventfd") else -1
        self._write = self._event
        if self._event < 0:  # Python 3.9 and earlier have none
            self._event, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.is_set = False

    def fileno(self) -> int:
        """Readable once it is set; -1 once the call is over."""
        return self._event

    def set(self) -> None:
        """Interrupt the call, if it is not over."""
        with self._lock:
            self.is_set = True
            if self._event >= 0:
                os.write(self._write, (1).to_bytes(8, "little"))

    def close(self) -> None:
        """The call is over."""
        with self._lock:
            for descriptor in {self._event, self._write} - {-1}:
                os.close(descriptor)
            self._event = self._write = -1

    def __del__(self) -> None:
        self.close()


def current_interruption() -> Interruption | None:
    """What can interrupt the call that this thread is about to make."""
    return _interruption.get()


def timeout_of(link: Link, timeout_s: float | None) -> float | None:
    """Seconds that a question by this link may take, here; `timeout_s` unless a block says otherwise."""
    for other, worker, seconds in reversed(_timeouts.get()):
        if other is link or worker is link.worker:  # the link's worker may have died, and be another one now
            return seconds
    return timeout_s


@contextlib.contextmanager
def options(link: Link, timeout_s: float | None) -> Iterator[None]:
    """A block in which each question to this link's worker may take so long."""
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"timeout_s={timeout_s!r}; expected seconds above zero, or None for no limit")
    token = _timeouts.set((*_timeouts.get(), (link, link.worker, timeout_s)))
    try:
        yield
    finally:
        _timeouts.reset(token)


def resumed(work: Callable[[], Any], interruption: Interruption | None = None) -> Callable[[], Any]:
    """This work, to be done in another thread as it would be here: under the same options and modes."""
    context = contextvars.copy_context()
    context.run(_interruption.set, interruption)
    entered = held()

    def there() -> Any:
        try:
            with entered():
                return context.run(work)
        finally:
            if interruption is not None:
                interruption.close()

    return there


async def awaited(link: Link, work: Callable[[], Any]) -> Any:
    """Do this in the link's own thread, without holding up the event loop.

    Cancelling the task cancels a call that has not begun, and interrupts one that has: the worker stops what it does
    and stays, as after Ctrl-C.
    """
    interruption = Interruption()
    future = link.submit(work, interruption)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        interruption.set()
        raise


def pipelined(link: Link, call: Callable[..., Any], iterables: tuple[Iterable[Any], ...], ahead: int) -> Iterator[Any]:
    """Results of calls with the items of these, in order.

    Args:
        link: Whose thread makes the calls.
        call: Takes one item of each iterable.
        iterables: Read in this thread, as far as is needed; they may be endless.
        ahead: How many calls may have been submitted beyond the one whose result is given.
    """
    if not iterables:
        raise TypeError("map() needs something to go over")
    if type(ahead) is not int or ahead < 0:
        raise ValueError(f"ahead={ahead!r}; expected a whole number of calls")
    return _pipelined(link, call, zip(*iterables, strict=False), ahead)


def _pipelined(link: Link, call: Callable[..., Any], items: Iterator[tuple[Any, ...]], ahead: int) -> Iterator[Any]:
    waiting: deque[tuple[Future[Any], Interruption]] = deque()

    def first() -> Any:
        try:
            return waiting[0][0].result()
        except (KeyboardInterrupt, CancelledError):
            waiting[0][1].set()
            raise
        finally:
            waiting.popleft()

    try:
        for item in items:
            interruption = Interruption()
            waiting.append((link.submit(functools.partial(call, *item), interruption), interruption))
            if len(waiting) > ahead:
                yield first()
        while waiting:
            yield first()
    finally:
        for future, _ in waiting:
            future.cancel()


def interruptible(interruption: Interruption, work: Callable[..., Any], *args: Any) -> Any:
    """Do this in a context of its own, where `interruption` can end the call that is waited for."""
    _interruption.set(interruption)
    return work(*args)
