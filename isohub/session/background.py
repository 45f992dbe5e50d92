"""The one thread of a session: reads what workers print, and does what a finalizer may not.

A worker's stdout and stderr are pipes; somebody must empty them or the worker stalls. Lines go to
``logging``, with control characters escaped, and the last of them are kept for error messages.

A finalizer can run at any bytecode of any thread, so it takes no lock: it hands its work over here by
``queue.SimpleQueue.put``, which is reentrant.

Side: caller. Trust: every byte read here is a worker's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import threading
import weakref
from collections import deque
from collections.abc import Callable

from isohub.errors import printable
from isohub.wire.protocol import close_descriptors

__all__ = ["Background", "Budget", "Output"]

_READ_BYTES = 1 << 16
#: A longer line is cut into pieces of this length: a worker that never ends its line must not fill memory.
_MAX_LINE_BYTES = 1 << 14
_TAIL_LINES = 20
_LINE_COST_BYTES = 64
# What one stream may give before the others have their turn.
_BURST_BYTES = 1 << 20

_log = logging.getLogger("isohub.session")


class Budget:
    """How much the streams of one worker may give together.

    Args:
        limit_bytes: So much.
        passed: Called once with what was given, in the thread that read it; must take no lock of the stream's.
    """

    def __init__(self, limit_bytes: int, passed: Callable[[int], None]) -> None:
        self._limit_bytes = limit_bytes
        self._passed: Callable[[int], None] | None = passed
        self._taken = 0

    def take(self, count: int) -> None:
        """Count some more."""
        self._taken += count
        if self._taken > self._limit_bytes and self._passed is not None:
            passed, self._passed = self._passed, None
            passed(self._taken)


class Output:
    """One stream of one worker: a pipe's reading end, where its lines go, and the last of them.

    Args:
        descriptor: The pipe's reading end, owned by this object.
        logger: Gets each line.
        level: At which level.
    """

    def __init__(self, descriptor: int, logger: logging.Logger, level: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self._logger = logger
        self._level = level
        self._rest = b""
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._lock = threading.Lock()
        self.budget: Budget | None = None

    def drain(self, limit_bytes: int = _BURST_BYTES) -> bool:
        """Take what is there, up to a limit; False once the stream has ended. Any thread."""
        with self._lock:
            taken = 0
            while taken < limit_bytes:
                if self.descriptor < 0:
                    return False
                try:
                    data = os.read(self.descriptor, _READ_BYTES)
                except BlockingIOError:
                    return True
                if not data:
                    self._take(b"\n" if self._rest else b"")
                    return False
                taken += len(data)
                if self.budget is not None:
                    # A line costs its reader more than its bytes: a flood of empty ones is one too.
                    self.budget.take(len(data) + _LINE_COST_BYTES * data.count(b"\n"))
                self._take(data)
            return True

    def tail(self) -> str:
        """The last lines, control characters escaped."""
        with self._lock:
            rest = [printable(self._rest.decode("utf-8", "replace"), newlines=False)] if self._rest else []
            return "\n".join([*self._tail, *rest])

    def close(self) -> None:
        """Stop reading. For `Background` alone, which knows whether its selector holds the descriptor."""
        with self._lock:
            if self.descriptor >= 0:
                os.close(self.descriptor)
                self.descriptor = -1

    def _take(self, data: bytes) -> None:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        wanted = self._logger.isEnabledFor(self._level)
        if not wanted:  # a flood costs no more than splitting it
            lines = lines[-_TAIL_LINES:]
        for line in lines:
            text = printable(line[:_MAX_LINE_BYTES].decode("utf-8", "replace").rstrip("\r"), newlines=False)
            self._tail.append(text)
            if wanted:
                try:
                    self._logger.log(self._level, "%s", text)
                except Exception:  # noqa: BLE001 - a handler of the user's that fails must not stall the worker
                    wanted = False


class Background:
    """A daemon thread that starts with the first stream and ends with `close`."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Closed with the object and not by `close`: a finalizer may hand over work at any later time, and its
        # byte must not land in whatever has got the number by then.
        weakref.finalize(self, close_descriptors, [self._wake_read, self._wake_write]).atexit = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()
        self._closed = False

    def watch(self, output: Output) -> None:
        """Read this stream until it ends. Any thread."""
        self.defer(lambda: self._register(output))

    def forget(self, output: Output) -> None:
        """Stop reading this stream, whether or not it has ended. Any thread."""
        self.defer(lambda: self._unregister(output))

    def defer(self, work: Callable[[], None]) -> None:
        """Do this soon, in the session's thread. Any thread, and finalizers."""
        self._work.put(work)
        self._wake()

    def start(self) -> None:
        """Start the thread unless it runs."""
        with self._start_lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="isohub-session", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Do what is left, then end."""
        with self._start_lock:
            if self._closed:
                return
            self._closed = True
            thread, self._thread = self._thread, None
        self._work.put(None)
        self._wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, Output):
                key.data.close()
        self._selector.close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            os.write(self._wake_write, b"\0")

    def _register(self, output: Output) -> None:
        if output.descriptor >= 0:
            self._selector.register(output.descriptor, selectors.EVENT_READ, output)

    def _unregister(self, output: Output) -> None:
        if output.descriptor >= 0:
            output.drain()
            with contextlib.suppress(KeyError):
                self._selector.unregister(output.descriptor)
            output.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                output = key.data
                if output is None:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, _READ_BYTES)
                elif not output.drain():
                    self._unregister(output)
            while True:
                try:
                    work = self._work.get_nowait()
                except queue.Empty:
                    break
                if work is None:
                    return
                try:
                    work()
                except Exception:  # noqa: BLE001 - the thread must outlive any one piece of work
                    _log.exception("background work failed")
