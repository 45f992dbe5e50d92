"""The store: every commit that was fetched, whole, read-only, once.

    <root>/checkouts/<host>/<owner>/<repo>/<commit>/{tree/, checkout.json}
    <root>/checkouts/<host>/<owner>/<repo>/.lock, .staging-*, .trash-*
    <root>/weights/<host>/<owner>/<repo>/

Rules:
  1. A checkout is there if and only if its ``checkout.json`` decodes and names its commit.
  2. It is written in a staging directory beside, measured, made read-only, flushed, and then
     renamed once. A reader takes no lock and sees all of it or nothing, whatever was killed.
  3. Whoever writes holds the repository's lock; so a staging directory that a lock holder finds
     is a dead writer's, and is removed.
  4. What is there never changes. A forced fetch that brings other bytes exchanges the whole
     directory in one step; the same bytes leave it alone.
  5. Components of paths are percent-encoded: different names never meet.

Failures of the disk become `SourceUnavailableError` here and nowhere below. Runs in the caller.

Source: rename(2), renameat2(2), git-archive(1), XDG Base Directory Specification 0.8.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from filelock import FileLock, Timeout

from isohub.errors import InvalidReferenceError, SourceUnavailableError, printable
from isohub.repos.disk import exchange, flush_directory, flush_file_system, freeze, remove_tree
from isohub.repos.measure import measure
from isohub.repos.naming import encode_component, near_names
from isohub.repos.pins import Checkout, Pin
from isohub.repos.sources import source_for
from isohub.repos.sources.local import DirectorySource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from isohub.repos.reference import Reference

__all__ = ["Store", "get_dir", "set_dir"]

_log = logging.getLogger("isohub.repos")
_RECORD = "checkout.json"
_RECORD_LIMIT_BYTES = 16 << 20
_HEX = frozenset("0123456789abcdef")
_chosen_dir: Path | None = None


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """checkout.json, format 1."""

    format: Literal[1]
    reference: str
    commit: str
    ref_name: str | None
    validated: bool
    tree: str
    files: int
    bytes: int
    submodules: tuple[str, ...]
    lfs_pointers: tuple[str, ...]
    url: str
    created: str


class Store:
    """Checkouts and weights under one directory.

    Args:
        root: The directory; made, with mode 0700, when something is first written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).expanduser().absolute()

    def resolve(self, reference: Reference, *, force_reload: bool = False, skip_validation: bool = False) -> Pin:
        """Find the commit that a reference means now. A full SHA that is in the store asks nobody.

        Args:
            reference: What to look for. Trust: the caller.
            force_reload: Ask even then.
            skip_validation: Accept a SHA that was not shown to belong to the repository.

        Raises:
            RefNotFoundError: The repository has no such ref.
            SourceUnavailableError: It could not be asked.
        """
        ref = (reference.ref or "").lower()
        if not force_reload and len(ref) in (40, 64) and _HEX.issuperset(ref):
            record = self._record(self._repo_dir(reference) / ref, ref)
            # One that was let in unvalidated stays so until somebody shows where it belongs.
            if record is not None and (record.validated or skip_validation):
                return Pin(reference, ref, None, validated=record.validated)
        with _disk_errors(self.root, reference):
            return source_for(reference).resolve(reference, skip_validation=skip_validation)

    def lookup(self, pin: Pin) -> Checkout | None:
        """The checkout of a pin if it is here; asks nobody and takes no lock."""
        if _is_directory(pin):
            return DirectorySource().checkout(pin)
        place = self._repo_dir(pin.reference) / pin.commit
        record = self._record(place, pin.commit)
        return None if record is None else self._checkout(pin, place, record)

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
        """
        if not force_reload and (found := self.lookup(pin)) is not None and not self._to_be_validated(pin):
            return found
        if _is_directory(pin):
            return DirectorySource().checkout(pin)
        with _disk_errors(self.root, pin.reference):
            repo_dir = self._repo_dir(pin.reference)
            self._make_root()
            repo_dir.mkdir(parents=True, exist_ok=True)
            with _locked(repo_dir):
                _sweep(repo_dir)
                place = repo_dir / pin.commit
                # Whoever had the lock before may have brought it.
                if force_reload or self._record(place, pin.commit) is None:
                    self._bring(pin, place, progress=progress)
                elif self._to_be_validated(pin):
                    _mark_validated(place, self._record(place, pin.commit))
            record = self._record(place, pin.commit)
            if record is None:
                raise OSError(5, "the checkout was removed while it was made", str(place))
            return self._checkout(pin, place, record)

    def weights_dir(self, pin: Pin) -> Path:
        """Where a repository's weights are kept, so that two repositories' files never meet; made."""
        reference = pin.reference
        with _disk_errors(self.root, reference):
            self._make_root()
            place = self.root / "weights" / _inside(reference)
            place.mkdir(parents=True, exist_ok=True)
            return place

    def _bring(self, pin: Pin, place: Path, *, progress: bool) -> None:
        staging = place.parent / f".staging-{secrets.token_hex(8)}"
        tree = staging / "tree"
        tree.mkdir(parents=True)
        try:
            source_for(pin.reference).fetch(pin, tree, progress=progress)
            freeze(tree)
            measured = measure(tree)
            known = self._record(place, pin.commit)
            if known is not None and known.tree == measured.digest:
                if pin.validated and not known.validated:
                    _mark_validated(place, known)
                return
            record = _Record(
                format=1,
                reference=str(pin.reference),
                commit=pin.commit,
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
            _write_record(staging / _RECORD, record)
            staging.chmod(0o555)
            # The bytes before the name: after a power cut a checkout is whole or is not there.
            flush_file_system(staging)
            if known is not None:
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

    def _record(self, place: Path, commit: str) -> _Record | None:
        try:
            with (place / _RECORD).open("rb") as stream:
                record = msgspec.json.decode(stream.read(_RECORD_LIMIT_BYTES), type=_Record)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        return record if record.commit == commit else None

    def _checkout(self, pin: Pin, place: Path, record: _Record) -> Checkout:
        tree = place / "tree"
        return Checkout(
            pin=pin,
            path=_subdirectory(tree, pin.reference),
            tree=record.tree,
            submodules=record.submodules,
            lfs_pointers=record.lfs_pointers,
        )

    def _to_be_validated(self, pin: Pin) -> bool:
        if _is_directory(pin) or not pin.validated:
            return False
        record = self._record(self._repo_dir(pin.reference) / pin.commit, pin.commit)
        return record is not None and not record.validated

    def _repo_dir(self, reference: Reference) -> Path:
        return self.root / "checkouts" / _inside(reference)

    def _make_root(self) -> None:
        if not self.root.is_dir():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)


def get_dir() -> Path:
    """Directory of the default store.

    In order: `set_dir`, ``$ISOHUB_HOME``, ``$TORCH_HOME/isohub``, ``$XDG_CACHE_HOME/isohub``,
    ``~/.cache/isohub``. Not made.
    """
    if _chosen_dir is not None:
        return _chosen_dir
    for variable, below in (("ISOHUB_HOME", ""), ("TORCH_HOME", "isohub"), ("XDG_CACHE_HOME", "isohub")):
        value = os.environ.get(variable)
        if value:
            return _absolute(Path(value) / below)
    return _absolute(Path("~/.cache/isohub"))


def set_dir(d: str | os.PathLike[str] | None) -> None:
    """Choose the directory of the default store for this process; None goes back to the environment's."""
    global _chosen_dir  # noqa: PLW0603  # torch.hub.set_dir's contract is a process-wide setting
    _chosen_dir = None if d is None else _absolute(Path(d))


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise SourceUnavailableError(
            f"there is no home directory for {path}", hint="set ISOHUB_HOME to a directory that can be written"
        ) from error


def _is_directory(pin: Pin) -> bool:
    return pin.reference.source == "local" and pin.reference.ref is None


def _inside(reference: Reference) -> Path:
    return Path(*(encode_component(part) for part in (reference.host, reference.owner, reference.repo)))


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


def _write_record(path: Path, record: _Record) -> None:
    data = msgspec.json.format(msgspec.json.encode(record), indent=2)
    with path.open("xb") as stream:
        stream.write(data + b"\n")
        stream.flush()
        os.fchmod(stream.fileno(), 0o444)
        os.fsync(stream.fileno())


def _mark_validated(place: Path, record: _Record | None) -> None:
    if record is None:
        return
    place.chmod(0o755)
    try:
        beside = place / f"{_RECORD}.new"
        beside.unlink(missing_ok=True)
        _write_record(beside, msgspec.structs.replace(record, validated=True))
        beside.replace(place / _RECORD)
    finally:
        place.chmod(0o555)


def _put(staging: Path, place: Path) -> None:
    """Give a finished staging directory its name; what had the name goes, after."""
    if not os.path.lexists(place):
        staging.rename(place)
        return
    if exchange(staging, place):
        remove_tree(staging)
        return
    # No exchange on this file system: for a moment there is none, and `_sweep` mends a crash then.
    trash = place.with_name(f".trash-{place.name}-{secrets.token_hex(8)}")
    place.rename(trash)
    staging.rename(place)
    remove_tree(trash)


@contextmanager
def _locked(repo_dir: Path) -> Iterator[None]:
    """Hold the repository's lock; the kernel gives it back whatever kills its holder."""
    lock = FileLock(repo_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.info("waiting for another process or thread that writes to %s", repo_dir)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sweep(repo_dir: Path) -> None:
    """Remove what dead writers left. The caller holds the lock."""
    for trash in repo_dir.glob(".trash-*"):
        place = repo_dir / trash.name.split("-")[1]
        if not place.exists() and (trash / _RECORD).exists():
            trash.rename(place)
        else:
            remove_tree(trash)
    for staging in repo_dir.glob(".staging-*"):
        _log.info("removing %s, which a writer that died left", staging)
        remove_tree(staging)


@contextmanager
def _disk_errors(root: Path, reference: Reference) -> Iterator[None]:
    """Say what the disk refused, and what helps."""
    try:
        yield
    except OSError as error:
        raise SourceUnavailableError(
            f"the store at {root} cannot be used: {error.strerror or error}"
            + (f" ({error.filename})" if error.filename else ""),
            hint="make room or set ISOHUB_HOME to a directory that can be written",
            reference=str(reference),
        ) from error
