"""Whether the store is what it says it is: every record, every tree, every blob, byte by byte.

  1. A checkout's tree is measured again, names, modes and bytes, and its measures are held against its
     record; the record against its own checksum, and its commit and extras against its directory's name.
  2. A blob's bytes are hashed against its name, an entry's file against its entry, an entry against its place.
  3. What is writable, is of another kind, is missing, or should not be there is damage too.
  4. Leftovers are no damage: `isohub.repos.inventory` names them, and nobody reads them.
  5. The record has one hash for a tree. Which file of it is damaged is guessed from what the kernel alone writes:
     what was changed after the record was. A disk that loses bytes changes no time, and then nobody knows.
  6. Files that were placed in ``checkpoints`` under a name of the caller's are his to change, and so is what becomes of
     them: another content than was placed is told, and removed only if nobody has written to the file since.
  7. Others may be writing. What looks damaged is looked at again under its writer's lock; what is gone by
     then never was damaged.

It reads only; the one thing that it makes is a lock file where there was none. Runs in the caller. Trust:
nothing in the store is believed but the hashes, and file names are a repo's.

Source: gitformat-pack(5) for tree ids; inode(7) for modes and times.
"""

from __future__ import annotations

import calendar
import logging
import os
import re
import stat
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from isohub.errors import TrustError
from isohub.repos.blobs import hash_file
from isohub.repos.bytecode import BYTECODE_NAME
from isohub.repos.disk import disk_errors, hold, locked
from isohub.repos.inventory import CHECKOUT_NAME, decode_component, partial_key
from isohub.repos.layout import CHECKOUT_RECORD, REFS_RECORD, weights_dir
from isohub.repos.measure import measure
from isohub.repos.placing import PlacedRecord, directory_lock, placed_name
from isohub.repos.records import CheckoutRecord, Resolutions, read_record
from isohub.repos.trust import Trust
from isohub.repos.weights_entry import WeightsEntry
from isohub.repos.weights_url import ENTRY_RECORD, file_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Damage", "verify"]

_log = logging.getLogger("isohub.repos")
_Record = TypeVar("_Record", bound=msgspec.Struct)
_WRITABLE = 0o222
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"[0-9a-f]{40}")
_LIKELY = 20
_LOCK_FILES = frozenset({".lock", ".refs.lock"})


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it should be.

    Attributes:
        path: Where.
        what: ``record``, ``content``, ``size``, ``mode``, ``kind``, ``missing``, ``unexpected``, ``unreadable``
            or ``trust``.
        expected: What should be there.
        got: What is.
        unit: What has to go so that the next load brings it again; None where nothing may be removed.
        likely: Of a tree, what was changed in it after the checkout was made, at most 20 paths.
    """

    path: Path
    what: str
    expected: str
    got: str
    unit: Path | None
    likely: tuple[Path, ...] = ()


def verify(root: Path) -> list[Damage]:
    """Look at everything in a store.

    Args:
        root: The store's directory; one that is not there is whole.

    Returns:
        What is damaged, by path.

    Raises:
        SourceUnavailableError: The disk failed in a way that is no damage of one file.
    """
    root = Path(root).expanduser().absolute()
    found: list[Damage] = []
    with disk_errors(root, "its contents"):
        for repo in _levels(root / "checkouts", 3, found):
            for path in _entries(repo):
                _log.info("verifying %s", path)
                found += _twice(partial(_in_repository, path), repo, ".lock")
        blobs: dict[str, os.stat_result] = {}
        for directory in _levels(root / "weights" / "blobs", 1, found):
            for path in _entries(directory):
                _log.info("verifying %s", path)
                found += _blob(path, blobs)
        downloads = root / "weights" / "partial"
        for scope in _levels(root / "weights" / "urls", 3, found):
            for path in _entries(scope):
                _log.info("verifying %s", path)
                if not _KEY.fullmatch(path.name) or _kind(path) != "directory":
                    found.append(_unexpected(path))
                    continue
                found += _twice(partial(_entry, root, path, blobs), downloads, f"{path.name}.lock")
        found += _partials(downloads)
        found += _placed(root / "checkpoints")
        found += [_unexpected(path) for path in _entries(root / "weights") if path.name not in _WEIGHTS_DIRECTORIES]
        try:
            Trust(root).entries()
        except TrustError as error:
            found.append(Damage(Trust(root).file, "trust", "a list as isohub wrote it", error.message, None))
    return sorted(set(found), key=lambda damage: (damage.path, damage.what))


_WEIGHTS_DIRECTORIES = frozenset({"blobs", "urls", "partial"})


def _twice(look: Callable[[], list[Damage]], directory: Path, lock: str) -> list[Damage]:
    """What is damaged, and still is when nobody writes."""
    if not look():
        return []
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(directory, lock))
        except (OSError, NotImplementedError):
            pass  # a store that is only read has no writers
        return look()


def _in_repository(path: Path) -> list[Damage]:
    """One entry of a repository's directory."""
    name = path.name
    if name == REFS_RECORD:
        return _record(path, Resolutions, path)[1]
    if CHECKOUT_NAME.fullmatch(name):
        return _checkout(path)
    if name in _LOCK_FILES:
        return _lock_file(path)
    if name.startswith((".staging-", ".trash-", f".{REFS_RECORD}-")):
        return []
    return [_unexpected(path)]


def _checkout(place: Path) -> list[Damage]:
    try:
        held = hold(place)
    except FileNotFoundError:  # removed meanwhile
        return []
    except OSError:
        return [_unexpected(place)]
    try:
        record, found = _record(place / CHECKOUT_RECORD, CheckoutRecord, place)
        found += [
            _unexpected(path, place)
            for path in _entries(place)
            # Bytecode is a checkout's or nothing: whoever reads it checks it.
            if path.name not in (CHECKOUT_RECORD, "tree") and not BYTECODE_NAME.fullmatch(path.name)
        ]
        found += _mode(place, place)
        tree = place / "tree"
        kind = _kind(tree)
        if kind != "directory":
            return [*found, Damage(tree, "kind", "directory", kind, place)]
        found += _tree_modes(tree, place)
        if record is None:
            return found
        name = "+".join((record.commit, *record.extras))
        if name != place.name:
            found.append(Damage(place / CHECKOUT_RECORD, "record", place.name, name, place))
        measured = measure(tree)
        different = [
            (what, expected, got)
            for what, expected, got in (
                ("content", record.tree, measured.digest),
                ("size", f"{record.files} files", f"{measured.files} files"),
                ("size", f"{record.bytes} bytes", f"{measured.bytes} bytes"),
                ("content", f"empty: {', '.join(record.submodules)}", f"empty: {', '.join(measured.empty)}"),
            )
            if expected != got
        ]
        likely = _changed_since(tree, place, record) if different else ()
        found += [Damage(tree, what, expected, got, place, likely) for what, expected, got in different]
    except OSError as error:
        if not os.path.lexists(place):
            return []
        path = Path(os.fsdecode(error.filename)) if error.filename else place
        return [Damage(path, "unreadable", "a file that can be read", error.strerror or str(error), place)]
    finally:
        if held is not None:
            os.close(held)
    return found


def _changed_since(tree: Path, place: Path, record: CheckoutRecord) -> tuple[Path, ...]:
    """What was changed in a tree after its record was written; nothing if that is all of it, as in a copied store."""
    # The record is the last to be written. It is written once more when a commit is shown to be the repo's.
    made = (place / CHECKOUT_RECORD).lstat().st_ctime_ns
    try:
        made = min(made, (calendar.timegm(time.strptime(record.created, "%Y-%m-%dT%H:%M:%SZ")) + 1) * 1_000_000_000)
    except ValueError:
        pass
    files, changed, directories = 0, [], []
    for directory, names, others in os.walk(tree, onerror=_raise):
        # The time of a directory's entries: a name that came, went or changed.
        if Path(directory).lstat().st_mtime_ns > made:
            directories.append(Path(directory))
        for path in (Path(directory, name) for name in (*names, *others)):
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                files += 1
                changed += [path] * (status.st_ctime_ns > made)
    return () if 1 < files == len(changed) else tuple(sorted((*changed, *directories))[:_LIKELY])


def _tree_modes(tree: Path, unit: Path) -> list[Damage]:
    found = _mode(tree, unit)
    for directory, names, files in os.walk(tree, onerror=_raise):
        for name in (*names, *files):
            path = Path(directory, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                found.append(Damage(path, "kind", "file, directory or link", _kind(path), unit))
            elif mode & (_WRITABLE | stat.S_ISUID | stat.S_ISGID):
                found += _mode(path, unit)
    return found


def _blob(path: Path, blobs: dict[str, os.stat_result]) -> list[Damage]:
    if path.name.startswith("."):
        return []  # of a write that was killed
    if not _SHA256.fullmatch(path.name) or path.parent.name != path.name[:2]:
        return [_unexpected(path)]
    if _kind(path) != "file":
        return [Damage(path, "kind", "file", _kind(path), path)]
    try:
        found = _mode(path, path)
        blobs[path.name] = path.lstat()
        digest = hash_file(path)[0]
    except FileNotFoundError:  # removed meanwhile
        return []
    except OSError as error:
        return [Damage(path, "unreadable", "a file that can be read", error.strerror or str(error), path)]
    return found if digest == path.name else [*found, Damage(path, "content", path.name, digest, path)]


def _entry(root: Path, place: Path, blobs: dict[str, os.stat_result]) -> list[Damage]:
    paths = {path.name: path for path in _entries(place) if not path.name.startswith(".")}
    if ENTRY_RECORD not in paths:  # of a write that was killed, or gone meanwhile
        return []
    entry, found = _record(place / ENTRY_RECORD, WeightsEntry, place)
    if entry is None:
        return found
    where = weights_dir(root, entry.scope) / entry.key
    if where != place or entry.name != file_name(entry.url):
        found.append(Damage(place / ENTRY_RECORD, "record", str(place), str(where), place))
        return found
    found += [_unexpected(path, place) for name, path in paths.items() if name not in (ENTRY_RECORD, entry.name)]
    path = place / entry.name
    if _kind(path) != "file":
        return [*found, Damage(path, "kind", "file", _kind(path), place)]
    found += _mode(path, place)
    blob = blobs.get(entry.sha256)
    if blob is None and not (root / "weights" / "blobs" / entry.sha256[:2] / entry.sha256).exists():
        missing = root / "weights" / "blobs" / entry.sha256[:2] / entry.sha256
        found.append(Damage(missing, "missing", "file", "nothing", place))
    try:
        status = path.lstat()
        # The blob's other name was hashed with it; a copy, where links are not possible, is hashed here.
        digest = entry.sha256 if blob is not None and os.path.samestat(status, blob) else hash_file(path)[0]
    except OSError as error:
        return [*found, Damage(path, "unreadable", "a file that can be read", error.strerror or str(error), place)]
    if digest != entry.sha256:
        found.append(Damage(path, "content", entry.sha256, digest, place))
    if status.st_size != entry.stamp.bytes:
        found.append(Damage(path, "size", f"{entry.stamp.bytes} bytes", f"{status.st_size} bytes", place))
    return found


def _partials(directory: Path) -> list[Damage]:
    found = []
    for path in _entries(directory):
        if path.name.endswith(".lock") and _KEY.fullmatch(path.name.removesuffix(".lock")):
            found += _lock_file(path)
        elif partial_key(path) is None and not path.name.startswith("."):
            found.append(_unexpected(path))
    return found


def _placed(directory: Path) -> list[Damage]:
    """Files that were placed under names of the caller's, by the records beside them."""
    found = []
    for path in _entries(directory):
        name = placed_name(path)
        if name is None or not _placed_file(path, directory / name):
            continue
        with directory_lock(directory, exclusive=False):
            found += _placed_file(path, directory / name)
    return found


def _placed_file(path: Path, file: Path) -> list[Damage]:
    if _kind(path) == "nothing":  # gone meanwhile
        return []
    record, found = _record(path, PlacedRecord, path)
    if record is None or not record.origins or _kind(file) != "file":
        return found
    _log.info("verifying %s", file)
    try:
        digest, stamp = hash_file(file)
    except FileNotFoundError:
        return found
    except OSError as error:
        return [*found, Damage(file, "unreadable", "a file that can be read", error.strerror or str(error), None)]
    if all(origin.sha256 != digest for origin in record.origins):
        # Nobody wrote to it, so the disk did not keep it; else its user may have meant it.
        unit = file if stamp == record.stamp else None
        found.append(Damage(file, "content", record.origins[-1].sha256, digest, unit))
    return found


def _record(path: Path, kind: type[_Record], unit: Path) -> tuple[_Record | None, list[Damage]]:
    """A record, and what is wrong with it."""
    found = _kind(path)
    if found != "file":
        return None, [Damage(path, "missing" if found == "nothing" else "kind", "file", found, unit)]
    record = read_record(path, kind)
    damages = _mode(path, unit)
    # One byte is outside of what the checksum and the grammar hold: the line feed at the end.
    if record is None or not _ends_as_written(path):
        damages.append(Damage(path, "record", "a whole record", "bytes that do not fit their checksum", unit))
    return record, damages


def _ends_as_written(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            stream.seek(-2, os.SEEK_END)
            return stream.read() == b"}\n"
    except OSError:
        return False


def _mode(path: Path, unit: Path) -> list[Damage]:
    mode = stat.S_IMODE(path.lstat().st_mode)
    kept = mode & ~(_WRITABLE | stat.S_ISUID | stat.S_ISGID)
    return [] if kept == mode else [Damage(path, "mode", f"{kept:04o}", f"{mode:04o}", unit)]


def _lock_file(path: Path) -> list[Damage]:
    """A lock file is empty, or a stranger's."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return []
    return [] if stat.S_ISREG(status.st_mode) and not status.st_size else [_unexpected(path)]


def _unexpected(path: Path, unit: Path | None = None) -> Damage:
    return Damage(path, "unexpected", "nothing", _kind(path), unit or path)


def _kind(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return "nothing"
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "link" if stat.S_ISLNK(mode) else "special file"


def _levels(top: Path, depth: int, found: list[Damage]) -> Iterator[Path]:
    """Directories so many levels below; what is none, or has no name that we give, is damage."""
    if depth == 0:
        yield top
        return
    if _kind(top) not in ("directory", "nothing"):
        found.append(_unexpected(top))
        return
    for path in _entries(top):
        if path.name.startswith(".") or _kind(path) != "directory" or decode_component(path.name) is None:
            if _kind(path) != "nothing":
                found.append(_unexpected(path))
            continue
        yield from _levels(path, depth - 1, found)


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def _raise(error: OSError) -> None:
    raise error
