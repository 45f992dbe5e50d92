"""``isohub lock``: write what references mean now into a lockfile, move it on, or hold the store against it.

Side: caller. Trust: a lockfile may come with somebody's project; `isohub.repos.lockfile` reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isohub.cli.options import Settings, output_options, pass_settings
from isohub.cli.output import Block, Cell, Styled, Table
from isohub.errors import IntegrityError, IsohubError, LockMismatchError, OfflineError

if TYPE_CHECKING:
    from isohub.repos.lock_format import LockedRepo, LockedWeights
    from isohub.repos.lockfile import Lockfile
    from isohub.repos.pins import Checkout
    from isohub.repos.reference import Reference, SourceName
    from isohub.repos.weights_entry import Scope

__all__ = ["lock"]

_STYLES = {"added": "green", "updated": "yellow", "differs": "red", "failed": "red"}


@click.command("lock")
@click.argument("repos", nargs=-1, metavar="[REPO]...")
@click.option("--lockfile", default="isohub.lock", show_default=True, metavar="FILE", help="Which file.")
@click.option("--upgrade", is_flag=True, help="Ask again for what is locked, weights too: of REPO, or all.")
@click.option(
    "--check", is_flag=True, help="Write nothing; fetch what is locked, weights too, and fail if anything differs."
)
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
    --lockfile downloads them; those of another commit are locked no longer.
    """
    from isohub.repos.catalog import is_offline
    from isohub.repos.lockfile import Lockfile
    from isohub.repos.reference import parse

    if upgrade and check:
        raise click.UsageError("--upgrade writes and --check does not; say one of them")
    if not repos and not (upgrade or check):
        raise click.UsageError("name a REPO; --upgrade and --check alone mean all that is locked")
    if not repos and (submodules or lfs):
        raise click.UsageError("--submodules and --lfs are of a REPO; what is locked says for itself what it has")
    extras = ("lfs",) * lfs + ("submodules",) * submodules
    locked = Lockfile(lockfile, frozen=check)
    if check or not repos:
        locked.require()
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
            self._fetch(wanted)
            return wanted.row("unchanged", before.commit)
        checkout = self._resolved(wanted)
        if before is None:
            self._lockfile.check(checkout)
            return wanted.row("added", checkout.commit, validated=checkout.pin.validated)
        same_commit = before.commit == checkout.commit
        weights = self._asked_again(wanted, before) if same_commit else {}
        self._lockfile.update(checkout, weights)
        changed = [
            {"url": each.url, "sha256": new.sha256, "was": each.sha256}
            for each in before.weights
            if (new := weights.get(each.which)) is not None and new != each
        ]
        unlocked = [each.url for each in before.weights if not same_commit or weights[each.which] is None]
        unlocked += [f"the environment {each.name}" for each in before.environment]
        same = same_commit and (before.tree, before.ref) == (checkout.tree, checkout.pin.ref_name)
        return wanted.row(
            "unchanged" if same and not changed and not unlocked else "updated",
            checkout.commit,
            was=before.commit,
            validated=checkout.pin.validated,
            weights_updated=changed,
            weights_unlocked=unlocked,
        )

    def upgraded_entry(self, entry: LockedRepo) -> dict[str, Any]:
        """Move one that is locked to what it means now."""
        return self.locked(_Wanted(self._lockfile.reference(entry), entry.extras), upgrade=True)

    def checked_entry(self, entry: LockedRepo) -> dict[str, Any]:
        """As `checked`, for one that is locked; its directory may be gone."""
        try:
            wanted = _Wanted(self._lockfile.reference(entry), entry.extras)
        except IsohubError as error:
            found = {"reference": entry.reference, "extras": list(entry.extras), "status": "failed", "commit": None}
            return {**found, "problem": error.message, "hint": error.hint}
        return self.checked(wanted)

    def checked(self, wanted: _Wanted) -> dict[str, Any]:
        """Hold one against the lockfile, with its weights."""
        try:
            checkout = self._fetch(wanted)
            entry = self._lockfile.find(wanted.reference, wanted.extras)
            assert entry is not None  # a frozen lockfile has refused what it does not name
            unseen = self._check_weights(wanted, entry)
        except LockMismatchError as error:
            commit = error.got if error.what == "commit" else None
            return wanted.row("differs", commit, problem=error.message, hint=error.hint)
        except IsohubError as error:
            return wanted.row("failed", None, problem=error.message, hint=error.hint)
        return wanted.row("same", checkout.commit, weights=len(entry.weights), weights_not_here=unseen)

    def _fetch(self, wanted: _Wanted) -> Checkout:
        """What is locked, as a load brings it."""
        from isohub.repos.catalog import Catalog, Wanted

        catalog = Catalog(self._root, offline=self._offline, lockfile=self._lockfile)
        return catalog.checkout(
            Wanted(
                str(wanted.reference),
                wanted.reference.source,
                skip_validation=self._skip_validation,
                verbose=self._progress,
                submodules="submodules" in wanted.extras,
                lfs="lfs" in wanted.extras,
            )
        )

    def _resolved(self, wanted: _Wanted) -> Checkout:
        """What a reference means now; what its source said before counts only offline."""
        from isohub.repos.store import Store

        store = Store(self._root, offline=self._offline)
        pin = store.resolve(
            wanted.reference,
            force_reload=not self._offline,
            skip_validation=self._skip_validation,
            extras=wanted.extras,
        )
        return store.measured(store.fetch(pin, progress=self._progress))

    def _asked_again(self, wanted: _Wanted, entry: LockedRepo) -> dict[tuple[str, str], LockedWeights | None]:
        """What the URLs of an entry give now; None for one whose query is not kept, so that nobody can ask."""
        from isohub.repos.credentials import Credentials
        from isohub.repos.lock_format import LockedWeights
        from isohub.repos.weights import Weights

        if self._offline and any(each.key is None for each in entry.weights):
            raise OfflineError(
                f"whether the weights of {entry.reference} have changed cannot be asked: the network may not be used",
                hint="with a network: isohub lock --upgrade; offline comes from ISOHUB_OFFLINE or --offline",
                reference=entry.reference,
            )
        weights, scope = Weights(self._root), _scope(wanted)
        found: dict[tuple[str, str], LockedWeights | None] = {}
        for each in entry.weights:
            if each.key is not None:
                found[each.which] = None
                continue
            known = weights.lookup(each.url, scope)
            if known is not None and known.sha256 != each.sha256:
                weights.forget(each.url, scope)  # an answer of before, which must not be locked for want of another
            file = weights.fetch(
                each.url, scope, credentials=Credentials(anonymous=True), progress=self._progress, revalidate=True
            )
            found[each.which] = LockedWeights(each.url, file.sha256, file.bytes)
        return found

    def _check_weights(self, wanted: _Wanted, entry: LockedRepo) -> list[str]:
        """Fetch and compare an entry's weights; returns the addresses that lack a query and are not here."""
        from isohub.repos.credentials import Credentials
        from isohub.repos.layout import weights_dir
        from isohub.repos.weights import Weights
        from isohub.repos.weights_entry import read_entry

        weights, scope, unseen = Weights(self._root, offline=self._offline), _scope(wanted), []
        for each in entry.weights:
            if each.key is None:
                try:
                    file = weights.fetch(
                        each.url,
                        scope,
                        credentials=Credentials(anonymous=True),
                        sha256=each.sha256,
                        progress=self._progress,
                    )
                except IntegrityError as error:
                    if error.expected == each.sha256 and error.got:
                        self._lockfile.compare_weights(wanted.reference, wanted.extras, each, error.got, each.bytes)
                    raise
            else:
                known = read_entry(self._root, weights_dir(self._root, scope) / each.key)
                if known is None:
                    unseen.append(each.url)
                    continue
                file = known.file(self._root)
            file = weights.measured(file)
            self._lockfile.compare_weights(wanted.reference, wanted.extras, each, file.sha256, file.bytes)
        return unseen


def _scope(wanted: _Wanted) -> Scope:
    reference = wanted.reference
    return reference.host, reference.owner, reference.repo


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
            cells += [
                [f"  {each['url']}", Styled("updated", "yellow"), f"sha256 {each['was'][:16]} -> {each['sha256'][:16]}"]
                for each in row.get("weights_updated", ())
            ]
        blocks.append(Table(("reference", "status", "commit"), cells))
    for row in rows:
        if "problem" in row:
            blocks += [row["problem"], *([f"hint: {row['hint']}"] if row["hint"] else [])]
        for url in row.get("weights_unlocked", ()):
            blocks.append(f"{url} is locked no longer: the next load with the lockfile locks it anew")
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
