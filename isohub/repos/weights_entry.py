"""What the store knows of a weights file: the entry beside it, and what callers are given.

    <root>/weights/urls/<host>/<owner>/<repo>/<key>/entry.json

Entries hold a URL without its query, which may be a signature; the key is of the whole. A file counts if its
stamp is that of its last hashing, or else its hash; that it was hashed is the only thing that is written here.
Runs in the caller. Trust: the store's own files, which hold URLs that a repo chose.
"""

from __future__ import annotations

import logging
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from filelock import Timeout

from isohub.repos.blobs import Blobs, Stamp, hash_file
from isohub.repos.disk import lock_file
from isohub.repos.layout import weights_dir
from isohub.repos.records import read_record, write_record
from isohub.repos.weights_url import ENTRY_RECORD, file_name

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CALLER", "Scope", "WeightsEntry", "WeightsFile", "is_sound", "partial_dir", "read_entries", "read_entry"]

_log = logging.getLogger("isohub.repos")
#: Whom a file was fetched for: (host, owner, repo).
Scope = tuple[str, str, str]
#: The scope of what the caller himself asks for.
CALLER: Scope = ("caller", "", "")


@dataclass(frozen=True)
class WeightsFile:
    """A file that is here.

    Attributes:
        url: As it was asked for, without query and fragment.
        key: Of the whole URL; `parse_weights_url` gives it.
        scope: Whom it was fetched for.
        name: Its name in the store.
        path: The file, read-only. Whoever uses it holds its scope (`Weights.held`). Another content may get the
            name when the URL is asked again.
        blob: The same content under its own name, for whom it must not change. Whoever uses it holds it
            (`Weights.hold_blob`).
        sha256: In hex.
        bytes: Its size.
    """

    url: str
    key: str
    scope: Scope
    name: str
    path: Path
    blob: Path
    sha256: str
    bytes: int


class WeightsEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """entry.json.

    Attributes:
        format: 1.
        url: Without query and fragment.
        key: As the directory's name.
        scope: As the directories' names.
        name: The file beside it.
        sha256: Of the file.
        etag: A strong one that the server gave, or None.
        created: UTC, ISO 8601.
        stamp: The file's, at its last hashing.
    """

    format: Literal[1]
    url: str
    key: str
    scope: tuple[str, str, str]
    name: str
    sha256: str
    etag: str | None
    created: str
    stamp: Stamp

    def place(self, root: Path) -> Path:
        """Its directory."""
        return weights_dir(root, self.scope) / self.key

    def file(self, root: Path) -> WeightsFile:
        """What callers are given."""
        return WeightsFile(
            url=self.url,
            key=self.key,
            scope=self.scope,
            name=self.name,
            path=self.place(root) / self.name,
            blob=Blobs(root).path(self.sha256),
            sha256=self.sha256,
            bytes=self.stamp.bytes,
        )


def read_entry(root: Path, place: Path) -> WeightsEntry | None:
    """The entry of a directory, or None where there is no whole one that belongs there."""
    entry = read_record(place / ENTRY_RECORD, WeightsEntry)
    if entry is None or entry.name != file_name(entry.url):
        return None
    return entry if entry.place(root) == place else None


def read_entries(root: Path, key: str = "*") -> Iterator[WeightsEntry]:
    """All entries, or those of one URL, in no order."""
    for record in (root / "weights" / "urls").glob(f"*/*/*/{key}/{ENTRY_RECORD}"):
        entry = read_entry(root, record.parent)
        if entry is not None:
            yield entry


def partial_dir(root: Path) -> Path:
    """Where downloads are until they are whole, and the locks of those who write: ``<key>.lock``."""
    return root / "weights" / "partial"


def is_sound(root: Path, entry: WeightsEntry) -> bool:
    """Whether an entry's file is here and as it was. One that was touched is hashed, and the entry restamped.

    Raises:
        OSError: It is there and cannot be read.
    """
    path = entry.file(root).path
    try:
        status = path.lstat()
        if Stamp.of(status) == entry.stamp:
            return True
        digest = None
        if stat.S_ISREG(status.st_mode) and status.st_size == entry.stamp.bytes:
            digest, stamp = hash_file(path)
    except FileNotFoundError:
        return False
    if digest != entry.sha256:
        _log.warning("%s is damaged; it counts as absent", path)
        return False
    _restamp(root, entry, stamp)
    return True


def _restamp(root: Path, entry: WeightsEntry, stamp: Stamp) -> None:
    """Note that a file was found whole, so that the next reader need not hash it."""
    place = entry.place(root)
    try:
        # Only with the lock, and without waiting: somebody may be replacing both file and entry.
        with lock_file(partial_dir(root) / f"{entry.key}.lock", timeout_s=0):
            if read_entry(root, place) == entry:
                write_record(place / ENTRY_RECORD, msgspec.structs.replace(entry, stamp=stamp))
    except (OSError, NotImplementedError, Timeout) as error:
        _log.debug("%s is whole, which could not be written down: %s", place, error)
