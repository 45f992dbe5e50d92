"""What refs meant when a source was last asked: used where nobody can be asked, and told as such.

One record a repository. Rules:
  1. What is remembered has its checkout here: it is written down when that is, not when it was said.
  2. One full name has one meaning: whatever spelling asked last decides for all.
  3. A spelling means what git would make of it: a tag before a branch.

Runs in the caller. Trust: the store's own file. Source: gitrevisions(7).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from isohub.repos.disk import locked
from isohub.repos.layout import REFS_RECORD
from isohub.repos.records import Resolution, Resolutions, read_record, write_record

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from isohub.repos.pins import Pin

__all__ = ["forget", "recall", "remember"]


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
    names = [] if not ref else [ref, f"refs/{ref}", f"refs/tags/{ref}", f"refs/heads/{ref}"]
    by_name = {resolution.ref_name: resolution for resolution in known.values()}
    return next((by_name[name] for name in names if name in by_name), known.get(ref))


def remember(directory: Path, pin: Pin, *, public: bool) -> None:
    """Keep what a source has just said.

    Args:
        directory: The repository's, in the store.
        pin: What it said; its checkout is here.
        public: Whether it was asked without credentials.

    Raises:
        OSError, NotImplementedError: It cannot be written, or not locked.
    """
    place = directory / REFS_RECORD
    record = read_record(place, Resolutions)
    if record is not None and _updated(record.refs, pin, public=public) == record.refs:
        return
    with locked(directory, ".refs.lock"):
        record = read_record(place, Resolutions)
        write_record(place, Resolutions(1, _updated({} if record is None else record.refs, pin, public=public)))


def _updated(refs: Mapping[str, Resolution], pin: Pin, *, public: bool) -> dict[str, Resolution]:
    ref = pin.reference.ref or ""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    said = Resolution(pin.commit, pin.ref_name, pin.validated, public, now)
    updated = dict(refs)
    for name in {ref, *(name for name, old in refs.items() if pin.ref_name and old.ref_name == pin.ref_name)}:
        old = refs.get(name)
        if old is not None and (old.commit, old.ref_name, old.validated) == (pin.commit, pin.ref_name, pin.validated):
            updated[name] = msgspec.structs.replace(old, public=old.public or public)
        else:
            updated[name] = said
    return updated


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
