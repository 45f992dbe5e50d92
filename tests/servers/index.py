"""A package index on loopback (PEP 503), with wheels and source distributions that are made here, file by file."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["PackageIndex", "make_wheel"]


def make_wheel(
    name: str,
    version: str,
    files: Mapping[str, str] | None = None,
    requires: Sequence[str] = (),
    extras: Mapping[str, Sequence[str]] | None = None,
    tag: str = "py3-none-any",
) -> tuple[str, bytes]:
    """A wheel's file name and content. By default it has one module, which knows its version."""
    stem = f"{name.replace('-', '_')}-{version}"
    files = {f"{name.replace('-', '_')}.py": f"__version__ = {version!r}\n"} if files is None else files
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {text}" for text in requires]
    for extra, needs in (extras or {}).items():
        metadata += [f"Provides-Extra: {extra}", *(f"Requires-Dist: {text}; extra == '{extra}'" for text in needs)]
    content = {**files, f"{stem}.dist-info/METADATA": "\n".join(metadata) + "\n"}
    content[f"{stem}.dist-info/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: {tag}\n"
    record = []
    for path, text in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(text.encode())}")
    content[f"{stem}.dist-info/RECORD"] = "\n".join([*record, f"{stem}.dist-info/RECORD,,"]) + "\n"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as wheel:
        for path, text in content.items():
            wheel.writestr(zipfile.ZipInfo(path, (2020, 1, 1, 0, 0, 0)), text)
    return f"{stem}-{tag}.whl", stream.getvalue()


class PackageIndex:
    """Serves ``/simple/<name>/``; a context manager.

    Attributes:
        login: ``user:password`` that is asked for, or None.
        asked: Paths that were asked for, in order.
    """

    def __init__(self) -> None:
        self.login: str | None = None
        self.asked: list[str] = []
        self._files: dict[str, dict[str, bytes]] = {}
        self.gate = threading.Event()
        self.gate.set()
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/simple"

    def wheel(self, name: str, version: str, *args: object, **kwargs: object) -> str:
        """Add a wheel; gives its sha256."""
        file, content = make_wheel(name, version, *args, **kwargs)
        return self.add(name, file, content)

    def sdist(self, name: str, version: str, files: Mapping[str, str]) -> str:
        """Add a source distribution."""
        stem = f"{name.replace('-', '_')}-{version}"
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            for path, text in {
                **files,
                "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            }.items():
                info = tarfile.TarInfo(f"{stem}/{path}")
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
        return self.add(name, f"{stem}.tar.gz", stream.getvalue())

    def add(self, name: str, file: str, content: bytes) -> str:
        self._files.setdefault(name, {})[file] = content
        return hashlib.sha256(content).hexdigest()

    def move(self, name: str, place: Path) -> None:
        """Put a package's files into a directory, and have them no more."""
        for file, content in self._files.pop(name).items():
            (place / file).write_bytes(content)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Files wait until the block ends."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        self.asked.append(request.path)
        if self.login is not None:
            expected = "Basic " + base64.b64encode(self.login.encode()).decode()
            if request.headers.get("Authorization") != expected:
                self._send(request, 401, b"", {"WWW-Authenticate": "Basic realm=index"})
                return
        parts = request.path.strip("/").split("/")
        files = self._files.get(parts[1]) if len(parts) > 1 else None
        if files is None:
            self._send(request, 404, b"")
        elif len(parts) == 2:
            links = (
                f'<a href="{file}#sha256={hashlib.sha256(data).hexdigest()}">{file}</a>' for file, data in files.items()
            )
            self._send(
                request, 200, f"<html><body>{''.join(links)}</body></html>".encode(), {"Content-Type": "text/html"}
            )
        elif parts[2] in files:
            self.gate.wait(30)
            self._send(request, 200, files[parts[2]], {"Content-Type": "application/octet-stream"})
        else:
            self._send(request, 404, b"")

    def _send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        try:
            request.send_response(status)
            for name, value in (headers or {}).items():
                request.send_header(name, value)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(body)
        except OSError:
            pass  # who asked is gone

    def __enter__(self) -> PackageIndex:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
