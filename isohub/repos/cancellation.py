"""Giving up what another thread does: downloads, and waits for locks.

Whoever starts work that may have to be given up does it in a `Cancellation.scope`; what can be ended from
outside registers there, wherever in the layers below it is. Runs in the caller.

Source: the scopes of Trio and anyio, for threads.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Cancellation", "ends_by", "is_cancelled"]


class Cancellation:
    """Ends everything that runs in its scopes, once and for good. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._ends: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """End what runs, and what will begin; any thread."""
        with self._lock:
            self._cancelled = True
            ends = [*self._ends]
        for end in ends:
            end()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What this thread does in the block can be ended."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def add(self, end: Callable[[], None]) -> None:
        """Have something ended with the rest; at once, if that has been."""
        with self._lock:
            self._ends.append(end)
            cancelled = self._cancelled
        if cancelled:
            end()

    def remove(self, end: Callable[[], None]) -> None:
        """It has ended by itself."""
        with self._lock:
            self._ends.remove(end)


_current: ContextVar[Cancellation | None] = ContextVar("isohub_cancellation", default=None)


@contextmanager
def ends_by(end: Callable[[], None]) -> Iterator[None]:
    """What runs in the block is ended by this call, from another thread, if the scope around is cancelled."""
    cancellation = _current.get()
    if cancellation is None:
        yield
        return
    cancellation.add(end)
    try:
        yield
    finally:
        cancellation.remove(end)


def is_cancelled() -> bool:
    """Whether the scope around was cancelled."""
    cancellation = _current.get()
    return cancellation is not None and cancellation.cancelled
