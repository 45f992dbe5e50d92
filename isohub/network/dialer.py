"""How a worker's proxy reaches a server: by name, by address, or by the proxy of the caller's environment.

A name is decided on, then resolved once; what is dialled is the addresses that the border left. With a proxy in the
environment that one is dialled instead, and asked for the very name that was decided on.

Refuses: what the border refuses; proxies that are no plain HTTP ones.
Side: caller. Trust: targets are the worker's, addresses and answers are the network's, the environment is the caller's.
Source: RFC 9110, 9.3.6 (CONNECT) and 11.7 (Proxy-Authorization); RFC 7617 (Basic).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import logging
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from requests.utils import get_environ_proxies, select_proxy

from isohub.network.border import NetworkBorder, look_up
from isohub.network.errand import Errand
from isohub.network.heads import Bad, Request, head_end, parse_answer
from isohub.network.relay import ProxyLimits, Waiter
from isohub.sandbox.hosts import Refused, Target

__all__ = ["Dialer", "Outer", "StopError"]

_log = logging.getLogger("isohub.network")


class StopError(Exception):
    """A connection ends with an answer of the proxy's own.

    Args:
        status: Of the answer.
        reason: Why; may hold what a peer sent.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class Outer:
    """The proxy of the caller's environment."""

    place: Target
    fields: str  # for its eyes alone


class Dialer:
    """Reaches servers for the connections of one proxy.

    Args:
        border: Decides.
        waiter: Ends all waiting.
        limits: What is given at most.
        who: Whose requests they are, safe to show.
    """

    def __init__(self, border: NetworkBorder, waiter: Waiter, limits: ProxyLimits, who: str) -> None:
        self.border = border
        self.waiter = waiter
        self.limits = limits
        self.who = who
        self._resolving = threading.Semaphore(limits.connections)

    def head(self, connection: socket.socket, until: float, what: str) -> tuple[bytes, bytes] | None:
        """A head and what came after it; None if the connection ends first.

        Raises:
            StopError: It is too long, or none.
            TimeoutError: It did not come.
        """
        buffer = bytearray()
        while True:
            scanned = len(buffer)
            data = self.waiter.receive(connection, until)
            if not data:
                return None
            buffer += data
            end = head_end(buffer, scanned)
            if isinstance(end, Bad):
                raise StopError(end.status, end.reason)
            if len(buffer if end is None else buffer[:end]) > self.limits.head_bytes:
                raise StopError(431, f"a {what}'s head of more than {self.limits.head_bytes} bytes")
            if end is not None:
                return bytes(buffer[:end]), bytes(buffer[end:])

    @contextlib.contextmanager
    def reach(self, request: Request) -> Iterator[tuple[socket.socket, Outer | None, bytes]]:
        """A connection to the server, or through the environment's proxy; and what came on it already.

        Raises:
            StopError: There is none; 403 if there may be none.
            ClosedError: The proxy closes.
        """
        scheme = "connect" if request.method == "CONNECT" else "http"
        decided = self.border.decide(scheme, request.target)
        if isinstance(decided, Refused):
            raise StopError(403, decided.reason if decided.hint is None else f"{decided.reason}\nhint: {decided.hint}")
        outer = _outer(request)
        target, until = request.target, time.monotonic() + self.limits.connect_s
        shown = str(target) if outer is None else f"{target}, by the proxy of the caller's environment,"
        try:
            addresses = self._addresses(target if outer is None else outer.place, until)
            if outer is None:
                judged = self.border.judge(scheme, target, addresses)
                if isinstance(judged, Refused):
                    raise StopError(
                        403, judged.reason if judged.hint is None else f"{judged.reason}\nhint: {judged.hint}"
                    )
                upstream = self._dial(judged, target.port, until)
            else:
                _log.info("%s: %s goes by the proxy of the caller's environment", self.who, target)
                upstream = self._dial(addresses, outer.place.port, until)
        except TimeoutError:
            raise StopError(504, f"{shown} gives no connection within {self.limits.connect_s:g} s") from None
        except OSError as error:
            raise StopError(502, f"{shown} cannot be reached: {error.strerror or error}") from None
        with upstream:
            early = b""
            if outer is not None and request.method == "CONNECT":
                early = self._tunnel(upstream, target, outer, until)
            yield upstream, outer, early

    def _addresses(self, target: Target, until: float) -> tuple[str, ...]:
        if target.is_address:
            return (target.host,)
        resolving = self._resolving
        if not resolving.acquire(blocking=False):
            raise StopError(504, "too many names are being resolved")

        def work() -> tuple[str, ...]:
            try:
                return look_up(target)
            finally:
                resolving.release()

        try:
            errand = Errand(work, lambda _: None, lambda: None)
        except BaseException:
            resolving.release()
            raise
        try:
            self.waiter.wait({errand.fileno(): select.POLLIN}, until)
            return errand.take()
        finally:
            errand.leave()

    def _dial(self, addresses: tuple[str, ...], port: int, until: float) -> socket.socket:
        failure: OSError = OSError(errno.EHOSTUNREACH, "it has no address")
        for number, address in enumerate(addresses):
            now = time.monotonic()
            try:
                return self.waiter.connect(address, port, now + (until - now) / (len(addresses) - number))
            except OSError as error:
                failure = error
        raise failure

    def _tunnel(self, upstream: socket.socket, target: Target, outer: Outer, until: float) -> bytes:
        """Have the environment's proxy connect; what came after its consent."""
        try:
            text = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{outer.fields}\r\n"
            self.waiter.send(upstream, text.encode("ascii"), until)
            came = self.head(upstream, until, "proxy")
        except TimeoutError:
            raise StopError(504, "the proxy of the caller's environment does not answer") from None
        except OSError as error:
            raise StopError(502, f"the proxy of the caller's environment went: {error.strerror}") from None
        answer = Bad(502, "") if came is None else parse_answer(came[0], "CONNECT")
        if came is None or isinstance(answer, Bad):
            raise StopError(502, "the proxy of the caller's environment does not answer in HTTP/1")
        if not 200 <= answer.status < 300:
            raise StopError(502, f"the proxy of the caller's environment answers {answer.status} for {target}")
        return came[1]


def _outer(request: Request) -> Outer | None:
    """The proxy that the caller's environment names for a request."""
    url = f"{'https' if request.method == 'CONNECT' else 'http'}://{request.target}/"
    named = select_proxy(url, get_environ_proxies(url))
    if not named:
        return None
    try:
        parts = urlsplit(named if "://" in named else f"http://{named}")
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host = None
    if host is None or parts.scheme != "http":
        # Its text may hold a password.
        raise StopError(
            502, "the caller's environment names a proxy that is no http://host:port, which cannot be used here"
        )
    fields = ""
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        fields = f"Proxy-Authorization: Basic {base64.b64encode(login).decode('ascii')}\r\n"
    return Outer(Target(host, port), fields)
