"""What every command takes: the form of its output, and how a repo is to be read. Side: caller."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from isohub.cli.output import Output

if TYPE_CHECKING:
    from isohub.hub import Session

__all__ = [
    "Settings",
    "check_seed",
    "environment_options",
    "opened",
    "output_options",
    "pass_settings",
    "repo_options",
    "sandbox_options",
    "timeout_option",
]

_SEED_LIMIT = 1 << 63  # torch.manual_seed takes 64 bits, signed
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


_LOCKFILE = "isohub.lock"
_REQUIRE_HELP = "Layers without which no worker starts: Landlock and seccomp, or all."

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
    """How a repo is read, brought and bound: torch.hub's options, and `Session`'s."""
    for option in (
        click.option("--frozen", is_flag=True, help="Add nothing to the lockfile: what it does not name is an error."),
        click.option(
            "--lockfile",
            type=click.Path(dir_okay=False),
            metavar="FILE",
            help=f"What commits, trees and weights have to be; {_LOCKFILE} with --frozen.",
        ),
        click.option("--offline", is_flag=True, help="Use the cache alone, as ISOHUB_OFFLINE=1 does."),
        click.option("--lfs", is_flag=True, help="Bring the files behind Git LFS pointers."),
        click.option("--submodules", is_flag=True, help="Bring the submodules."),
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


def check_seed(seed: int | None) -> None:
    """Refuse a seed that torch does not take.

    Raises:
        click.BadParameter: It is too large.
    """
    if seed is not None and seed >= _SEED_LIMIT:
        raise click.BadParameter(f"{seed} is not below {_SEED_LIMIT}", param_hint="--seed")


def sandbox_options(command: _F) -> _F:
    """What the worker may touch, for commands that start one: the fields of `isohub.Sandbox`."""
    for option in (
        click.option("--sandbox", type=click.Choice(["none"]), help="Give a trusted repo all of your powers."),
        click.option("--require", type=click.Choice(["default", "all"]), default="default", help=_REQUIRE_HELP),
        click.option("--gpu", is_flag=True, help="Let the worker see the GPUs."),
        click.option("--memory", metavar="SIZE", help="The most memory of the worker, such as 8GiB."),
        click.option("--write", multiple=True, metavar="PATH", help="What the worker may change."),
        click.option("--read", multiple=True, metavar="PATH", help="What the worker may read."),
        click.option("--network", multiple=True, metavar="HOST", help="A host that the worker may reach."),
    ):
        command = option(command)
    return command


def environment_options(command: _F) -> _F:
    """What a repo runs on: the fields of `isohub.Environment`."""
    for option in (
        click.option("--allow-build", is_flag=True, help="Also build packages that are there as source only."),
        click.option("--extra", "extras", multiple=True, metavar="NAME", help="An optional part of the project."),
        click.option("--override", "overrides", multiple=True, metavar="REQ", help="In place of what is asked for."),
        click.option(
            "--with",
            "requirements",
            multiple=True,
            metavar="REQ",
            help="Install this, not what REPO says; over this Python's packages.",
        ),
        click.option("--python", metavar="VERSION", help="Another Python, such as 3.9, with packages of its own."),
        click.option(
            "--environment",
            metavar="host|auto|FILE",
            help="This Python's packages; these, and what REPO needs beyond; or those of a requirements file.",
        ),
    ):
        command = option(command)
    return command


def _environment(options: dict[str, Any], default: str | None) -> Any:
    """The environment that `environment_options` gave; they are taken out of the options."""
    from isohub.environments.environment import Environment

    if "allow_build" not in options:
        return None
    base: str | None = options.pop("environment")
    requirements: Any = options.pop("requirements") or None
    fields = {name: options.pop(name) for name in ("python", "overrides", "extras", "allow_build")}
    if base is not None and base not in ("host", "auto"):
        if requirements is not None:
            raise click.UsageError("--environment FILE and --with both say what to install; say one of them")
        requirements = Path(base)
        base = None
    elif base is None and fields["python"] is None:
        base = "auto" if requirements is not None else default
    if base is None and requirements is None and fields["python"] is None:
        if any(fields.values()):
            raise click.UsageError("of which environment? say --environment auto, or --python VERSION")
        return None
    try:
        return Environment(cast("Any", base), requirements=requirements, **fields)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _sandbox(options: dict[str, Any]) -> Any:
    """The policy that `sandbox_options` gave; they are taken out of the options."""
    from isohub.sandbox.policy import Sandbox

    if "sandbox" not in options:
        return None
    fields = {name: options.pop(name) for name in ("network", "read", "write", "memory", "gpu", "require")}
    level = options.pop("sandbox")
    policy = Sandbox(**fields)
    if level is not None and policy != Sandbox():
        raise click.UsageError("--sandbox none takes every wall away; the other options of the sandbox go without it")
    return level or policy


def opened(options: dict[str, Any], *, default_environment: str | None = None, **more: Any) -> Session:
    """A session with the rules that the options above gave; they are taken out of the options.

    Args:
        options: What they gave; what is left is for `Session.fetch`.
        default_environment: "host" or "auto", where no environment is named; None leaves that to the session.
        **more: More parameters of `Session`.
    """
    from isohub.hub import Session

    frozen, lockfile = options.pop("frozen"), options.pop("lockfile")
    return Session(
        sandbox=_sandbox(options),
        environment=_environment(options, default_environment),
        offline=options.pop("offline") or None,
        lockfile=lockfile or (_LOCKFILE if frozen else None),
        frozen=frozen,
        submodules=options.pop("submodules"),
        lfs=options.pop("lfs"),
        **more,
    )
