"""Bytes between two sockets, in one thread that never blocks: bounded in time, in number, and in memory.

Rules:

1. Every wait also waits for one descriptor that ends them all: whoever makes it readable is obeyed at once.
2. Of each direction one piece is held, and no more is read until it is gone: a slow reader slows its writer.
3. Bytes are counted before they are sent on, and those beyond a limit are not.
4. A direction that ends is passed on as such (a half-closed connection); the other may go on until it is idle.

Side: caller. Trust: both ends are hostile. Source: poll(2), connect(2), shutdown(2).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from dataclasses import dataclass, field

__all__ = ["ClosedError", "Flow", "Meter", "ProxyLimits", "ShortError", "SpentError", "Waiter", "relay"]

_PIECE_BYTES = 1 << 16
# Told whether or not they were asked for; the next call on the socket says what it is.
_BROKEN = select.POLLERR | select.POLLHUP | select.POLLNVAL


@dataclass(frozen=True)
class ProxyLimits:
    """What a proxy gives at most.

    Attributes:
        connections: Served at once.
        head_s: For a request's head to come.
        connect_s: For a name to be resolved, and for all of its addresses to be tried.
        idle_s: Without a byte either way, and for an answer's head to come.
        head_bytes: Of a request's or an answer's head.
        sent_bytes: To a server, by one connection.
        received_bytes: From a server, by one connection.
        total_sent_bytes: To servers, by all of a proxy's connections.
        total_received_bytes: From servers, by all of a proxy's connections.
    """

    connections: int = 64
    head_s: float = 10.0
    connect_s: float = 20.0
    idle_s: float = 120.0
    head_bytes: int = 64 << 10
    sent_bytes: int = 1 << 30
    received_bytes: int = 64 << 30
    total_sent_bytes: int = 4 << 30
    total_received_bytes: int = 1 << 40


class ClosedError(Exception):
    """Whoever waits here is to end."""


class ShortError(ConnectionResetError):
    """A source ended before all that it promised."""


class SpentError(Exception):
    """A limit on bytes is reached."""


class Meter:
    """Counts bytes of one direction.

    Args:
        limit_bytes: The most that may pass.
        within: Counts as well; of several connections.
    """

    def __init__(self, limit_bytes: int, within: Meter | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._within = within
        self._lock = threading.Lock()
        self.count_bytes = 0

    def take(self, count_bytes: int) -> None:
        """Count.

        Raises:
            SpentError: So many may not pass.
        """
        with self._lock:
            if self.count_bytes + count_bytes > self._limit_bytes:
                raise SpentError(f"more than {self._limit_bytes} bytes")
            if self._within is not None:
                self._within.take(count_bytes)
            self.count_bytes += count_bytes


class Waiter:
    """What a thread may wait for, besides its end.

    Args:
        wake: A descriptor that is readable once all waiting is to end; not owned.
    """

    def __init__(self, wake: int) -> None:
        self._wake = wake

    def wait(self, interests: dict[int, int], until: float | None) -> dict[int, int]:
        """Wait for events of poll(2).

        Args:
            interests: Events by descriptor.
            until: As `time.monotonic` has it; None is for ever.

        Raises:
            ClosedError: All waiting ends.
            TimeoutError: It is later.
        """
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        for descriptor, events in interests.items():
            poller.register(descriptor, events)
        ready = dict(poller.poll(None if until is None else max(0.0, until - time.monotonic()) * 1000))
        if self._wake in ready:
            raise ClosedError
        if not ready:
            raise TimeoutError
        return ready

    def receive(self, connection: socket.socket, until: float, limit_bytes: int = _PIECE_BYTES) -> bytes:
        """What came; empty at the end."""
        while True:
            self.wait({connection.fileno(): select.POLLIN}, until)
            try:
                return connection.recv(limit_bytes)
            except BlockingIOError:
                continue

    def send(self, connection: socket.socket, data: bytes, until: float) -> None:
        """Send all of it."""
        view = memoryview(data)
        while view:
            self.wait({connection.fileno(): select.POLLOUT}, until)
            try:
                view = view[connection.send(view) :]
            except BlockingIOError:
                continue

    def connect(self, address: str, port: int, until: float) -> socket.socket:
        """A connection to an address, not to a name.

        Raises:
            OSError: There is none.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = connection.connect_ex((address, port))
            if number == errno.EINPROGRESS:
                self.wait({connection.fileno(): select.POLLOUT}, until)
                number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number != 0:
                raise OSError(number, os.strerror(number))
        except BaseException:
            connection.close()
            raise
        return connection


@dataclass
class Flow:
    """One direction.

    Attributes:
        source: Where from.
        sink: Where to.
        meter: Counts what came.
        left_bytes: How many are still to come; None until the source ends.
        pending: What came and is not sent on; may be given, and is counted already.
        ends_sink: Pass the end on.
    """

    source: socket.socket
    sink: socket.socket
    meter: Meter
    left_bytes: int | None = None
    pending: bytes = b""
    ends_sink: bool = True
    _ended: bool = field(default=False, init=False)

    @property
    def done(self) -> bool:
        """Whether nothing is to come and nothing to be sent."""
        return not self.pending and (self._ended or self.left_bytes == 0)

    def wants(self) -> tuple[int, int] | None:
        """Descriptor and event to wait for."""
        if self.done:
            return None
        if self.pending:
            return self.sink.fileno(), select.POLLOUT
        return self.source.fileno(), select.POLLIN

    def move(self) -> None:
        """Do what can be done without waiting."""
        try:
            if self.pending:
                self.pending = self.pending[self.sink.send(self.pending) :]
                return
            limit = _PIECE_BYTES if self.left_bytes is None else min(_PIECE_BYTES, self.left_bytes)
            data = self.source.recv(limit)
        except BlockingIOError:
            return
        self.meter.take(len(data))
        self.pending = data
        if self.left_bytes is not None:
            if not data:
                raise ShortError(errno.ECONNRESET, f"{self.left_bytes} bytes did not come")
            self.left_bytes -= len(data)
        self._ended = not data

    def drop(self) -> None:
        """Move no more, for an end is gone."""
        self.pending, self._ended, self.ends_sink = b"", True, False

    def finish(self) -> None:
        """Pass the end on."""
        if self.ends_sink:
            self.ends_sink = False
            try:
                self.sink.shutdown(socket.SHUT_WR)
            except OSError:  # it is gone
                pass


def relay(waiter: Waiter, flows: tuple[Flow, ...], last: Flow | None, idle_s: float) -> None:
    """Move bytes until all flows are done, or the `last` one is.

    Raises:
        ClosedError: All waiting ends.
        TimeoutError: Nothing moved for so long.
        SpentError: A limit is reached.
        OSError: An end is gone, of the `last` flow if there is one.
    """
    while True:
        for flow in flows:
            if flow.done:
                flow.finish()
        if all(flow.done for flow in flows) or (last is not None and last.done):
            return
        interests: dict[int, int] = {}
        for descriptor, event in filter(None, (flow.wants() for flow in flows)):
            interests[descriptor] = interests.get(descriptor, 0) | event
        ready = waiter.wait(interests, time.monotonic() + idle_s)
        for flow in flows:
            wanted = flow.wants()
            if wanted is not None and ready.get(wanted[0], 0) & (wanted[1] | _BROKEN):
                try:
                    flow.move()
                except OSError:
                    if last is None or flow is last:
                        raise
                    flow.drop()  # a server may answer without reading all of a request
