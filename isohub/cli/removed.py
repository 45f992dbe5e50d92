"""What the commands that remove something from the store have in common: the plan carried out, and said.

Exit status 1 where something that was asked for is not there, or stays.

Side: caller. Trust: names in plans are repos'; `output` escapes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from isohub.cli.options import Settings
from isohub.cli.output import Block, Cell, Styled, Table
from isohub.cli.units import read_age, read_size, show_age, show_size

if TYPE_CHECKING:
    from isohub.repos.removal import Plan

__all__ = ["carried_out", "dry_run_option", "finished", "moment", "prune_options", "shown_use"]

_F = TypeVar("_F", bound=Callable[..., Any])
_SIZE_HELP = "Keep so much at most, such as 5GB."
_AGE_HELP = "Remove what was not used for, say, 30d."
_WORDS = {
    "asked": "asked for",
    "old": "not used for so long",
    "room": "used longest ago",
    "leftover": "left by a write that ended early",
    "damaged": "damaged",
}


def dry_run_option(command: _F) -> _F:
    """--dry-run, for what removes."""
    return click.option("-n", "--dry-run", is_flag=True, help="Say what would go, and remove nothing.")(command)


def prune_options(command: _F) -> _F:
    """What to keep, for what removes the oldest."""
    for option in (
        click.option("--older-than", "older_than_s", callback=read_age, metavar="AGE", help=_AGE_HELP),
        click.option("--max-size", "max_bytes", callback=read_size, metavar="SIZE", help=_SIZE_HELP),
    ):
        command = option(command)
    return command


def carried_out(
    settings: Settings,
    root: Path,
    plan: Plan,
    dry_run: bool,
    *,
    missing: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
    failed: bool = False,
) -> None:
    """Carry a plan out, unless it is a dry run, say what went and what stays, and end with status 1 if need be.

    Args:
        settings: Where it is said.
        root: The store's directory.
        plan: What is to go.
        dry_run: Remove nothing.
        missing: Names of which nothing is there.
        more: More for JSON.
        failed: End with status 1 in any case.
    """
    from isohub.repos.removal import carry_out

    done = plan if dry_run else carry_out(root, plan)
    found: dict[str, Any] = {
        "dir": str(root),
        "dry_run": dry_run,
        "bytes": done.bytes,
        "removed": [
            {"path": str(each.path), "what": each.what, "name": each.name, "bytes": each.bytes, "why": each.why}
            for each in done.removals
        ],
        "kept": [
            {"path": str(each.path), "what": each.what, "name": each.name, "reason": each.reason} for each in done.kept
        ],
        **(more or {}),
    }
    blocks: list[Block] = []
    if done.removals:
        rows = [(each.what, each.name, show_size(each.bytes), _WORDS[each.why]) for each in done.removals]
        blocks.append(Table(("what", "name", "size", "why"), rows, right=frozenset({2})))
    if done.kept:
        stays: list[Sequence[Cell]] = [(each.what, each.name, Styled(each.reason, "yellow")) for each in done.kept]
        blocks.append(Table(("what stays", "name", "because"), stays))
    if done.removals or not missing:
        verb = "would be freed" if dry_run else "freed"
        blocks.append(f"{show_size(done.bytes)} {verb} in {root}")
    paths = [str(each.path) for each in done.removals]
    finished(settings, found, blocks, paths, missing=missing, failed=failed or bool(done.kept))


def finished(
    settings: Settings,
    found: dict[str, Any],
    blocks: Sequence[Block],
    quiet: Sequence[str],
    *,
    missing: Sequence[str],
    failed: bool = False,
) -> None:
    """Print, and end with status 1 if something was not there or stays."""
    found["missing"] = list(missing)
    settings.output.result(found, *blocks, *(f"{text} is not in the cache" for text in missing), quiet=quiet)
    if missing or failed:
        click.get_current_context().exit(1)


def moment(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def shown_use(seconds: float) -> str:
    """How long ago something was used."""
    age = show_age(time.time() - seconds)
    return age if age == "now" else f"{age} ago"
