"""The client's half of git's protocol, version 0: what a server says of its refs, and how a pack is asked for.

Parses by the grammar and its limits; computes nothing about objects and opens no connection.
`smart_http` and `ssh` carry it. Runs in the caller.

Source: gitprotocol-pack(5), gitprotocol-common(5), gitprotocol-capabilities(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Protocol

from isohub.errors import IntegrityError, SourceUnavailableError, printable
from isohub.repos.naming import ref_problem
from isohub.repos.sources.refs import Refs

if TYPE_CHECKING:
    from isohub.repos.reference import Reference

__all__ = [
    "ADVERTISEMENT_LIMIT_BYTES",
    "Advertisement",
    "PackRequest",
    "PackTooLargeError",
    "PktStream",
    "Remote",
    "read_refs",
]

#: A million refs at 64 bytes, twice; repositories with 300,000 pull requests exist.
ADVERTISEMENT_LIMIT_BYTES = 128 << 20
_SHA = re.compile(rb"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_LENGTH = re.compile(rb"[0-9a-fA-F]{4}")
_AGENT = "agent=isohub"
# What a server may say beside a pack: 5 bytes a packet, and a keep-alive every 5 s. Packets of 1,000
# bytes, the least that git sends, take 11 MB for 2 GiB.
_TALK_LIMIT_BYTES = 64 << 20


class PackTooLargeError(IntegrityError):
    """A server sends a pack of more bytes than were allowed."""


@dataclass(frozen=True)
class Advertisement:
    """What a server says of a repository.

    Attributes:
        refs: Its refs.
        objects: Full name to object id as the server keeps it: of a tag, where `refs` has its commit.
        capabilities: Its words, such as ``shallow`` and ``symref=HEAD:refs/heads/main``.
        base: Address that later requests go to, redirects followed.
    """

    refs: Refs
    objects: Mapping[str, str]
    capabilities: frozenset[str]
    base: str

    @property
    def object_format(self) -> str:
        """``sha1`` or ``sha256``."""
        return _capability(self.capabilities, "object-format") or "sha1"

    def branches_and_tags(self) -> list[str]:
        """Object ids of all of them, each once. Pull requests are not the repository's own."""
        names = [name for name in self.objects if name.startswith(("refs/heads/", "refs/tags/"))]
        return list(dict.fromkeys(self.objects[name] for name in names))

    def refuse_tag(self, sha: str, reference: Reference) -> None:
        """Refuse a full or short SHA that is an annotated tag's.

        Raises:
            RefNotFoundError: It is.
        """
        for name, tag in self.objects.items():
            if tag.startswith(sha) and name.startswith("refs/tags/") and self.refs.commits[name] != tag:
                raise self.refs.names_tag(reference, self.refs.commits[name], name)

    def wants(self, commit: str) -> tuple[list[str], int | None]:
        """What to ask for, and to which depth, in order to get a commit."""
        tips = {self.refs.head: self.refs.head}
        tips.update((tip, self.objects[name]) for name, tip in self.refs.commits.items())
        if commit in tips:
            return [tips[commit] or commit], 1
        if self.capabilities & {"allow-reachable-sha1-in-want", "allow-any-sha1-in-want"}:
            return [commit], 1
        return self.branches_and_tags(), None


class Remote(Protocol):
    """A repository at the other end of git's protocol."""

    @property
    def advertisement(self) -> Advertisement:
        """What the server said first."""
        ...

    def receive(self, request: PackRequest, into: IO[bytes]) -> None:
        """Ask for a pack and write it to a seekable file, which is emptied at each try. Once a remote.

        Raises:
            SourceUnavailableError: The server refuses or fails.
            PackTooLargeError: The pack is larger than allowed.
        """
        ...


class PktStream:
    """Exact reads from an iterator of chunks.

    Args:
        chunks: Trust: the network.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._held = b""  # the last chunk; what is before `_at` was read
        self._at = 0

    def exactly(self, count: int) -> bytes:
        """So many bytes; ValueError where there are fewer."""
        # The rest of a chunk is not copied: one may hold an advertisement whole.
        end = self._at + count
        if end <= len(self._held):
            start, self._at = self._at, end
            return self._held[start:end]
        parts = [self._held[self._at :]]
        missing = count - len(parts[0])
        while missing > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise ValueError("it ends in the middle of a line")
            parts.append(chunk[:missing])
            self._held, self._at = chunk, min(missing, len(chunk))
            missing -= len(chunk)
        return b"".join(parts)

    def pkt(self) -> bytes | None:
        """One pkt-line's content, or None for a flush."""
        digits = self.exactly(4)
        if not _LENGTH.fullmatch(digits):
            raise ValueError("a line has no length")
        length = int(digits, 16)
        # 1 to 3 are special packets of version 2, which was not asked for; 65520 is the protocol's limit.
        if 0 < length < 4 or length > 65520:
            raise ValueError(f"a line has the length {length}")
        return None if length == 0 else self.exactly(length - 4)

    def rest(self) -> Iterator[bytes]:
        """All that is left, in chunks."""
        yield self._held[self._at :]
        self._held, self._at = b"", 0
        yield from self._chunks


def read_refs(stream: PktStream, base: str) -> Advertisement:
    """Read an advertisement of version 0 or 1, up to its flush.

    Args:
        stream: At its first line. Trust: the network.
        base: For the result.

    Raises:
        ValueError: It does not follow the grammar.
    """
    commits: dict[str, str] = {}
    peeled: dict[str, str] = {}
    capabilities: frozenset[str] | None = None
    head: str | None = None
    count = 0
    while (line := stream.pkt()) is not None:
        count += len(line) + 4
        if count > ADVERTISEMENT_LIMIT_BYTES:
            raise ValueError(f"it has more than {ADVERTISEMENT_LIMIT_BYTES} bytes of refs")
        line = line.removesuffix(b"\n")
        if line.startswith(b"ERR "):
            raise ValueError(f"the server says: {_said(line[4:])}")
        if capabilities is None:
            if line == b"version 1":
                continue
            line, _, words = line.partition(b"\0")
            capabilities = frozenset(words.decode("utf-8", "replace").split())
        if line.startswith(b"shallow "):
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
    words_found = capabilities or frozenset()
    objects = dict(commits)
    commits.update((name, commit) for name, commit in peeled.items() if name in commits)
    target = _capability(words_found, "symref", "HEAD:")
    return Advertisement(Refs(commits, head, target if target in commits else None), objects, words_found, base)


class PackRequest:
    """A request for a pack, and the reader of its answer.

    Args:
        advertisement: Of the same repository.
        wants: Object ids; at least one.
        depth: How many commits of history, if the server can do that.
        commits_only: Leave out trees and blobs, if the server can do that.
        limit_bytes: Bound on the pack.
    """

    def __init__(
        self,
        advertisement: Advertisement,
        wants: Sequence[str],
        *,
        depth: int | None,
        commits_only: bool,
        limit_bytes: int,
    ) -> None:
        able = advertisement.capabilities
        words: list[str] = [word for word in ("ofs-delta", "no-progress", "side-band-64k") if word in able]
        self._base = advertisement.base
        self._limit_bytes = limit_bytes
        self._talk_bytes = 0
        self._sideband = "side-band-64k" in words
        self._shallow = depth is not None and "shallow" in able
        filtered = commits_only and "filter" in able
        words += ["shallow"] if self._shallow else []
        words += ["filter"] if filtered else []
        kind = advertisement.object_format
        words += [f"object-format={kind}"] if kind != "sha1" else []
        first, *others = dict.fromkeys(wants)
        lines = [_pkt(f"want {first} {' '.join([*words, _AGENT])}\n")]
        lines += [_pkt(f"want {sha}\n") for sha in others]
        lines += [_pkt(f"deepen {depth}\n")] if self._shallow else []
        lines += [_pkt("filter tree:0\n")] if filtered else []
        #: What is sent; nothing more needs to be said.
        self.body = b"".join(lines) + b"0000" + _pkt("done\n")

    def read(self, stream: PktStream, into: IO[bytes]) -> None:
        """Write the answer's pack to a file, which is emptied first.

        Raises:
            ValueError: It does not follow the grammar.
            SourceUnavailableError: The server refuses, or says too much beside the pack.
            PackTooLargeError: The pack is larger than allowed.
        """
        into.seek(0)
        into.truncate()
        self._talk_bytes = 0
        if self._shallow:
            while (line := stream.pkt()) is not None:
                self._listen(4 + len(line))
                if not line.startswith((b"shallow ", b"unshallow ")):
                    raise self._refused(line)
        if (line := stream.pkt()) is None or line.rstrip(b"\n") != b"NAK":
            raise self._refused(line or b"")
        count = 0
        for chunk in self._banded(stream) if self._sideband else stream.rest():
            count += len(chunk)
            if count > self._limit_bytes:
                text = f"{self._base} sends a pack of more than {self._limit_bytes} bytes"
                raise PackTooLargeError(text, url=self._base)
            into.write(chunk)

    def _banded(self, stream: PktStream) -> Iterator[bytes]:
        while (line := stream.pkt()) is not None:
            band, content = line[:1], line[1:]
            self._listen(5 if band == b"\1" else 4 + len(line))
            if band == b"\1":
                yield content
            elif band == b"\3":
                raise self._refused(content)
            elif band != b"\2":
                raise ValueError(f"there is no side band {band!r}")

    def _listen(self, count: int) -> None:
        """Count what is no part of the pack."""
        self._talk_bytes += count
        if self._talk_bytes > _TALK_LIMIT_BYTES:
            raise SourceUnavailableError(
                f"{self._base} says more than {_TALK_LIMIT_BYTES} bytes beside the pack", url=self._base
            )

    def _refused(self, line: bytes) -> SourceUnavailableError:
        text = _said(line.removeprefix(b"ERR ")) or "no reason given"
        return SourceUnavailableError(f"{self._base} does not send the pack: {text}", url=self._base)


def _said(line: bytes) -> str:
    return printable(line.decode("utf-8", "replace").strip(), limit_chars=300, newlines=False)


def _pkt(text: str) -> bytes:
    data = text.encode("utf-8")
    return b"%04x%s" % (len(data) + 4, data)


def _capability(capabilities: frozenset[str], key: str, prefix: str = "") -> str | None:
    start = f"{key}={prefix}"
    return next((word[len(start) :] for word in sorted(capabilities) if word.startswith(start)), None)
