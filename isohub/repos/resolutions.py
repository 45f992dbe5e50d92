"""What refs meant when a source was last asked: used where nobody can be asked, and told as such.

One record a repository. Runs in the caller. Trust: the store's own file.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from isohub.repos.disk import locked
from isohub.repos.layout import REFS_RECORD, Resolution, Resolutions
from isohub.repos.records import read_record, write_record

if TYPE_CHECKING:
    from pathlib import Path

    from isohub.repos.pins import Pin

__all__ = ["forget", "recall", "remember"]

# One that says the same as before is written again after so long, for its time alone.
_REMEMBERED_S = 3600.0


def recall(directory: Path, ref: str, *, public_only: bool = False) -> Resolution | None:
    """The last resolution of a ref, under this spelling or another.

    Args:
        directory: The repository's, in the store.
        ref: As written; empty for the remote's HEAD.
        public_only: Only what was told to somebody without credentials.
    """
    record = read_record(directory / REFS_RECORD, Resolutions)
    known = {} if record is None else record.refs
    if public_only:
        known = {name: resolution for name, resolution in known.items() if resolution.public}
    if ref in known:
        return known[ref]
    names = (ref, f"refs/heads/{ref}", f"refs/tags/{ref}") if ref else ()
    return next((resolution for resolution in known.values() if resolution.ref_name in names), None)


def remember(directory: Path, pin: Pin, *, public: bool) -> None:
    """Keep what a source has just said.

    Args:
        directory: The repository's, in the store.
        pin: What it said.
        public: Whether it was asked without credentials.

    Raises:
        OSError, NotImplementedError: It cannot be written, or not locked.
    """
    place, ref = directory / REFS_RECORD, pin.reference.ref or ""
    record = read_record(place, Resolutions)
    known = None if record is None else record.refs.get(ref)
    same = known is not None and (known.commit, known.ref_name, known.validated) == (
        pin.commit,
        pin.ref_name,
        pin.validated,
    )
    if known is not None and same:
        if (known.public or not public) and abs(time.time() - place.stat().st_mtime) < _REMEMBERED_S:
            return
        public = public or known.public
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with locked(directory, ".refs.lock"):
        record = read_record(place, Resolutions)
        refs = {} if record is None else dict(record.refs)
        refs[ref] = Resolution(pin.commit, pin.ref_name, pin.validated, public, now)
        write_record(place, Resolutions(1, refs))


def forget(directory: Path, commit: str) -> None:
    """Drop what led to a commit that is here no longer.

    Raises:
        OSError, NotImplementedError: It cannot be written, or not locked.
    """
    place = directory / REFS_RECORD
    with locked(directory, ".refs.lock"):
        record = read_record(place, Resolutions)
        if record is not None and any(resolution.commit == commit for resolution in record.refs.values()):
            kept = {ref: resolution for ref, resolution in record.refs.items() if resolution.commit != commit}
            write_record(place, msgspec.structs.replace(record, refs=kept))
