"""The proxy of a worker without a network: real sockets, real servers, and peers that keep no rule."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isohub.network.proxy import AllowListProxy
from isohub.network.relay import ProxyLimits
from isohub.sandbox.hosts import HostPolicy
from tests.conftest import eventually, open_descriptors
from tests.servers.files import Fault, FileServer
from tests.servers.proxy import ProxyServer
from tests.servers.tls import authority


def port_of(server) -> int:
    return int(server.host.rpartition(":")[2])


def listening(backlog: int = 16) -> socket.socket:
    """In a worker's namespace it is the same; here it is on this machine's loopback."""
    return socket.create_server(("127.0.0.1", 0), backlog=backlog)


@pytest.fixture
def server():
    with FileServer() as made:
        yield made


@pytest.fixture
def proxy():
    """Makes proxies, and holds them to rule 5: nothing of theirs stays."""
    threads = threading.active_count()
    with contextlib.ExitStack() as stack:

        def make(*hosts, **limits):
            made = AllowListProxy(listening(), HostPolicy(hosts), who="them", limits=ProxyLimits(**limits))
            stack.callback(made.close)
            return made

        yield make
    assert eventually(lambda: threading.active_count() <= threads)


def address(proxy) -> tuple[str, int]:
    return proxy.address


def get(proxy, url, **options):
    """As a worker's requests would: with the proxy in its environment."""
    host, port = address(proxy)
    with requests.Session() as session:
        session.trust_env = False
        session.proxies = {"http": f"http://{host}:{port}", "https": f"http://{host}:{port}"}
        return session.request(options.pop("method", "GET"), url, timeout=20, **options)


def say(proxy, *pieces, end=False, within_s=20.0) -> bytes:
    """Send these bytes, and read to the end."""
    with socket.create_connection(address(proxy), timeout=within_s) as connection:
        for piece in pieces:
            connection.sendall(piece)
        if end:
            connection.shutdown(socket.SHUT_WR)
        data = b""
        while piece := connection.recv(1 << 16):
            data += piece
        return data


def connected(proxy, target: str) -> socket.socket:
    connection = socket.create_connection(address(proxy), timeout=20)
    connection.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = connection.recv(1)
        assert piece, head
        head += piece
    assert head.startswith(b"HTTP/1.1 200 "), head
    return connection


@contextlib.contextmanager
def raw_server(act):
    """Does this with each connection, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=once, args=(connection,), daemon=True).start()

    def once(connection):
        with connection, contextlib.suppress(OSError):
            act(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def read_head(connection) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(1 << 16)
        if not piece:
            break
        data += piece
    return data


def test_requests_go_where_the_policy_leads_and_nowhere_else(proxy, server, caplog):
    url = server.add("/w.bin", b"bytes" * 1000)
    with caplog.at_level("INFO", logger="isohub.network"):
        made = proxy(server.host)
        found = get(made, f"{url}?q=1")
        assert (found.status_code, found.content) == (200, b"bytes" * 1000)
        assert server.requests[-1].path == "/w.bin?q=1"
        assert server.requests[-1].headers["Connection"] == "close"
        assert not [name for name in server.requests[-1].headers if name.lower().startswith("proxy")]
        assert f"them: {server.host} is allowed by {server.host}" in caplog.text
        assert eventually(lambda: f"them: {server.host} ended:" in caplog.text)
        assert {record.levelno for record in caplog.records} == {logging.INFO}
        assert made.received_bytes > 5000
        caplog.clear()
        refused = get(proxy("a.example"), url)
    assert refused.status_code == 403
    assert f"{server.host} is not named by the network policy" in refused.text
    assert f"isohub.Sandbox(network=['{server.host}'])" in refused.text
    assert server.count() == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_tunnels_go_where_the_policy_leads_and_nowhere_else(proxy, tmp_path, monkeypatch):
    path, context = authority(tmp_path / "ca")
    with FileServer(tls=context) as server:
        url = server.add("/w.bin", b"bytes")
        assert get(proxy(server.host), url, verify=str(path)).content == b"bytes"
        with pytest.raises(requests.exceptions.ProxyError, match="403 Forbidden"):
            get(proxy("a.example"), url, verify=str(path))
        by_name = url.replace("127.0.0.1", "localhost")
        name = f"localhost:{port_of(server)}"
        with pytest.raises(requests.exceptions.ProxyError, match="403 Forbidden"):
            get(proxy(name), by_name, verify=str(path))  # it is named, and leads home
        assert get(proxy(name, server.host, f"[::1]:{port_of(server)}"), by_name, verify=str(path)).content == b"bytes"
        assert server.count() == 2


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_bodies_go_along(proxy, method):
    def echo(connection):
        head = read_head(connection)
        data = head.partition(b"\r\n\r\n")[2]
        while len(data) < 300_000:
            data += connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 300000\r\n\r\n" + data)
        connection.recv(1)

    with raw_server(echo) as host:
        found = get(proxy(host), f"http://{host}/", method=method, data=b"x" * 300_000)
    assert found.content == b"x" * 300_000
    assert found.headers["Connection"] == "close"


def test_head_has_no_body_and_neither_has_its_refusal(proxy, server):
    url = server.add("/w.bin", b"bytes")
    made = proxy(server.host)
    assert get(made, url, method="HEAD").headers["Content-Length"] == "5"
    data = say(made, b"HEAD http://b.example/ HTTP/1.1\r\nHost: b.example\r\n\r\n")
    assert data.startswith(b"HTTP/1.1 403 ")
    assert data.endswith(b"\r\n\r\n")


def test_the_address_that_was_checked_is_the_one_that_is_dialled(proxy, server, monkeypatch):
    """DNS rebinding, mixed answers, and names that lead where no public host is."""
    asked, real = [], socket.getaddrinfo
    answers: list[list[str]] = []

    def answer(host, port, *args, **kwargs):
        if not host.endswith(".example"):
            return real(host, port, *args, **kwargs)
        asked.append(host)
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    port = port_of(server)
    made = proxy(f"a.example:{port}", server.host, f"127.0.0.3:{port}")
    ask = f"GET http://a.example:{port}/w HTTP/1.1\r\nHost: a.example:{port}\r\n\r\n".encode()
    server.add("/w", b"bytes")
    with FileServer(host="127.0.0.2") as other:
        answers[:] = [["127.0.0.1"], ["127.0.0.2"]]
        assert say(made, ask).endswith(b"bytes")
        assert asked == ["a.example"]
        assert server.requests[-1].headers["Host"] == f"a.example:{port}"
        said = say(made, ask)
        assert said.startswith(b"HTTP/1.1 403 ")
        assert b"leads to 127.0.0.2, a loopback address" in said
        answers[:] = [["10.0.0.1", "127.0.0.3", "127.0.0.1", "169.254.169.254"]]
        assert say(made, ask).endswith(b"bytes")  # of those that may be dialled the second answers
        for address_, kind in (("169.254.169.254", b"cloud metadata"), ("::ffff:127.0.0.2", b"loopback")):
            answers[:] = [[address_]]
            assert kind in say(made, ask)
        assert say(made, ask).startswith(b"HTTP/1.1 502 ")
        asked.clear()
        assert say(made, b"CONNECT b.example:443 HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 403 ")
        assert asked == []  # a resolver is a server too
        assert other.count() == 0


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n",
        b"GET http://{host}/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\nHost: evil.example\r\n\r\n",
        b"GET http://evil.example@{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n",
        b"GET http://{host}/#x HTTP/1.1\r\nHost: {host}\r\n\r\n",
        b"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\nX: a\r\n b\r\n\r\n",
        b"GET http://{host}/ HTTP/1.1\nHost: {host}\n\n",
        b"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\nX: a\rb\r\n\r\n",
        b"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\nX: \0\r\n\r\n",
        b"POST http://{host}/ HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST http://{host}/ HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxx",
        b"POST http://{host}/ HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\nGET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_reads_in_two_ways_reaches_nobody(proxy, request_, caplog):
    seen = []
    with raw_server(lambda connection: seen.append(read_head(connection))) as host:
        with caplog.at_level("WARNING", logger="isohub.network"):
            said = say(proxy(host), request_.replace(b"{host}", host.encode()))
        assert said.split(b" ")[1] in (b"400", b"411")
        assert seen == []
        assert "refused" in caplog.text
        say(proxy(host), b"GET http://%b/ HTTP/1.1\r\nHost: %b\r\n\r\n" % (host.encode(), host.encode()))
        assert eventually(lambda: len(seen) == 1)  # the control


def test_a_second_request_reaches_nobody(proxy):
    """Neither with the first nor later, nor behind a body, nor though the server offers to go on."""
    seen = []

    def serve(connection):
        seen.append(read_head(connection))
        while seen[-1].endswith(b"bo"):
            seen.append(connection.recv(1 << 16))
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok")
        while data := connection.recv(1 << 16):
            seen.append(data)

    with raw_server(serve) as host:
        made = proxy(host)
        one = f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        other = b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n"
        with socket.create_connection(address(made), timeout=20) as connection:
            connection.sendall(one)
            answer = read_head(connection)
            while not answer.endswith(b"ok"):
                answer += connection.recv(100)
            assert b"Connection: close\r\n" in answer
            with contextlib.suppress(ConnectionError):
                connection.sendall(other)
                assert connection.recv(100) == b""
        body = f"POST http://{host}/ HTTP/1.1\r\nHost: {host}\r\nContent-Length: 4\r\n\r\nbo".encode()
        with socket.create_connection(address(made), timeout=20) as connection:
            connection.sendall(body)
            assert eventually(lambda: b"".join(seen).endswith(b"bo"))
            connection.sendall(b"dy" + other)
            assert eventually(lambda: b"".join(seen).endswith(b"body"))
            with contextlib.suppress(ConnectionError):
                while connection.recv(100):
                    pass
        assert say(made, body + b"dy" + other).startswith(b"HTTP/1.1 400 ")
        assert b"evil" not in b"".join(seen)


def test_bytes_go_both_ways_in_a_tunnel_and_halves_close(proxy):
    def serve(connection):
        data = b""
        while piece := connection.recv(1 << 16):
            data += piece
        connection.sendall(b"got %d" % len(data))

    with raw_server(serve) as host:
        made = proxy(host)
        with connected(made, host) as tunnel:
            tunnel.sendall(b"x" * 3_000_000)
            tunnel.shutdown(socket.SHUT_WR)
            assert tunnel.recv(100) == b"got 3000000"
            assert tunnel.recv(100) == b""
        early = f"CONNECT {host} HTTP/1.1\r\n\r\nfirst words".encode()  # before the answer, as some clients do
        assert say(made, early, end=True).endswith(b"got 11")
        assert made.sent_bytes == 3_000_011


def test_much_goes_through(proxy, server):
    content = os.urandom(1 << 20) * 24
    url = server.add("/w.bin", content)
    made = proxy(server.host)
    assert get(made, url).content == content
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(get(made, url).content))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [len(content)] * 4


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"", b"502"),
        (b"SSH-2.0-x\r\n\r\n", b"502"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", b"502"),
        (b"HTTP/1.1 200 OK\r\n folded\r\n\r\n", b"502"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", b"502"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, b"502"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, b"502"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", b"204"),
        (b"HTTP/1.1 200 OK\r\n\r\nto the end", b"200"),
    ],
)
def test_servers_that_answer_oddly(proxy, answer, status):
    def serve(connection):
        read_head(connection)
        connection.sendall(answer)

    with raw_server(serve) as host:
        said = say(proxy(host), f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert said.split(b" ")[1] == status
    if status == b"200":
        assert said.endswith(b"to the end")


def test_a_server_that_answers_before_it_has_read_all(proxy):
    def serve(connection):
        read_head(connection)
        connection.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno")
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.2)

    with raw_server(serve) as host:
        with socket.create_connection(address(proxy(host)), timeout=20) as connection:
            connection.sendall(
                f"POST http://{host}/ HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9999999\r\n\r\nx".encode()
            )
            assert read_head(connection).startswith(b"HTTP/1.1 413 ")


def test_a_server_that_is_not_there_or_says_nothing(proxy):
    free = listening()
    gone = f"127.0.0.1:{free.getsockname()[1]}"
    free.close()
    with raw_server(lambda connection: connection.recv(1 << 16) and time.sleep(2)) as silent:
        made = proxy(gone, silent, idle_s=0.3)
        for text in (f"GET http://{gone}/ HTTP/1.1\r\nHost: {gone}\r\n\r\n", f"CONNECT {gone} HTTP/1.1\r\n\r\n"):
            assert say(made, text.encode()).startswith(b"HTTP/1.1 502 ")
        begun = time.monotonic()
        assert say(made, f"GET http://{silent}/ HTTP/1.1\r\nHost: {silent}\r\n\r\n".encode()).startswith(
            b"HTTP/1.1 504 "
        )
        with connected(made, silent) as tunnel:
            assert tunnel.recv(10) == b""
        assert time.monotonic() - begun < 1.8


def test_a_name_that_resolves_for_ever_holds_nobody(proxy, monkeypatch):
    release = threading.Event()
    real = socket.getaddrinfo

    def answer(host, *args, **kwargs):
        return real(host, *args, **kwargs) if host != "a.example" else release.wait(30) and []

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    made = proxy("a.example", connect_s=0.3, connections=2)
    ask = b"CONNECT a.example:443 HTTP/1.1\r\n\r\n"
    assert say(made, ask).startswith(b"HTTP/1.1 504 ")
    assert say(made, ask).startswith(b"HTTP/1.1 504 ")
    said = say(made, ask)  # both still wait: no third thread for it
    assert b"too many names" in said
    begun = time.monotonic()
    made.close()
    assert time.monotonic() - begun < 1
    release.set()


def test_heads_have_a_time_and_a_length(proxy):
    made = proxy(head_s=0.4, head_bytes=4096)
    begun = time.monotonic()
    assert say(made, b"GET http://a.example/").startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - begun < 2
    assert say(made, b"GET http://a.example/ HTTP/1.1\r\nX: " + b"x" * 5000).startswith(b"HTTP/1.1 431 ")
    assert say(made, b"GET http://a.example/ HTTP/1.1\r\nX: " + b"x" * 5000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    with socket.create_connection(address(made), timeout=20) as drip:  # a byte now and then is no more time
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while not select.select([drip], [], [], 0.05)[0]:
                drip.sendall(b"G")
        assert time.monotonic() - begun < 2
        assert drip.recv(20).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("limits", "sends", "brings"),
    [
        ({"sent_bytes": 100_000}, 200_000, 10), ({"total_sent_bytes": 100_000}, 200_000, 10),
        ({"received_bytes": 100_000}, 10, 200_000), ({"total_received_bytes": 100_000}, 10, 200_000),
    ],
)  # fmt: skip
def test_bytes_have_a_number(proxy, limits, sends, brings, caplog):
    got = []

    def serve(connection):
        data = b""
        while len(data) < sends and (piece := connection.recv(1 << 16)):
            data += piece
            got[:] = [len(data)]
        if len(data) >= sends:
            connection.sendall(b"y" * brings)

    def exchange(made):
        with connected(made, host) as tunnel:
            with contextlib.suppress(ConnectionError):
                tunnel.sendall(b"x" * sends)
                tunnel.settimeout(10)
                data = b""
                while piece := tunnel.recv(1 << 16):
                    data += piece
                return len(data)
        return 0

    with raw_server(serve) as host:
        with caplog.at_level("INFO", logger="isohub.network"):
            made = proxy(host, **limits)
            assert exchange(made) < brings or brings == 10
            assert max(made.sent_bytes, made.received_bytes, *got) <= 100_000
            assert eventually(lambda: "cut off after more than 100000 bytes" in caplog.text)
        assert exchange(proxy(host)) == brings  # the control
        assert got == [sends]


def test_a_thousand_connections_are_so_many_threads(proxy, server):
    url = server.add("/w.bin", b"bytes")
    made = proxy(server.host, connections=4, head_s=0.2)
    threads, descriptors = threading.active_count(), open_descriptors()
    crowd = []
    try:
        for number in range(1000):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(address(made))
            crowd.append(one)
            if number % 50 == 0:
                assert threading.active_count() <= threads + 4
        assert open_descriptors() <= descriptors + 1000 + 8
    finally:
        for number, one in enumerate(crowd):
            if number % 2:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            one.close()
    assert get(made, url).content == b"bytes"
    assert eventually(lambda: open_descriptors() <= descriptors + 2)


def test_peers_that_reset_at_any_time_leave_nothing(proxy, server):
    url = server.add("/w.bin", b"x" * 5_000_000)
    path = url.removeprefix(server.url)
    made = proxy(server.host)
    get(made, url)
    descriptors = open_descriptors()
    asks = [
        f"CONNECT {server.host} HTTP/1.1\r\n\r\n",
        f"GET {server.url}{path} HTTP/1.1\r\nHost: {server.host}\r\n\r\n",
        f"POST {server.url}{path} HTTP/1.1\r\nHost: {server.host}\r\nContent-Length: 100\r\n\r\nx",
        f"GET {server.url}",
    ]
    for number in range(60):
        one = socket.create_connection(address(made))
        one.sendall(asks[number % 4].encode())
        time.sleep(0.002 * (number % 5))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
    assert get(made, url).status_code == 200
    made.close()
    assert eventually(lambda: open_descriptors() < descriptors)


def test_close_ends_all_at_once(server):
    threads, descriptors = threading.active_count(), open_descriptors()
    fault = server.fail("stall", Fault(stall=1000))
    server.add("/stall", b"x" * 9000)
    made = AllowListProxy(listening(), HostPolicy((server.host,)), who="them")
    peers = [socket.create_connection(address(made)) for _ in range(10)]
    peers[0].sendall(b"GET http://a")
    peers[1].sendall(f"GET {server.url}/stall HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode())
    peers[2].sendall(f"POST {server.url}/ HTTP/1.1\r\nHost: {server.host}\r\nContent-Length: 10\r\n\r\n".encode())
    peers[3].sendall(f"CONNECT {server.host} HTTP/1.1\r\n\r\n".encode())
    assert fault.stalled.wait(10)
    begun = time.monotonic()
    made.close()
    made.close()
    assert time.monotonic() - begun < 1
    for peer in peers:
        peer.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while peer.recv(1 << 16):
                pass
        peer.close()
    with pytest.raises(OSError):
        socket.create_connection(address(made), timeout=5)
    fault.resume.set()
    assert eventually(lambda: threading.active_count() <= threads)
    assert eventually(lambda: open_descriptors() <= descriptors)


def test_whoever_shares_the_listener_cannot_hold_it(server):
    """A worker has the same open socket: it may make it block, take connections from it, and shut it down."""
    url = server.add("/w.bin", b"bytes")
    listener = listening()
    theirs = listener.dup()
    made = AllowListProxy(listener, HostPolicy((server.host,)))
    assert get(made, url).content == b"bytes"
    theirs.setblocking(True)
    assert get(made, url).content == b"bytes"
    thieves = [
        threading.Thread(target=lambda: contextlib.suppress(OSError) and _take(theirs), daemon=True) for _ in range(3)
    ]
    for thread in thieves:
        thread.start()
    for _ in range(30):
        socket.create_connection(made.address).close()
    begun = time.monotonic()
    made.close()
    assert time.monotonic() - begun < 2
    theirs.close()
    for thread in thieves:
        thread.join(5)
    listener = listening()
    theirs = listener.dup()
    with AllowListProxy(listener, HostPolicy(())):
        theirs.shutdown(socket.SHUT_RDWR)
        time.sleep(0.1)
    theirs.close()


def test_a_socket_that_does_not_listen_is_refused():
    with socket.socket() as one, pytest.raises(ValueError, match="listens"):
        AllowListProxy(one, HostPolicy(()))


def _take(listener):
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()


_IN_A_NAMESPACE = """
import ctypes, encodings.idna, fcntl, os, socket, struct, sys, urllib.request
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000 | 0x40000000) != 0:  # CLONE_NEWUSER | CLONE_NEWNET
    sys.exit(f"unshare: {os.strerror(ctypes.get_errno())}")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
listener = socket.create_server(("127.0.0.1", 0))
parent = socket.socket(fileno=int(sys.argv[1]))
socket.send_fds(parent, [b"here"], [listener.fileno()])
parent.recv(1)
try:
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[2], timeout=5)
    sys.exit("it went without the proxy")
except OSError as error:
    print(error.reason.errno)
host, port = listener.getsockname()
opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": f"http://{host}:{port}"}))
print(opener.open(sys.argv[2], timeout=20).read().decode())
try:
    opener.open("http://b.example/", timeout=20)
except OSError as error:
    print(error.code)
"""


def test_a_listener_of_another_network_namespace_is_served(server):
    """Where this machine lets no user make one, this fails: nothing else shows it."""
    url = server.add("/w.bin", b"bytes")
    mine, theirs = socket.socketpair()
    command = [sys.executable, "-c", _IN_A_NAMESPACE, str(theirs.fileno()), url]
    child = subprocess.Popen(
        command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    theirs.close()
    with mine, child:
        mine.settimeout(20)
        _, descriptors, _, _ = socket.recv_fds(mine, 10, 1)
        assert descriptors, child.communicate(timeout=20)[1]
        with AllowListProxy(socket.socket(fileno=descriptors[0]), HostPolicy((server.host,))) as made:
            assert made.address[0] == "127.0.0.1"
            mine.sendall(b"1")
            said, problem = child.communicate(timeout=60)
    assert said.split() == [str(errno.ECONNREFUSED), "bytes", "403"], problem


def test_the_proxy_of_the_environment_is_gone_through(proxy, server, tmp_path, monkeypatch):
    path, context = authority(tmp_path / "ca")
    with ProxyServer() as outer, FileServer(tls=context) as secure:
        url, secret = server.add("/w.bin", b"bytes"), secure.add("/w.bin", b"secret")
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, outer.url.replace("//", "//me:p%40ss@"))
        made = proxy(server.host, f"localhost:{port_of(secure)}")
        assert get(made, url).content == b"bytes"
        by_name = secret.replace("127.0.0.1", "localhost")
        assert get(made, by_name, verify=str(path)).content == b"secret"  # where the name leads is the proxy's to judge
        assert outer.requests == [f"GET {url}", f"CONNECT localhost:{port_of(secure)}"]
        assert outer.authorizations == ["Basic bWU6cEBzcw=="] * 2
        assert get(made, "http://b.example/").status_code == 403
        assert len(outer.requests) == 2  # names are decided on here
        outer.refuses = True
        with pytest.raises(requests.exceptions.ProxyError, match="502 Bad Gateway"):
            get(made, by_name, verify=str(path))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert get(made, url).content == b"bytes"
        assert len(outer.requests) == 3
        for wrong in ("socks5://127.0.0.1:1", "https://127.0.0.1:1", "http://:x", "http://127.0.0.1:99999"):
            monkeypatch.setenv("https_proxy", wrong)
            assert say(made, f"CONNECT localhost:{port_of(secure)} HTTP/1.1\r\n\r\n".encode()).startswith(
                b"HTTP/1.1 502 "
            )


def test_a_worker_s_own_proxy_credentials_go_nowhere(proxy):
    seen = []

    def serve(connection):
        seen.append(read_head(connection))
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with raw_server(serve) as host:
        fields = f"Host: {host}\r\nProxy-Authorization: Basic eA==\r\nAuthorization: mine\r\nConnection: X-Drop\r\nX-Drop: 1\r\n"
        say(proxy(host), f"GET http://{host}/ HTTP/1.1\r\n{fields}\r\n".encode())
    assert seen == [f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nAuthorization: mine\r\n\r\n".encode()]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(
        st.binary(max_size=60)
        | st.sampled_from([b"GET http://a.example/ HTTP/1.1\r\n", b"\r\n", b"Host: a.example\r\n"]),
        max_size=5,
    )
)
def test_whatever_a_peer_says_is_answered_or_ended(data):
    with AllowListProxy(listening(), HostPolicy(()), limits=ProxyLimits(head_s=0.5)) as made:
        with contextlib.suppress(ConnectionError):
            said = say(made, *data, end=True)
            assert said == b"" or said.startswith(b"HTTP/1.1 4")


def test_nothing_that_a_peer_says_moves_a_cursor(proxy, caplog):
    with caplog.at_level("DEBUG", logger="isohub.network"):
        made = proxy("a.example")
        for text in (
            b"GET http://a\x1b[2J/ HTTP/1.1\r\n\r\n",
            b"CONNECT \xe2\x80\xae:1 HTTP/1.1\r\n\r\n",
            b"CONNECT a%1b:1 HTTP/1.1\r\n\r\n",
        ):
            said = say(made, text)
            assert said.startswith(b"HTTP/1.1 400 ")
            assert b"\x1b" not in said
    assert caplog.records
    assert all(record.getMessage().isprintable() for record in caplog.records)
