"""Which repos may be handed the caller's own powers.

1. Trust is of one (host, owner, repo), or of one commit of it. Each part is kept and compared by
   itself, exactly: no joining (torch.hub's ``owner_name`` list takes ``a/b_c`` for ``a_b/c``), no
   case folding, no owner who is trusted for being known.
2. Only `add` writes, under a lock, to a file that only its user can write, in one rename.
3. Reading fails closed. A missing file means that nothing is trusted; a file that is damaged, of
   another format version, or writable by others is a `TrustError`, never an answer. Its checksum finds
   the flipped byte that would trust somebody else.

Version 1 had no checksum; it is read, and written as version 2 at the next change. Where a local repo was
found is written beside it, for people: `owner` is a hash then. It is shown, and what is trusted never depends on it.

It asks nobody and prompts nowhere. Runs in the caller.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import uuid
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from isohub.errors import InvalidReferenceError, TrustError, printable
from isohub.repos.disk import lock_file
from isohub.repos.reference import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from isohub.repos.reference import Reference

__all__ = ["Trust", "TrustEntry", "trust_location", "trust_target"]

_FORMAT_VERSION = 2
_UNSEALED_VERSION = 1
_LIMIT_BYTES = 1 << 20  # some 5,000 entries; a person adds each
_LOCK_TIMEOUT_S = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")  # SHA-1 or SHA-256


@dataclass(frozen=True, order=True)
class TrustEntry:
    """What is trusted.

    Attributes:
        host: Such as ``github.com``.
        owner: Owner as the reference names it; may hold slashes on hosts that have groups.
        repo: Name of the repository.
        commit: Full SHA; None trusts every commit, also those to come.
        location: Where a local repo was when it was trusted, made printable; None for others. Not compared.
    """

    host: str
    owner: str
    repo: str
    commit: str | None = None
    location: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("host", "owner", "repo"):
            value: object = getattr(self, name)
            # Nothing invisible: an entry that a person reads must be the one that is compared.
            if not isinstance(value, str) or not value or not value.isprintable() or value != value.strip():
                raise TrustError(f"cannot trust this {name}: got {printable(repr(value), limit_chars=200)}")
        commit: object = self.commit  # whatever a damaged file holds
        if commit is not None and not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
            raise TrustError(
                f"cannot trust this commit: got {printable(repr(commit), limit_chars=200)}, "
                f"expected a full SHA in lower case",
                repo=f"{self.owner}/{self.repo}",
            )
        location: object = self.location
        if location is not None and not (isinstance(location, str) and location and location.isprintable()):
            raise TrustError(f"cannot note this location: got {printable(repr(location), limit_chars=200)}")

    @property
    def whole_name(self) -> str:
        """The repo, as ``host/owner/repo``."""
        return f"{self.host}/{self.owner}/{self.repo}"

    @property
    def name(self) -> str:
        """The entry as it is shown, and as `Trust.remove_text` takes it: ``host/owner/repo[@commit]``."""
        return self.whole_name + (f"@{self.commit}" if self.commit else "")


class Trust:
    """The trusted list in a directory, read anew at every question.

    Attributes:
        file: ``<directory>/trust.json``.
    """

    def __init__(self, directory: Path) -> None:
        self.file = Path(directory) / "trust.json"

    def entries(self) -> tuple[TrustEntry, ...]:
        """All entries, sorted.

        Raises:
            TrustError: The file cannot be relied on; the message names it and says why.
        """
        return tuple(sorted(self._read(), key=lambda e: (e.host, e.owner, e.repo, e.commit or "")))

    def allows(self, host: str, owner: str, repo: str, commit: str | None, *, whole: bool = True) -> bool:
        """Whether this commit of this repo is trusted.

        Args:
            host: As resolved, and so are the others. Trust: caller and network.
            owner: Owner.
            repo: Repository.
            commit: Full SHA; with None, only trust in every commit counts.
            whole: Whether trust in every commit counts; False for a commit that was not shown to be on a
                branch or tag of the repo, which needs an entry of its own.

        Raises:
            TrustError: The file cannot be relied on.
        """
        asked: set[tuple[str, str, str, str | None]]
        asked = {(host, owner, repo, commit)} if commit is not None else set()
        if whole:
            asked.add((host, owner, repo, None))
        return any((entry.host, entry.owner, entry.repo, entry.commit) in asked for entry in self._read())

    def add(self, host: str, owner: str, repo: str, commit: str | None = None, *, location: str | None = None) -> bool:
        """Trusts a repo, or one commit of it. Returns False if exactly that was trusted before.

        Args:
            host: Exactly so, and so are the others. Trust: the caller.
            owner: Owner.
            repo: Repository.
            commit: Full SHA; None for all commits.
            location: `trust_location` of the reference.

        Raises:
            TrustError: A part is empty or no full SHA, or the file cannot be relied on or written.
        """
        entry = TrustEntry(host, owner, repo, commit, location)
        with self._locked():
            entries = self._read()
            known = next((each for each in entries if each == entry), None)
            if known is None or location not in (None, known.location):
                self._write((entries - {entry}) | {entry})
        return known is None

    def remove(self, host: str, owner: str, repo: str, commit: str | None = None) -> bool:
        """Ends trust. Returns whether there was any.

        Without a commit, everything about the repo is removed, so that afterwards none of its
        commits is trusted. With one, only that entry is.

        Raises:
            TrustError: One commit was named and would still be trusted, since the whole repo is; or
                the file cannot be relied on or written.
        """
        with self._locked():
            entries = self._read()
            gone = _removal(entries, (host, owner, repo), commit)
            if gone:
                self._write(entries - gone)
        return bool(gone)

    def would_remove(self, text: str) -> tuple[TrustEntry, ...]:
        """The entries that `remove_text` would take away, sorted; raises as it does, and writes nothing."""
        named = self.named(text)
        gone = _removal(self._read(), (named.host, named.owner, named.repo), named.commit)
        return tuple(sorted(gone, key=lambda entry: entry.name))

    def remove_text(self, text: str) -> bool:
        """Ends trust in what a text names. Returns whether there was any; takes and raises as `named` and `remove`."""
        entry = self.named(text)
        return self.remove(entry.host, entry.owner, entry.repo, entry.commit)

    def named(self, text: str) -> TrustEntry:
        """What a text names, trusted or not.

        Args:
            text: A name as `TrustEntry` has it, a reference, or the location of a trusted local repo, which
                may be gone. Trust: the caller.

        Raises:
            InvalidReferenceError: It is none of these, or names a ref that can move.
            TrustError: It names what cannot be trusted, or the file cannot be relied on.
        """
        entries = self.entries()
        for entry in entries:
            if text in (entry.name, entry.whole_name):
                return entry if text == entry.name else replace(entry, commit=None)
        try:
            reference = parse(text)
        except InvalidReferenceError as error:
            place = _place(text)
            for entry in entries:
                if entry.location is not None and entry.location == place:
                    return replace(entry, commit=None)
            raise InvalidReferenceError(
                error.message,
                hint="isohub trust ls shows what is trusted; name it as it is there",
                reference=error.reference,
                part=error.part,
            ) from None
        return TrustEntry(*trust_target(reference), location=trust_location(reference))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = lock_file(self.file.with_name(f"{self.file.name}.lock"), timeout_s=_LOCK_TIMEOUT_S, mode=0o600)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            why = f"is locked by another process for more than {_LOCK_TIMEOUT_S:.0f} s"
            raise self._unchanged(why, "try again") from error
        except (OSError, NotImplementedError) as error:  # the second is filelock's word for a disk without locks
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            hint = "set ISOHUB_HOME to a directory on a local disk that can be written"
            raise self._unchanged(f"cannot be locked and written: {reason}", hint) from error
        try:
            yield
        finally:
            lock.release()

    def _unreliable(self, why: str, hint: str | None = None) -> TrustError:
        return TrustError(
            f"the trusted list {self.file} {printable(why, limit_chars=500, newlines=False)}; nothing is trusted",
            hint=hint or f"look at {self.file}; if you cannot tell what it should hold, delete it and trust anew",
        )

    def _unchanged(self, why: str, hint: str) -> TrustError:
        """The error for a list that is sound and could not be written: who was trusted still is."""
        shown = printable(why, limit_chars=500, newlines=False)
        return TrustError(f"the trusted list {self.file} {shown}; it is as it was", hint=hint)

    def _read(self) -> frozenset[TrustEntry]:
        try:
            # NOFOLLOW: a link would let its target's owner decide. NONBLOCK: a FIFO would hang.
            descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return frozenset()
        except OSError as error:
            raise self._unreliable(f"cannot be read: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise self._unreliable("is no regular file")
            if status.st_uid not in {os.geteuid(), 0}:
                raise self._unreliable(f"belongs to user {status.st_uid}, expected {os.geteuid()}")
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise self._unreliable(f"may be written by others (mode {stat.S_IMODE(status.st_mode):o})")
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                content = stream.read(_LIMIT_BYTES + 1)
        finally:
            os.close(descriptor)
        if len(content) > _LIMIT_BYTES:
            raise self._unreliable(f"is larger than {_LIMIT_BYTES} bytes")
        try:
            return _parse(content)
        except (ValueError, RecursionError, TrustError) as error:
            raise self._unreliable(f"is damaged: {error}") from error

    def _write(self, entries: frozenset[TrustEntry]) -> None:
        content = _text(entries)
        if len(content) > _LIMIT_BYTES:
            raise self._unchanged(f"would be larger than {_LIMIT_BYTES} bytes", "isohub trust rm takes entries away")
        staging = self.file.with_name(f".{self.file.name}.{uuid.uuid4().hex}")
        try:
            descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(descriptor)
            staging.replace(self.file)
        except OSError as error:
            staging.unlink(missing_ok=True)
            hint = "make room, or set ISOHUB_HOME to a directory that can be written"
            raise self._unchanged(f"cannot be written: {error.strerror}", hint) from error


def _removal(
    entries: frozenset[TrustEntry], identity: tuple[str, str, str], commit: str | None
) -> frozenset[TrustEntry]:
    """What goes when trust in a repo, or in one commit of it, ends."""
    of_repo = frozenset(entry for entry in entries if (entry.host, entry.owner, entry.repo) == identity)
    if commit is None:
        return of_repo
    if any(entry.commit is None for entry in of_repo):
        host, owner, repo = identity
        raise TrustError(
            f"{owner}/{repo} on {host} is trusted as a whole, so removing {commit} alone changes nothing",
            repo=f"{owner}/{repo}",
            hint="remove the whole repo, then add the commits that you trust",
        )
    return frozenset(entry for entry in of_repo if entry.commit == commit)


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _text(entries: frozenset[TrustEntry]) -> bytes:
    """The one form in which a list is written: of the same entries always the same bytes."""
    trusted = [
        {name: value for name, value in asdict(entry).items() if name != "location" or value is not None}
        for entry in sorted(entries, key=str)
    ]
    document = {"version": _FORMAT_VERSION, "trusted": trusted, "sha256": _checksum(trusted)}
    return (json.dumps(document, indent=2) + "\n").encode()


def _checksum(trusted: list[Any]) -> str:
    return hashlib.sha256(json.dumps(trusted, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse(content: bytes) -> frozenset[TrustEntry]:
    document: object = json.loads(content.decode("utf-8"), object_pairs_hook=_no_repeated_keys)
    if not isinstance(document, dict) or not {"version", "trusted"} <= set(document):
        raise ValueError("expected an object with the keys 'version' and 'trusted'")
    version = document["version"]
    if type(version) is not int or version not in (_UNSEALED_VERSION, _FORMAT_VERSION):
        raise ValueError(f"got format version {version!r}, expected {_FORMAT_VERSION}")
    if set(document) != {"version", "trusted"} | ({"sha256"} if version == _FORMAT_VERSION else set()):
        raise ValueError(f"got the keys {', '.join(map(repr, document))} in format version {version}")
    trusted = document["trusted"]
    if not isinstance(trusted, list):
        raise ValueError("expected a list under 'trusted'")
    if version == _FORMAT_VERSION and document["sha256"] != _checksum(trusted):
        raise ValueError("its checksum is not that of its entries; isohub trust add | rm write it, editors do not")
    entries = set()
    for number, item in enumerate(trusted):
        if not isinstance(item, dict) or set(item) - {"location"} != {"host", "owner", "repo", "commit"}:
            raise ValueError(f"expected the keys host, owner, repo and commit in entry {number}")
        entries.add(TrustEntry(**item))
    found = frozenset(entries)
    if version == _FORMAT_VERSION and content != _text(found):
        raise ValueError("its entries are whole, but it is not written as isohub writes it")
    return found


def trust_location(reference: Reference) -> str | None:
    """Where a local reference is, for `Trust.add`; None for others."""
    return _shown(reference.location) if reference.source == "local" else None


def _place(text: str) -> str | None:
    """The location that a path has, or had before it was gone."""
    try:
        return _shown(os.path.realpath(Path(text).expanduser()))
    except (OSError, RuntimeError, ValueError):  # a loop, no home directory, a NUL
        return None


def _shown(path: str) -> str:
    shown = printable(path, newlines=False)
    return shown if shown.isprintable() else ascii(shown)[1:-1]


def trust_target(reference: Reference) -> tuple[str, str, str, str | None]:
    """What a reference names, for `Trust.add` and `Trust.remove`.

    Args:
        reference: Without a ref, the whole repo; with a full SHA, that commit alone. Trust: the caller.

    Returns:
        Host, owner, repo, and the commit or None.

    Raises:
        InvalidReferenceError: Its ref may mean another commit tomorrow: a branch, a tag, a short SHA.
    """
    identity = (reference.host, reference.owner, reference.repo)
    ref = reference.ref
    if ref is None:
        return (*identity, None)
    if _COMMIT.fullmatch(ref.lower()):
        return (*identity, ref.lower())
    shown = printable(ref, limit_chars=200, newlines=False)
    short = re.fullmatch(r"[0-9a-fA-F]{4,39}", ref) is not None
    raise InvalidReferenceError(
        f"{reference} cannot be trusted: {shown!r} "
        + ("may be the start of more than one commit" if short else "is a ref, and refs move to other commits")
        + "; expected a full SHA, or no ref for all commits of the repo",
        hint="isohub fetch shows the full SHA; leave the ref out to trust the whole repo",
        reference=str(reference),
        part="ref",
    )
