"""The store: every commit that was fetched, whole, read-only, once.

Where things are is `isohub.repos.layout`'s. Rules:
  1. A checkout is there if and only if its ``checkout.json`` is whole and names its commit.
  2. It is written in a staging directory beside, measured, made read-only, flushed, and then
     renamed once. A reader takes no lock and sees all of it or nothing, whatever was killed.
  3. Whoever writes holds the repository's lock; so a staging directory that a lock holder finds
     is a dead writer's, and is removed.
  4. What is there never changes. A forced fetch that brings other bytes exchanges the whole
     directory in one step; the same bytes leave it alone.
  5. What a ref meant last is remembered; it is used where nobody can be asked, and that is said.

Failures of the disk become `SourceUnavailableError` here and nowhere below. Runs in the caller.

Source: rename(2), renameat2(2), flock(2), git-archive(1).
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from isohub.errors import InvalidReferenceError, OfflineError, RefNotFoundError, SourceUnavailableError, printable
from isohub.repos.credentials import Credentials
from isohub.repos.disk import (
    claim,
    disk_errors,
    exchange,
    flush_directory,
    flush_file_system,
    freeze,
    hold,
    locked,
    make_root,
    remove_tree,
)
from isohub.repos.layout import CHECKOUT_RECORD, checkout_dir, repo_dir
from isohub.repos.measure import measure
from isohub.repos.naming import near_names
from isohub.repos.pins import Checkout, Pin
from isohub.repos.records import CheckoutRecord, read_record, write_record
from isohub.repos.resolutions import recall, remember
from isohub.repos.sources import source_for
from isohub.repos.sources.local import DirectorySource

if TYPE_CHECKING:
    from isohub.repos.reference import Reference

__all__ = ["Store"]

_log = logging.getLogger("isohub.repos")
_HEX = frozenset("0123456789abcdef")
_SHORTEST_SHA = 4  # core.abbrev's minimum


class Store:
    """Checkouts under one directory.

    Args:
        root: The directory; made, with mode 0700, when something is first written.
        offline: Ask nobody: what is not here is an `OfflineError`.
        credentials: Whom to ask as; the user unless given. Without any, only what was told to
            somebody without credentials is found here.
    """

    def __init__(self, root: Path, *, offline: bool = False, credentials: Credentials | None = None) -> None:
        self.root = Path(root).expanduser().absolute()
        self._offline = offline
        self._credentials = credentials or Credentials()
        self._said: set[Pin] = set()  # by sources, for what is not here yet

    def resolve(
        self,
        reference: Reference,
        *,
        force_reload: bool = False,
        skip_validation: bool = False,
        extras: tuple[str, ...] = (),
    ) -> Pin:
        """Find the commit that a reference means now. A full SHA that is in the store asks nobody.

        Where the source does not answer, what it said last is used, with a warning, unless `force_reload`.

        Args:
            reference: What to look for. Trust: the caller.
            force_reload: Ask even then.
            skip_validation: Accept a SHA that was not shown to belong to the repository.
            extras: As in `Pin.extras`.

        Raises:
            RefNotFoundError: The repository has no such ref.
            SourceUnavailableError: It could not be asked.
            OfflineError: It may not be asked, and nothing is known here.
        """
        extras = tuple(sorted(set(extras)))
        local = reference.source == "local"
        known = None if force_reload else self._stored(reference, skip_validation, extras)
        if known is not None:
            return known
        if self._offline and not local:
            return self._last_or_offline(reference, extras, skip_validation=skip_validation)
        try:
            with disk_errors(self.root, str(reference)):
                source = source_for(reference, self._credentials, offline=self._offline)
                pin = replace(source.resolve(reference, skip_validation=skip_validation), extras=extras)
        except SourceUnavailableError as error:
            last = None
            if error.passing and not force_reload and not local:
                last = self._last(reference, extras, skip_validation=skip_validation)
            if last is None:
                raise
            _log.warning(
                "%s; going on with %s, what it said last for %s", error.message, last.commit, reference.ref or "HEAD"
            )
            return last
        if not _is_directory(pin) and (pin.ref_name is not None or reference.ref is None):
            self._said.add(pin)
        return replace(pin, extras=()) if _is_directory(pin) else pin

    def shown(self, pin: Pin) -> Pin:
        """A lockfile's pin, validated as far as this store or the source shows it.

        A lock decides which bytes are loaded. Where they belong, and so whose credentials go along and what is
        trusted, is not its to say.

        Args:
            pin: Trust: whoever wrote the lockfile.

        Raises:
            SourceUnavailableError: It is not here, and the source could not be asked.
        """
        here = self._here(replace(pin, ref_name=None))
        if here is not None or self._offline or not pin.validated:
            return here or replace(pin, ref_name=None, validated=False)
        try:
            asked = self.resolve(replace(pin.reference, ref=pin.commit), extras=pin.extras)
        except RefNotFoundError as error:
            _log.warning("the lockfile says that it belongs there, but %s", error.message)
            return replace(pin, ref_name=None, validated=False)
        return replace(pin, ref_name=None, validated=asked.validated)

    def lookup(self, pin: Pin) -> Checkout | None:
        """The checkout of a pin if it is here; asks nobody and takes no lock."""
        if _is_directory(pin):
            return DirectorySource().checkout(pin)
        found = self._find(pin)
        if found is None:
            return None
        _touch(found[0])
        return self._checkout(pin, *found)

    def fetch(self, pin: Pin, *, force_reload: bool = False, progress: bool = False) -> Checkout:
        """Bring a pin's tree here, unless it is here.

        Args:
            pin: What to bring.
            force_reload: Bring it again; what is here is replaced only if the bytes differ.
            progress: Draw a bar on stderr, if that is a terminal.

        Returns:
            The checkout. Its directory is read-only and shared with every other user of the store.

        Raises:
            IntegrityError: What arrived is not that commit, or may not be unpacked.
            SourceUnavailableError: It could not be brought or stored.
            OfflineError: It is not here, and nobody may be asked.
        """
        if _is_directory(pin):
            return DirectorySource().checkout(pin)
        remote = pin.reference.source != "local"
        if not force_reload or (self._offline and remote):
            found = self.lookup(pin)
            if found is not None and (self._offline or not self._to_be_validated(pin)):
                self._remember(pin)
                return found
        if self._offline and remote:
            raise _offline(pin.reference, f"commit {pin.commit} of {pin.reference.location}", pin.extras)
        with disk_errors(self.root, str(pin.reference)):
            directory = repo_dir(self.root, pin.reference)
            make_root(self.root)
            directory.mkdir(parents=True, exist_ok=True)
            with locked(directory):
                _sweep(directory)
                place = checkout_dir(self.root, pin)
                # Whoever had the lock before may have brought it.
                known = self._find(pin)
                if force_reload or known is None:
                    self._bring(pin, place, progress=progress)
                elif self._to_be_validated(pin):
                    _mark_validated(*known)
                # While the lock is held nobody removes it.
                found = self.lookup(pin)
            if found is None:
                raise OSError(errno.EIO, "the checkout was removed while it was made", str(place))
            self._remember(pin)
            return found

    def hold(self, checkout: Checkout) -> int | None:
        """Say that a checkout is in use, so that nothing removes it.

        Returns:
            A descriptor that the caller closes when it is used no longer; None for a directory of the
            user's, and where the file system has no such locks.

        Raises:
            FileNotFoundError: It was removed meanwhile.
        """
        if _is_directory(checkout.pin):
            return None
        found = self._find(checkout.pin)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "it was removed", str(checkout.path))
        return hold(found[0])

    def measured(self, checkout: Checkout) -> Checkout:
        """The checkout with the hash of what is there now, in place of that of what was there when it was fetched.

        Raises:
            SourceUnavailableError: It cannot be read.
        """
        found = None if _is_directory(checkout.pin) else self._find(checkout.pin)
        if found is None:
            return checkout  # a directory of the user's, which was hashed just now
        with disk_errors(self.root, str(checkout.reference)):
            return replace(checkout, tree=measure(found[0] / "tree").digest)

    def _stored(self, reference: Reference, skip_validation: bool, extras: tuple[str, ...]) -> Pin | None:
        """A pin that needs no question: of a full SHA whose checkout is here."""
        ref = (reference.ref or "").lower()
        if len(ref) not in (40, 64) or not _HEX.issuperset(ref) or self._credentials.anonymous:
            return None
        pin = self._here(Pin(reference, ref, None, extras=extras))
        # One that was let in unvalidated stays so until somebody shows where it belongs.
        return pin if pin is not None and (pin.validated or skip_validation) else None

    def _last(self, reference: Reference, extras: tuple[str, ...], *, skip_validation: bool) -> Pin | None:
        """What a reference meant when it was last asked for, if that is here."""
        public_only = self._credentials.anonymous
        directory, ref = repo_dir(self.root, reference), reference.ref or ""
        resolution = recall(directory, ref, public_only=public_only)
        if resolution is not None:
            pin = Pin(reference, resolution.commit, resolution.ref_name, resolution.validated, extras)
            return pin if self._find(pin) is not None else None
        if len(ref) < _SHORTEST_SHA or not _HEX.issuperset(ref.lower()) or public_only:
            return None
        commits = {place.name.partition("+")[0] for place in directory.glob(f"{ref.lower()}*")}
        found = (self._here(Pin(reference, commit, None, extras=extras)) for commit in commits)
        here = [pin for pin in found if pin is not None]
        return here[0] if len(here) == 1 and (here[0].validated or skip_validation) else None

    def _here(self, pin: Pin) -> Pin | None:
        """The pin, validated as far as its record says; None if it is not here."""
        found = self._find(pin)
        return None if found is None else replace(pin, validated=found[1].validated)

    def _last_or_offline(self, reference: Reference, extras: tuple[str, ...], *, skip_validation: bool) -> Pin:
        last = self._last(reference, extras, skip_validation=skip_validation)
        if last is None:
            raise _offline(reference, str(reference), extras)
        if last.ref_name is not None:
            _log.warning("offline: %s is taken for %s, as it was when last asked", reference, last.commit)
        return last

    def _remember(self, pin: Pin) -> None:
        """Keep what a source said, now that its checkout is here, as well as this store lets us."""
        if pin not in self._said:
            return
        self._said.discard(pin)
        directory = repo_dir(self.root, pin.reference)
        try:
            make_root(self.root)
            directory.mkdir(parents=True, exist_ok=True)
            remember(directory, pin, public=self._credentials.anonymous)
        except (OSError, NotImplementedError) as error:
            # The answer is right all the same; what cannot be written down is only missed offline.
            _log.info("what %s means could not be written down: %s", pin.reference, error)

    def _bring(self, pin: Pin, place: Path, *, progress: bool) -> None:
        staging = place.parent / f".staging-{secrets.token_hex(8)}"
        tree = staging / "tree"
        tree.mkdir(parents=True)
        try:
            source = source_for(pin.reference, self._credentials, offline=self._offline)
            source.fetch(pin, tree, progress=progress)
            freeze(tree)
            measured = measure(tree)
            known = _record(place, pin)
            if known is not None and known.tree == measured.digest and measure(place / "tree").digest == known.tree:
                if pin.validated and not known.validated:
                    _mark_validated(place, known)
                return
            record = CheckoutRecord(
                format=2,
                reference=str(pin.reference),
                commit=pin.commit,
                extras=pin.extras,
                ref_name=pin.ref_name,
                validated=pin.validated,
                tree=measured.digest,
                files=measured.files,
                bytes=measured.bytes,
                submodules=measured.empty,
                lfs_pointers=measured.lfs_pointers,
                url=pin.reference.location,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            )
            write_record(staging / CHECKOUT_RECORD, record)
            staging.chmod(0o555)
            # The bytes before the name: after a power cut a checkout is whole or is not there.
            flush_file_system(staging)
            if known is not None and known.tree != measured.digest:
                _log.warning(
                    "%s has other bytes than the copy of %s: tree %s, was %s; the new ones are kept",
                    pin.name,
                    known.created,
                    measured.digest[:12],
                    known.tree[:12],
                )
            _put(staging, place)
            flush_directory(place.parent)
        finally:
            if staging.exists():
                remove_tree(staging)

    def _find(self, pin: Pin) -> tuple[Path, CheckoutRecord] | None:
        """A pin's directory and record. A plain checkout that lacks nothing serves a pin with extras as well."""
        place = checkout_dir(self.root, pin)
        record = _record(place, pin)
        if record is not None:
            return place, record
        if pin.extras:
            plain = replace(pin, extras=())
            place = checkout_dir(self.root, plain)
            record = _record(place, plain)
            lacking = {"submodules": record.submodules, "lfs": record.lfs_pointers} if record else {}
            if record is not None and not any(lacking[extra] for extra in pin.extras):
                return place, record
        return None

    def _checkout(self, pin: Pin, place: Path, record: CheckoutRecord) -> Checkout:
        return Checkout(
            pin=pin,
            path=_subdirectory(place / "tree", pin.reference),
            tree=record.tree,
            submodules=record.submodules,
            lfs_pointers=record.lfs_pointers,
            root=place / "tree",
        )

    def _to_be_validated(self, pin: Pin) -> bool:
        found = self._find(pin) if pin.validated else None
        return found is not None and not found[1].validated


def _record(place: Path, pin: Pin) -> CheckoutRecord | None:
    record = read_record(place / CHECKOUT_RECORD, CheckoutRecord)
    return record if record is not None and (record.commit, record.extras) == (pin.commit, pin.extras) else None


def _offline(reference: Reference, what: str, extras: tuple[str, ...]) -> OfflineError:
    flags = "".join(f" --{extra}" for extra in extras)
    return OfflineError(
        f"{what} is not in the cache, and the network may not be used",
        hint=f"with a network: isohub fetch {reference}{flags}; offline comes from ISOHUB_OFFLINE or offline=True",
        reference=str(reference),
        url=reference.location,
    )


def _touch(place: Path) -> None:
    """Note when it was last used, for `cache prune`."""
    try:
        os.utime(place)
    except OSError:
        pass  # a store that is only read


def _is_directory(pin: Pin) -> bool:
    return pin.reference.source == "local" and pin.reference.ref is None


def _subdirectory(tree: Path, reference: Reference) -> Path:
    if reference.subdirectory is None:
        return tree
    path = (tree / reference.subdirectory).resolve()
    if path.is_dir() and path.is_relative_to(tree.resolve()):
        return path
    names = [entry.relative_to(tree).as_posix() for entry in tree.rglob("*") if entry.is_dir()]
    near = near_names(reference.subdirectory, names)
    raise InvalidReferenceError(
        f"{reference} has no directory {reference.subdirectory!r} in its tree",
        hint=f"near names: {', '.join(printable(name, newlines=False) for name in near)}" if near else None,
        reference=str(reference),
        part="subdirectory",
    )


def _mark_validated(place: Path, record: CheckoutRecord) -> None:
    place.chmod(0o755)
    try:
        write_record(place / CHECKOUT_RECORD, msgspec.structs.replace(record, validated=True))
    finally:
        place.chmod(0o555)


def _put(staging: Path, place: Path) -> None:
    """Give a finished staging directory its name; what had the name goes, after."""
    if not os.path.lexists(place):
        staging.rename(place)
        return
    trash = place.with_name(f".trash-{place.name}-{secrets.token_hex(8)}")
    if exchange(staging, place):
        staging.rename(trash)
    else:
        # No exchange on this file system: for a moment there is none, and `_sweep` mends a crash then.
        place.rename(trash)
        staging.rename(place)
    _discard(trash)


def _discard(trash: Path) -> None:
    """Remove what was replaced, unless somebody uses it: his lock is what keeps `place` as well (`claim`)."""
    try:
        claimed = claim(trash)
    except BlockingIOError:
        return
    try:
        remove_tree(trash)
    finally:
        if claimed is not None:
            os.close(claimed)


def _sweep(repo_dir: Path) -> None:
    """Remove what dead writers left. The caller holds the lock."""
    for trash in repo_dir.glob(".trash-*"):
        place = repo_dir / trash.name.split("-")[1]
        if not place.exists() and (trash / CHECKOUT_RECORD).exists():
            trash.rename(place)
        else:
            _discard(trash)
    for staging in repo_dir.glob(".staging-*"):
        _log.info("removing %s, which a writer that died left", staging)
        remove_tree(staging)
