"""``isohub cache``: what the store holds, and removing it. What goes is decided in `isohub.repos.removal`.

Exit status 1 where something that was asked for is not there, stays because it is in use, or is damaged.

Side: caller. Trust: names, refs and URLs are repos'; `output` escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isohub.cli.options import Settings, output_options, pass_settings
from isohub.cli.output import Block, Cell, Styled, Table
from isohub.cli.removed import carried_out, dry_run_option, finished, moment, prune_options, shown_use
from isohub.cli.units import show_size

if TYPE_CHECKING:
    from isohub.repos.inventory import Inventory, StoredCheckout, StoredWeights
    from isohub.repos.verify import Damage
    from isohub.repos.weights_entry import Scope

__all__ = ["cache"]


@click.group("cache")
def cache() -> None:
    """List, check and remove what is kept: checkouts and weights."""


@cache.command("dir")
@output_options
@pass_settings
def cache_dir(settings: Settings) -> None:
    """Print the directory; ISOHUB_HOME sets it."""
    from isohub.repos.layout import get_dir

    place = str(get_dir())
    settings.output.result({"dir": place}, place, quiet=[place])


@cache.command("ls")
@click.argument("repo", required=False)
@click.option("--checkouts", "only", flag_value="checkouts", help="Leave out weights.")
@click.option("--weights", "only", flag_value="weights", help="Leave out checkouts.")
@output_options
@pass_settings
def cache_ls(settings: Settings, /, repo: str | None, only: str | None) -> None:
    """List checkouts and weights: all, or those of REPO, which may also be as rm takes it."""
    from isohub.repos.selection import commit_name, select

    inventory = _inventory()
    chosen = select(inventory, None if repo is None else _named([repo]))
    checkouts = [] if only == "weights" else chosen.checkouts
    weights = [] if only == "checkouts" else chosen.weights
    leftovers = inventory.leftovers() if repo is None and only is None else []
    total = sum([each.bytes for each in checkouts] + [each.bytes for each in weights])
    total += sum(each.bytes for each in leftovers)
    found = {
        "dir": str(inventory.root),
        "bytes": total,
        "checkouts": [_checkout_data(each) for each in checkouts],
        "weights": [_weights_data(each, chosen.urls) for each in weights],
        "leftovers": [{"path": str(each.path), "what": each.what, "bytes": each.bytes} for each in leftovers],
    }
    blocks: list[Block] = []
    if checkouts:
        blocks.append(_checkout_table(checkouts))
    if weights:
        blocks.append(_weights_table(weights, chosen.urls))
    if leftovers:
        size = show_size(sum(each.bytes for each in leftovers))
        blocks.append(f"{_count(len(leftovers), 'leftover')} of writes that ended early, {size}: isohub cache prune")
    if checkouts or weights or leftovers:
        blocks.append(f"{show_size(total)} in {inventory.root}")
    elif not chosen.missing:
        blocks.append(f"nothing in {inventory.root}")
    names = [commit_name(each) for each in checkouts]
    names += [str(file.path) for each in weights for file in each.files]
    finished(settings, found, blocks, names, missing=chosen.missing)


@cache.command("rm")
@click.argument("repos", nargs=-1, metavar="[REPO[:REF] | REPO@COMMIT | URL | PATH]...")
@click.option("--all", "everything", is_flag=True, help="Remove all checkouts and weights.")
@dry_run_option
@output_options
@pass_settings
def cache_rm(settings: Settings, /, repos: tuple[str, ...], everything: bool, dry_run: bool) -> None:
    """Remove repos with their weights, or single checkouts or weights.

    REPO alone is all of a repo: its checkouts, and the weights that were downloaded for it. With a ref or a
    commit it is that checkout. URL is of weights, whoever has them; PATH is of either, as ls --quiet prints it.
    What is in use stays.
    """
    from isohub.repos.removal import plan_removal
    from isohub.repos.selection import select

    if bool(repos) == everything:
        raise click.UsageError("name a REPO, or say --all" if not repos else "--all and a REPO exclude each other")
    inventory = _inventory()
    chosen = select(inventory, _named(repos))
    files = [file for weights in chosen.weights for file in weights.files]
    plan = plan_removal(inventory, chosen.checkouts, files=files, scopes=chosen.scopes, everything=everything)
    carried_out(settings, inventory.root, plan, dry_run, missing=chosen.missing)


@cache.command("prune")
@prune_options
@dry_run_option
@output_options
@pass_settings
def cache_prune(settings: Settings, /, max_bytes: int | None, older_than_s: float | None, dry_run: bool) -> None:
    """Remove leftovers, and what was used longest ago. What is in use stays."""
    from isohub.repos.removal import plan_prune

    inventory = _inventory()
    plan = plan_prune(inventory, max_bytes=max_bytes, older_than_s=older_than_s)
    carried_out(settings, inventory.root, plan, dry_run)


@cache.command("verify")
@click.option("--repair", is_flag=True, help="Remove what is damaged, so that the next load brings it again.")
@dry_run_option
@output_options
@pass_settings
def cache_verify(settings: Settings, /, repair: bool, dry_run: bool) -> None:
    """Read everything again and hold it against its hashes."""
    from isohub.repos.removal import plan_repair
    from isohub.repos.verify import verify

    if dry_run and not repair:
        raise click.UsageError("--dry-run says what --repair would remove; verify alone removes nothing")
    inventory = _inventory()
    damages = verify(inventory.root)
    if repair and damages:
        if not (settings.json or settings.quiet):
            settings.output.result({}, *_damage_blocks(damages))
        carried_out(
            settings,
            inventory.root,
            plan_repair(inventory, damages),
            dry_run,
            more={"damages": [_damage_data(each) for each in damages]},
            failed=dry_run,
        )
        return
    found = {"dir": str(inventory.root), "damages": [_damage_data(damage) for damage in damages]}
    blocks = _damage_blocks(damages) if damages else [f"all of {inventory.root} is as it was written"]
    if any(damage.unit is not None for damage in damages):
        blocks.append("hint: isohub cache verify --repair removes what is damaged, and the next load brings it again")
    settings.output.result(found, *blocks, quiet=[str(damage.path) for damage in damages])
    if damages:
        click.get_current_context().exit(1)


# What is done, and said.


def _inventory() -> Inventory:
    from isohub.repos.inventory import Inventory
    from isohub.repos.layout import get_dir

    return Inventory(Path(get_dir()))


def _named(texts: Sequence[str]) -> Sequence[str]:
    if "" in texts:
        raise click.UsageError("REPO is an empty text; name a repo, or leave it out")
    return texts


def _checkout_table(checkouts: Sequence[StoredCheckout]) -> Table:
    from isohub.repos.selection import repo_name

    rows: list[Sequence[Cell]] = [
        (
            repo_name(each.scope, each.url),
            "+".join((each.commit[:10], *each.extras)),
            ", ".join(ref or "HEAD" for ref in each.refs),
            str(each.files),
            show_size(each.bytes),
            Styled("in use", "yellow") if each.in_use else shown_use(each.used),
        )
        for each in checkouts
    ]
    return Table(("repo", "commit", "refs", "files", "size", "used"), rows, right=frozenset({3, 4}))


def _weights_table(weights: Sequence[StoredWeights], urls: Mapping[Scope, str]) -> Table:
    from isohub.repos.selection import repo_name

    rows: list[Sequence[Cell]] = []
    for each in weights:
        for number, file in enumerate(each.files):
            in_use = file.scope in each.in_use
            rows.append(
                (
                    file.url,
                    repo_name(file.scope, urls.get(file.scope)),
                    file.sha256[:10],
                    "same file" if number else show_size(each.bytes),
                    Styled("in use", "yellow") if in_use else shown_use(each.used),
                )
            )
    return Table(("weights", "of", "sha256", "size", "used"), rows, right=frozenset({3}))


def _damage_blocks(damages: Sequence[Damage]) -> list[Block]:
    rows = [(str(each.path), Styled(each.what, "red"), each.expected, each.got) for each in damages]
    blocks: list[Block] = [Table(("path", "damaged", "expected", "got"), rows)]
    likely = sorted({path for each in damages for path in each.likely})
    blocks += [f"changed after the checkout was made, so likely: {path}" for path in likely]
    return [*blocks, _count(len(damages), "damage")]


def _checkout_data(checkout: StoredCheckout) -> dict[str, Any]:
    from isohub.repos.selection import commit_name

    host, owner, repo = checkout.scope
    return {
        "host": host,
        "owner": owner,
        "repo": repo,
        "name": commit_name(checkout),
        "commit": checkout.commit,
        "extras": list(checkout.extras),
        "refs": list(checkout.refs),
        "url": checkout.url,
        "path": str(checkout.path),
        "bytes": checkout.bytes,
        "files": checkout.files,
        "created": checkout.created,
        "used": moment(checkout.used),
        "in_use": checkout.in_use,
    }


def _weights_data(weights: StoredWeights, urls: Mapping[Scope, str]) -> dict[str, Any]:
    from isohub.repos.selection import repo_name

    return {
        "sha256": weights.sha256,
        "bytes": weights.bytes,
        "used": moment(weights.used),
        "in_use": bool(weights.in_use),
        "files": [
            {
                "url": each.url,
                "scope": list(each.scope),
                "name": repo_name(each.scope, urls.get(each.scope)),
                "path": str(each.path),
            }
            for each in weights.files
        ],
    }


def _damage_data(damage: Damage) -> dict[str, Any]:
    return {
        "path": str(damage.path),
        "what": damage.what,
        "expected": damage.expected,
        "got": damage.got,
        "likely": [str(path) for path in damage.likely],
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
