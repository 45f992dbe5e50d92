"""A second thread that does to pages what takes the kernel long, while the first one goes on.

Rules:

1. It calls the kernel and nothing else, and holds no lock of Python's while it does.
2. It is gone, and not only idle, when `stop` returns: a fork of the process must find one thread.
3. There is none where there is one processor, or where no thread may be started: then the caller does it itself.

Side: worker. It is no `threading.Thread`, so that a repo's code does not meet it.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import queue
from typing import Any, Callable, Optional, Tuple

__all__ = ["Helper"]

# So much at a time: about 6 ms.
_STEP_BYTES = 16 << 20

Work = Callable[[int, int], None]


class Helper:
    """The thread.

    Attributes:
        identity: Its number, as `sys._current_frames` has it.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Optional[Tuple[Work, int, int]]] = queue.SimpleQueue()
        self._stopped = False
        self._over = _thread.allocate_lock()
        self._over.acquire()
        self.identity = _thread.start_new_thread(self._run, ())

    @classmethod
    def start(cls) -> Optional[Helper]:
        """One, where it is of use."""
        if len(os.sched_getaffinity(0)) < 2:
            return None
        try:
            return cls()
        except RuntimeError:  # a limit of processes
            return None

    def do(self, work: Work, address: int, size_bytes: int) -> None:
        """Have this done to pages, step by step, after what was asked before. Whether it can be is not told."""
        self._queue.put((work, address, size_bytes))

    def stop(self, finish: bool = False) -> None:
        """Wait for its end.

        Args:
            finish: Whether it first does what it was asked for; else it ends with its step.
        """
        if not finish:
            self._stopped = True
        self._queue.put(None)
        self._over.acquire()
        self._over.release()

    def _run(self) -> None:
        try:
            while not self._stopped:
                asked: Any = self._queue.get()
                if asked is None:
                    return
                work, address, size_bytes = asked
                for done in range(0, size_bytes, _STEP_BYTES):
                    if not self._stopped:
                        with contextlib.suppress(OSError):
                            work(address + done, min(_STEP_BYTES, size_bytes - done))
        finally:
            self._over.release()
