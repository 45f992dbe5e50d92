"""``isohub env``: what repos run on, built ahead, listed and removed.

Exit status 1 where something that was asked for is not there, or stays because it is in use.

Side: caller. Trust: names of packages are an index's, names of repos are repos'; `output` escapes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isohub.cli.options import (
    Settings,
    environment_options,
    opened,
    output_options,
    pass_settings,
    repo_options,
)
from isohub.cli.output import Block, Cell, Styled, Table
from isohub.cli.removed import carried_out, dry_run_option, moment, prune_options, shown_use
from isohub.cli.units import show_size

if TYPE_CHECKING:
    from isohub.environments.inventory import StoredEnvironment
    from isohub.repos.lock_format import LockedPackage

__all__ = ["env"]

_KEY_CHARS = 10


@click.group("env")
def env() -> None:
    """Build, list and remove what repos run on."""


@env.command("build")
@click.argument("repo", required=False)
@repo_options
@environment_options
@output_options
@pass_settings
def env_build(settings: Settings, /, repo: str | None, **options: Any) -> None:
    """Build what REPO runs on, so that later loads need no network; nothing of the repo runs.

    Without an option it is --environment auto. Without REPO, --with and --environment FILE say what to install.
    """
    with opened(options, default_environment="auto") as session:
        wanted = session.environment
        if repo is None and wanted.requirements is None:
            raise click.UsageError("name a REPO, or say what to install: --with REQ, or --environment FILE")
        more = {"verbose": settings.progress, "force_reload": options["force_reload"]}
        if repo is not None:
            checkout = session.fetch(repo, verbose=settings.progress, **options)
            prepared = session.prepare(checkout, wanted, **more)
        else:
            prepared = session.prepare(None, wanted, **more)
    runtime = prepared.runtime
    found = {
        "key": runtime.key,
        "environment": prepared.name,
        "python": runtime.python,
        "directories": list(runtime.packages),
        "packages": _packages(prepared.packages),
    }
    count = len(prepared.packages)
    words = f"{count} package{'s' * (count != 1)}" if count else "the host meets all of it"
    settings.output.result(found, f"{runtime.key[:_KEY_CHARS]}  {prepared.name}: {words}", quiet=[runtime.key])


@env.command("ls")
@output_options
@pass_settings
def env_ls(settings: Settings) -> None:
    """List what is built, used last first."""
    from isohub.environments.inventory import leftovers, stored

    root = _root()
    environments, remains = stored(root), leftovers(root)
    total = sum([each.bytes for each in environments] + [each.bytes for each in remains])
    found = {
        "dir": str(root / "environments"),
        "bytes": total,
        "environments": [_data(each) for each in environments],
        "leftovers": [{"path": str(each.path), "what": each.what, "bytes": each.bytes} for each in remains],
    }
    blocks: list[Block] = [_table(environments)] if environments else []
    if remains:
        blocks.append(f"{len(remains)} left by builds that ended early: isohub env prune")
    blocks.append(f"{show_size(total)} in {root / 'environments'}" if blocks else f"nothing in {root / 'environments'}")
    settings.output.result(found, *blocks, quiet=[each.record.key for each in environments])


@env.command("show")
@click.argument("key")
@output_options
@pass_settings
def env_show(settings: Settings, /, key: str) -> None:
    """Show what an environment consists of. KEY is as ls prints it."""
    chosen, _ = _named([key])
    if len(chosen) != 1:
        words = f"{len(chosen)} environments are meant by {key}" if chosen else f"no environment is meant by {key}"
        words += "\nhint: isohub env ls shows their keys, of which four characters or more are given"
        settings.output.result({"environments": [_data(each) for each in chosen]}, words)
        click.get_current_context().exit(1)
    (one,) = chosen
    record = one.record
    lines: list[Block] = [
        f"key       {record.key}",
        f"asked     {record.name}",
        f"made for  {record.made_for or 'a list of its own'}, {record.created}",
        f"python    {record.python}, {record.interpreter}" + (", over its packages" * (record.kind == "overlay")),
        f"path      {one.path}, {show_size(one.bytes)}",
    ]
    rows = [(each.name, each.version, each.sha256[0][:16]) for each in record.packages]
    lines.append(Table(("package", "version", "sha256"), rows))
    settings.output.result(_data(one), *lines, quiet=[f"{each.name}=={each.version}" for each in record.packages])


@env.command("rm")
@click.argument("keys", nargs=-1, metavar="[KEY | REPO@COMMIT | PATH]...")
@click.option("--all", "everything", is_flag=True, help="Remove all of them.")
@dry_run_option
@output_options
@pass_settings
def env_rm(settings: Settings, /, keys: tuple[str, ...], everything: bool, dry_run: bool) -> None:
    """Remove environments. What is in use stays."""
    from isohub.environments.inventory import kept, leftovers, plan_removal, stored

    if bool(keys) == everything:
        raise click.UsageError("name a KEY, or say --all" if not keys else "--all and a KEY exclude each other")
    chosen, missing = (stored(_root()), []) if everything else _named(keys)
    plan = plan_removal(chosen, [*leftovers(_root()), *kept(_root())] if everything else ())
    carried_out(settings, _root(), plan, dry_run, missing=missing)


@env.command("prune")
@prune_options
@dry_run_option
@output_options
@pass_settings
def env_prune(settings: Settings, /, max_bytes: int | None, older_than_s: float | None, dry_run: bool) -> None:
    """Remove what builds that ended early left, and what was used longest ago. What is in use stays."""
    from isohub.environments.inventory import leftovers, plan_prune, stored

    root = _root()
    plan = plan_prune(stored(root), leftovers(root), max_bytes=max_bytes, older_than_s=older_than_s)
    carried_out(settings, root, plan, dry_run)


def _root() -> Path:
    from isohub.repos.layout import get_dir

    return Path(get_dir())


def _named(keys: Sequence[str]) -> tuple[list[StoredEnvironment], list[str]]:
    from isohub.environments.inventory import named, stored

    return named(stored(_root()), keys)


def _table(environments: Sequence[StoredEnvironment]) -> Table:
    rows: list[Sequence[Cell]] = []
    for each in environments:
        record = each.record
        used: Cell = Styled("in use", "yellow") if each.in_use else shown_use(each.used)
        kind = "over the host" if record.kind == "overlay" else "its own"
        size = show_size(each.bytes)
        shown = record.key[:_KEY_CHARS]
        rows.append((shown, record.made_for or record.name, record.python, kind, str(len(record.packages)), size, used))
    return Table(("key", "made for", "python", "kind", "packages", "size", "used"), rows, right=frozenset({4, 5}))


def _data(each: StoredEnvironment) -> dict[str, Any]:
    record = each.record
    return {
        "key": record.key,
        "kind": record.kind,
        "environment": record.name,
        "made_for": record.made_for,
        "interpreter": record.interpreter,
        "python": record.python,
        "platform": record.platform,
        "packages": _packages(record.packages),
        "path": str(each.path),
        "bytes": each.bytes,
        "created": record.created,
        "used": moment(each.used),
        "in_use": each.in_use,
    }


def _packages(packages: Sequence[LockedPackage]) -> list[dict[str, Any]]:
    return [{"name": each.name, "version": each.version, "sha256": list(each.sha256)} for each in packages]
