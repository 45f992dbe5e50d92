"""A GitHub server on loopback, over real git repositories.

It speaks git's smart HTTP protocol, serves archives and Git LFS objects, and answers the few paths of
the REST API that isohub uses. It counts what is asked, can demand a token, and can be told to misbehave.

    with GitHubServer() as server:
        server.add("owner", "repo", git_repo)
        server.fail("/archive/", Fault(status=500), times=1)
        ...
        assert server.count("/info/refs") == 1
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import socket
import subprocess
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.git_repo import GitRepo, git_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Fault", "GitHubServer", "Request"]


@dataclass(frozen=True)
class Request:
    """What was asked."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Fault:
    """How to misbehave.

    Attributes:
        status: Answer this instead.
        headers: With these headers.
        body: With this body; with status 200 in place of the real one.
        redirect: Answer 302 to this address; ``{path}`` is what was asked.
        truncate: Send the real length and only so many bytes.
        stall: Send half of the body, then wait for this event before the rest.
        stalled: Set when the half is sent.
        comment: Put this into the zip archive in place of the commit.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    redirect: str | None = None
    truncate: int | None = None
    stall: threading.Event | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    comment: bytes | None = None


class GitHubServer:
    """The server; a context manager. Set ``GITHUB_SERVER_URL`` to `url` and ``GITHUB_API_URL`` to `api_url`."""

    def __init__(self) -> None:
        self.token: str | None = None
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._repos: dict[str, GitRepo] = {}
        #: Git LFS: objects by id, what the batch API says instead, and where it sends for the rest.
        self.lfs_objects: dict[str, bytes] = {}
        self.lfs_errors: dict[str, dict[str, object]] = {}
        self.lfs_storage: str | None = None
        self._lfs_repos: set[str] = set()
        self._faults: list[tuple[re.Pattern[str], Fault, list[int]]] = []
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.github = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._http.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    @property
    def api_url(self) -> str:
        return f"{self.url}/api/v3"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to take this server for GitHub."""
        return {"GITHUB_SERVER_URL": self.url, "GITHUB_API_URL": self.api_url}

    def add(self, owner: str, repo: str, git_repo: GitRepo) -> GitRepo:
        """Serve a repository as owner/repo, with what GitHub's servers let clients ask for."""
        for setting in ("allowFilter", "allowReachableSHA1InWant"):
            git_repo.git("config", f"uploadpack.{setting}", "true")
        self._repos[f"{owner}/{repo}"] = git_repo
        return git_repo

    def add_lfs(self, owner: str, repo: str, content: bytes) -> bytes:
        """Serve an object to a repository, which has Git LFS from now on; returns its pointer file."""
        oid = hashlib.sha256(content).hexdigest()
        self.lfs_objects[oid] = content
        self._lfs_repos.add(f"{owner}/{repo}")
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()

    def has_lfs(self, name: str) -> bool:
        return name in self._lfs_repos

    def fail(self, path: str, fault: Fault, times: int = 1_000_000) -> Fault:
        """Misbehave for the next requests whose path and query match a regular expression."""
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

    def repo(self, name: str) -> GitRepo | None:
        return self._repos.get(name)

    def record(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for pattern, fault, left in self._faults:
                if left[0] > 0 and pattern.search(request.path):
                    left[0] -= 1
                    return fault
        return None

    def __enter__(self) -> GitHubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for _, fault, _ in self._faults:
                if fault.stall is not None:
                    fault.stall.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # server_close would wait for connections that clients keep open.
    block_on_close = False
    request_queue_size = 128
    github: GitHubServer

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that are killed in the middle are what some tests are about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait for a delayed ACK
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        github = self.server.github
        fault = github.record(Request(self.command, self.path, dict(self.headers)))
        if fault is not None and fault.redirect is not None:
            self._send(302, b"", {"Location": fault.redirect.format(path=self.path)}, None)
            return
        if fault is not None and fault.status is not None:
            self._send(fault.status, fault.body or b"no", dict(fault.headers), None)
            return
        if fault is not None and fault.body is not None:
            self._send(200, fault.body, {"Content-Type": "application/zip", **fault.headers}, fault)
            return
        if github.token is not None and _STORED not in self.path and not self._authorized(github.token):
            git_path = ".git/" in self.path
            self._send(401 if git_path else 404, b"no", {"WWW-Authenticate": "Basic"} if git_path else {}, None)
            return
        status, kind, content = self._route(body)
        if fault is not None and fault.comment is not None:
            content = _with_comment(content, fault.comment)
        self._send(status, content, {"Content-Type": kind}, fault)

    def _authorized(self, token: str) -> bool:
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            return base64.b64decode(value).decode().partition(":")[2] == token and "/archive/" not in self.path
        return scheme.lower() == "bearer" and value == token and self.path.startswith("/api/v3/")

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], fault: Fault | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault is not None and fault.truncate is not None:
            self.wfile.write(content[: fault.truncate])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault is not None and fault.stall is not None:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            fault.stalled.set()
            fault.stall.wait()
            content = content[len(content) // 2 :]
        self.wfile.write(content)

    def _route(self, body: bytes) -> tuple[int, str, bytes]:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if path.startswith("/api/v3/repos/"):
            return self._api(path.removeprefix("/api/v3/repos/"))
        if path.startswith(_STORED):
            return self._lfs_object(path.removeprefix(_STORED))
        match = re.fullmatch(
            r"/([^/]+(?:/[^/]+)*/[^/]+?)(?:\.git)?/(info/refs|git-upload-pack|archive/(.+)\.zip|info/lfs/objects/batch)",
            path,
        )
        repo = self.server.github.repo(match[1]) if match else None
        if match is None or repo is None:
            return 404, "text/plain", b"Not Found"
        if match[2] == "info/refs":
            if parse_qs(parts.query) != {"service": ["git-upload-pack"]}:
                return 400, "text/plain", b"Bad Request"
            refs = _git(repo, "upload-pack", "--stateless-rpc", "--advertise-refs", ".")
            return 200, "application/x-git-upload-pack-advertisement", b"001e# service=git-upload-pack\n0000" + refs
        if match[2] == "git-upload-pack" and self.command != "POST":
            return 405, "text/plain", b"Method Not Allowed"
        if match[2] == "git-upload-pack":
            pack = _git(repo, "upload-pack", "--stateless-rpc", ".", stdin=body, check=False)
            return 200, "application/x-git-upload-pack-result", pack
        if match[2] == "info/lfs/objects/batch":
            return self._lfs_batch(match[1], body)
        return self._archive(repo, match[1], match[3])

    def _lfs_batch(self, name: str, body: bytes) -> tuple[int, str, bytes]:
        github = self.server.github
        if not github.has_lfs(name):
            return _json(404, {"message": "Not Found"})
        if self.headers.get("Accept") != _LFS_TYPE or self.headers.get("Content-Type") != _LFS_TYPE:
            return _json(406, {"message": "Not Acceptable"})
        question = json.loads(body)
        assert question["operation"] == "download" and "basic" in question["transfers"]
        assert len(question["objects"]) <= 100
        answers = []
        for asked in question["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            content = github.lfs_objects.get(asked["oid"])
            if content is None or len(content) != asked["size"]:
                answer["error"] = {"code": 404, "message": "Object does not exist"}
            else:
                href = f"{github.lfs_storage or github.url}{_STORED}{asked['oid']}?signature=s3cret"
                answer["actions"] = {"download": {"href": href, "header": {"X-Lfs": "ticket"}, "expires_in": 60}}
            answers.append({**answer, **github.lfs_errors.get(asked["oid"], {})})
        status, _, content_bytes = _json(200, {"transfer": "basic", "objects": answers})
        return status, _LFS_TYPE, content_bytes

    def _lfs_object(self, oid: str) -> tuple[int, str, bytes]:
        if self.headers.get("X-Lfs") != "ticket" or "signature=s3cret" not in self.path:
            return _json(403, {"message": "Forbidden"})
        content = self.server.github.lfs_objects.get(oid)
        return (404, "text/plain", b"no") if content is None else (200, "application/octet-stream", content)

    def _archive(self, repo: GitRepo, name: str, ref: str) -> tuple[int, str, bytes]:
        sha = _resolve(repo, ref)
        if sha is None:
            return 404, "text/plain", b"Not Found"
        top = f"{name.partition('/')[2]}-{sha}/"
        return 200, "application/zip", _git(repo, "archive", "--format=zip", f"--prefix={top}", sha)

    def _api(self, path: str) -> tuple[int, str, bytes]:
        owner, repo_name, what, *rest = [*path.split("/", 3), ""]
        repo = self.server.github.repo(f"{owner}/{repo_name}")
        argument = rest[0]
        if repo is None:
            return _json(404, {"message": "Not Found"})
        if what == "zipball":
            return self._archive(repo, f"{owner}/{repo_name}", argument)
        if what == "commits":
            sha = _resolve(repo, argument)
            if sha is None:
                return _json(422, {"message": f"No commit found for SHA: {argument}"})
            return _json(200, {"sha": sha, "commit": {"tree": {"sha": repo.tree(sha)}}})
        if what == "compare":
            base, head = (_resolve(repo, side) for side in argument.split("..."))
            if base is None or head is None:
                return _json(404, {"message": "Not Found"})
            return _compare(repo, base, head)
        if what in ("branches", "tags"):
            lines = repo.git("for-each-ref", "--format=%(refname:strip=2) %(objectname)", f"refs/{_REFS[what]}")
            pairs = [line.split(" ") for line in lines.splitlines()]
            return _json(200, [{"name": name, "commit": {"sha": sha}} for name, sha in pairs])
        return _json(404, {"message": "Not Found"})


_STORED = "/lfs-storage/"
_LFS_TYPE = "application/vnd.git-lfs+json"
_REFS = {"branches": "heads", "tags": "tags"}


def _compare(repo: GitRepo, base: str, head: str) -> tuple[int, str, bytes]:
    if base == head:
        return _json(200, {"status": "identical"})
    merge_base = _git(repo, "merge-base", base, head, check=False).decode().strip()
    if not merge_base:
        return _json(404, {"message": f"No common ancestor between {base} and {head}."})
    status = {head: "behind", base: "ahead"}.get(merge_base, "diverged")
    return _json(200, {"status": status})


def _resolve(repo: GitRepo, ref: str) -> str | None:
    # As GitHub: every commit in the storage that a repository shares with its forks.
    found = _git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}", check=False)
    return found.decode().strip() or None


def _git(repo: GitRepo, *arguments: str, stdin: bytes = b"", check: bool = True) -> bytes:
    done = subprocess.run(
        ["git", *arguments], cwd=repo.path, env=git_environment(), input=stdin, capture_output=True, check=False
    )
    if check and done.returncode != 0:
        raise AssertionError(done.stderr)
    return done.stdout


def _json(status: int, value: object) -> tuple[int, str, bytes]:
    return status, "application/json; charset=utf-8", json.dumps(value).encode()


def _with_comment(archive: bytes, comment: bytes) -> bytes:
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as opened:
        opened.comment = comment
    return buffer.getvalue()
