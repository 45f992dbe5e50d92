"""What every command takes: the form of its output, and how a repo is to be read. Side: caller."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from isohub.cli.output import Output

if TYPE_CHECKING:
    from isohub.hub import Session
    from isohub.repos.pins import Checkout

__all__ = ["Settings", "output_options", "pass_settings", "pinned", "repo_options", "timeout_option"]

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass
class Settings:
    """The options that any command takes, before or after its name."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    @property
    def output(self) -> Output:
        """Where to print."""
        return Output("json" if self.json else "quiet" if self.quiet else "human")

    @property
    def progress(self) -> bool:
        """Whether somebody wants to see a download's progress."""
        return not (self.json or self.quiet)


pass_settings = click.make_pass_decorator(Settings, ensure=True)


def _note(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    settings = ctx.ensure_object(Settings)
    if value:
        setattr(settings, parameter.name or "", True)
        if settings.json and settings.quiet:
            raise click.UsageError("--json and --quiet exclude each other", ctx)
        if parameter.name == "verbose":
            _show_logs()


def _show_logs() -> None:
    """What workers print, and what isohub remarks, on stderr. The lines are escaped where they are read."""
    logger = logging.getLogger("isohub")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def output_options(command: _F) -> _F:
    """--json, --quiet and --verbose, wherever they are written."""
    for names, words in (
        (("-v", "--verbose"), "Show what workers print, on stderr."),
        (("-q", "--quiet"), "Print only what a script needs."),
        (("--json",), "Print JSON."),
    ):
        command = click.option(*names, is_flag=True, expose_value=False, callback=_note, help=words)(command)
    return command


def repo_options(command: _F) -> _F:
    """--source, --force-reload and --skip-validation, as torch.hub's functions take them."""
    for option in (
        click.option("--skip-validation", is_flag=True, help="Accept a commit that is not shown to be the repo's own."),
        click.option("--force-reload", is_flag=True, help="Ask the source again and download again."),
        click.option("--source", type=click.Choice(["github", "git", "local"]), help="How to read REPO."),
    ):
        command = option(command)
    return command


def _finite(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:  # noqa: ARG001
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("expected a number of seconds; leave it out for no limit")
    return value


def timeout_option(command: _F) -> _F:
    """--timeout, for commands that ask a worker."""
    return click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        callback=_finite,
        help="How long each question to the worker may take.",
    )(command)


def pinned(session: Session, repo: str, progress: bool, **options: Any) -> tuple[Checkout, str]:
    """A repo, fetched, and a reference that names its commit: one command looks at one commit.

    Args:
        session: Whose store.
        repo: What was written.
        progress: Whether to draw a bar.
        **options: What `repo_options` gave.
    """
    checkout = session.fetch(repo, verbose=progress, **options)
    reference = checkout.reference
    if reference.source == "local" and reference.ref is None:
        return checkout, reference.location
    return checkout, str(replace(reference, ref=checkout.commit))
