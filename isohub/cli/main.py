"""The command line's one way in and its one way out.

Exit status: 0; 1 when the command failed; 2 for what cannot be meant as written (usage, references);
130 after Ctrl-C. No traceback is shown for what isohub foresees, unless ISOHUB_TRACEBACK=1.

Side: caller.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

import isohub
from isohub.cli.bisect import bisect
from isohub.cli.cache import cache
from isohub.cli.commands import fetch, help_, inspect, list_, trust
from isohub.cli.compare import compare
from isohub.cli.demo import demo
from isohub.cli.doctor import doctor
from isohub.cli.env import env
from isohub.cli.evaluate import evaluate
from isohub.cli.lock import lock
from isohub.cli.options import Settings, output_options
from isohub.cli.ps import ps
from isohub.cli.run import run
from isohub.errors import (
    EntrypointNotFoundError,
    InvalidReferenceError,
    IsohubError,
    MissingDependenciesError,
    WorkerDiedError,
    WorkerTimeoutError,
    printable,
)

__all__ = ["isohub_group", "main"]

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


#: Where the Python hint names a parameter or a function, the option that is the same.
_HINTS: dict[type[IsohubError], str] = {
    EntrypointNotFoundError: "isohub list REPO shows them",
    WorkerDiedError: "-v shows what it printed",
    WorkerTimeoutError: "give it longer with --timeout SECONDS",
}


class _Group(click.Group):
    """Commands in the order in which one meets them, and errors as words."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IsohubError as error:
            if os.environ.get("ISOHUB_TRACEBACK") == "1":
                raise
            ctx.ensure_object(Settings).output.error(_for_command_line(error))
            ctx.exit(_USAGE if isinstance(error, InvalidReferenceError) else _FAILED)


def _for_command_line(error: IsohubError) -> IsohubError:
    hint = _HINTS.get(type(error))
    if isinstance(error, MissingDependenciesError) and error.command:
        hint = f"{error.command}; or --environment auto, which brings what the repo asks for"
    if hint is not None and not getattr(error, "near", None):
        error.hint = hint
    return error


@click.group(
    "isohub",
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="REPO is owner/repo[:ref], https://host/path[:ref], git+https://host/path[@ref], ./directory or "
    "./clone:ref. A ref is a branch, a tag, refs/..., pull/N or a commit.",
)
@click.version_option(isohub.__version__, prog_name="isohub", message="%(prog)s %(version)s")
@output_options
def isohub_group() -> None:
    """Load models as torch.hub does, each repo and commit in a worker process of its own."""


for _command in (
    *(demo, list_, help_, inspect, fetch, run, compare, evaluate, bisect),
    *(ps, lock, trust, cache, env, doctor),
):
    isohub_group.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: In place of ``sys.argv[1:]``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to fail
    settings = Settings()
    try:
        # A command returns None; an exit status comes from `Context.exit`.
        status = isohub_group.main(arguments, prog_name="isohub", standalone_mode=False, obj=settings)
        sys.exit(status or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stdout.write(f"{error.format_message()}\n")
        sys.exit(0)
    except click.Abort:
        sys.stderr.write("interrupted\n")
        sys.exit(_INTERRUPTED)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        if context is not None:
            sys.stderr.write(f"{context.get_usage()}\n")
        sys.stderr.write(f"error: {printable(error.format_message())}\n")
        if context is not None:
            sys.stderr.write(f"hint: {context.command_path} --help\n")
        sys.exit(error.exit_code)
