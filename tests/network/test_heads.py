"""Heads that read in one way only: what passes, what does not, and that nothing of what came is repeated unread."""

from __future__ import annotations

import http.client
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isohub.network.heads import Answer, Bad, Request, head_end, parse_answer, parse_request, write_refusal
from isohub.sandbox.hosts import Target


def request(line: str, *fields: str) -> Request | Bad:
    return parse_request("\r\n".join([line, *fields, "", ""]).encode("latin-1"))


def test_a_tunnel():
    for line in ("CONNECT a.example:443 HTTP/1.1", "CONNECT A.example:443 HTTP/1.0"):
        for fields in ((), ("Host: a.example:443",), ("Host: A.EXAMPLE",)):
            asked = request(line, *fields)
            assert isinstance(asked, Request)
            assert (asked.method, asked.target, asked.path) == ("CONNECT", Target("a.example", 443), "")


def test_a_request_is_written_anew():
    asked = request(
        "POST HTTP://A.Example:8080/p?q=1 HTTP/1.1",
        "host: a.example:8080",
        "X-One:1  ",
        "CONNECTION: X-Two, keep-alive",
        "x-two: 2",
        "content-length: 5",
        "Proxy-Authorization: Basic eA==",
        "Proxy-Connection: keep-alive",
        "Keep-Alive: 5",
        "TE: trailers",
        "Trailer: X",
        "Upgrade: websocket",
        "Expect: 100-continue",
        "Cookie: a=b",
    )
    assert isinstance(asked, Request)
    assert asked.body_bytes == 5
    assert asked.head() == (
        b"POST /p?q=1 HTTP/1.1\r\nHost: a.example:8080\r\nConnection: close\r\nContent-Length: 5\r\n"
        b"X-One: 1\r\nCookie: a=b\r\n\r\n"
    )
    outer = asked.head(outer="Proxy-Authorization: Basic eQ==\r\n")
    assert outer.startswith(b"POST http://a.example:8080/p?q=1 HTTP/1.1\r\nHost: a.example:8080\r\n")
    assert outer.count(b"Proxy-Authorization: Basic eQ==\r\n") == 1


def test_the_default_port_and_path():
    asked = request("GET http://a.example HTTP/1.1", "Host: a.example:80")
    assert isinstance(asked, Request)
    assert asked.head() == b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"
    asked = request("GET http://a.example?q HTTP/1.0")
    assert isinstance(asked, Request)
    assert asked.head().startswith(b"GET /?q HTTP/1.0\r\nHost: a.example\r\n")
    asked = request("GET http://[fd00::7]:80/ HTTP/1.1", "Host: [fd00:0::7]")
    assert isinstance(asked, Request)
    assert b"\r\nHost: [fd00::7]\r\n" in asked.head()


def test_a_connection_field_cannot_take_what_is_needed_away():
    asked = request(
        "POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: 3", "Connection: Host, Content-Length"
    )
    assert isinstance(asked, Request)
    assert b"Host: a.example\r\n" in asked.head()
    assert b"Content-Length: 3\r\n" in asked.head()


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["GET / HTTP/1.1", "Host: a.example"], 400),
        (["GET https://a.example/ HTTP/1.1", "Host: a.example"], 400),
        (["GET ftp://a.example/ HTTP/1.1", "Host: a.example"], 400),
        (["GET http://a.example/#f HTTP/1.1", "Host: a.example"], 400),
        (["GET http://u:p@a.example/ HTTP/1.1", "Host: a.example"], 400),
        (["GET http://a.example@b.example/ HTTP/1.1", "Host: b.example"], 400),
        (["GET http://a.example\\@b.example/ HTTP/1.1", "Host: a.example"], 400),
        (["GET http://a.example./ HTTP/1.1", "Host: a.example."], 400),
        (["GET http://a.example:/ HTTP/1.1", "Host: a.example"], 400),
        (["GET http:///x HTTP/1.1", "Host: a.example"], 400),
        (["GET http://2130706433/ HTTP/1.1", "Host: 2130706433"], 400),
        (["GET http://a.example/ HTTP/1.1"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: b.example"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: a.example:81"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: "], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: a.example", "Host: a.example"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: a.example", "host: b.example"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: a.example, b.example"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host : a.example"], 400),
        (["GET http://a.example/ HTTP/1.1", " Host: a.example"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: a.example", " folded"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: a.example", "\tfolded: x"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: a.example", "no colon"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: a.example", ": empty"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: a.example", "X: \x01"], 400),
        (["GET http://a.example/ HTTP/1.1", "Host: a.example", "X\xe4: 1"], 400),
        (["POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: 1", "Content-Length: 1"], 400),
        (["POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: 1", "Content-Length: 2"], 400),
        (["POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: 1, 1"], 400),
        (["POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: +1"], 400),
        (["POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: 0x1"], 400),
        (["POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: "], 400),
        (["POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: " + "9" * 19], 400),
        (
            ["POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: 1", "Transfer-Encoding: chunked"],
            400,
        ),
        (["POST http://a.example/ HTTP/1.1", "Host: a.example", "Transfer-Encoding: chunked"], 411),
        (["POST http://a.example/ HTTP/1.1", "Host: a.example", "Transfer-Encoding: xchunked"], 411),
        (["CONNECT a.example HTTP/1.1"], 400),
        (["CONNECT a.example:443/ HTTP/1.1"], 400),
        (["CONNECT http://a.example:443 HTTP/1.1"], 400),
        (["CONNECT u@a.example:443 HTTP/1.1"], 400),
        (["CONNECT a.example:443 HTTP/1.1", "Host: b.example:443"], 400),
        (["CONNECT a.example:443 HTTP/1.1", "Host: a.example:80"], 400),
        (["CONNECT a.example:443 HTTP/1.1", "Content-Length: 5"], 400),
        (["CONNECT [::ffff:127.0.0.1]:443 HTTP/1.1"], 400),
        (["CONNECT ::1:443 HTTP/1.1"], 400),
        (["CONNECT fe80::1%25lo:443 HTTP/1.1"], 400),
        (["TRACE http://a.example/ HTTP/1.1", "Host: a.example"], 405),
        (["get http://a.example/ HTTP/1.1", "Host: a.example"], 400),
        (["GET  http://a.example/ HTTP/1.1", "Host: a.example"], 400),
        (["GET http://a.example/ x HTTP/1.1", "Host: a.example"], 400),
        (["GET http://a.example/\x0b HTTP/1.1", "Host: a.example"], 400),
        (["GET http://b\xfccher.example/ HTTP/1.1", "Host: a.example"], 400),
        (["GET http://a.example/ HTTP/2.0", "Host: a.example"], 400),
        (["GET http://a.example/ HTTP/1.1 ", "Host: a.example"], 400),
        (["GET http://a.example/", "Host: a.example"], 400),
        (["", "GET http://a.example/ HTTP/1.1", "Host: a.example"], 400),
        (["PRI * HTTP/2.0"], 400),
    ],
)
def test_what_reads_in_two_ways_is_refused(lines, status):
    bad = request(*lines)
    assert isinstance(bad, Bad)
    assert bad.status == status
    assert bad.reason.isprintable()
    assert isinstance(request("GET http://a.example/ HTTP/1.1", "Host: a.example"), Request)  # the control


@pytest.mark.parametrize(
    "data", [b"GET x\n\n", b"GET x\nHost: a\r\n", b"GET x\rHost", b"GET\0", b"\x16\x03\x01\0", b"a\r\n\n", b"a\r\r\n"]
)
def test_line_ends_are_both_characters(data):
    assert isinstance(head_end(data), Bad)


def test_where_a_head_ends_does_not_depend_on_how_it_comes():
    data = b"GET x\r\nA: b\r\n\r\nbody\n\0"
    buffer = bytearray()
    for number in range(len(data)):
        scanned = len(buffer)
        buffer += data[number : number + 1]
        end = head_end(buffer, scanned)
        assert end == (None if number < 14 else 15)
        if end is not None:
            break


def answer(line: str, *fields: str, method: str = "GET") -> Answer | Bad:
    return parse_answer("\r\n".join([line, *fields, "", ""]).encode("latin-1"), method)


def test_answers():
    found = answer(
        "HTTP/1.1 200 OK", "Content-Length: 5", "Connection: keep-alive, X-One", "X-One: 1", "X-Two: 2", "Keep-Alive: 5"
    )
    assert found == Answer(200, b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\nX-Two: 2\r\n\r\n", 5)
    chunked = answer("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", "Content-Length: 5")
    assert isinstance(chunked, Answer)
    assert chunked.body_bytes is None
    assert b"Content-Length" not in chunked.head
    assert b"Transfer-Encoding: chunked\r\n" in chunked.head
    for status, method in ((204, "GET"), (304, "GET"), (200, "HEAD")):
        found = answer(f"HTTP/1.1 {status} x", "Content-Length: 5", method=method)
        assert isinstance(found, Answer)
        assert found.body_bytes == 0
    assert isinstance(answer("HTTP/1.0 200"), Answer)


@pytest.mark.parametrize(
    "lines",
    [["HTTP/2 200"], ["ICY 200 OK"], ["HTTP/1.1 20 OK"], ["HTTP/1.1 101 Switching"], ["HTTP/1.1 200 OK", " folded"], [""],
     ["HTTP/1.1 200 OK", "Content-Length: 1", "Content-Length: 2"], ["HTTP/1.1 200 OK", "Content-Length: -1"], ["HTTP/1.1 200 \x07"]],
)  # fmt: skip
def test_answers_that_are_none(lines):
    bad = answer(*lines)
    assert isinstance(bad, Bad)
    assert bad.status == 502


def test_a_refusal_is_plain_text():
    data = write_refusal(403, "no \x1b[2J \u202e\r\nSet-Cookie: x")
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert b"Set-Cookie" not in head
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"\x1b" not in body
    assert write_refusal(403, "no", body=False).endswith(b"\r\n\r\n")


@given(st.binary(max_size=200))
@example(b"CONNECT a:1 HTTP/1.1")
def test_any_bytes_are_a_request_or_are_refused(data):
    found = parse_request(data + b"\r\n\r\n")
    assert isinstance(found, (Request, Bad))
    assert isinstance(parse_answer(data + b"\r\n\r\n", "GET"), (Answer, Bad))


PIECES = st.sampled_from(
    ["GET", "POST", "CONNECT", " ", "http://", "a.example", "b.example", ":80", ":443", "/", "@", "#", "?", "\\", " HTTP/1.1", "\r\n",
     "Host: ", "Content-Length: ", "Transfer-Encoding: chunked", "5", "Connection: close, host", "\t", "\x00", "\r", "\n", "[::1]"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=14).map("".join))
def test_what_passes_is_read_by_others_as_it_was_here(text):
    """The standard library's server reads what is sent on: the same method, Host and length, once each."""
    data = f"{text}\r\n\r\n".encode()
    end = head_end(data)
    assert end is not None
    if isinstance(end, Bad) or end != len(data):
        return
    found = parse_request(data)
    if isinstance(found, Bad) or found.method == "CONNECT":
        return
    first, _, fields = found.head().partition(b"\r\n")
    assert first.split(b" ")[1].startswith(b"/")
    parsed = http.client.parse_headers(io.BytesIO(fields))
    host = str(found.target).removesuffix(":80") if found.target.port == 80 else str(found.target)
    assert parsed.get_all("Host") == [host]
    assert parsed.get_all("Content-Length") == (None if found.body_bytes is None else [str(found.body_bytes)])
    assert parsed.get_all("Transfer-Encoding") is None
    assert parsed.get_all("Connection") == ["close"]
