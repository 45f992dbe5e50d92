"""One connection of a worker's to its proxy: a request, its answer or its tunnel, and the end of both sockets.

Rules:

1. One request. Bytes after it are refused if they came with it, and not read if they come later.
2. What goes on is written anew (`isohub.network.heads`); bodies and tunnels are bytes, and are counted.
3. A refusal of ours is an answer with its reason in plain text. Once a server's answer has begun, the connection is cut
   instead.

Side: caller. Trust: the client is the worker's, the server is the network's.
Source: RFC 9112, 9.3 and 9.6 (how connections end); RFC 9110, 15 (status codes), 15.2 (interim answers).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time

from isohub.errors import printable
from isohub.network.dialer import Dialer, Outer, StopError
from isohub.network.heads import Answer, Bad, Request, head_end, parse_answer, parse_request, write_refusal
from isohub.network.relay import ClosedError, Flow, Meter, ShortError, SpentError, relay
from isohub.sandbox.hosts import Refused

__all__ = ["Exchange"]

_log = logging.getLogger("isohub.network")
# For an answer of ours, and for a peer to take it before its connection ends.
_FAREWELL_S = 1.0
# Of what a peer still sends then; closing over unread bytes is a reset, which would take our answer along.
_FAREWELL_BYTES = 1 << 16


class Exchange:
    """One connection of a worker's to its proxy.

    Args:
        client: That connection, not blocking; the caller closes it.
        dialer: Reaches servers.
        sent: Counts, with the proxy's other connections, what goes to servers.
        received: The same for what comes from them.
    """

    def __init__(self, client: socket.socket, dialer: Dialer, sent: Meter, received: Meter) -> None:
        self._client = client
        self._dialer = dialer
        self._waiter = dialer.waiter
        self._limits = dialer.limits
        self._sent = Meter(dialer.limits.sent_bytes, sent)
        self._received = Meter(dialer.limits.received_bytes, received)
        self._method = ""

    def serve(self) -> None:
        """Answer it.

        Raises:
            ClosedError: The proxy closes.
            OSError: The peer is gone.
        """
        try:
            came = self._dialer.head(self._client, time.monotonic() + self._limits.head_s, "request")
            if came is None:
                return
            request = parse_request(came[0])
            if isinstance(request, Bad):
                raise StopError(request.status, request.reason)
            self._method = request.method
            if request.method != "CONNECT" and len(came[1]) > (request.body_bytes or 0):
                raise StopError(400, "more than one request on a connection")
            with self._dialer.reach(request) as (upstream, outer, early):
                self._talk(request, upstream, outer, came[1], early)
        except TimeoutError:  # of the request's head; the others are translated where they are
            self._farewell(408, f"no whole request within {self._limits.head_s:g} s")
        except StopError as stop:
            self._farewell(stop.status, stop.reason)

    def _talk(self, request: Request, upstream: socket.socket, outer: Outer | None, rest: bytes, early: bytes) -> None:
        begun, why, level = time.monotonic(), "", logging.INFO
        try:
            if request.method == "CONNECT":
                self._sent.take(len(rest))
                self._received.take(len(early))
                self._waiter.send(
                    self._client, b"HTTP/1.1 200 Connection established\r\n\r\n", begun + self._limits.idle_s
                )
                up = Flow(self._client, upstream, self._sent, pending=rest)
                down = Flow(upstream, self._client, self._received, pending=early)
                relay(self._waiter, (up, down), None, self._limits.idle_s)
            else:
                self._exchange(request, upstream, None if outer is None else outer.fields, rest)
        except SpentError as error:
            why, level = f"; cut off after {error}", logging.WARNING
        except TimeoutError:
            why = f"; cut off after {self._limits.idle_s:g} s of silence"
        except ClosedError:
            why = "; cut off as the worker ends"
            raise
        except OSError as error:
            why = f"; {error.strerror or error}"
        except StopError as stop:
            why = f"; {stop.reason}"
            raise
        finally:
            _log.log(
                level,
                "%s: %s ended: %d bytes sent, %d received, %.1f s%s",
                self._dialer.who, request.target, self._sent.count_bytes, self._received.count_bytes,
                time.monotonic() - begun, printable(why, newlines=False),
            )  # fmt: skip

    def _exchange(self, request: Request, upstream: socket.socket, outer: str | None, rest: bytes) -> None:
        head = request.head(outer=outer)
        self._sent.take(len(head) + len(rest))
        left = (request.body_bytes or 0) - len(rest)
        up = Flow(self._client, upstream, self._sent, left_bytes=left, pending=head + rest, ends_sink=False)
        try:
            answer, body = self._answer(request, upstream, up)
        except TimeoutError:
            raise StopError(504, f"{request.target} does not answer within {self._limits.idle_s:g} s") from None
        except OSError as error:
            raise StopError(502, f"{request.target} went before it answered: {error.strerror or error}") from None
        except SpentError as error:
            raise StopError(502, f"{request.target}: {error}") from None
        left_bytes = None
        if answer.body_bytes is not None:
            body = body[: answer.body_bytes]
            left_bytes = answer.body_bytes - len(body)
        down = Flow(upstream, self._client, self._received, left_bytes, answer.head + body)
        relay(self._waiter, (up, down), down, self._limits.idle_s)
        self._part()

    def _answer(self, request: Request, upstream: socket.socket, up: Flow) -> tuple[Answer, bytes]:
        """The head of an answer and what came after it, while the request is still being sent."""
        buffer, left = bytearray(), self._limits.head_bytes
        until = time.monotonic() + self._limits.idle_s
        while True:
            interests = {upstream.fileno(): select.POLLIN}
            wanted = up.wants()
            if wanted is not None:
                interests[wanted[0]] = interests.get(wanted[0], 0) | wanted[1]
            ready = self._waiter.wait(interests, until)
            if wanted is not None and ready.get(wanted[0], 0) & wanted[1]:
                try:
                    up.move()
                except ShortError:
                    raise
                except OSError:
                    up.drop()  # it may have answered all the same
                until = time.monotonic() + self._limits.idle_s
            if not ready.get(upstream.fileno(), 0) & ~select.POLLOUT:
                continue
            scanned = len(buffer)
            try:
                data = upstream.recv(1 << 16)
            except BlockingIOError:
                continue
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            self._received.take(len(data))
            buffer += data
            while (end := head_end(buffer, scanned)) is not None:
                if isinstance(end, Bad):
                    raise StopError(502, f"{request.target} answers with {end.reason}")
                answer = parse_answer(bytes(buffer[:end]), request.method)
                if isinstance(answer, Bad):
                    raise StopError(502, f"{request.target}: {answer.reason}")
                left -= end
                if left < 0:
                    break
                del buffer[:end]
                if answer.status >= 200:
                    return answer, bytes(buffer)
                scanned = 0
            if len(buffer) > left:
                raise StopError(
                    502, f"{request.target} answers with a head of more than {self._limits.head_bytes} bytes"
                )

    def _farewell(self, status: int, reason: str) -> None:
        if status in (400, 405, 408, 411, 431):
            self._dialer.border.refused(Refused(reason))
        elif status != 403:  # which is in the log already
            _log.info("%s: answered %d: %s", self._dialer.who, status, printable(reason, newlines=False))
        data = write_refusal(status, reason, body=self._method != "HEAD")
        try:
            self._waiter.send(self._client, data, time.monotonic() + _FAREWELL_S)
        except OSError:
            return
        self._part()

    def _part(self) -> None:
        """End the connection so that the peer gets all that was sent."""
        until, left = time.monotonic() + _FAREWELL_S, _FAREWELL_BYTES
        try:
            self._client.shutdown(socket.SHUT_WR)
            while left > 0 and (data := self._waiter.receive(self._client, until)):
                left -= len(data)
        except OSError:
            pass
