"""A file server on loopback that can be told to misbehave.

    with FileServer() as server:
        url = server.add("/weights/model.pth", content)     # strong ETag, Last-Modified, ranges
        server.fail("model", Fault(reset=1000), times=1)    # the next answer ends in a reset
        ...
        assert server.count("model") == 2
        assert server.requests[1].headers["Range"] == "bytes=1000-"

Each server listens on a port of its own and so is another origin; ``FileServer(host="127.0.0.2")``
is another host as well. It answers GET and HEAD as RFC 9110 asks: conditional requests (13), ranges (14).
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import fcntl
import gzip
import hashlib
import os
import re
import socket
import ssl
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

__all__ = ["Fault", "FileServer", "Request", "basic"]

_EPOCH_S = 1_700_000_000


@dataclass(frozen=True)
class Request:
    """What was asked. `headers` has the names as they were sent; `requests` sends them capitalized."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Fault:
    """How to misbehave. Counts of bytes are of this answer's body, after the headers.

    Attributes:
        status: Answer this in place of the file.
        headers: With these headers besides; None takes one away.
        body: With this body. Without `status`, 200 and this in place of the file.
        redirect: Answer 302 to this address; ``{path}`` is what was asked.
        truncate: Say the real length, send so many bytes, close.
        reset: Say the real length, send so many bytes, reset the connection (RST).
        stall: Say the real length, send so many bytes, then wait until `resume` is set.
        length: Say this Content-Length whatever the body has; close at the body's end.
        chunked: Say no length, send the body in chunks of 1000 bytes.
        gzip: Compress the body and say so, though it was not asked for. Ranges are ignored.
        content_range: Say this in place of the right Content-Range of a 206.
        then: Called when the answer has been sent, before the connection ends.
        stalled: Set when a stall begins.
        resume: Ends a stall.
    """

    status: int | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: bytes | None = None
    redirect: str | None = None
    truncate: int | None = None
    reset: int | None = None
    stall: int | None = None
    length: int | None = None
    chunked: bool = False
    gzip: bool = False
    content_range: str | None = None
    then: Callable[[], object] | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _File:
    content: bytes
    etag: str | None
    last_modified: str | None
    ranges: bool
    version: int


class FileServer:
    """The server; a context manager.

    Args:
        host: Address on loopback to listen on, such as ``127.0.0.2``.
        tls: Speak https with this context.

    Attributes:
        requests: All that was asked, in order.
        authorization: The ``Authorization`` that every request must have, or None; see `basic`.
        refusal: The status for a request without it: 401, 403 or 404.
    """

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.authorization: str | None = None
        self.refusal = 401
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._faults: list[tuple[re.Pattern[str], Fault, list[int]]] = []
        self._http = _Server((host, 0), _Handler)
        self._http.files = self
        self._scheme = "http"
        if tls is not None:
            self._scheme = "https"
            # The handshake is left to the connection's own thread.
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def host(self) -> str:
        """Address and port."""
        return f"{self._http.server_address[0]}:{self._http.server_port}"

    @property
    def url(self) -> str:
        """Scheme, address and port."""
        return f"{self._scheme}://{self.host}"

    def add(
        self,
        path: str,
        content: bytes,
        *,
        etag: Literal["strong", "weak"] | None = "strong",
        last_modified: bool = True,
        ranges: bool = True,
    ) -> str:
        """Serve a file; returns its URL.

        Args:
            path: Begins with a slash; a query is not compared.
            content: Its bytes.
            etag: Kind of its ETag, which is of the content.
            last_modified: Whether it has a date; each `replace` makes it a second younger.
            ranges: Whether ranges are answered with 206, or the whole file with 200.
        """
        with self._lock:
            self._files[path] = _file(content, etag, last_modified, ranges, 0)
        return self.url + path

    def replace(self, path: str, content: bytes) -> None:
        """Serve other content at the same place, with another ETag and date."""
        with self._lock:
            old = self._files[path]
            kind: Literal["strong", "weak"] | None = "strong"
            if old.etag is None or old.etag.startswith("W/"):
                kind = None if old.etag is None else "weak"
            self._files[path] = _file(content, kind, old.last_modified is not None, old.ranges, old.version + 1)

    def remove(self, path: str) -> None:
        """Answer 404 from now on."""
        with self._lock:
            del self._files[path]

    def fail(self, path: str, fault: Fault, times: int = 1_000_000) -> Fault:
        """Misbehave for the next requests whose path and query match a regular expression.

        Faults that were told first are spent first.
        """
        with self._lock:
            self._faults.append((re.compile(path), fault, [times]))
        return fault

    def behave(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._faults.clear()

    def count(self, path: str = "") -> int:
        """How many requests had a path and query that match a regular expression."""
        with self._lock:
            return sum(re.search(path, request.path) is not None for request in self.requests)

    def forget(self) -> None:
        """Count from zero."""
        with self._lock:
            self.requests.clear()

    def record(self, request: Request) -> tuple[_File | None, Fault | None]:
        """Note a request; what to answer, and how to misbehave. For the handler."""
        with self._lock:
            self.requests.append(request)
            file = self._files.get(request.path.partition("?")[0])
            for pattern, fault, left in self._faults:
                if left[0] > 0 and pattern.search(request.path):
                    left[0] -= 1
                    return file, fault
        return file, None

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for _, fault, _ in self._faults:
                fault.resume.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def basic(user: str, password: str) -> str:
    """The ``Authorization`` of a user and a password."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")


def _file(content: bytes, etag: Literal["strong", "weak"] | None, dated: bool, ranges: bool, version: int) -> _File:
    tag = None
    if etag is not None:
        tag = ("W/" if etag == "weak" else "") + f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    date = email.utils.formatdate(_EPOCH_S + version, usegmt=True) if dated else None
    return _File(content, tag, date, ranges, version)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # server_close would wait for connections that clients keep open.
    block_on_close = False
    request_queue_size = 128
    files: FileServer

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that end in the middle are what some tests are about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server.files
        file, fault = server.record(Request(self.command, self.path, dict(self.headers)))
        if server.authorization is not None and self.headers.get("Authorization") != server.authorization:
            headers: dict[str, str | None] = {"WWW-Authenticate": 'Basic realm="x"'} if server.refusal == 401 else {}
            self._send(server.refusal, b"no", headers, Fault())
        elif fault is not None and fault.redirect is not None:
            self._send(302, b"", {"Location": fault.redirect.format(path=self.path)}, fault)
        elif fault is not None and (fault.status is not None or fault.body is not None):
            self._send(fault.status or 200, b"no" if fault.body is None else fault.body, {}, fault)
        elif file is None:
            self._send(404, b"Not Found", {}, fault or Fault())
        else:
            self._send(*self._answer(file, fault or Fault()), fault or Fault())

    do_HEAD = do_GET

    def _answer(self, file: _File, fault: Fault) -> tuple[int, bytes, dict[str, str | None]]:
        headers: dict[str, str | None] = {"Content-Type": "application/octet-stream"}
        if file.etag is not None:
            headers["ETag"] = file.etag
        if file.last_modified is not None:
            headers["Last-Modified"] = file.last_modified
        if file.etag is not None and self.headers.get("If-None-Match") == file.etag:
            return 304, b"", headers
        if fault.gzip:
            return 200, gzip.compress(file.content, 6), {**headers, "Content-Encoding": "gzip"}
        headers["Accept-Ranges"] = "bytes" if file.ranges else "none"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not file.ranges or not self._same(file):
            return 200, file.content, headers
        size, first = len(file.content), int(asked[1])
        last = min(int(asked[2]), size - 1) if asked[2] else size - 1
        if first > last:
            return 416, b"", {"Content-Range": f"bytes */{size}"}
        headers["Content-Range"] = fault.content_range or f"bytes {first}-{last}/{size}"
        return 206, file.content[first : last + 1], headers

    def _same(self, file: _File) -> bool:
        """Whether If-Range holds: by a strong comparison (RFC 9110, 13.1.5)."""
        asked = self.headers.get("If-Range")
        if asked is None or asked == file.last_modified:
            return True
        return asked == file.etag and not asked.startswith("W/")

    def _send(self, status: int, content: bytes, headers: Mapping[str, str | None], fault: Fault) -> None:
        self.send_response_only(status)
        length = len(content) if fault.length is None else fault.length
        said: dict[str, str | None] = {"Date": self.date_time_string(), **headers, "Content-Length": str(length)}
        if fault.chunked:
            said["Transfer-Encoding"] = "chunked"
            pieces = [content[at : at + 1000] for at in range(0, len(content), 1000)]
            content = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])
        if status == 304 or fault.chunked:
            del said["Content-Length"]
        said.update(fault.headers)
        for name, value in said.items():
            if value is not None:
                self.send_header(name, value)
        if said.get("Content-Length", "") is None or fault.length is not None:
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._send_body(content, fault)
        if fault.then is not None:
            fault.then()
        if fault.reset is not None:
            self._reset()

    def _reset(self) -> None:
        """Send RST, once the client's kernel has all that was written: what waits here would be lost (socket(7))."""
        waiting = b"\0\0\0\1"
        with contextlib.suppress(OSError):
            while int.from_bytes(waiting, sys.byteorder) > 0:
                waiting = fcntl.ioctl(self.connection, termios.TIOCOUTQ, b"\0\0\0\0")
                time.sleep(0.001)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # `shutdown` would send FIN first

    def _send_body(self, content: bytes, fault: Fault) -> None:
        for limit in (fault.truncate, fault.reset):
            if limit is not None:
                self.wfile.write(content[:limit])
                self.close_connection = True
                return
        if fault.stall is not None:
            self.wfile.write(content[: fault.stall])
            self.wfile.flush()
            fault.stalled.set()
            fault.resume.wait()
            content = content[fault.stall :]
        self.wfile.write(content)
