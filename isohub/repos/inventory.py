"""What the store holds, what of it is in use, and what nobody needs any more.

It reads names, sizes, times and records. It changes nothing, follows no link, and does not look into files:
that is `isohub.repos.verify`. Sizes are what the disk gave away (``du``), and a file with several names is
counted once. Runs in the caller. Trust: the store's own files; names and URLs in them are a repo's.

Source: stat(2), st_blocks; flock(2).
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from filelock import Timeout

from isohub.repos.disk import claim, disk_errors, lock_file
from isohub.repos.layout import CHECKOUT_RECORD, REFS_RECORD, weights_dir
from isohub.repos.naming import encode_component
from isohub.repos.records import CheckoutRecord, Resolutions, read_record
from isohub.repos.weights_entry import Scope, WeightsFile, read_entries

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CHECKOUT_NAME",
    "Inventory",
    "Leftover",
    "StoredCheckout",
    "StoredWeights",
    "claim_file",
    "decode_component",
    "is_locked",
    "is_used",
    "not_later_than_now",
    "partial_key",
    "subdirectories",
    "usage",
]

#: Names of checkouts: a commit and its extras, as `checkout_dir` writes them.
CHECKOUT_NAME = re.compile(r"(?P<commit>[0-9a-f]{40}|[0-9a-f]{64})(?:\+lfs)?(?:\+submodules)?")
_HASHED = re.compile(r"[A-Za-z0-9_.%-]{1,100}%=[0-9a-f]{64}")
_PARTIAL = re.compile(r"(?P<key>[0-9a-f]{40})\.(?:part|part\.json|copy)")
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own blocks are


@dataclass(frozen=True)
class StoredCheckout:
    """A checkout.

    Attributes:
        scope: (host, owner, repo).
        commit: Its commit.
        extras: As in `Pin.extras`.
        refs: What last resolved to it, as written; empty text is the remote's HEAD.
        ref_name: Full name of the ref that it was first fetched for, if any.
        reference: What it was first fetched for.
        url: Where it came from; for a local clone its path.
        path: Its directory, which holds ``tree``.
        bytes: On the disk.
        files: Files and symlinks.
        created: UTC, ISO 8601.
        used: When it was last used, seconds since 1970.
        in_use: Whether somebody uses it now.
    """

    scope: Scope
    commit: str
    extras: tuple[str, ...]
    refs: tuple[str, ...]
    ref_name: str | None
    reference: str
    url: str
    path: Path
    bytes: int
    files: int
    created: str
    used: float
    in_use: bool


@dataclass(frozen=True)
class StoredWeights:
    """One content, and all the places that have it.

    Attributes:
        sha256: Of the content.
        blob: Where it is.
        files: Its places: URLs, each of one scope.
        bytes: On the disk, of all of them together.
        used: When one of them was last used, seconds since 1970.
        in_use: The scopes whose weights somebody uses now.
    """

    sha256: str
    blob: Path
    files: tuple[WeightsFile, ...]
    bytes: int
    used: float
    in_use: frozenset[Scope]


@dataclass(frozen=True)
class Leftover:
    """What is no checkout and no weights.

    Attributes:
        path: A file or a directory; for a partial download its largest part.
        what: ``staging``, ``trash``, ``broken`` (a checkout or an entry without a whole record), ``partial``,
            ``blob`` (that nothing links to) or ``file`` (of a write that was killed).
        bytes: On the disk.
        live: Whether its writer may still be at work.
        in_use: Whether somebody uses it now: a tree that a forced fetch replaced under its worker, a blob
            whose last entry went.
    """

    path: Path
    what: str
    bytes: int
    live: bool
    in_use: bool = False


class Inventory:
    """What is in a store.

    Args:
        root: The store's directory; need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).expanduser().absolute()

    def checkouts(self) -> list[StoredCheckout]:
        """All checkouts, by repository and commit.

        Raises:
            SourceUnavailableError: The disk failed.
        """
        found = []
        with disk_errors(self.root, "its checkouts"):
            for scope, directory in self.repositories():
                record = read_record(directory / REFS_RECORD, Resolutions)
                refs = {} if record is None else record.refs
                for place in subdirectories(directory):
                    match = CHECKOUT_NAME.fullmatch(place.name)
                    checkout = None if match is None else read_record(place / CHECKOUT_RECORD, CheckoutRecord)
                    if checkout is None or place.name != "+".join((checkout.commit, *checkout.extras)):
                        continue
                    names = sorted(ref for ref, known in refs.items() if known.commit == checkout.commit)
                    try:
                        used = place.stat().st_mtime
                    except FileNotFoundError:  # removed meanwhile
                        continue
                    found.append(
                        StoredCheckout(
                            scope=scope,
                            commit=checkout.commit,
                            extras=checkout.extras,
                            refs=tuple(names),
                            ref_name=checkout.ref_name,
                            reference=checkout.reference,
                            url=checkout.url,
                            path=place,
                            bytes=usage(place),
                            files=checkout.files,
                            created=checkout.created,
                            used=not_later_than_now(used),
                            in_use=is_used(place),
                        )
                    )
        return sorted(found, key=lambda checkout: (checkout.scope, checkout.commit, checkout.extras))

    def weights(self) -> list[StoredWeights]:
        """All weights that some place has, by URL.

        Raises:
            SourceUnavailableError: The disk failed.
        """
        by_content: dict[str, list[WeightsFile]] = {}
        found = []
        with disk_errors(self.root, "its weights"):
            for entry in read_entries(self.root):
                by_content.setdefault(entry.sha256, []).append(entry.file(self.root))
            for sha256, files in by_content.items():
                blob = self.root / "weights" / "blobs" / sha256[:2] / sha256
                scopes = {file.scope for file in files}
                found.append(
                    StoredWeights(
                        sha256=sha256,
                        blob=blob,
                        files=tuple(sorted(files, key=lambda file: (file.url, file.scope, file.key))),
                        bytes=usage(blob, *(file.path for file in files)),
                        used=not_later_than_now(max(_mtime(file.path.parent) for file in files)),
                        in_use=frozenset(scope for scope in scopes if is_used(weights_dir(self.root, scope))),
                    )
                )
        return sorted(found, key=lambda weights: weights.files[0].url)

    def leftovers(self) -> list[Leftover]:
        """Everything else, by path; blobs last, since other leftovers may link to them.

        Raises:
            SourceUnavailableError: The disk failed.
        """
        with disk_errors(self.root, "its leftovers"):
            found = [*self._of_checkouts(), *self._of_entries(), *self._of_blobs(), *self._of_partial()]
            found += [Leftover(path, "file", usage(path), False) for path in self.root.glob(".trust.json.*")]
        return sorted(found, key=lambda leftover: (leftover.what == "blob", leftover.path))

    def repositories(self) -> Iterator[tuple[Scope, Path]]:
        """Every repository that has a directory of checkouts."""
        yield from _scopes(self.root / "checkouts")

    def scopes(self) -> Iterator[tuple[Scope, Path]]:
        """Every scope that has a directory of weights."""
        yield from _scopes(self.root / "weights" / "urls")

    def _of_checkouts(self) -> Iterator[Leftover]:
        for _, directory in self.repositories():
            live: bool | None = None
            for path in _entries(directory):
                what = "staging" if path.name.startswith(".staging-") else "trash"
                if path.name.startswith(f".{REFS_RECORD}-"):
                    yield Leftover(path, "file", usage(path), is_locked(directory / ".refs.lock"))
                    continue
                if not path.name.startswith((".staging-", ".trash-")):
                    if not CHECKOUT_NAME.fullmatch(path.name) or read_record(path / CHECKOUT_RECORD, CheckoutRecord):
                        continue
                    what = "broken"
                live = is_locked(directory / ".lock") if live is None else live
                yield Leftover(path, what, usage(path), live, _is_directory(path) and is_used(path))

    def _of_entries(self) -> Iterator[Leftover]:
        known = {entry.place(self.root) for entry in read_entries(self.root)}
        partial = self.root / "weights" / "partial"
        for _, directory in self.scopes():
            for place in subdirectories(directory):
                live = is_locked(partial / f"{place.name}.lock")
                if place not in known:
                    yield Leftover(place, "broken", usage(place), live)
                    continue
                for path in _entries(place):
                    if path.name.startswith("."):
                        yield Leftover(path, "file", 0, live)

    def _of_blobs(self) -> Iterator[Leftover]:
        known = {entry.sha256 for entry in read_entries(self.root)}
        # Whoever holds the lock of a download may be about to link to a blob.
        live = any(is_locked(path) for path in (self.root / "weights" / "partial").glob("*.lock"))
        for directory in subdirectories(self.root / "weights" / "blobs"):
            for path in _entries(directory):
                if path.name not in known:
                    yield Leftover(path, "blob", usage(path), live, _is_file(path) and is_used(path))

    def _of_partial(self) -> Iterator[Leftover]:
        directory = self.root / "weights" / "partial"
        parts: dict[str, list[Path]] = {}
        for path in _entries(directory):
            key = partial_key(path)
            if key is not None:
                parts.setdefault(key, []).append(path)
            elif path.name.startswith("."):
                yield Leftover(path, "file", usage(path), is_locked(directory / f"{path.name[1:41]}.lock"))
        for key, paths in parts.items():
            yield Leftover(max(paths, key=usage), "partial", usage(*paths), is_locked(directory / f"{key}.lock"))


def claim_file(path: Path) -> int | None:
    """Have a file for oneself, to remove it, as `disk.claim` has a directory; whoever reads it shares its lock.

    Raises:
        BlockingIOError: Somebody uses it.
        FileNotFoundError: It is gone.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without such locks
        os.close(descriptor)
        return None
    return descriptor


def subdirectories(directory: Path) -> list[Path]:
    """Directories in a directory that have no dot in front, sorted; links are none."""
    return [path for path in _entries(directory) if not path.name.startswith(".") and _is_directory(path)]


def decode_component(name: str) -> str | None:
    """The text of which `encode_component` made this name; the name itself for a hashed one; None if it did not."""
    if name == "%":
        return ""
    if _HASHED.fullmatch(name):
        return name
    try:
        text = unquote_to_bytes(name).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return text if encode_component(text) == name else None


def partial_key(path: Path) -> str | None:
    """The key of the download that a file in ``partial`` is a part of; None if it is none."""
    match = _PARTIAL.fullmatch(path.name)
    return None if match is None else match["key"]


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock file now."""
    if not path.exists():
        return False
    try:
        with lock_file(path, timeout_s=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a store that is only read, or a disk without locks
        return False


def _scopes(top: Path) -> Iterator[tuple[Scope, Path]]:
    for host in subdirectories(top):
        for owner in subdirectories(host):
            for repo in subdirectories(owner):
                parts = [decode_component(path.name) for path in (host, owner, repo)]
                if parts[0] is not None and parts[1] is not None and parts[2] is not None:
                    yield (parts[0], parts[1], parts[2]), repo


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def is_used(path: Path) -> bool:
    """Whether somebody holds a lock on a directory or a file."""
    try:
        descriptor = claim_file(path) if _is_file(path) else claim(path)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    if descriptor is not None:
        os.close(descriptor)
    return False


def usage(*paths: Path) -> int:
    """Bytes that files and trees have on the disk, each inode once."""
    seen: dict[tuple[int, int], int] = {}

    def count(path: str | Path) -> None:
        try:
            status = os.lstat(path)
        except FileNotFoundError:  # removed meanwhile
            return
        seen[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK_BYTES

    for path in paths:
        count(path)
        # os.walk follows a link only where it is the top.
        for directory, names, files in () if path.is_symlink() else os.walk(path):
            for name in (*names, *files):
                count(os.path.join(directory, name))  # noqa: PTH118 - called for every file
    return sum(seen.values())


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def not_later_than_now(moment: float) -> float:
    """A clock that was wrong must not keep something for ever."""
    return min(moment, time.time())
