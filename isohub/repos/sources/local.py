"""A directory on this machine as it stands: named by its content, used in place.

Its commit is ``tree-`` and git's tree id over the files, so that a clean clone has the id of
its commit's tree and any edit gives another. ``.git`` and ``__pycache__`` do not count. Files
that have not changed are not read again in the same process. Runs in the caller.

Source: git's racy-git.txt (why a file that was just written is read once more).
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from isohub.errors import SourceUnavailableError
from isohub.repos.blobs import open_regular
from isohub.repos.measure import Measured, blob_id, measure
from isohub.repos.pins import TREE_PREFIX, Checkout, Pin
from isohub.repos.sources.submodules import GITMODULES_LIMIT_BYTES, parse_gitmodules
from isohub.repos.tree import TreeWriter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from isohub.repos.reference import Reference

__all__ = ["DirectorySource", "measure_directory"]

#: A file younger than this may change again without a new time stamp; FAT counts in 2 s.
RACY_NS = 2_000_000_000
_SKIPPED = frozenset({b".git", b"__pycache__"})
_CACHE_LIMIT = 500_000

_Key = tuple[bytes, int, int, int, int]
_blob_ids: dict[_Key, bytes] = {}


class DirectorySource:
    """Plain directories, as `isohub.repos.sources.Source`."""

    def resolve(self, reference: Reference, *, skip_validation: bool = False) -> Pin:  # noqa: ARG002  # nothing to validate
        """Hash the directory; see `Source.resolve`."""
        return Pin(reference, TREE_PREFIX + measure_directory(reference).digest)

    def checkout(self, pin: Pin) -> Checkout:
        """The directory itself; nothing is copied.

        Raises:
            SourceUnavailableError: It is no longer what the pin says, or cannot be read.
        """
        measured = measure_directory(pin.reference)
        if TREE_PREFIX + measured.digest != pin.commit:
            raise SourceUnavailableError(
                f"{pin.reference.location} has changed: its content is {TREE_PREFIX}{measured.digest}, "
                f"expected {pin.commit}",
                hint="load it again to take the new content",
                reference=str(pin.reference),
                url=pin.reference.location,
            )
        root = Path(pin.reference.location)
        return Checkout(
            pin=pin,
            path=root,
            tree=measured.digest,
            submodules=_empty_submodules(root, measured),
            lfs_pointers=measured.lfs_pointers,
        )

    def fetch(self, pin: Pin, into: Path, *, progress: bool = False) -> None:  # noqa: ARG002  # the disk is quick
        """Copy the directory, with the rules that hold for trees from elsewhere; see `Source.fetch`."""
        root = Path(pin.reference.location)
        writer = TreeWriter(into, origin=str(root))
        for directory, names, files in os.walk(root):
            inside = Path(directory).relative_to(root)
            names[:] = sorted(name for name in names if os.fsencode(name) not in _SKIPPED)
            for name in [*names, *sorted(files)]:
                path, place = (inside / name).as_posix(), Path(directory, name)
                mode = place.lstat().st_mode
                if stat.S_ISLNK(mode):
                    writer.symlink(path, os.readlink(place))  # noqa: PTH115  # as it is written
                elif stat.S_ISREG(mode):
                    writer.file(path, _chunks(place), executable=bool(mode & 0o100))
                elif stat.S_ISDIR(mode):
                    writer.directory(path)
        writer.finish()


def measure_directory(reference: Reference) -> Measured:
    """Git's SHA-1 tree id and the rest of a directory's measures.

    Raises:
        SourceUnavailableError: It is gone, a part cannot be read, or it changes all the time.
    """
    root = Path(reference.location)
    try:
        if not root.is_dir():
            raise NotADirectoryError(20, "it is no directory", str(root))
        return measure(root, algorithm="sha1", skip=_SKIPPED, read=_cached_blob_id)
    except OSError as error:
        raise SourceUnavailableError(
            f"{root} cannot be read: {error.strerror or error} ({error.filename or root})",
            hint="make it readable, or point to a directory without that file",
            reference=str(reference),
            url=str(root),
        ) from error


def _cached_blob_id(path: bytes, info: os.stat_result) -> bytes | None:
    key = (path, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
    known = _blob_ids.get(key)
    if known is not None:
        return known
    started_ns = time.time_ns()
    identity = blob_id(path, info.st_size, "sha1")
    if identity is None:
        return None
    # ctime cannot be set back by a user, so an old one means that the content is old as well.
    if started_ns - max(info.st_mtime_ns, info.st_ctime_ns) > RACY_NS:
        if len(_blob_ids) >= _CACHE_LIMIT:
            _blob_ids.clear()
        _blob_ids[key] = identity
    return identity


def _empty_submodules(root: Path, measured: Measured) -> tuple[str, ...]:
    """Empty directories that ``.gitmodules`` names; others are just empty."""
    try:
        # A link is none for git as well, and a pipe would be waited for.
        with os.fdopen(open_regular(root / ".gitmodules"), "rb") as stream:
            named = parse_gitmodules(stream.read(GITMODULES_LIMIT_BYTES + 1))
    except (OSError, ValueError):
        return ()
    return tuple(sorted(named.keys() & set(measured.empty)))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            yield chunk
