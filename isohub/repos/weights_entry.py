"""What the store knows of a weights file: the entry beside it, and what callers are given.

    <root>/weights/urls/<host>/<owner>/<repo>/<key>/entry.json

Entries hold a URL without its query, which may be a signature; the key is of the whole. Reads only. Runs in
the caller. Trust: the store's own files, which hold URLs that a repo chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from isohub.repos.blobs import Stamp
from isohub.repos.layout import weights_dir
from isohub.repos.records import read_record
from isohub.repos.weights_url import ENTRY_RECORD, file_name

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CALLER", "Scope", "WeightsEntry", "WeightsFile", "read_entries", "read_entry"]

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
        path: The file, read-only. Whoever uses it holds its scope (`Weights.held`).
        sha256: In hex.
        bytes: Its size.
    """

    url: str
    key: str
    scope: Scope
    name: str
    path: Path
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
