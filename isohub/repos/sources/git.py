"""Any git host over smart HTTP or ssh, and clones on this machine at one of their refs.

A commit is fetched shallowly where the server can do that. Its id vouches for all that is
written, because every object is hashed as it is read. No hook, filter or submodule's command
runs; the one program that does, for ssh addresses, is ssh. Runs in the caller.

Source: gitprotocol-pack(5), gitrepository-layout(5), gitrevisions(7).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dulwich.errors import NotGitRepository
from dulwich.repo import Repo

from isohub.errors import SourceUnavailableError, printable
from isohub.repos.credentials import Credentials
from isohub.repos.pins import Pin
from isohub.repos.sources.extras import Home, write_commit
from isohub.repos.sources.objects import DAMAGE, Objects
from isohub.repos.sources.packs import PACK_LIMIT_BYTES, connected, history, received
from isohub.repos.sources.refs import Refs, is_full_sha, is_sha
from isohub.repos.sources.ssh import is_ssh

if TYPE_CHECKING:
    from isohub.repos.reference import Reference
    from isohub.repos.sources.pkt import Remote

__all__ = ["CloneSource", "GitSource", "clone_url", "opened"]


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
        with self._remote(reference) as remote:
            refs, ref = remote.advertisement.refs, reference.ref or "HEAD"
            match = refs.match(ref)
            if match is None and is_sha(ref):
                match = refs.match_tip(ref, reference)
            if match is not None:
                return Pin(reference, match.commit, match.name, validated=match.own)
            if not is_sha(ref) or not refs.commits:
                raise refs.not_found(reference)
            if is_full_sha(ref):
                remote.advertisement.refuse_tag(ref.lower(), reference)
            if skip_validation and is_full_sha(ref):
                return Pin(reference, ref.lower(), None, validated=False)
            found = history(remote, ref.lower(), limit_bytes=PACK_LIMIT_BYTES)
            if len(found) > 1:
                raise refs.ambiguous(ref, found, reference)
            if not found:
                remote.advertisement.refuse_tag(ref.lower(), reference)
                raise refs.not_found(reference, "no commit on its branches and tags has that id")
            return Pin(reference, found[0], None)

    def fetch(self, pin: Pin, into: Path, *, progress: bool = False) -> None:
        """Fetch a commit and write its tree, with the pin's extras; see `Source.fetch`."""
        reference = pin.reference
        with (
            tempfile.TemporaryDirectory(prefix=".pack-", dir=into.parent) as directory,
            self._remote(reference) as remote,
        ):
            scratch = Path(directory)
            wants, depth = remote.advertisement.wants(pin.commit)
            if not wants:
                raise _gone(pin)
            with received(remote, wants, scratch, depth=depth) as (objects, _):
                try:
                    objects.read(pin.commit)
                except KeyError:
                    raise _gone(pin) from None
                home = Home(clone_url(reference), self._credentials, own=_is_own(pin), base=remote.advertisement.base)
                _write(objects, pin, into, home, scratch, progress=progress)

    @contextmanager
    def _remote(self, reference: Reference) -> Iterator[Remote]:
        with _named(reference), connected(clone_url(reference), self._credentials) as remote:
            yield remote


class CloneSource:
    """A clone on this machine at a ref, as `isohub.repos.sources.Source`.

    Ordinary, bare and linked worktrees' clones; what is not committed is not seen.

    Args:
        credentials: Whom to ask its remote as, for submodules and LFS files that it lacks. A commit
            that is on none of its branches and tags, such as one of a pull request that was fetched
            into it, has them asked for without any.
        offline: Ask nobody: what it lacks is an `OfflineError`.
    """

    def __init__(self, credentials: Credentials | None = None, *, offline: bool = False) -> None:
        self._credentials = credentials or Credentials()
        self._offline = offline

    def resolve(self, reference: Reference, *, skip_validation: bool = False) -> Pin:  # noqa: ARG002  # the user's own clone
        """Find the commit that a reference means now; any commit that is in the clone is the user's."""
        ref = reference.ref or "HEAD"
        with opened(reference) as (repo, objects):
            refs = _clone_refs(repo, objects)
            match = refs.match(ref)
            if match is not None:
                return Pin(reference, match.commit, match.name, validated=match.own)
            if not is_sha(ref):
                raise refs.not_found(reference)
            found, tagged = objects.commits_like(ref)
            if not found and tagged:
                # Under the tag's id a lockfile or a list of trust would not know the commit.
                raise refs.names_tag(reference, tagged[0])
            if len(found) > 1:
                raise refs.ambiguous(ref, found, reference)
            if not found:
                raise refs.not_found(reference, hint=None if not is_full_sha(ref) else "git fetch may bring it")
            return Pin(reference, found[0], None)

    def fetch(self, pin: Pin, into: Path, *, progress: bool = False) -> None:
        """Write a commit's tree, with the pin's extras; see `Source.fetch`.

        Submodules and LFS files are taken from the clone where it has them, else from its remote.
        """
        with (
            opened(pin.reference) as (repo, objects),
            tempfile.TemporaryDirectory(prefix=".pack-", dir=into.parent) as scratch,
        ):
            directories = tuple(dict.fromkeys(Path(str(place)) for place in (repo.controldir(), repo.commondir())))
            origin = _origin(repo)
            # The history is walked for those alone who may have to ask.
            asks = bool(pin.extras) and origin is not None and not self._offline
            own = asks and _is_on_branches(repo, objects, pin.commit)
            credentials = self._credentials if own else Credentials(anonymous=True)
            home = Home(origin, credentials, own, directories)
            _write(objects, pin, into, home, Path(scratch), offline=self._offline, progress=progress)


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


def _is_on_branches(repo: Repo, objects: Objects, commit: str) -> bool:
    """Whether a clone's own branches and tags lead to a commit; what else was fetched is anyone's."""
    refs = _clone_refs(repo, objects).commits
    tips = [refs[name] for name in refs if name.startswith(("refs/heads/", "refs/tags/"))]
    return commit in tips or commit in objects.reachable(tips)


@contextmanager
def opened(reference: Reference) -> Iterator[tuple[Repo, Objects]]:
    """A clone on this machine, to be read while the context is open.

    Raises:
        SourceUnavailableError: It is none, or cannot be read.
    """
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


def _write(
    objects: Objects, pin: Pin, into: Path, home: Home, scratch: Path, *, progress: bool, offline: bool = False
) -> None:
    write_commit(
        objects,
        pin.commit,
        into,
        origin=f"{pin.reference.location} at {pin.commit[:12]}",
        extras=pin.extras,
        home=home,
        scratch=scratch,
        offline=offline,
        progress=progress,
    )


def clone_url(reference: Reference) -> str:
    """What ``git clone`` takes for a reference of a server."""
    # GitHub's own form; without the suffix it redirects some clients.
    return f"{reference.location}.git" if reference.source == "github" else reference.location


def _is_own(pin: Pin) -> bool:
    """Whether a commit is the repository's own: on its branches and tags, and no pull request's."""
    return pin.validated and (pin.ref_name is None or pin.ref_name.startswith(("refs/heads/", "refs/tags/")))


def _origin(repo: Repo) -> str | None:
    """Address of a clone's remote, without what it holds of credentials; None if that is a path."""
    try:
        url = repo.get_config().get((b"remote", b"origin"), b"url").decode("utf-8")
    except (KeyError, ValueError, OSError):
        return None
    if is_ssh(url):
        return url
    parts = urlsplit(url)
    return (
        f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.scheme in ("https", "http") else None
    )


def _gone(pin: Pin) -> SourceUnavailableError:
    where = pin.reference.location
    return SourceUnavailableError(
        f"{where} did not send commit {pin.commit}: it is on none of its branches now",
        reference=str(pin.reference),
        url=where,
    )


@contextmanager
def _named(reference: Reference) -> Iterator[None]:
    """Errors with the reference, and a hint that fits a git host."""
    try:
        yield
    except SourceUnavailableError as error:
        if error.reference is not None:
            raise
        hint = error.hint
        if error.status in (401, 403, 404) and hint is None:
            hint = "check the address; for a private repository put the password into ~/.netrc"
        fields = {**error.fields, "reference": str(reference)}
        raise type(error)(error.message, hint=hint, **fields) from error
