"""Any git host over smart HTTP, and clones on this machine at one of their refs.

A commit is fetched shallowly where the server can do that. Its id vouches for all that is
written, because every object is hashed as it is read. No hook, filter, credential helper or
other program runs: dulwich only reads objects and refs. Runs in the caller.

Source: gitprotocol-pack(5), gitrepository-layout(5), gitrevisions(7).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dulwich.errors import NotGitRepository
from dulwich.object_store import DiskObjectStore
from dulwich.repo import Repo

from isohub.errors import IntegrityError, SourceUnavailableError, printable
from isohub.repos.credentials import Credentials
from isohub.repos.http import HttpClient
from isohub.repos.pins import Pin
from isohub.repos.sources.objects import DAMAGE, Objects
from isohub.repos.sources.refs import Refs, is_full_sha, is_sha
from isohub.repos.sources.smart_http import Advertisement, read_advertisement, receive_pack

if TYPE_CHECKING:
    from isohub.repos.reference import Reference

__all__ = ["CloneSource", "GitSource"]

# As for archives: GitHub refuses pushes above 2 GiB.
_PACK_LIMIT_BYTES = 2 << 30


class GitSource:
    """Repositories on any git host, as `isohub.repos.sources.Source`.

    Args:
        credentials: Whom to ask as.
    """

    def __init__(self, credentials: Credentials | None = None) -> None:
        self._credentials = credentials or Credentials()

    def resolve(self, reference: Reference, *, skip_validation: bool = False) -> Pin:
        """Find the commit that a reference means now; see `Source.resolve`.

        A SHA that is no tip costs the history of all branches and tags, without files where the
        server can leave them out. `skip_validation` spares that for a full SHA.
        """
        _require_https(reference)
        with HttpClient(self._credentials) as client:
            advertisement = _advertisement(client, reference)
            refs, ref = advertisement.refs, reference.ref or "HEAD"
            match = refs.match(ref)
            if match is None and is_sha(ref):
                match = refs.match_tip(ref, reference)
            if match is not None:
                return Pin(reference, match.commit, match.name)
            if not is_sha(ref) or not refs.commits:
                raise refs.not_found(reference)
            if skip_validation and is_full_sha(ref):
                return Pin(reference, ref.lower(), None, validated=False)
            with tempfile.TemporaryDirectory(prefix="isohub-") as scratch:
                wants = _branches_and_tags(advertisement)
                with _received(client, advertisement, wants, Path(scratch), depth=None, commits_only=True) as objects:
                    found = objects.commits_like(ref)
            if len(found) > 1:
                raise refs.ambiguous(ref, found, reference)
            if not found:
                raise refs.not_found(reference, "no commit on its branches and tags has that id")
            return Pin(reference, found[0], None)

    def fetch(self, pin: Pin, into: Path, *, progress: bool = False) -> None:  # noqa: ARG002  # packs come without a length
        """Fetch a commit and write its tree; see `Source.fetch`."""
        _require_https(pin.reference)
        with (
            HttpClient(self._credentials) as client,
            tempfile.TemporaryDirectory(prefix=".pack-", dir=into.parent) as scratch,
        ):
            advertisement = _advertisement(client, pin.reference)
            tips = {advertisement.refs.head: advertisement.refs.head}
            tips.update((commit, advertisement.objects[name]) for name, commit in advertisement.refs.commits.items())
            able = advertisement.capabilities
            if pin.commit in tips:
                wants, depth = [tips[pin.commit] or pin.commit], 1
            elif able & {"allow-reachable-sha1-in-want", "allow-any-sha1-in-want"}:
                wants, depth = [pin.commit], 1
            else:
                wants, depth = _branches_and_tags(advertisement), None
            with _received(client, advertisement, wants, Path(scratch), depth=depth, commits_only=False) as objects:
                try:
                    objects.read(pin.commit)
                except KeyError:
                    raise SourceUnavailableError(
                        f"{pin.reference.location} did not send commit {pin.commit}: it is on none of its branches now",
                        reference=str(pin.reference),
                        url=pin.reference.location,
                    ) from None
                objects.write_tree(pin.commit, into)


class CloneSource:
    """A clone on this machine at a ref, as `isohub.repos.sources.Source`.

    Ordinary, bare and linked worktrees' clones; what is not committed is not seen.
    """

    def resolve(self, reference: Reference, *, skip_validation: bool = False) -> Pin:  # noqa: ARG002  # the user's own clone
        """Find the commit that a reference means now; any commit that is in the clone is the user's."""
        ref = reference.ref or "HEAD"
        with _opened(reference) as (repo, objects):
            refs = _clone_refs(repo, objects)
            match = refs.match(ref)
            if match is not None:
                return Pin(reference, match.commit, match.name)
            if not is_sha(ref):
                raise refs.not_found(reference)
            found = objects.commits_like(ref)
            if len(found) > 1:
                raise refs.ambiguous(ref, found, reference)
            if not found:
                raise refs.not_found(reference, hint=None if not is_full_sha(ref) else "git fetch may bring it")
            return Pin(reference, found[0], None)

    def fetch(self, pin: Pin, into: Path, *, progress: bool = False) -> None:  # noqa: ARG002  # the disk is quick
        """Write a commit's tree; see `Source.fetch`."""
        with _opened(pin.reference) as (_, objects):
            objects.write_tree(pin.commit, into)


class _Peeled(Mapping[str, str]):
    """A clone's refs with tags peeled when they are looked at: there may be 100,000 of them."""

    def __init__(self, raw: dict[str, str], objects: Objects) -> None:
        self._raw = raw
        self._objects = objects

    def __getitem__(self, name: str) -> str:
        sha = self._raw[name]
        try:
            return self._objects.peel(sha) or sha
        except KeyError:  # a missing object is a finding of `fetch`, which names it
            return sha

    def __contains__(self, name: object) -> bool:
        return name in self._raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)


def _clone_refs(repo: Repo, objects: Objects) -> Refs:
    raw: dict[str, str] = {}
    for raw_name in repo.refs.allkeys():
        try:
            raw[raw_name.decode("utf-8")] = repo.refs[raw_name].decode("ascii")
        except (KeyError, UnicodeDecodeError, ValueError):
            continue  # a symref to nothing, such as HEAD before the first commit
    head = raw.pop("HEAD", None)
    followed: Any = repo.refs  # whose type for names differs by version
    names = [name.decode("utf-8", "replace") for name in followed.follow(b"HEAD")[0]]
    head_name = names[-1] if head and len(names) > 1 else None
    return Refs(_Peeled(raw, objects), head, head_name, remote="origin")


@contextmanager
def _opened(reference: Reference) -> Iterator[tuple[Repo, Objects]]:
    where = reference.location
    try:
        repo = Repo(where)
    except NotGitRepository as error:
        raise SourceUnavailableError(
            f"{where} is no git clone, so it has no ref {reference.ref!r}",
            hint="leave the ref out for the directory as it stands, or name the clone's top directory",
            reference=str(reference),
            url=where,
        ) from error
    except (OSError, *DAMAGE) as error:
        raise _unreadable(reference, error) from error
    except Exception as error:
        # dulwich refuses extensions and formats that it does not know with classes that differ by version.
        if not type(error).__module__.startswith("dulwich."):
            raise
        raise _unreadable(reference, error) from error
    try:
        algorithm = getattr(getattr(repo, "object_format", None), "name", "sha1")
        yield repo, Objects(repo.object_store, where=where, algorithm=algorithm)
    finally:
        repo.close()


def _unreadable(reference: Reference, error: Exception) -> SourceUnavailableError:
    text = printable(str(error) or type(error).__name__, limit_chars=300, newlines=False)
    return SourceUnavailableError(
        f"{reference.location} is a clone that cannot be read: {type(error).__name__}: {text}",
        hint="a plain `git clone` of it, without --filter and of the current format, can be read",
        reference=str(reference),
        url=reference.location,
    )


def _require_https(reference: Reference) -> None:
    if reference.location.startswith("ssh://"):
        raise SourceUnavailableError(
            f"{reference.location} is reached over ssh, which would run a program with your keys; isohub does not",
            hint="write https://..., or `git clone` it yourself and name the clone: ./clone:ref",
            reference=str(reference),
            url=reference.location,
        )


def _advertisement(client: HttpClient, reference: Reference) -> Advertisement:
    try:
        advertisement = read_advertisement(client, reference.location)
    except SourceUnavailableError as error:
        hint = error.hint
        if error.status in (401, 403, 404):
            hint = "check the address; for a private repository put the password into ~/.netrc"
        raise SourceUnavailableError(
            error.message, hint=hint, reference=str(reference), url=error.url, status=error.status
        ) from error
    if advertisement.object_format not in ("sha1", "sha256"):
        kind = printable(advertisement.object_format, limit_chars=50, newlines=False)
        raise SourceUnavailableError(f"{reference.location} has objects of the unknown format {kind!r}")
    return advertisement


def _branches_and_tags(advertisement: Advertisement) -> list[str]:
    names = [name for name in advertisement.objects if name.startswith(("refs/heads/", "refs/tags/"))]
    return list(dict.fromkeys(advertisement.objects[name] for name in names))


@contextmanager
def _received(
    client: HttpClient,
    advertisement: Advertisement,
    wants: list[str],
    scratch: Path,
    *,
    depth: int | None,
    commits_only: bool,
) -> Iterator[Objects]:
    """Fetch a pack into an object store of its own and read from that."""
    directory = scratch / "objects"
    directory.mkdir()
    algorithm = advertisement.object_format
    options: dict[str, Any] = {}
    if algorithm != "sha1":
        from dulwich.object_format import get_object_format  # noqa: PLC0415  # dulwich 1.0 and later

        options["object_format"] = get_object_format(algorithm)
    with tempfile.TemporaryFile(dir=scratch) as pack:
        receive_pack(
            client,
            advertisement,
            wants,
            pack,
            depth=depth,
            commits_only=commits_only,
            limit_bytes=_PACK_LIMIT_BYTES,
        )
        pack.seek(0)
        store = DiskObjectStore.init(str(directory), **options)
        try:
            try:
                store.add_thin_pack(pack.read, None)
            except DAMAGE as error:
                text = printable(str(error) or type(error).__name__, limit_chars=300, newlines=False)
                raise IntegrityError(
                    f"{advertisement.base} sends a damaged pack: {text}", url=advertisement.base
                ) from error
            yield Objects(store, where=advertisement.base, algorithm=algorithm)
        finally:
            store.close()
