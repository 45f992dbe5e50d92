"""Files that are placed in a directory of the user's, and which URL each came from.

    <directory>/<name>                  the file: the user's own to change
    <directory>/.<name>.isohub          which URL it came from
    <directory>/.isohub-<16 hex>/       what is not finished; gone when its writer is

Rules:
  1. A file appears under its name whole, by one rename.
  2. The record lists what may lie under the name, by content: before a file is placed it is added to the
     list, and afterwards the list holds it alone. Whatever was killed in between, the file's content says
     which URL it came from.
  3. A file whose content is in no record is the user's own.
  4. A placed file that was of no use stays, and its record says so: the next call asks its URL again.
  5. An unfinished directory is removed by the next writer, once its own has ended: flock(2) tells.

Runs in the caller. Trust: the user's own directory; others may write there too, but to nothing that is
removed here: names, owner and kind are checked.

Source: rename(2), flock(2).
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import msgspec

from isohub.repos.blobs import Stamp, hash_file
from isohub.repos.disk import claim, hold, remove_tree
from isohub.repos.records import read_record, write_record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Origin", "PlacedRecord", "directory_lock", "origin_of", "place", "placed_name", "reject", "workspace"]

_log = logging.getLogger("isohub.repos")
_RECORD = re.compile(r"\.(?P<name>.+)\.isohub", re.DOTALL)
_WORKSPACE = re.compile(r"\.isohub-[0-9a-f]{16}")


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a placed file came from.

    Attributes:
        key: Of the whole URL.
        url: Without query and fragment.
        sha256: Of the file, in hex.
        rejected: Whether the file was of no use.
    """

    key: str
    url: str
    sha256: str
    rejected: bool = False


class PlacedRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The record beside a file. `stamp` is of the last origin's file, None while it is being placed."""

    format: Literal[1]
    origins: tuple[Origin, ...]
    stamp: Stamp | None


def origin_of(file: Path) -> Origin | None:
    """Which URL a file came from, or None if it is the user's own.

    Raises:
        OSError: It cannot be read.
    """
    record = read_record(_record_path(file), PlacedRecord)
    if record is None or not record.origins:
        return None
    if not file.is_symlink() and Stamp.of(file.stat()) == record.stamp:
        return record.origins[-1]
    digest, stamp = hash_file(file.resolve())
    found = next((origin for origin in record.origins if origin.sha256 == digest), None)
    if found is not None and not file.is_symlink():
        try:
            with workspace(file.parent) as space:
                _write(space, file, PlacedRecord(1, (found,), stamp))
        except OSError as error:
            _log.debug("where %s came from could not be written down: %s", file, error)
    return found


def place(source: Path, file: Path, origin: Origin) -> None:
    """Move a finished file to its name.

    Args:
        source: In a `workspace` of the file's directory.
        file: Its name.
        origin: What it is.

    Raises:
        OSError: The disk refused. Under the name is what was there before, or the new file.
    """
    space = source.parent
    record = read_record(_record_path(file), PlacedRecord)
    before = () if record is None else record.origins
    _write(space, file, PlacedRecord(1, (*before, origin), None))
    source.replace(file)
    _write(space, file, PlacedRecord(1, (origin,), Stamp.of(file.lstat())))


def reject(file: Path) -> bool:
    """Note that a placed file was of no use. Whoever calls has the directory's lock, shared or exclusive.

    Returns:
        False if it is the user's own.

    Raises:
        OSError: The disk refused.
    """
    origin = origin_of(file)
    if origin is None:
        return False
    rejected = msgspec.structs.replace(origin, rejected=True)
    with workspace(file.parent) as space:
        # Without a stamp: should the user put another file there now, its content tells.
        _write(space, file, PlacedRecord(1, (rejected,), None))
    return True


@contextmanager
def workspace(directory: Path) -> Iterator[Path]:
    """A directory for what is not finished, on the same file system; gone at the end.

    Raises:
        OSError: It cannot be made.
    """
    _sweep(directory)
    while True:
        made = directory / f".isohub-{secrets.token_hex(8)}"
        made.mkdir(mode=0o700)
        try:
            descriptor = hold(made)
            break
        except FileNotFoundError:
            continue  # somebody swept it before it was held
    try:
        yield made
    finally:
        remove_tree(made)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def directory_lock(directory: Path, *, exclusive: bool) -> Iterator[None]:
    """Keep others from placing files in the directory; exclusively, in order to do so.

    It leaves nothing behind. Where the file system has no locks nobody waits: more than one download of the
    same file, and a reader who meets another's file of the same name.

    Raises:
        OSError: There is no such directory.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        except OSError as error:  # ENOLCK, EBADF, ENOSYS: network file systems
            _log.debug("%s cannot be locked: %s", directory, error)
        yield
    finally:
        os.close(descriptor)


def _sweep(directory: Path) -> None:
    """Remove what killed writers left."""
    for path in directory.glob(".isohub-*"):
        try:
            status = path.lstat()
            if not _WORKSPACE.fullmatch(path.name) or not stat.S_ISDIR(status.st_mode):
                continue
            if status.st_uid != os.geteuid():
                continue
            descriptor = claim(path)
        except OSError:
            continue  # in use, or gone
        if descriptor is not None:
            remove_tree(path)
            os.close(descriptor)


def _write(space: Path, file: Path, record: PlacedRecord) -> None:
    # By way of the workspace: whoever is killed leaves nothing beside the file.
    write_record(space / "record", record)
    (space / "record").replace(_record_path(file))


def placed_name(record: Path) -> str | None:
    """The name of the file that a record is of, by the record's own; None if it is none."""
    match = _RECORD.fullmatch(record.name)
    return None if match is None else match["name"]


def _record_path(file: Path) -> Path:
    return file.with_name(f".{file.name}.isohub")
