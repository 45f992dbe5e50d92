"""Removing from the store: first a plan, which is data, then the carrying out of exactly that plan.

Rules:
  1. What is in use stays, and that is said. Whoever removes has claimed it (`disk.claim`) before.
     Where the file system has no such locks nobody can know, and what was asked for goes.
  2. A checkout is renamed away under its repository's lock, and then loses its record before its tree: a
     reader sees all of it or none, and what is left after a kill is swept away by the next writer.
  3. Of weights the entry goes first, then the file, then the blob, if nothing links to it any more and nobody
     has it locked: a worker may have been given its path.
  4. Leftovers of dead writers go with every `prune`; those of living ones are theirs.
  5. What somebody else removed meanwhile is removed. What the disk refuses stays, and that is said.

Runs in the caller. Trust: the store's own files.

Source: flock(2), rename(2), unlink(2).
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout

from isohub.repos.disk import claim, lock_file, remove_tree
from isohub.repos.inventory import (
    CHECKOUT_NAME,
    Inventory,
    Leftover,
    StoredCheckout,
    StoredWeights,
    claim_file,
    subdirectories,
)
from isohub.repos.layout import CHECKOUT_RECORD
from isohub.repos.resolutions import forget
from isohub.repos.selection import commit_name
from isohub.repos.weights_entry import read_entries
from isohub.repos.weights_url import ENTRY_RECORD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from isohub.repos.verify import Damage
    from isohub.repos.weights_entry import Scope, WeightsFile

__all__ = ["Kept", "Plan", "Removal", "carry_out", "plan_prune", "plan_removal", "plan_repair"]

_IN_USE = "in use"
_LOCKED = "somebody writes there now"


@dataclass(frozen=True)
class Removal:
    """One thing to remove, or removed.

    Attributes:
        path: What goes.
        what: ``checkout``, ``weights`` (a URL of a scope), ``environment``, or as `Leftover.what`.
        name: For people, as `selection.commit_name` gives it; or a URL.
        bytes: What the disk gets back.
        why: ``asked``, ``old``, ``room``, ``leftover`` or ``damaged``.
        blob: The content of weights, where this is its last name.
    """

    path: Path
    what: str
    name: str
    bytes: int
    why: str
    blob: Path | None = None


@dataclass(frozen=True)
class Kept:
    """One thing that was asked for and stays.

    Attributes:
        path: What stays.
        what: As in `Removal`.
        name: As in `Removal`.
        reason: Why it stays: that it is in use, or what the disk said.
    """

    path: Path
    what: str
    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What goes and what stays; or, from `carry_out`, what went and what stayed.

    Attributes:
        removals: In the order in which they are carried out.
        kept: What was asked for and stays.
    """

    removals: tuple[Removal, ...]
    kept: tuple[Kept, ...]

    @property
    def bytes(self) -> int:
        """What the disk gets back."""
        return sum(removal.bytes for removal in self.removals)


class _Draft:
    """A plan in the making."""

    def __init__(self) -> None:
        self.removals: dict[Path, Removal] = {}
        self.kept: dict[Path, Kept] = {}

    def checkout(self, checkout: StoredCheckout, why: str) -> None:
        name = commit_name(checkout)
        if checkout.in_use:
            self.kept[checkout.path] = Kept(checkout.path, "checkout", name, _IN_USE)
            return
        self.removals[checkout.path] = Removal(checkout.path, "checkout", name, checkout.bytes, why)

    def weights(self, weights: StoredWeights, files: Sequence[WeightsFile], why: str) -> None:
        for file in files:
            if file.scope in weights.in_use:
                self.kept[file.path.parent] = Kept(file.path.parent, "weights", file.url, _IN_USE)
        files = [file for file in files if file.scope not in weights.in_use]
        last = bool(files) and len(files) == len(weights.files)
        for number, file in enumerate(files):
            place = file.path.parent
            # The disk gets the bytes back with the last of a content's names.
            if last and number == len(files) - 1:
                self.removals[place] = Removal(place, "weights", file.url, weights.bytes, why, weights.blob)
            else:
                self.removals[place] = Removal(place, "weights", file.url, 0, why)

    def leftover(self, leftover: Leftover, why: str = "leftover") -> None:
        path = leftover.path
        if leftover.in_use:
            self.kept[path] = Kept(path, leftover.what, path.name, _IN_USE)
        elif not leftover.live:
            self.removals[path] = Removal(path, leftover.what, path.name, leftover.bytes, why)
        elif why != "leftover":
            self.kept[path] = Kept(path, leftover.what, path.name, _LOCKED)

    def plan(self) -> Plan:
        return Plan(tuple(self.removals.values()), tuple(self.kept.values()))


def plan_removal(
    inventory: Inventory,
    checkouts: Iterable[StoredCheckout] = (),
    *,
    files: Iterable[WeightsFile] = (),
    scopes: Iterable[Scope] = (),
    everything: bool = False,
) -> Plan:
    """Plan to remove what was named.

    Args:
        inventory: Of the store.
        checkouts: Some of its checkouts.
        files: Some of its weights.
        scopes: (host, owner, repo) of which all goes: checkouts, weights and leftovers.
        everything: All of the store but the list of trusted repos.
    """
    draft, whole = _Draft(), set(scopes)
    named = {checkout.path for checkout in checkouts} | {file.path for file in files}
    for checkout in inventory.checkouts():
        if everything or checkout.scope in whole or checkout.path in named:
            draft.checkout(checkout, "asked")
    for weights in inventory.weights():
        chosen = [file for file in weights.files if everything or file.scope in whole or file.path in named]
        draft.weights(weights, chosen, "asked")
    directories = [path for scope, path in (*inventory.repositories(), *inventory.scopes()) if scope in whole]
    for leftover in inventory.leftovers():
        if everything or any(leftover.path.is_relative_to(directory) for directory in directories):
            draft.leftover(leftover, "asked")
    return draft.plan()


def plan_prune(
    inventory: Inventory, *, max_bytes: int | None = None, older_than_s: float | None = None, now: float | None = None
) -> Plan:
    """Plan to remove leftovers, what was not used for long, and what was not used for longest until the rest fits.

    Args:
        inventory: Of the store.
        max_bytes: What may stay, at most; None for no limit.
        older_than_s: Seconds after which what was not used goes; None for never.
        now: Seconds since 1970; the clock's unless given.
    """
    draft = _Draft()
    for leftover in inventory.leftovers():
        draft.leftover(leftover)
    moment = time.time() if now is None else now
    stored: list[StoredCheckout | StoredWeights] = [*inventory.checkouts(), *inventory.weights()]
    stored.sort(key=lambda each: each.used)
    total = sum(each.bytes for each in stored)
    in_use = []
    for each in stored:
        old = older_than_s is not None and moment - each.used > older_than_s
        if not old and (max_bytes is None or total <= max_bytes):
            continue
        if each.in_use and not old:
            in_use.append(each)
            continue
        _drop(draft, each, "old" if old else "room")
        total -= 0 if each.in_use else each.bytes
    if max_bytes is not None and total > max_bytes:
        for each in in_use:
            _drop(draft, each, "room")
    return draft.plan()


def plan_repair(inventory: Inventory, damages: Iterable[Damage]) -> Plan:
    """Plan to remove what is damaged, so that the next load brings it again."""
    draft = _Draft()
    units = {damage.unit for damage in damages if damage.unit is not None}
    for checkout in inventory.checkouts():
        if checkout.path in units:
            draft.checkout(checkout, "damaged")
    for weights in inventory.weights():
        draft.weights(
            weights, [file for file in weights.files if file.path.parent in units or weights.blob in units], "damaged"
        )
        units.discard(weights.blob)  # it goes with its last name, and stays with one that is in use
    done = draft.removals.keys() | draft.kept.keys()
    for leftover in inventory.leftovers():
        if leftover.path in units - done:
            draft.leftover(leftover, "damaged")
    done = draft.removals.keys() | draft.kept.keys()
    for unit in sorted(units - done):
        if os.path.lexists(unit):
            draft.removals[unit] = Removal(unit, "file", unit.name, 0, "damaged")
    for damage in damages:
        if damage.unit is None:
            draft.kept[damage.path] = Kept(damage.path, damage.what, damage.path.name, "only its user can mend it")
    return draft.plan()


def carry_out(root: Path, plan: Plan) -> Plan:
    """Remove what a plan names.

    Returns:
        What was removed, and what stays: of the plan, and what has come into use since.
    """
    removed, kept = [], list(plan.kept)
    for removal in plan.removals:
        reason = _refusal(_remove, root, removal.path, removal.what)
        if reason is not None:
            kept.append(Kept(removal.path, removal.what, removal.name, reason))
            continue
        if removal.blob is not None and (reason := _refusal(_remove_blob, root, removal.blob)) is not None:
            # What else has it was kept and said before, or is new.
            if not _is_named(root, removal.blob):
                kept.append(Kept(removal.blob, removal.what, removal.name, reason))
            removed.append(replace(removal, bytes=0))
            continue
        removed.append(removal)
    return Plan(tuple(removed), tuple(kept))


def _refusal(remove: Callable[..., None], *arguments: object) -> str | None:
    """Try, and say why it stays."""
    try:
        remove(*arguments)
    except FileNotFoundError:
        return None  # somebody else was quicker
    except BlockingIOError:
        return _IN_USE
    except Timeout:
        return _LOCKED
    except (OSError, NotImplementedError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or str(error)
    return None


def _remove(root: Path, path: Path, what: str) -> None:
    inside = path.relative_to(root)
    if inside.parts[0] == "checkouts" and len(inside.parts) >= 5:
        _remove_of_repository(root / Path(*inside.parts[:4]), path)
        return
    if inside.parts[0] == "environments" and len(inside.parts) == 2:
        if path.name.startswith("."):  # whoever writes there holds it
            with _claimed(path):
                remove_tree(path)
            return
        with _locked(path.parent / "locks" / f"{path.name}.lock"), _claimed(path):
            remove_tree(_renamed_away(path, "environment.json"))
        return
    if inside.parts[:2] == ("weights", "urls") and len(inside.parts) >= 6:
        with _claimed(root / Path(*inside.parts[:5])):
            if len(inside.parts) == 6 and path.is_dir() and not path.is_symlink():
                remove_tree(path / ENTRY_RECORD)
            remove_tree(path)
        return
    if what == "blob":
        _remove_blob(root, path)
        return
    if what == "partial":
        key = path.name.partition(".")[0]
        with _locked(path.with_name(f"{key}.lock")):
            for ending in ("part", "part.json", "copy"):
                path.with_name(f"{key}.{ending}").unlink(missing_ok=True)
        return
    remove_tree(path)


def _remove_blob(root: Path, path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        remove_tree(path)
        return
    descriptor = claim_file(path)
    try:
        if _is_named(root, path):
            raise BlockingIOError("an entry has it")
        path.unlink()
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_named(root: Path, blob: Path) -> bool:
    """Whether an entry has a blob; where links are not possible it has a copy."""
    try:
        links = blob.lstat().st_nlink
    except FileNotFoundError:
        return False
    return links > 1 or any(entry.sha256 == blob.name for entry in read_entries(root))


def _remove_of_repository(directory: Path, path: Path) -> None:
    # The lock before the claim: while it is held, nobody puts another checkout in this one's place.
    with _locked(directory / ".lock"), _claimed(path):
        if not CHECKOUT_NAME.fullmatch(path.name):
            remove_tree(path)
            return
        remove_tree(_renamed_away(path))
        commit = path.name.partition("+")[0]
        if all(each.name.partition("+")[0] != commit for each in subdirectories(directory)):
            forget(directory, commit)


def _renamed_away(place: Path, record: str = CHECKOUT_RECORD) -> Path:
    """Give a tree the name of trash and take its record, without which no sweep brings it back."""
    trash = place.with_name(f".trash-{place.name}-{secrets.token_hex(8)}")
    place.rename(trash)
    trash.chmod(0o700)
    remove_tree(trash / record)
    return trash


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """Have a directory that nobody uses. What is no directory needs no claim."""
    if directory.is_symlink() or not directory.is_dir():
        yield
        return
    descriptor = claim(directory)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, or raise `filelock.Timeout` at once."""
    with lock_file(path, timeout_s=0):
        yield


def _drop(draft: _Draft, each: StoredCheckout | StoredWeights, why: str) -> None:
    if isinstance(each, StoredCheckout):
        draft.checkout(each, why)
    else:
        draft.weights(each, each.files, why)
