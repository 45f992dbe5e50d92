"""The client's half of git's smart HTTP protocol, version 0: read refs, ask for a pack.

Parses what the server sends by its grammar and limits; computes nothing about objects. Runs
in the caller.

Source: gitprotocol-http(5), gitprotocol-pack(5), gitprotocol-common(5), gitprotocol-capabilities(5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from isohub.errors import IntegrityError, SourceUnavailableError, printable
from isohub.repos.http import read_limited
from isohub.repos.naming import ref_problem
from isohub.repos.sources.refs import Refs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import requests

    from isohub.repos.http import HttpClient

__all__ = ["Advertisement", "parse_advertisement", "read_advertisement", "receive_pack"]

# A million refs at 64 bytes; repositories with 300,000 pull requests exist.
_ADVERTISEMENT_LIMIT_BYTES = 128 << 20
_TYPE = "application/x-git-upload-pack-advertisement"
_RESULT_TYPE = "application/x-git-upload-pack-result"
_SHA = re.compile(rb"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_LENGTH = re.compile(rb"[0-9a-fA-F]{4}")
_AGENT = "agent=isohub"


@dataclass(frozen=True)
class Advertisement:
    """What a server says of a repository.

    Attributes:
        refs: Its refs.
        objects: Full name to object id as the server keeps it: of a tag, where `refs` has its commit.
        capabilities: Its words, such as ``shallow`` and ``symref=HEAD:refs/heads/main``.
        base: Address that later requests go to, redirects followed; ends before ``/info/refs``.
    """

    refs: Refs
    objects: Mapping[str, str]
    capabilities: frozenset[str]
    base: str

    @property
    def object_format(self) -> str:
        """``sha1`` or ``sha256``."""
        return _capability(self.capabilities, "object-format") or "sha1"


def read_advertisement(client: HttpClient, base: str) -> Advertisement:
    """Ask for all refs, in one request.

    Args:
        client: Whom to ask with.
        base: Address of the repository, as ``git clone`` takes it.

    Raises:
        SourceUnavailableError: There is no such repository for us, or what answers is no git server.
    """

    def read(response: requests.Response) -> Advertisement:
        if response.headers.get("Content-Type", "").partition(";")[0].strip() != _TYPE:
            kind = printable(response.headers.get("Content-Type", "nothing"), limit_chars=80, newlines=False)
            raise SourceUnavailableError(
                f"{base} answers {kind}, which is no git repository's answer", hint="is the address right?", url=base
            )
        data = read_limited(response, _ADVERTISEMENT_LIMIT_BYTES)
        try:
            refs, objects, capabilities = parse_advertisement(data)
        except ValueError as error:
            raise SourceUnavailableError(
                f"{base} answers what git's protocol does not allow: {error}", url=base
            ) from error
        effective = response.url.partition("?")[0].removesuffix("/info/refs")
        return Advertisement(refs, objects, capabilities, effective)

    # Without the header the server answers in version 0, which brings refs with the first request.
    return client.request(f"{base}/info/refs?service=git-upload-pack", read)


def parse_advertisement(data: bytes) -> tuple[Refs, dict[str, str], frozenset[str]]:
    """Read an advertisement of version 0 or 1.

    Args:
        data: The whole body. Trust: the network.

    Returns:
        The refs with tags peeled, the object ids by name, and the capabilities.

    Raises:
        ValueError: It does not follow the grammar.
    """
    lines = _pkt_lines(data)
    if next(lines, None) != b"# service=git-upload-pack" or next(lines, b"") is not None:
        raise ValueError("it does not start with the service's name and a flush")
    commits: dict[str, str] = {}
    peeled: dict[str, str] = {}
    capabilities: frozenset[str] | None = None
    head: str | None = None
    ended = False
    for line in lines:
        if ended:
            raise ValueError("there is data behind the end")
        if line is None:
            ended = True
            continue
        if capabilities is None:
            if line == b"version 1":
                continue
            line, _, words = line.partition(b"\0")  # noqa: PLW2901
            capabilities = frozenset(words.decode("utf-8", "replace").split())
        if line.startswith((b"shallow ", b"ERR ")):
            if line.startswith(b"ERR "):
                raise ValueError(f"the server says: {printable(line[4:].decode('utf-8', 'replace'), limit_chars=300)}")
            continue
        sha, space, raw_name = line.partition(b" ")
        if not space or not _SHA.fullmatch(sha):
            raise ValueError("a line is no object id and name")
        if raw_name == b"capabilities^{}":
            continue  # an empty repository has to say its capabilities somewhere
        try:
            name = raw_name.decode("utf-8")
        except UnicodeDecodeError:
            continue  # nobody can write it as a reference
        if name == "HEAD":
            head = sha.decode("ascii")
        elif name.endswith("^{}"):
            peeled[name[:-3]] = sha.decode("ascii")
        elif name.startswith("refs/") and ref_problem(name) is None:
            commits[name] = sha.decode("ascii")
    if not ended:
        raise ValueError("it ends without a flush")
    words_found = capabilities or frozenset()
    objects = dict(commits)
    commits.update((name, commit) for name, commit in peeled.items() if name in commits)
    target = _capability(words_found, "symref", "HEAD:")
    return Refs(commits, head, target if target in commits else None), objects, words_found


def receive_pack(
    client: HttpClient,
    advertisement: Advertisement,
    wants: Sequence[str],
    into: IO[bytes],
    *,
    depth: int | None,
    commits_only: bool,
    limit_bytes: int,
) -> None:
    """Ask for a pack and write it to a file.

    Args:
        client: Whom to ask with.
        advertisement: Of the same repository.
        wants: Object ids.
        into: Seekable; emptied at each try.
        depth: How many commits of history, if the server can do that.
        commits_only: Leave out trees and blobs, if the server can do that.
        limit_bytes: Bound on the pack.

    Raises:
        SourceUnavailableError: The server refuses or fails.
        IntegrityError: The pack is larger than allowed.
    """
    able = advertisement.capabilities
    words: list[str] = [word for word in ("ofs-delta", "no-progress", "side-band-64k") if word in able]
    sideband = "side-band-64k" in words
    shallow = depth is not None and "shallow" in able
    filtered = commits_only and "filter" in able
    words += ["shallow"] if shallow else []
    words += ["filter"] if filtered else []
    words += [f"object-format={advertisement.object_format}"] if advertisement.object_format != "sha1" else []
    first, *others = dict.fromkeys(wants)
    request = [_pkt(f"want {first} {' '.join([*words, _AGENT])}\n")]
    request += [_pkt(f"want {sha}\n") for sha in others]
    request += [_pkt(f"deepen {depth}\n")] if shallow else []
    request += [_pkt("filter tree:0\n")] if filtered else []
    body = b"".join(request) + b"0000" + _pkt("done\n")

    def read(response: requests.Response) -> None:
        into.seek(0)
        into.truncate()
        stream = _Stream(response.iter_content(1 << 16))
        if shallow:
            while (line := stream.pkt()) is not None:
                if not line.startswith((b"shallow ", b"unshallow ")):
                    raise _refused(advertisement.base, line)
        if (line := stream.pkt()) is None or line.rstrip(b"\n") != b"NAK":
            raise _refused(advertisement.base, line or b"")
        count = 0
        for chunk in _sideband(stream, advertisement.base) if sideband else stream.rest():
            count += len(chunk)
            if count > limit_bytes:
                raise IntegrityError(
                    f"{advertisement.base} sends a pack of more than {limit_bytes} bytes", url=advertisement.base
                )
            into.write(chunk)

    headers = {"Content-Type": "application/x-git-upload-pack-request", "Accept": _RESULT_TYPE}
    try:
        client.request(f"{advertisement.base}/git-upload-pack", read, data=body, headers=headers)
    except ValueError as error:
        text = f"{advertisement.base} answers what git's protocol does not allow: {error}"
        raise SourceUnavailableError(text, url=advertisement.base) from error


class _Stream:
    """Exact reads from an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._held = b""

    def exactly(self, count: int) -> bytes:
        parts = [self._held]
        missing = count - len(self._held)
        while missing > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise ValueError("it ends in the middle of a line")
            parts.append(chunk)
            missing -= len(chunk)
        whole = b"".join(parts)
        self._held = whole[count:]
        return whole[:count]

    def pkt(self) -> bytes | None:
        """One pkt-line's content, or None for a flush."""
        length = _pkt_length(self.exactly(4))
        return None if length == 0 else self.exactly(length - 4)

    def rest(self) -> Iterator[bytes]:
        yield self._held
        yield from self._chunks


def _sideband(stream: _Stream, base: str) -> Iterator[bytes]:
    while (line := stream.pkt()) is not None:
        band, content = line[:1], line[1:]
        if band == b"\1":
            yield content
        elif band == b"\3":
            raise _refused(base, content)
        elif band != b"\2":
            raise ValueError(f"there is no side band {band!r}")


def _refused(base: str, line: bytes) -> SourceUnavailableError:
    text = printable(line.decode("utf-8", "replace").strip(), limit_chars=300, newlines=False)
    return SourceUnavailableError(f"{base} does not send the pack: {text or 'no reason given'}", url=base)


def _pkt(text: str) -> bytes:
    data = text.encode("utf-8")
    return b"%04x%s" % (len(data) + 4, data)


def _pkt_length(digits: bytes) -> int:
    if not _LENGTH.fullmatch(digits):
        raise ValueError("a line has no length")
    length = int(digits, 16)
    # 1 to 3 are special packets of version 2, which was not asked for; 65520 is the protocol's limit.
    if 0 < length < 4 or length > 65520:
        raise ValueError(f"a line has the length {length}")
    return length


def _pkt_lines(data: bytes) -> Iterator[bytes | None]:
    at = 0
    while at < len(data):
        length = _pkt_length(data[at : at + 4])
        if length == 0:
            yield None
            at += 4
            continue
        if at + length > len(data):
            raise ValueError("it ends in the middle of a line")
        yield data[at + 4 : at + length].removesuffix(b"\n")
        at += length


def _capability(capabilities: frozenset[str], key: str, prefix: str = "") -> str | None:
    start = f"{key}={prefix}"
    return next((word[len(start) :] for word in sorted(capabilities) if word.startswith(start)), None)
