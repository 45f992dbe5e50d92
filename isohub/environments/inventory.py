"""Which environments are built, what of them is in use, and which of them to remove.

What goes is a `Plan`, as for checkouts and weights, and `isohub.repos.removal.carry_out` carries it out: what is in use
stays, and that is said. Side: caller. Trust: the store's own files; names in them are repos' and the caller's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from isohub.environments.store import RECORD, EnvironmentRecord
from isohub.repos.disk import disk_errors
from isohub.repos.inventory import Leftover, is_locked, is_used, not_later_than_now, usage
from isohub.repos.records import read_record
from isohub.repos.removal import Kept, Plan, Removal

__all__ = ["StoredEnvironment", "kept", "leftovers", "named", "plan_prune", "plan_removal", "stored"]

_SHORTEST_KEY = 4


@dataclass(frozen=True)
class StoredEnvironment:
    """An environment that is built.

    Attributes:
        record: What it consists of.
        path: Its directory.
        bytes: On the disk.
        used: When it was last used, seconds since 1970.
        in_use: Whether a session uses it now.
    """

    record: EnvironmentRecord
    path: Path
    bytes: int
    used: float
    in_use: bool

    @property
    def name(self) -> str:
        """For people: the start of its key, and what it was made for."""
        return " ".join(filter(None, (self.record.key[:10], self.record.made_for)))


def stored(root: Path) -> list[StoredEnvironment]:
    """All environments, those first that were used last.

    Args:
        root: The store's directory; need not exist.

    Raises:
        SourceUnavailableError: The disk failed.
    """
    found = []
    with disk_errors(root, "its environments"):
        for path in _entries(root):
            record = None if path.name.startswith(".") else read_record(path / RECORD, EnvironmentRecord)
            if record is None or record.key != path.name:
                continue
            try:
                used = path.stat().st_mtime
            except FileNotFoundError:  # removed meanwhile
                continue
            found.append(StoredEnvironment(record, path, usage(path), not_later_than_now(used), is_used(path)))
    return sorted(found, key=lambda each: each.used, reverse=True)


def leftovers(root: Path) -> list[Leftover]:
    """What is no environment: of builds that were killed, and what has no whole record.

    Raises:
        SourceUnavailableError: The disk failed.
    """
    found = []
    with disk_errors(root, "its environments"):
        for path in _entries(root):
            if path.name in ("built", "locks", "resolutions"):
                continue
            if path.name.startswith((".staging-", ".trash-")):
                what = "staging" if path.name.startswith(".staging-") else "trash"
                found.append(Leftover(path, what, usage(path), is_used(path)))
            elif read_record(path / RECORD, EnvironmentRecord) is None:
                live = is_locked(path.parent / "locks" / f"{path.name}.lock")
                found.append(Leftover(path, "broken", usage(path), live, is_used(path)))
    return found


def kept(root: Path) -> list[Leftover]:
    """What makes the next environment quicker: what requirements came to, and wheels that were built from source."""
    places = [path for path in _entries(root) if path.name in ("built", "resolutions")]
    return [Leftover(path, path.name, usage(path), live=False) for path in places]


def named(environments: Sequence[StoredEnvironment], names: Iterable[str]) -> tuple[list[StoredEnvironment], list[str]]:
    """Those that are meant by the start of a key, a path, or what they were made for; and names that mean none."""
    chosen: list[StoredEnvironment] = []
    missing = []
    for name in names:
        meant = [
            each
            for each in environments
            if (len(name) >= _SHORTEST_KEY and each.record.key.startswith(name.lower()))
            or name == each.record.made_for
            or os.path.realpath(name) == os.path.realpath(each.path)
        ]
        chosen += [each for each in meant if each not in chosen]
        if not meant:
            missing.append(name)
    return chosen, missing


def plan_removal(environments: Iterable[StoredEnvironment], remains: Iterable[Leftover] = ()) -> Plan:
    """Plan to remove these, and what is left of others."""
    return _plan([(each, "asked") for each in environments], remains)


def plan_prune(
    environments: Sequence[StoredEnvironment],
    remains: Iterable[Leftover],
    *,
    max_bytes: int | None = None,
    older_than_s: float | None = None,
) -> Plan:
    """Plan to remove leftovers, what was not used for long, and what was used longest ago until the rest fits.

    Args:
        environments: All of them.
        remains: All leftovers.
        max_bytes: What may stay, at most; None for no limit.
        older_than_s: Seconds after which what was not used goes; None for never.
    """
    now = time.time()
    total = sum(each.bytes for each in environments)
    chosen = []
    for each in sorted(environments, key=lambda one: (one.in_use, one.used)):
        old = older_than_s is not None and now - each.used > older_than_s
        if old or (max_bytes is not None and total > max_bytes):
            chosen.append((each, "old" if old else "room"))
            total -= 0 if each.in_use else each.bytes
    return _plan(chosen, remains)


def _plan(chosen: Iterable[tuple[StoredEnvironment, str]], remains: Iterable[Leftover]) -> Plan:
    removals, kept = [], []
    for each, why in chosen:
        if each.in_use:
            kept.append(Kept(each.path, "environment", each.name, "in use"))
        else:
            removals.append(Removal(each.path, "environment", each.name, each.bytes, why))
    dead = [rest for rest in remains if not rest.live and not rest.in_use]
    removals += [Removal(rest.path, rest.what, rest.path.name, rest.bytes, "leftover") for rest in dead]
    return Plan(tuple(removals), tuple(kept))


def _entries(root: Path) -> list[Path]:
    try:
        return sorted((root / "environments").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
