"""Heads of HTTP/1 messages, as a proxy for somebody hostile reads and writes them: no I/O.

Rules:

1. A request names one target, and in one way: by CONNECT ``host:port``, or by a whole ``http://`` address. What a Host
   field says besides must be the same.
2. What two readers could read differently is refused: bare CR or LF, NUL, folded lines, white space before a colon,
   a field twice that may be there once, two lengths, a user name, a fragment.
3. What is sent on is written anew from what was understood: never the bytes that came. It asks to close, and carries
   nothing that is for one hop.
4. The length of a request's body is a Content-Length or nothing. Chunked ones are refused (411).

Side: caller. Trust: requests are the worker's, answers are the network's.
Source: RFC 9112, 2.2 (line ends), 3.2 (targets), 5.2 (folding), 6.3 (lengths), 9.6 (close); RFC 9110, 7.6.1 (hops)
and 9.3.6 (CONNECT).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import HTTPStatus

from isohub.errors import printable
from isohub.sandbox.hosts import Refused, Target, parse_target

__all__ = ["Answer", "Bad", "Request", "head_end", "parse_answer", "parse_request", "write_refusal"]

_END = b"\r\n\r\n"
_BARE = re.compile(rb"\0|(?<!\r)\n|\r(?!\n|\Z)")
_REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]{1,8192}) HTTP/1\.([01])")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [\t -~\x80-\xff]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
_ABSOLUTE = re.compile(r"http://([^/?#]*)([/?][^#]*)?", re.IGNORECASE)
_LENGTH = re.compile(rb"[0-9]{1,18}")
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
# Of one hop (RFC 9110, 7.6.1), or what only whoever answers the next byte can honour.
_HOPS = frozenset(
    {
        b"connection", b"expect", b"http2-settings", b"keep-alive", b"proxy-authenticate", b"proxy-authentication-info",
        b"proxy-authorization", b"proxy-connection", b"te", b"trailer", b"upgrade",
    }
)  # fmt: skip
_OWN = frozenset({b"host", b"content-length", b"transfer-encoding"})

_Fields = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Bad:
    """A head that is not taken.

    Attributes:
        status: What to answer.
        reason: Why, safe to show.
    """

    status: int
    reason: str


@dataclass(frozen=True)
class Request:
    """What a worker asks of the proxy.

    Attributes:
        method: ``CONNECT`` or one of HTTP's.
        target: Where to.
        path: Begins with a slash; empty for CONNECT.
        version: ``1.0`` or ``1.1``.
        fields: What goes on, without what `head` writes.
        body_bytes: How long the body is; None if there is none.
    """

    method: str
    target: Target
    path: str
    version: str
    fields: _Fields
    body_bytes: int | None

    def head(self, *, outer: str | None = None) -> bytes:
        """The head to send on.

        Args:
            outer: For another proxy: the fields for it, each with its line's end; else None.
        """
        host = str(self.target)
        if self.target.port == 80:
            host = host.removesuffix(":80")
        path = self.path if outer is None else f"http://{host}{self.path}"
        lines = f"{self.method} {path} HTTP/{self.version}\r\nHost: {host}\r\nConnection: close\r\n{outer or ''}"
        if self.body_bytes is not None:
            lines += f"Content-Length: {self.body_bytes}\r\n"
        return lines.encode("ascii") + _written(self.fields) + b"\r\n"


@dataclass(frozen=True)
class Answer:
    """What a server says.

    Attributes:
        status: Of three digits; below 200 another head follows.
        head: To be sent on.
        body_bytes: How long the body is; None if the connection's end ends it.
    """

    status: int
    head: bytes
    body_bytes: int | None


def head_end(buffer: bytes | bytearray, scanned: int = 0) -> int | Bad | None:
    """Where a head ends, None if it does not yet.

    Args:
        buffer: What came so far.
        scanned: How much of it an earlier call has seen.
    """
    start = max(0, scanned - len(_END))
    end = buffer.find(_END, start)
    stop = len(buffer) if end < 0 else end + len(_END)
    if _BARE.search(buffer, start, stop):
        return Bad(400, "a line that ends with a bare CR or LF, or a NUL")
    return None if end < 0 else stop


def parse_request(head: bytes) -> Request | Bad:
    """Read a request.

    Args:
        head: Up to and with the empty line.
    """
    first, *lines = head.removesuffix(_END).split(b"\r\n")
    matched = _REQUEST_LINE.fullmatch(first)
    if matched is None:
        return Bad(400, "expected CONNECT host:port HTTP/1.1, or GET http://host/path HTTP/1.1")
    method, version = matched[1].decode("ascii"), f"1.{matched[3].decode('ascii')}"
    fields = _fields(lines)
    if isinstance(fields, Bad):
        return fields
    body = _body_bytes(fields)
    if isinstance(body, Bad):
        return body
    if method == "CONNECT":
        found = _target(matched[2].decode("ascii"), None)
        path = ""
        if body:
            return Bad(400, "a CONNECT with a body")
    elif method in _METHODS:
        absolute = _ABSOLUTE.fullmatch(matched[2].decode("ascii"))
        if absolute is None:
            return Bad(400, "expected a whole address, http://host/path without a fragment; https goes by CONNECT")
        found = _target(absolute[1], 80)
        path = absolute[2] or "/"
        path = path if path.startswith("/") else f"/{path}"
    else:
        return Bad(405, f"the method {method} is not passed on")
    if isinstance(found, Bad):
        return found
    named = _host(fields, found, version, method)
    if named is not None:
        return named
    return Request(method, found, path, version, _kept(fields), None if method == "CONNECT" else body)


def parse_answer(head: bytes, method: str) -> Answer | Bad:
    """Read an answer.

    Args:
        head: Up to and with the empty line.
        method: Of what was asked: an answer to HEAD has no body.
    """
    first, *lines = head.removesuffix(_END).split(b"\r\n")
    matched = _STATUS_LINE.fullmatch(first)
    if matched is None:
        return Bad(502, "the server does not answer in HTTP/1")
    status = int(matched[1])
    if status == 101:
        return Bad(502, "the server changes to another protocol, which nobody asked for")
    fields = _fields(lines)
    if isinstance(fields, Bad):
        return Bad(502, f"the server answers with {fields.reason}")
    lengths = {value for name, value in fields if name.lower() == b"content-length"}
    coded = [value for name, value in fields if name.lower() == b"transfer-encoding"]
    if len(lengths) > 1 or not all(_LENGTH.fullmatch(length) for length in lengths):
        return Bad(502, "the server answers with a length that is none")
    own = b"Connection: close\r\n" + _written(tuple((b"Transfer-Encoding", value) for value in coded))
    body = None
    if lengths and not coded:
        (length,) = lengths
        own += b"Content-Length: " + length + b"\r\n"
        body = int(length)
    if method == "HEAD" or status in (204, 304) or status < 200:
        body = 0
    return Answer(status, first + b"\r\n" + own + _written(_kept(fields)) + b"\r\n", body)


def write_refusal(status: int, reason: str, *, body: bool = True) -> bytes:
    """An answer of the proxy's own.

    Args:
        status: Of three digits.
        reason: Escaped here.
        body: False for an answer to HEAD.
    """
    text = f"isohub: {printable(reason, limit_chars=1000)}\n".encode("ascii", "backslashreplace")
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + (text if body else b"")


def _fields(lines: list[bytes]) -> _Fields | Bad:
    found = []
    for line in lines:
        matched = _FIELD.fullmatch(line)
        if matched is None:
            return Bad(400, "a header that is folded, or none")
        found.append((matched[1], matched[2].rstrip(b" \t")))
    return tuple(found)


def _body_bytes(fields: _Fields) -> int | Bad | None:
    lengths = [value for name, value in fields if name.lower() == b"content-length"]
    if any(name.lower() == b"transfer-encoding" for name, _ in fields):
        if lengths:
            return Bad(400, "two lengths, Content-Length and Transfer-Encoding")
        return Bad(411, "a body without Content-Length; write it with one")
    if not lengths:
        return None
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        return Bad(400, "a Content-Length twice, or one that is no number")
    return int(lengths[0])


def _target(authority: str, default_port: int | None) -> Target | Bad:
    found = parse_target(authority, default_port)
    return Bad(400, found.reason) if isinstance(found, Refused) else found


def _host(fields: _Fields, target: Target, version: str, method: str) -> Bad | None:
    """What is wrong with the Host fields."""
    hosts = [value for name, value in fields if name.lower() == b"host"]
    if not hosts:
        # Some clients send CONNECT without; it has its target, and nothing is written from a Host field.
        return None if version == "1.0" or method == "CONNECT" else Bad(400, "no Host")
    if len(hosts) > 1:
        return Bad(400, "Host twice")
    named = parse_target(hosts[0].decode("latin-1"), target.port if method == "CONNECT" else 80)
    if named != target:
        return Bad(400, "a Host that is not the target's")
    return None


def _kept(fields: _Fields) -> _Fields:
    listed = b",".join(value for name, value in fields if name.lower() == b"connection")
    dropped = _HOPS | _OWN | {name.strip(b" \t").lower() for name in listed.split(b",")}
    return tuple((name, value) for name, value in fields if name.lower() not in dropped)


def _written(fields: _Fields) -> bytes:
    return b"".join(name + b": " + value + b"\r\n" for name, value in fields)
