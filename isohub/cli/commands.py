"""The commands that look at a repo and at isohub's own directories. None of them imports torch here.

Side: caller. Trust: names, signatures and docstrings are the repo's; `output` escapes them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from inspect import cleandoc
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
    sandbox_options,
    timeout_option,
)
from isohub.cli.output import Block, Table
from isohub.errors import IsohubError

if TYPE_CHECKING:
    from isohub.repos.pins import Checkout
    from isohub.repos.trust import Trust, TrustEntry

__all__ = ["fetch", "help_", "inspect", "list_", "trust"]

_PARALLEL = 4


@click.command("list")
@click.argument("repo")
@repo_options
@sandbox_options
@environment_options
@timeout_option
@output_options
@pass_settings
def list_(settings: Settings, /, repo: str, timeout_s: float | None, **options: Any) -> None:
    """List a repo's entrypoints; hubconf.py runs in a worker."""
    with opened(options, timeout_s=timeout_s) as session:
        checkout = session.fetch(repo, verbose=settings.progress, **options)
        session.prepare(checkout, verbose=settings.progress)
        names = session.list(checkout, verbose=False)
    found = {"repo": checkout.pin.name, "commit": checkout.commit, "entrypoints": names}
    settings.output.result(found, *names, quiet=names)


@click.command("help")
@click.argument("repo")
@click.argument("model")
@repo_options
@sandbox_options
@environment_options
@timeout_option
@output_options
@pass_settings
def help_(settings: Settings, /, repo: str, model: str, timeout_s: float | None, **options: Any) -> None:
    """Show an entrypoint's docstring; hubconf.py runs in a worker."""
    with opened(options, timeout_s=timeout_s) as session:
        checkout = session.fetch(repo, verbose=settings.progress, **options)
        session.prepare(checkout, verbose=settings.progress)
        text = session.help(checkout, model, verbose=False)
    found = {"repo": checkout.pin.name, "commit": checkout.commit, "model": model, "help": text}
    shown = None if text is None else cleandoc(text)
    settings.output.result(
        found, f"{model} has no docstring" if shown is None else shown, quiet=(shown or "").splitlines()
    )


@click.command("inspect")
@click.argument("repo")
@repo_options
@output_options
@pass_settings
def inspect(settings: Settings, /, repo: str, **options: Any) -> None:
    """Read hubconf.py as text; nothing of the repo runs."""
    with opened(options) as session:
        checkout = session.fetch(repo, verbose=settings.progress, **options)
        outline = session.inspect(checkout, verbose=False)
    names = [entrypoint.name for entrypoint in outline.entrypoints]
    rows = [
        (entry.name + (entry.signature or ""), entry.kind, str(entry.line), _first_line(entry.doc))
        for entry in outline.entrypoints
    ]
    blocks: list[Block] = [f"{checkout.pin.name}  {_first_line(outline.doc)}".rstrip()]
    dependencies = ", ".join(outline.dependencies) or "none"
    blocks.append(
        f"dependencies: {dependencies}" + (", and others that only running tells" * outline.dependencies_unreadable)
    )
    blocks.append(
        Table(("entrypoint", "kind", "line", "says"), rows, right=frozenset({2})) if rows else "no entrypoint"
    )
    if outline.star_imports:
        blocks.append(f"there may be more, from: {', '.join(outline.star_imports)}")
    if outline.undecided:
        blocks.append(f"callable or not, only running tells: {', '.join(outline.undecided)}")
    found = {"repo": checkout.pin.name, "commit": checkout.commit, **outline.to_dict()}
    settings.output.result(found, *blocks, quiet=names)


@click.command("fetch")
@click.argument("repos", metavar="REPO...", nargs=-1, required=True)
@repo_options
@output_options
@pass_settings
@click.pass_context
def fetch(ctx: click.Context, settings: Settings, /, repos: tuple[str, ...], **options: Any) -> None:
    """Download repos, several at once; nothing of them runs."""
    with opened(options) as session:

        def bring(repo: str) -> Checkout | IsohubError:
            try:
                return session.fetch(repo, verbose=settings.progress, **options)
            except IsohubError as error:
                if len(repos) == 1:
                    raise
                return error

        with ThreadPoolExecutor(min(len(repos), _PARALLEL), thread_name_prefix="isohub-fetch") as pool:
            brought = list(pool.map(bring, repos))
    found: list[dict[str, Any]] = []
    blocks: list[Block] = []
    for repo, checkout in zip(repos, brought, strict=True):
        if isinstance(checkout, IsohubError):
            settings.output.error(checkout)
            found.append({"repo": repo, "error": {"type": type(checkout).__name__, "message": checkout.message}})
            continue
        found.append(_described(checkout))
        blocks += [*([f"repo    {repo}"] if len(repos) > 1 else []), *_lines(checkout)]
    paths = [str(checkout.path) for checkout in brought if not isinstance(checkout, IsohubError)]
    settings.output.result(found[0] if len(repos) == 1 else {"repos": found}, *blocks, quiet=paths)
    if len(paths) < len(repos):
        ctx.exit(1)


def _described(checkout: Checkout) -> dict[str, Any]:
    pin = checkout.pin
    in_place = pin.reference.source == "local" and pin.reference.ref is None
    return {
        "repo": pin.name,
        "reference": str(pin.reference),
        "ref": pin.ref_name,
        "commit": checkout.commit,
        "validated": None if in_place else pin.validated,
        "path": str(checkout.path),
        "tree": checkout.tree,
        "submodules": list(checkout.submodules),
        "lfs_pointers": list(checkout.lfs_pointers),
    }


def _lines(checkout: Checkout) -> list[str]:
    pin = checkout.pin
    lines = [f"commit  {checkout.commit}", f"path    {checkout.path}"]
    if pin.ref_name is not None:
        lines.insert(0, f"ref     {pin.ref_name}")
    if not pin.validated:
        lines.append("not shown to be a commit of this repo (--skip-validation)")
    if checkout.submodules:
        lines.append(f"submodules left empty, --submodules brings them: {', '.join(checkout.submodules)}")
    if checkout.lfs_pointers:
        lines.append(f"Git LFS pointers, --lfs brings their files: {', '.join(checkout.lfs_pointers)}")
    return lines


@click.group("trust")
def trust() -> None:
    """Say which repos may open programs in your process.

    Programs are TorchScript and ExportedProgram: opening one can run the repo's code with all of your powers.
    Nothing else needs trust.
    """


@trust.command("add")
@click.argument("repo")
@output_options
@pass_settings
def trust_add(settings: Settings, /, repo: str) -> None:
    """Trust a repo: exactly this host, owner and name; all its commits, or one if REPO ends in a full SHA."""
    from isohub.repos.reference import parse
    from isohub.repos.trust import TrustEntry, trust_location, trust_target

    reference = parse(repo)
    entry = TrustEntry(*trust_target(reference), location=trust_location(reference))
    _trusted().add(entry.host, entry.owner, entry.repo, entry.commit, location=entry.location)
    found = {"repo": entry.name, "location": entry.location, "trusted": True}
    settings.output.result(found, f"{_with_location(entry)} is trusted")


@trust.command("rm")
@click.argument("repo")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@output_options
@pass_settings
def trust_rm(settings: Settings, /, repo: str, dry_run: bool) -> None:
    """Trust a repo no longer, or one commit of it. REPO may also be as ls prints it."""
    name = _trusted().named(repo).name
    gone = [_with_location(entry) for entry in _trusted().would_remove(repo)]
    removed = not dry_run and _trusted().remove_text(repo)
    words = f"{name} was not trusted"
    if gone:
        words = f"{name} {'would be' if dry_run else 'is'} trusted no longer"
    found = {"repo": name, "trusted": dry_run and bool(gone), "removed": removed, "dry_run": dry_run, "entries": gone}
    settings.output.result(found, words, *(f"  {each}" for each in gone if dry_run))


@trust.command("ls")
@output_options
@pass_settings
def trust_ls(settings: Settings) -> None:
    """List the trusted repos."""
    entries = _trusted().entries()
    names = [entry.name for entry in entries]
    found = {"trusted": names, "locations": {entry.name: entry.location for entry in entries if entry.location}}
    lines = [_with_location(entry) for entry in entries]
    settings.output.result(found, *(lines or ["no repo is trusted"]), quiet=names)


def _trusted() -> Trust:
    from isohub.repos.layout import get_dir
    from isohub.repos.trust import Trust

    return Trust(Path(get_dir()))


def _with_location(entry: TrustEntry) -> str:
    return entry.name if entry.location is None else f"{entry.name} ({entry.location})"


def _first_line(text: str | None) -> str:
    stripped = (text or "").strip()
    return stripped.splitlines()[0] if stripped else ""
