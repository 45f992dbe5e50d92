"""An HTTP proxy on loopback that counts: absolute addresses in the clear, CONNECT for all else.

with ProxyServer() as proxy:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    ...
    assert proxy.requests == ["CONNECT 127.0.0.1:4711"]
"""

from __future__ import annotations

import http.client
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

__all__ = ["ProxyServer"]


class ProxyServer:
    """The proxy; a context manager.

    Attributes:
        requests: Method and target of all that was asked, in order.
        authorizations: ``Proxy-Authorization`` of each, or None.
        refuses: Answer 407.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.authorizations: list[str | None] = []
        self.refuses = False
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.proxy = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._http.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def __enter__(self) -> ProxyServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: ProxyServer

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def _refused(self) -> bool:
        proxy = self.server.proxy
        proxy.requests.append(f"{self.command} {self.path}")
        proxy.authorizations.append(self.headers.get("Proxy-Authorization"))
        if proxy.refuses:
            self.send_response(407)
            self.send_header("Content-Length", "0")
            self.end_headers()
        return proxy.refuses

    def do_GET(self) -> None:
        if self._refused():
            return
        parts = urlsplit(self.path)
        origin = http.client.HTTPConnection(parts.netloc)
        origin.request("GET", parts.path, headers={"Host": parts.netloc})
        answer = origin.getresponse()
        body = answer.read()
        origin.close()
        self.send_response(answer.status)
        if location := answer.getheader("Location"):
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self) -> None:
        if self._refused():
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as origin:
            self.send_response(200)
            self.end_headers()
            up = threading.Thread(target=_pump, args=(self.connection, origin), daemon=True)
            up.start()
            _pump(origin, self.connection)
            up.join()
        self.close_connection = True


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass
    for end, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
        try:
            end.shutdown(how)
        except OSError:
            pass
