"""``isohub bisect``: the first commit at which a model's output, a metric or a command's answer changed.

Exit status: 0; 1 if commits that could not be told lie before the first bad one; 2 for wrong usage.

Side: caller. Trust: authors and messages of commits are the repo's; they are escaped where they are shown.
"""

from __future__ import annotations

from typing import Any

import click

from isohub.cli.executors import as_usage, check_executor, executor_of, ray_option
from isohub.cli.functions import named_object
from isohub.cli.inputs import parse_keywords, parse_value
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

__all__ = ["bisect"]

# "\b" keeps click from filling the paragraph.
_HELP = """Find the first commit of REPO, between a good and a bad one, at which something changed.

\b
  isohub bisect owner/repo --good v1 --bad main resnet18 --input 'randn(1,3,64,64)' --tolerance 1e-5
  isohub bisect ./clone --good v1 --bad main resnet18 --test check.py:score --tolerance 0.01
  isohub bisect ./clone --good v1 --bad main --run -- python check.py

With --input the outputs of MODEL are held against those of the good end. With --test a function of yours is called
with the model: True is good, False is bad, a number is good near that of the good end. With --run the rest is a
command, as for git bisect run: exit status 0 is good, 125 cannot be told, others up to 127 are bad. It has
ISOHUB_REPO, ISOHUB_COMMIT and ISOHUB_CHECKOUT (a read-only directory) in its environment, and is not confined.
"""


@click.command("bisect", help=_HELP, short_help="Find the first commit at which something changed.")
@click.argument("repo")
@click.argument("words", nargs=-1, metavar="[MODEL] [COMMAND]...")
@click.option("--good", required=True, metavar="REF", help="A commit that is as it should be.")
@click.option("--bad", required=True, metavar="REF", help="A later one that is not.")
@click.option(
    "--input", "inputs", multiple=True, metavar="INPUT", help="What to call the model with, as for isohub run."
)
@click.option("--test", metavar="FILE.py:NAME", help="A function of the model.")
@click.option("--run", "is_command", is_flag=True, help="The rest is a command.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="ATOL",
    help="The largest difference that is none.",
)
@click.option(
    "--rtol", type=click.FloatRange(min=0), default=0.0, metavar="RTOL", help="Allow as much relatively, too."
)
@click.option("--arg", "arguments", multiple=True, metavar="VALUE", help="An argument for the entrypoint.")
@click.option("--set", "keywords", multiple=True, metavar="NAME=VALUE", help="A keyword for the entrypoint.")
@click.option("--method", default="", metavar="NAME", help="Call this method and not the model itself.")
@click.option(
    "--errors", type=click.Choice(["skip", "bad"]), default="skip", help="What a commit is whose model raises."
)
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Of builds, calls and random inputs.")
@click.option(
    "--workers", type=click.IntRange(1), metavar="N", help="Commits that are asked at once; else one each core."
)
@click.option("--log", type=click.Path(dir_okay=False), metavar="FILE", help="Keep answers there, and go on from it.")
@ray_option
@repo_options
@sandbox_options
@environment_options
@timeout_option
@output_options
@pass_settings
@click.pass_context
def bisect(
    ctx: click.Context,
    settings: Settings,
    /,
    repo: str,
    words: tuple[str, ...],
    good: str,
    bad: str,
    inputs: tuple[str, ...],
    test: str | None,
    is_command: bool,
    tolerance: float,
    rtol: float,
    arguments: tuple[str, ...],
    keywords: tuple[str, ...],
    method: str,
    errors: str,
    seed: int,
    workers: int | None,
    log: str | None,
    ray: str | None,
    timeout_s: float | None,
    **options: Any,
) -> None:
    """Find the first bad commit."""
    if is_command and (not words or test is not None or inputs):
        raise click.UsageError("--run wants a command after --, and goes without --test and --input")
    if not is_command and len(words) != 1:
        raise click.UsageError("expected the name of a model; or --run, and a command after --")
    if not is_command and (test is None) == (not inputs):
        raise click.UsageError("expected --input or --test, and one of them alone")
    check_executor(workers, ray)
    function = None if test is None else named_object(test, "--test")
    entry_kwargs = parse_keywords(keywords)

    from isohub.bisection.bisect import bisect as find

    with opened(options, timeout_s=timeout_s) as session:
        executor = executor_of(session, workers, ray)
        try:
            found = find(
                repo,
                good,
                bad,
                list(words) if is_command else function,
                model=None if is_command else words[0],
                inputs=list(inputs) or None,
                args=[parse_value(text) for text in arguments],
                kwargs=entry_kwargs,
                seed=seed,
                tolerance=(tolerance, rtol),
                method=method,
                errors="bad" if errors == "bad" else "skip",
                log=log,
                progress=None if settings.progress else False,
                executor=executor,
                timeout_s=timeout_s,
                **options,
            )
        except (TypeError, ValueError) as error:
            raise as_usage(error) from error
    settings.output.result(found.to_dict(), str(found), quiet=[commit.id for commit in found.candidates])
    if found.first_bad is None:
        ctx.exit(1)
