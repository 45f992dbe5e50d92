"""What a remote sends, brought into an object store of its own, and the history of its branches.

A remote is reached over HTTPS or by ssh, whichever its address says. Nothing that was received
is believed: `Objects` hashes whatever is read. Runs in the caller.

Source: gitprotocol-pack(5), gitformat-pack(5), git-rev-list(1) (``--filter=tree:0``).
"""

from __future__ import annotations

import mmap
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dulwich.object_store import DiskObjectStore

from isohub.errors import IntegrityError, SourceUnavailableError, printable
from isohub.repos.http import HttpClient
from isohub.repos.sources.objects import DAMAGE, Objects
from isohub.repos.sources.pkt import PackRequest, Remote
from isohub.repos.sources.refs import is_full_sha
from isohub.repos.sources.smart_http import HttpRemote
from isohub.repos.sources.ssh import SshRemote, is_ssh

if TYPE_CHECKING:
    from isohub.repos.credentials import Credentials

__all__ = ["HISTORY_LIMIT_BYTES", "PACK_LIMIT_BYTES", "connected", "history", "received", "tree_of"]

#: As for archives: GitHub refuses pushes above 2 GiB.
PACK_LIMIT_BYTES = 2 << 30
#: Commits alone, 235 bytes each in a pack: 280,000 of them, which is three times PyTorch's history
#: and a fifth of the Linux kernel's. They take 20 s to hash and walk.
HISTORY_LIMIT_BYTES = 64 << 20
# An object is held in memory whole. GitHub takes no file above 100 MiB; git treats those above
# 512 MiB as too big for its own memory (core.bigFileThreshold).
_OBJECT_LIMIT_BYTES = 512 << 20
# All together, deltas applied: each is inflated and hashed, at some 300 MB/s.
_INFLATED_LIMIT_BYTES = 32 << 30
# One commit: its message is the largest part, and GitHub shows 64 KiB of it.
_COMMIT_LIMIT_BYTES = 16 << 20
_OFS_DELTA, _REF_DELTA = 6, 7
_STEP_BYTES = 1 << 16


@contextmanager
def connected(location: str, credentials: Credentials) -> Iterator[Remote]:
    """A remote that was asked for its refs.

    Args:
        location: As ``git clone`` takes it: ``https://``, ``ssh://``, or ``user@host:path``.
        credentials: Whom to ask as over HTTP; ssh has its own.

    Raises:
        SourceUnavailableError: It is not there for us, or speaks of objects that we do not know.
    """
    if is_ssh(location):
        with SshRemote(location) as remote:
            yield _of_known_format(remote)
    else:
        with HttpClient(credentials) as client:
            yield _of_known_format(HttpRemote(client, location))


@contextmanager
def received(
    remote: Remote,
    wants: list[str],
    scratch: Path,
    *,
    depth: int | None,
    commits_only: bool = False,
    limit_bytes: int = PACK_LIMIT_BYTES,
) -> Iterator[tuple[Objects, int]]:
    """Fetch a pack into an object store of its own, to be read while the context is open.

    Args:
        remote: Whom to ask; it can be asked once.
        wants: Object ids.
        scratch: A directory for temporary files.
        depth: How many commits of history, if the server can do that.
        commits_only: Leave out trees and blobs, if the server can do that.
        limit_bytes: Bound on the pack.

    Returns:
        The objects, and the size of the pack in bytes.

    Raises:
        SourceUnavailableError: The server refuses or fails.
        PackTooLargeError: The pack is larger than allowed.
        IntegrityError: The pack is damaged.
    """
    advertisement = remote.advertisement
    algorithm = advertisement.object_format
    options: dict[str, Any] = {}
    if algorithm != "sha1":
        try:
            from dulwich.object_format import get_object_format  # noqa: PLC0415  # dulwich 1.0 and later
        except ModuleNotFoundError as error:
            raise SourceUnavailableError(
                f"{advertisement.base} has SHA-256 objects, which the dulwich that is installed does not read",
                hint="pip install --upgrade 'dulwich>=1.0'",
                url=advertisement.base,
            ) from error
        options["object_format"] = get_object_format(algorithm)
    request = PackRequest(advertisement, wants, depth=depth, commits_only=commits_only, limit_bytes=limit_bytes)
    with tempfile.TemporaryDirectory(prefix=".objects-", dir=scratch) as directory:
        with tempfile.TemporaryFile(dir=scratch) as pack:
            remote.receive(request, pack)
            size_bytes = pack.seek(0, 2)
            store = DiskObjectStore.init(f"{directory}/objects", **options)
            try:
                _check_sizes(pack, 20 if algorithm == "sha1" else 32)
                pack.seek(0)
                store.add_thin_pack(pack.read, None)
            except DAMAGE as error:
                store.close()
                text = printable(str(error) or type(error).__name__, limit_chars=300, newlines=False)
                raise IntegrityError(
                    f"{advertisement.base} sends a damaged pack: {text}", url=advertisement.base
                ) from error
        try:
            yield Objects(store, where=advertisement.base, algorithm=algorithm), size_bytes
        finally:
            store.close()


def history(remote: Remote, sha: str, *, limit_bytes: int) -> list[str]:
    """Commits of a remote's branches and tags that a full or short SHA names.

    Their history is fetched, without files where the server can leave them out, and walked from
    the tips by parents; so what is found is shown to belong to the repository.

    Args:
        remote: Whom to ask; it can be asked once.
        sha: In lower case.
        limit_bytes: Bound on what is fetched.

    Raises:
        SourceUnavailableError: The server refuses or fails.
        PackTooLargeError: The history is larger than allowed.
        IntegrityError: What arrives is damaged.
    """
    tips = remote.advertisement.branches_and_tags()
    if not tips:
        return []
    found: list[str] = []
    with (
        _temporary(remote.advertisement.base) as scratch,
        received(remote, tips, Path(scratch), depth=None, commits_only=True, limit_bytes=limit_bytes) as (objects, _),
    ):
        for commit in objects.reachable(tips):
            if commit.startswith(sha):
                found.append(commit)
                if is_full_sha(sha):
                    break
    return found


@contextmanager
def _temporary(base: str) -> Iterator[str]:
    """A directory that is not the store's, and whose troubles are not."""
    try:
        with tempfile.TemporaryDirectory(prefix="isohub-") as directory:
            yield directory
    except OSError as error:
        raise SourceUnavailableError(
            f"the history of {base} cannot be kept in {tempfile.gettempdir()} while it is read: "
            f"{error.strerror or error}",
            hint="make room there, or set TMPDIR to a directory that has some; a branch or a tag needs no history",
            url=base,
        ) from error


def tree_of(remote: Remote, commit: str, scratch: Path) -> str:
    """Id of the tree that a commit names, by the commit object alone.

    Args:
        remote: Whom to ask; it can be asked once.
        commit: Its id, which the object must have.
        scratch: A directory for temporary files.

    Raises:
        SourceUnavailableError: The server refuses or fails.
        PackTooLargeError: It sends more than the commit.
        IntegrityError: What arrives is damaged.
    """
    only = received(remote, [commit], scratch, depth=1, commits_only=True, limit_bytes=_COMMIT_LIMIT_BYTES)
    with only as (objects, _):
        return objects.tree(commit)


def _check_sizes(pack: IO[bytes], id_bytes: int) -> None:
    """Refuse a pack that inflates to more than memory and patience hold; a thousandth of that suffices to send it.

    Raises:
        ValueError: It does, or it is no pack.
    """
    pack.flush()
    with mmap.mmap(pack.fileno(), 0, access=mmap.ACCESS_READ) as data:  # ValueError if it is empty
        if data[:4] != b"PACK" or len(data) < 12 + id_bytes:
            raise ValueError("it does not begin as a pack does")
        at, total_bytes = 12, 0
        for _ in range(int.from_bytes(data[8:12], "big")):
            byte = data[at]
            kind, size_bytes, shift = (byte >> 4) & 7, byte & 15, 4
            at += 1
            while byte & 0x80:
                byte = data[at]
                size_bytes |= (byte & 0x7F) << shift
                shift += 7
                at += 1
            if kind == _OFS_DELTA:
                while data[at] & 0x80:
                    at += 1
                at += 1
            elif kind == _REF_DELTA:
                at += id_bytes
            start, at = _inflated(data, at, size_bytes)
            if kind in (_OFS_DELTA, _REF_DELTA):
                size_bytes = max(size_bytes, _result_bytes(start))
            total_bytes += size_bytes
            if size_bytes > _OBJECT_LIMIT_BYTES or total_bytes > _INFLATED_LIMIT_BYTES:
                raise ValueError(
                    f"an object of {size_bytes} bytes, {total_bytes} with those before; "
                    f"at most {_OBJECT_LIMIT_BYTES} and {_INFLATED_LIMIT_BYTES} are read"
                )


def _inflated(data: mmap.mmap, at: int, size_bytes: int) -> tuple[bytes, int]:
    """The first bytes of a deflated object, and where the next object starts; nothing large is held."""
    inflate = zlib.decompressobj()
    start, count = b"", 0
    while not inflate.eof:
        fed = data[at : at + min(_STEP_BYTES, size_bytes + 64)]
        if not fed:
            raise ValueError("it ends in the middle of an object")
        at += len(fed)
        while fed and not inflate.eof:
            out = inflate.decompress(fed, _STEP_BYTES)
            fed = inflate.unconsumed_tail
            start = start or out[:32]
            count += len(out)
            if count > size_bytes:
                raise ValueError("an object inflates to more than it says")
    return start, at - len(inflate.unused_data)


def _result_bytes(delta: bytes) -> int:
    """The size of what a delta makes: the second of two numbers at its start."""
    size_bytes = shift = numbers = 0
    for byte in delta:
        size_bytes |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            numbers += 1
            if numbers == 2:
                return size_bytes
            size_bytes = shift = 0
    raise ValueError("a delta has no sizes")


def _of_known_format(remote: Remote) -> Remote:
    advertisement = remote.advertisement
    if advertisement.object_format not in ("sha1", "sha256"):
        kind = printable(advertisement.object_format, limit_chars=50, newlines=False)
        raise SourceUnavailableError(
            f"{advertisement.base} has objects of the unknown format {kind!r}", url=advertisement.base
        )
    return remote
