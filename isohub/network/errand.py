"""Work in a thread of its own that its asker can wait for together with other things, and leave behind.

A download can hang where nothing ends it (a name that resolves for ever, a header that drips). Whoever waits for
it here waits on a descriptor, among deaths and deadlines, and goes when he must; the thread ends by itself.

Side: caller. Source: eventfd(2).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Errand"]

_T = TypeVar("_T")


class Errand(Generic[_T]):
    """One piece of work.

    Args:
        work: What to do, in a daemon thread.
        drop: Called with the result if nobody takes it.
        cancel: Called by `leave`; may end the work early.
    """

    def __init__(self, work: Callable[[], _T], drop: Callable[[_T], None], cancel: Callable[[], None]) -> None:
        self._work = work
        self._drop = drop
        self._cancel = cancel
        self._lock = threading.Lock()
        self._left = False
        self._done = False
        self._result: list[_T] = []
        self._raised: BaseException | None = None
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        thread = threading.Thread(target=self._run, name="isohub-errand", daemon=True)
        try:
            thread.start()
        except BaseException:
            os.close(self._event)
            raise

    def fileno(self) -> int:
        """Readable when it is done."""
        return self._event

    def _run(self) -> None:
        raised: BaseException | None = None
        result: list[_T] = []
        try:
            result.append(self._work())
        except BaseException as error:  # noqa: BLE001 - `take` raises it in the asker's thread
            raised = error
        with self._lock:
            self._done, self._raised, self._result = True, raised, result
            left = self._left
            if not left:
                os.eventfd_write(self._event, 1)
        if left and result:
            self._drop(result[0])

    def take(self) -> _T:
        """The result of what is done, or what it raised; once."""
        with self._lock:
            assert self._done
            result, self._result = self._result, []
            self._close()
        if self._raised is not None:
            raise self._raised
        return result[0]

    def leave(self) -> None:
        """Go without the result. Safe after `take`, and twice."""
        with self._lock:
            result, self._result = self._result, []
            first = not self._left
            self._left = True
            self._close()
        if first:
            self._cancel()
        for one in result:
            self._drop(one)

    def _close(self) -> None:
        if self._event >= 0:
            os.close(self._event)
            self._event = -1
