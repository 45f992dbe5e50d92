"""Connections for HTTP: what comes before a body has an end, and a border says where they may lead.

A `Border` decides for requests that somebody who is not trusted asked for. Every URL, redirects among them, is shown
to it; then the name is resolved once, and the addresses that it leaves are those that are connected to. The TLS
server name and the Host header stay the name.

Through a proxy of the caller's environment the URL is checked all the same. It is the proxy that resolves the name:
what address that leads to is the proxy's to judge, and its own address is the caller's word and is not judged.

Side: caller. Refuses: nothing by itself. Trust: the network answers.
"""

from __future__ import annotations

import functools
import http.client
import socket
from typing import Any, Protocol

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.connection import create_connection

from isohub.errors import SourceUnavailableError
from isohub.repos.http_errors import reason, without_secrets
from isohub.repos.naming import shown

__all__ = ["Adapter", "Border", "as_asked"]

# curl's MAX_HTTP_RESP_HEADER_SIZE. http.client bounds the lines of one answer, and not how many "100 Continue"
# come before it.
_HEAD_LIMIT_BYTES = 300 << 10


class Border(Protocol):
    """Which requests may leave, and to which addresses."""

    def check(self, url: str) -> None:
        """Refuse a URL whose server may not be asked.

        Raises:
            SourceUnavailableError: It may not.
        """

    def addresses(self, scheme: str, host: str, port: int) -> tuple[str, ...]:
        """Resolve a server's name, once, to the addresses that may be connected to; at least one.

        Raises:
            SourceUnavailableError: There is none that may.
            OSError: It cannot be resolved.
        """


def as_asked(url: str) -> str:
    """A URL as it is sent, and as a border sees it: the host in A-labels, the path encoded.

    Raises:
        SourceUnavailableError: It cannot be.
    """
    prepared = requests.PreparedRequest()
    try:
        prepared.prepare_url(url, None)
    except (requests.exceptions.RequestException, ValueError) as error:
        text = f"{shown(url)!r} is no address that can be asked: {reason(error)}"
        raise SourceUnavailableError(text, url=shown(url)) from without_secrets(error)
    return prepared.url or ""


class _Head:
    """The lines before a body, which end at some time."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left_bytes = _HEAD_LIMIT_BYTES

    def readline(self, limit: int = -1, /) -> bytes:
        line: bytes = self._file.readline(limit)
        self._left_bytes -= len(line)
        if self._left_bytes < 0:
            raise http.client.HTTPException(f"more than {_HEAD_LIMIT_BYTES} bytes before a body")
        return line

    def close(self) -> None:
        self._file.close()


class _Response(http.client.HTTPResponse):
    def begin(self) -> None:
        file = self.fp
        head: Any = _Head(file)
        self.fp = head
        try:
            super().begin()
        finally:
            if self.fp is head:  # else it was closed
                self.fp = file

    def _safe_read(self, amt: int) -> bytes:
        # urllib3 takes a chunk's size from here on, with its sign.
        if amt < 0:
            raise http.client.HTTPException("a chunk has a size below zero")
        data: bytes = super()._safe_read(amt)  # type: ignore[misc]  # not in typeshed
        return data


class _Connection(HTTPConnection):
    response_class = _Response
    scheme = "http"

    def __init__(self, *args: Any, border: Border | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._border = border

    def _new_conn(self) -> socket.socket:
        if self._border is None or self.proxy is not None:
            return super()._new_conn()
        return _connected(self, self._border, self.scheme)


class _TlsConnection(_Connection, HTTPSConnection):
    scheme = "https"


def _connected(connection: HTTPConnection, border: Border, scheme: str) -> socket.socket:
    """As urllib3 does it, with the border's addresses in place of the name."""
    host, port = connection.host, connection.port
    try:
        addresses = border.addresses(scheme, host, port)
    except OSError as error:
        gai = error if isinstance(error, socket.gaierror) else socket.gaierror(socket.EAI_FAIL, str(error))
        raise NameResolutionError(host, connection, gai) from error
    failure: OSError | None = None
    for address in addresses:
        try:
            return create_connection(
                (address, port),
                connection.timeout,
                source_address=connection.source_address,
                socket_options=connection.socket_options,
            )
        except OSError as error:
            failure = error
    if isinstance(failure, TimeoutError):
        text = f"Connection to {host} timed out. (connect timeout={connection.timeout})"
        raise ConnectTimeoutError(connection, text) from failure
    raise NewConnectionError(connection, f"Failed to establish a new connection: {failure}") from failure


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class Adapter(HTTPAdapter):
    """requests' own, over these connections.

    Args:
        border: Whom to ask where they may lead; None allows all.
    """

    def __init__(self, border: Border | None) -> None:
        # What a pool does not know, it hands to its connections.
        self._pools = {kind: functools.partial(pool, border=border) for kind, pool in _POOLS.items()}
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """As requests has it, for these pools."""
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """As requests has it, for these pools."""
        manager = super().proxy_manager_for(proxy, **options)
        if not proxy.lower().startswith("socks"):  # whose pools have connections of their own
            manager.pool_classes_by_scheme = self._pools
        return manager


_POOLS = {"http": _Pool, "https": _TlsPool}
