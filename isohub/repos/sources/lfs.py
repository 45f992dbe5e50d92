"""Git LFS: the files behind pointers, from a clone's own copies or a server's batch API, each hashed.

A pointer names its content by SHA-256, so nothing that a server sends has to be believed.
Objects come from where the server says, with the headers that it gives and none of ours.
``.lfsconfig`` is not followed: a repository does not choose which server learns of its user.
No filter and no ``git-lfs`` runs. Runs in the caller.

Source: git-lfs' docs/spec.md (pointers), docs/api/batch.md, docs/api/basic-transfers.md and
docs/api/server-discovery.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from isohub.errors import IntegrityError, OfflineError, SourceUnavailableError, printable
from isohub.repos.credentials import Credentials
from isohub.repos.download import Wanted, download_all
from isohub.repos.http import HttpClient, read_limited
from isohub.repos.naming import shown
from isohub.repos.sources.ssh import is_ssh, lfs_authenticate
from isohub.repos.tree import DEFAULT_LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import requests

    from isohub.repos.tree import TreeWriter

__all__ = ["LfsFile", "LfsStore", "Pointer", "parse_pointer"]

T = TypeVar("T")
# docs/spec.md: pointers are below 1,024 bytes.
_POINTER_LIMIT_BYTES = 1024
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n"
    rb"(?:ext-[0-9]-[a-z0-9.-]+ [^\n]*\n)*"
    rb"oid sha256:(?P<oid>[0-9a-f]{64})\n"
    rb"size (?P<size>0|[1-9][0-9]{0,17})\n"
)
# What git-lfs and the servers that speak of a limit use.
_BATCH = 100
# lfs.concurrenttransfers has the default 8.
_PARALLEL = 8
_ANSWER_LIMIT_BYTES = 4 << 20
_CHUNK_BYTES = 1 << 18
_TYPE = "application/vnd.git-lfs+json"
_NAMED = 5
_HEADERS_LIMIT = 32
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")  # RFC 9110, section 5.1
_HEADER_VALUE = re.compile(r"[\t -~]{0,8192}")
# These are the connection's, not the request's.
_HEADERS_REFUSED = frozenset({"host", "connection", "content-length", "transfer-encoding", "te", "upgrade", "trailer"})


@dataclass(frozen=True)
class Pointer:
    """What stands in a repository for a large file.

    Attributes:
        oid: SHA-256 of the content, in hex.
        size: Of the content, in bytes.
    """

    oid: str
    size: int


@dataclass(frozen=True)
class LfsFile:
    """A file that is to be written."""

    path: str
    pointer: Pointer
    executable: bool


def parse_pointer(content: bytes) -> Pointer | None:
    """A pointer, or None for anything else; what is nearly one is a file as any other, as for git-lfs.

    Args:
        content: Of a file. Trust: the repo.
    """
    match = _POINTER.fullmatch(content) if len(content) < _POINTER_LIMIT_BYTES else None
    return None if match is None else Pointer(match["oid"].decode("ascii"), int(match["size"]))


class LfsStore:
    """Where one repository's LFS objects are.

    Args:
        location: The repository's address, redirects followed; None if it has none.
        credentials: Whom to ask it as.
        directories: ``lfs/objects`` of clones on this machine, looked into first.
        scratch: A directory for temporary files.
        offline: Ask no server.
        progress: Draw bars on stderr, if that is a terminal.
    """

    def __init__(
        self,
        location: str | None,
        credentials: Credentials,
        directories: Sequence[Path],
        scratch: Path,
        *,
        offline: bool,
        progress: bool,
    ) -> None:
        self._location = location
        self._credentials = credentials
        self._directories = directories
        self._scratch = scratch
        self._offline = offline
        self._progress = progress

    def write(self, files: Sequence[LfsFile], writer: TreeWriter) -> None:
        """Write files with the content that their pointers name.

        Raises:
            SourceUnavailableError: The server has no Git LFS, or does not give an object.
            OfflineError: The server would have to be asked.
            IntegrityError: What came is not what a pointer names, or is too much.
        """
        total_bytes = sum(file.pointer.size for file in files)
        if total_bytes > DEFAULT_LIMITS.total_bytes:
            raise IntegrityError(
                f"the Git LFS files of {self._shown} have {total_bytes} bytes; "
                f"at most {DEFAULT_LIMITS.total_bytes} are brought",
                url=self._location,
            )
        by_pointer: dict[Pointer, list[LfsFile]] = {}
        for file in files:
            by_pointer.setdefault(file.pointer, []).append(file)
        wanted: list[Pointer] = []
        for pointer, same in by_pointer.items():
            place = self._local(pointer)
            if place is None:
                wanted.append(pointer)
                continue
            for file in same:
                writer.file(file.path, _verified(place, file), executable=file.executable)
        # A batch at a time, so that no more than one lies about twice.
        for start in range(0, len(wanted), _BATCH):
            batch = {pointer: by_pointer[pointer] for pointer in wanted[start : start + _BATCH]}
            for pointer, place in self._bring(batch).items():
                for file in batch[pointer]:
                    writer.file(file.path, _verified(place, file), executable=file.executable)
                place.unlink()

    @property
    def _shown(self) -> str:
        return self._location or "a clone without a remote"

    def _local(self, pointer: Pointer) -> Path | None:
        for directory in self._directories:
            place = directory / pointer.oid[:2] / pointer.oid[2:4] / pointer.oid
            try:
                info = place.lstat()
            except OSError:
                continue
            if stat.S_ISREG(info.st_mode) and info.st_size == pointer.size:
                return place
        return None

    def _bring(self, batch: dict[Pointer, list[LfsFile]]) -> dict[Pointer, Path]:
        """Download objects, some at a time."""
        example = printable(next(iter(batch.values()))[0].path, limit_chars=300, newlines=False)
        if self._offline:
            raise OfflineError(
                f"{example!r} is in Git LFS, the clone does not have its content, and the network may not be used",
                hint="run `git lfs fetch --all` in the clone while there is a network",
                url=self._location,
            )
        if self._location is None or (not is_ssh(self._location) and "://" not in self._location):
            raise SourceUnavailableError(
                f"{example!r} is in Git LFS, and neither the clone nor a server has its content",
                hint="run `git lfs fetch --all` in the clone",
            )
        actions = self._ask(self._location, batch)
        wanted = [
            Wanted(
                url=href,
                into=self._scratch / pointer.oid,
                name=batch[pointer][0].path,
                limit_bytes=pointer.size,
                progress=self._progress,
                sha256=pointer.oid,
            )
            for pointer, (href, _) in actions.items()
        ]
        headers = dict(actions.values())
        try:
            download_all(lambda: _StorageClient(headers), wanted, workers=_PARALLEL)
        except (SourceUnavailableError, IntegrityError) as error:
            names = [one.name for one in wanted if shown(one.url) == error.url] or ["a file"]
            text = f"{printable(names[0], limit_chars=300, newlines=False)!r}, which is in Git LFS: {error.message}"
            raise type(error)(text, hint=error.hint, **error.fields) from error
        return {pointer: self._scratch / pointer.oid for pointer in batch}

    def _ask(self, location: str, batch: dict[Pointer, list[LfsFile]]) -> dict[Pointer, tuple[str, dict[str, str]]]:
        """Ask the batch API where the objects are."""
        credentials, headers = self._credentials, {}
        if is_ssh(location):
            if credentials.anonymous:
                raise SourceUnavailableError(
                    f"{location} has Git LFS files, and ssh would use your keys for a commit that may be anyone's: "
                    "it is on no branch or tag",
                    hint="look at it, and run `git lfs fetch --all` in the clone",
                    url=location,
                )
            server, given = lfs_authenticate(location)
            headers = _headers(given, location)
            credentials = Credentials(anonymous=True)
            _judge_address(server, location)
        else:
            server = f"{location.removesuffix('.git')}.git/info/lfs"
        url = f"{server}/objects/batch"
        objects = [{"oid": pointer.oid, "size": pointer.size} for pointer in batch]
        question = {"operation": "download", "transfers": ["basic"], "objects": objects, "hash_algo": "sha256"}
        headers |= {"Accept": _TYPE, "Content-Type": _TYPE}

        def read(response: requests.Response) -> Any:
            try:
                return json.loads(read_limited(response, _ANSWER_LIMIT_BYTES))
            except (ValueError, RecursionError) as error:
                raise SourceUnavailableError(f"{url} answers what is no JSON", url=url) from error

        try:
            with HttpClient(credentials) as client:
                answer = client.request(url, read, data=json.dumps(question).encode("ascii"), headers=headers)
        except SourceUnavailableError as error:
            if error.status not in (404, 405, 410, 501):
                raise
            raise SourceUnavailableError(
                f"{location} has no Git LFS server for us: {error.message}",
                hint="a server that .lfsconfig names is not asked; `git lfs clone` it and name the clone: ./clone:ref",
                **{**error.fields, "url": url},
            ) from error
        return self._actions(answer, url, location, batch)

    def _actions(
        self, answer: Any, url: str, location: str, batch: dict[Pointer, list[LfsFile]]
    ) -> dict[Pointer, tuple[str, dict[str, str]]]:
        objects = answer.get("objects") if isinstance(answer, dict) else None
        if not isinstance(objects, list) or answer.get("transfer", "basic") != "basic":
            raise SourceUnavailableError(f"{url} answers what the batch API does not allow", url=url)
        said = {(item.get("oid"), item.get("size")): item for item in objects if isinstance(item, dict)}
        actions: dict[Pointer, tuple[str, dict[str, str]]] = {}
        missing: list[str] = []
        for pointer, files in batch.items():
            item = said.get((pointer.oid, pointer.size), {})
            download = item["actions"].get("download") if isinstance(item.get("actions"), dict) else None
            if isinstance(download, dict) and isinstance(download.get("href"), str):
                _judge_address(download["href"], location)
                actions[pointer] = (download["href"], _headers(download.get("header"), location))
                continue
            problem = item.get("error")
            why = "it is not in the answer, or of another size"
            if isinstance(problem, dict):
                why = f"{problem.get('message', 'no reason')} (code {problem.get('code', 'none')})"
            path = printable(files[0].path, limit_chars=200, newlines=False)
            missing.append(f"{path!r} ({pointer.oid[:12]}): {printable(why, limit_chars=200, newlines=False)}")
        if missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise SourceUnavailableError(
                f"{location} does not give {len(missing)} of its Git LFS files: {'; '.join(missing[:_NAMED])}{more}",
                hint="load it without lfs, which names the files that are pointers; or ask its owner to push them",
                url=url,
            )
        return actions


def _verified(place: Path, file: LfsFile) -> Iterator[bytes]:
    """The content of an object, hashed as it is copied."""
    digest = hashlib.sha256()
    with place.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            yield chunk
    if digest.hexdigest() != file.pointer.oid:
        path = printable(file.path, limit_chars=300, newlines=False)
        raise IntegrityError(
            f"{place} is damaged: it is not what the Git LFS pointer {path!r} names",
            hint="run `git lfs fsck` in the clone",
            expected=file.pointer.oid,
            got=digest.hexdigest(),
        )


class _StorageClient(HttpClient):
    """Sends what a server wants to see with each address, and nothing of ours, whatever host it names."""

    def __init__(self, headers: Mapping[str, Mapping[str, str]]) -> None:
        super().__init__(Credentials(anonymous=True))
        self._given = headers

    def request(self, url: str, read: Callable[[requests.Response], T], **options: Any) -> T:
        asked = options.pop("headers", None) or {}

        def headers() -> dict[str, str]:
            return {**self._given.get(url, {}), **(asked() if callable(asked) else asked)}

        return super().request(url, read, headers=headers, **options)


def _judge_address(url: str, location: str) -> None:
    """Refuse an address of the server's that is not https, or loopback where the repository is on loopback."""
    parts = urlsplit(url)
    plain = parts.scheme == "http" and _is_loopback(parts.hostname) and _is_loopback(urlsplit(location).hostname)
    if (parts.scheme != "https" and not plain) or not parts.hostname or "@" in parts.netloc:
        raise SourceUnavailableError(
            f"{location} sends us for Git LFS to {shown(url)!r}; expected an https address", url=location
        )


def _is_loopback(host: str | None) -> bool:
    return host is not None and (host in ("localhost", "::1") or re.fullmatch(r"127(?:\.\d{1,3}){3}", host) is not None)


def _headers(claimed: Any, location: str) -> dict[str, str]:
    """The headers that a server wants to see, judged: they are sent to whatever host it names."""
    if claimed is None:
        return {}
    if not isinstance(claimed, dict) or len(claimed) > _HEADERS_LIMIT:
        raise SourceUnavailableError(f"{location} asks for headers that are no object of strings", url=location)
    for name, value in claimed.items():
        fits = isinstance(value, str) and _HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value)
        if not fits or name.lower() in _HEADERS_REFUSED:
            text = printable(name, limit_chars=100, newlines=False)
            raise SourceUnavailableError(f"{location} asks for the header {text!r}, which is not sent", url=location)
    return dict(claimed)
