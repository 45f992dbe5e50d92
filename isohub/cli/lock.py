"""``isohub lock``: write what references mean now into a lockfile, move it on, or hold the store against it.

Side: caller. Trust: a lockfile may come with somebody's project; `isohub.repos.lockfile` reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isohub.cli.options import Settings, output_options, pass_settings
from isohub.cli.output import Block, Cell, Styled, Table
from isohub.errors import IsohubError, LockMismatchError

if TYPE_CHECKING:
    from isohub.repos.lock_format import LockedRepo
    from isohub.repos.lockfile import Lockfile
    from isohub.repos.pins import Checkout
    from isohub.repos.reference import Reference, SourceName

__all__ = ["lock"]

_STYLES = {"added": "green", "updated": "yellow", "differs": "red", "failed": "red"}


@click.command("lock")
@click.argument("repos", nargs=-1, metavar="[REPO]...")
@click.option("--lockfile", default="isohub.lock", show_default=True, metavar="FILE", help="Which file.")
@click.option("--upgrade", is_flag=True, help="Resolve again what is locked: REPO, or all.")
@click.option("--check", is_flag=True, help="Write nothing; fetch what is locked, and fail if anything differs.")
@click.option("--source", type=click.Choice(["github", "git", "local"]), help="How to read REPO.")
@click.option("--skip-validation", is_flag=True, help="Accept a commit that is not shown to be the repo's own.")
@click.option("--submodules", is_flag=True, help="Bring the submodules of REPO.")
@click.option("--lfs", is_flag=True, help="Bring the files behind REPO's Git LFS pointers.")
@click.option("--offline", is_flag=True, help="Use the cache alone, as ISOHUB_OFFLINE=1 does.")
@output_options
@pass_settings
def lock(
    settings: Settings,
    /,
    repos: tuple[str, ...],
    lockfile: str,
    upgrade: bool,
    check: bool,
    source: SourceName | None,
    skip_validation: bool,
    submodules: bool,
    lfs: bool,
    offline: bool,
) -> None:
    """Write the commits that REPOs mean now into a lockfile.

    What is locked stays as it is, unless --upgrade says otherwise. Weights are added when a load with
    --lockfile downloads them.
    """
    from isohub.repos.catalog import is_offline
    from isohub.repos.lockfile import Lockfile
    from isohub.repos.reference import parse

    if upgrade and check:
        raise click.UsageError("--upgrade writes and --check does not; say one of them")
    if not repos and not (upgrade or check):
        raise click.UsageError("name a REPO; --upgrade and --check alone mean all that is locked")
    locked = Lockfile(lockfile, frozen=check)
    extras = ("lfs",) * lfs + ("submodules",) * submodules
    if not repos and (submodules or lfs):
        raise click.UsageError("--submodules and --lfs are of a REPO; what is locked says for itself what it has")
    locker = _Locker(
        locked, offline=is_offline(offline or None), skip_validation=skip_validation, progress=settings.progress
    )
    rows = []
    for reference in [parse(repo, source) for repo in repos]:
        wanted = _Wanted(reference, _extras(reference, extras))
        rows.append(locker.checked(wanted) if check else locker.locked(wanted, upgrade=upgrade))
    if not repos:
        rows = [locker.checked_entry(each) if check else locker.upgraded_entry(each) for each in locked.entries()]
    _say(settings, locked, rows)
    if any(row["status"] in ("differs", "failed") for row in rows):
        click.get_current_context().exit(1)


class _Wanted:
    """A reference and what else of it is to be brought."""

    def __init__(self, reference: Reference, extras: tuple[str, ...]) -> None:
        self.reference = reference
        self.extras = extras

    def row(self, status: str, commit: str | None, **more: Any) -> dict[str, Any]:
        """What is said of it."""
        return {
            "reference": str(self.reference),
            "extras": list(self.extras),
            "status": status,
            "commit": commit,
            **more,
        }


class _Locker:
    """The lockfile, and the store that it is about."""

    def __init__(self, lockfile: Lockfile, *, offline: bool, skip_validation: bool, progress: bool) -> None:
        from isohub.repos.layout import get_dir

        self._root = Path(get_dir())
        self._lockfile = lockfile
        self._offline = offline
        self._skip_validation = skip_validation
        self._progress = progress

    def locked(self, wanted: _Wanted, *, upgrade: bool) -> dict[str, Any]:
        """Lock one; what is locked already is fetched, and stays."""
        before = self._lockfile.find(wanted.reference, wanted.extras)
        if before is not None and not upgrade:
            self._fetch(wanted, bound=True)
            return wanted.row("unchanged", before.commit)
        checkout = self._fetch(wanted, bound=False)
        if before is None:
            self._lockfile.check(checkout)
            return wanted.row("added", checkout.commit, validated=checkout.pin.validated)
        self._lockfile.update(checkout)
        same = (before.commit, before.tree, before.ref) == (checkout.commit, checkout.tree, checkout.pin.ref_name)
        status = "unchanged" if same else "updated"
        return wanted.row(status, checkout.commit, was=before.commit, validated=checkout.pin.validated)

    def upgraded_entry(self, entry: LockedRepo) -> dict[str, Any]:
        """Move one that is locked to what it means now."""
        return self.locked(_Wanted(self._lockfile.reference(entry), entry.extras), upgrade=True)

    def checked_entry(self, entry: LockedRepo) -> dict[str, Any]:
        """As `checked`, for one that is locked; its directory may be gone."""
        try:
            wanted = _Wanted(self._lockfile.reference(entry), entry.extras)
        except IsohubError as error:
            found = {"reference": entry.reference, "extras": list(entry.extras), "status": "failed", "commit": None}
            return {**found, "problem": error.message}
        return self.checked(wanted)

    def checked(self, wanted: _Wanted) -> dict[str, Any]:
        """Hold one against the lockfile, with its weights."""
        try:
            checkout = self._fetch(wanted, bound=True)
            entry = self._lockfile.find(wanted.reference, wanted.extras)
            assert entry is not None  # a frozen lockfile has refused what it does not name
            unseen = self._check_weights(wanted, entry)
        except LockMismatchError as error:
            return wanted.row("differs", error.got if error.what == "commit" else None, problem=error.message)
        except IsohubError as error:
            return wanted.row("failed", None, problem=error.message)
        return wanted.row("same", checkout.commit, weights=len(entry.weights), weights_not_here=unseen)

    def _fetch(self, wanted: _Wanted, *, bound: bool) -> Checkout:
        from isohub.repos.catalog import Catalog, Wanted

        catalog = Catalog(self._root, offline=self._offline, lockfile=self._lockfile if bound else None)
        checkout = catalog.checkout(
            Wanted(
                str(wanted.reference),
                wanted.reference.source,
                skip_validation=self._skip_validation,
                verbose=self._progress,
                submodules="submodules" in wanted.extras,
                lfs="lfs" in wanted.extras,
            )
        )
        return catalog.store.measured(checkout)

    def _check_weights(self, wanted: _Wanted, entry: LockedRepo) -> list[str]:
        """Fetch and compare an entry's weights; returns the addresses that lack a query and are not here."""
        from isohub.repos.credentials import Credentials
        from isohub.repos.layout import weights_dir
        from isohub.repos.weights import Weights
        from isohub.repos.weights_entry import read_entry

        reference, unseen = wanted.reference, []
        scope = (reference.host, reference.owner, reference.repo)
        for each in entry.weights:
            if each.key is None:
                file = Weights(self._root, offline=self._offline).fetch(
                    each.url, scope, credentials=Credentials(anonymous=True), progress=self._progress
                )
                self._lockfile.check_weights(reference, wanted.extras, each.url, file.sha256, file.bytes)
                continue
            known = read_entry(self._root, weights_dir(self._root, scope) / each.key)
            if known is None:
                unseen.append(each.url)
            elif (known.sha256, known.stamp.bytes) != (each.sha256, each.bytes):
                raise LockMismatchError(
                    f"{each.url} of {reference} is not what {self._lockfile.path} locks: "
                    f"weights sha256 {known.sha256}, expected {each.sha256}",
                    reference=str(reference),
                    what="weights",
                    expected=each.sha256,
                    got=known.sha256,
                    lockfile=str(self._lockfile.path),
                )
        return unseen


def _extras(reference: Reference, extras: tuple[str, ...]) -> tuple[str, ...]:
    """A directory as it stands has what it has."""
    return () if reference.source == "local" and reference.ref is None else extras


def _say(settings: Settings, lockfile: Lockfile, rows: list[dict[str, Any]]) -> None:
    blocks: list[Block] = []
    if rows:
        cells: list[list[Cell]] = []
        for row in rows:
            status = Styled(row["status"], _STYLES[row["status"]]) if row["status"] in _STYLES else row["status"]
            cells.append([" +".join((row["reference"], *row["extras"])), status, _commits(row)])
        blocks.append(Table(("reference", "status", "commit"), cells))
    blocks += [row["problem"] for row in rows if "problem" in row]
    for row in rows:
        for url in row.get("weights_not_here", ()):
            blocks.append(f"{url} is not here, and its query is not kept: it is checked when it is loaded")
    for row in rows:
        if row.get("validated") is False:
            blocks.append(f"{row['reference']} is not shown to be a commit of its repo (--skip-validation)")
    blocks.append(f"{len(lockfile.entries())} locked in {lockfile.path}")
    quiet = [f"{row['commit'] or row['status']} {row['reference']}" for row in rows]
    settings.output.result({"lockfile": str(lockfile.path), "entries": rows}, *blocks, quiet=quiet)


def _commits(row: dict[str, Any]) -> str:
    commit = (row["commit"] or "")[:16]
    was = row.get("was")
    return f"{was[:16]} -> {commit}" if was and was != row["commit"] else commit
