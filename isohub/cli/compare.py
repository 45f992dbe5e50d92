"""``isohub compare``: several refs asked the same, and what differs from the first, for people and for CI.

Exit status: 0; 1 if a ref failed, or with --fail-on if something changed beyond it; 2 for wrong usage.

Side: caller. Trust: texts are the repos'; `isohub.comparison` and `output` escape them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isohub.cli.inputs import make_inputs, parse_input, parse_keywords, parse_value
from isohub.cli.options import (
    Settings,
    check_seed,
    environment_options,
    opened,
    output_options,
    pass_settings,
    repo_options,
    sandbox_options,
    timeout_option,
)
from isohub.cli.output import Block, Cell, Styled, Table

if TYPE_CHECKING:
    from isohub.comparison import document
    from isohub.comparison.result import Comparison

__all__ = ["compare"]

_REPORTS = (".html", ".json", ".md")
_STYLES = {"changed": "bold red", "missing": "yellow", "added": "yellow", "unsteady": "dim", "same": "dim"}
# "\b" keeps click from filling the paragraph.
_HELP = """Ask two REPOS or more the same, and say what differs from the first: outputs, state, modules, code, time and
memory. The first is what is expected.

\b
INPUT is one of
  randn(1,3,224,224), rand(...), zeros(...), ones(...)   float32
  randint(1000, (1,16))                                  int64 below 1000
  array.npy, tensors.safetensors, tensors.pt             a file
  name=INPUT                                             passed by keyword

Without --input the models are built and not called. With --fail-on the exit status is 1 if an output differs by more,
or anything else of it does.
"""


def _report(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:  # noqa: ARG001
    for name in value:
        if Path(name).suffix not in _REPORTS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(_REPORTS)}")
        if not Path(name).absolute().parent.is_dir():
            raise click.BadParameter(f"there is no directory for {name!r}")
    return value


def _tolerance(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:  # noqa: ARG001
    if value is not None and not 0 <= value < float("inf"):
        raise click.BadParameter("expected a number from 0 on")
    return value


@click.command("compare", help=_HELP, short_help="Compare refs: outputs, state, modules, code, time, memory.")
@click.argument("repos", nargs=-1, required=True, metavar="REPO REPO...")
@click.argument("model")
@click.option("--input", "inputs", multiple=True, metavar="INPUT", help="What to call the models with; see above.")
@click.option("--arg", "arguments", multiple=True, metavar="VALUE", help="An argument for the entrypoint.")
@click.option("--set", "keywords", multiple=True, metavar="NAME=VALUE", help="A keyword for the entrypoint.")
@click.option("--method", default="", metavar="NAME", help="Call this method and not the model itself.")
@click.option("--eval", "evaluation", is_flag=True, help="Set evaluation mode before the calls.")
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Of builds, calls and random inputs.")
@click.option(
    "--fail-on",
    type=float,
    callback=_tolerance,
    metavar="ATOL",
    help="The largest absolute difference of an output that is none.",
)
@click.option(
    "--rtol", type=float, default=0.0, callback=_tolerance, metavar="RTOL", help="Allow as much relatively, too."
)
@click.option("--repeats", type=click.IntRange(0), metavar="N", help="Runs that are timed, of each; 0 for none.")
@click.option("--report", multiple=True, callback=_report, metavar="FILE", help="Write .html, .md or .json.")
@click.option("--markdown", is_flag=True, help="Print Markdown, for a comment on a pull request.")
@repo_options
@sandbox_options
@environment_options
@timeout_option
@output_options
@pass_settings
@click.pass_context
def compare(
    ctx: click.Context,
    settings: Settings,
    /,
    repos: tuple[str, ...],
    model: str,
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    keywords: tuple[str, ...],
    method: str,
    evaluation: bool,
    seed: int,
    fail_on: float | None,
    rtol: float,
    repeats: int | None,
    report: tuple[str, ...],
    markdown: bool,
    timeout_s: float | None,
    **options: Any,
) -> None:
    """Compare refs with the first one."""
    if len(repos) < 2:
        raise click.UsageError("two references or more are compared, and then comes the name of the model")
    check_seed(seed)
    if markdown and (settings.json or settings.quiet):
        raise click.UsageError("--markdown goes without --json and --quiet")
    wanted = [parse_input(text) for text in inputs]
    entry_kwargs = parse_keywords(keywords)
    _look_for_extras(report)

    from isohub.comparison.inputs import Call
    from isohub.comparison.measure import compare as compare_refs

    call = None
    if wanted:
        args, kwargs = make_inputs(wanted, seed)
        call = Call(tuple(args), kwargs, ", ".join(inputs))
    with opened(options, timeout_s=timeout_s) as session:
        found = compare_refs(
            repos,
            model,
            call,
            args=[parse_value(text) for text in arguments],
            kwargs=entry_kwargs,
            seed=seed,
            tolerance=(fail_on or 0.0, rtol),
            method=method,
            training=False if evaluation else None,
            repeats=repeats,
            session=session,
            verbose=settings.progress,
            **options,
        )
    for name in report:
        found.save(name)
    if markdown:
        sys.stdout.write(found.to_markdown())
        sys.stdout.flush()
    else:
        settings.output.result(found.to_dict(), *_blocks(found), quiet=[found.verdict])
    if found.failures or (fail_on is not None and found.changed):
        ctx.exit(1)


def _look_for_extras(report: tuple[str, ...]) -> None:
    """Say what is not installed before anything is built."""
    if any(name.endswith(".html") for name in report):
        from isohub.comparison.page import require_extras

        require_extras()


def _blocks(found: Comparison) -> list[Block]:
    from isohub.comparison.document import Heading, Line
    from isohub.comparison.render import line_text
    from isohub.comparison.words import blocks_of

    width = shutil.get_terminal_size().columns - 2
    blocks: list[Block] = []
    for block in blocks_of(found):
        if isinstance(block, Line):
            blocks.append(line_text(block))
        elif isinstance(block, Heading):
            blocks += [*([""] if blocks and blocks[-1] != "" else []), block.text]
        else:
            blocks += [*([""] if blocks and blocks[-1] != "" else []), _table(block, width), ""]
    return blocks[:-1] if blocks[-1] == "" else blocks


def _table(table: document.Table, width: int) -> Table:
    from isohub.comparison.render import fitted

    columns, *rows = fitted(table, width)
    return Table(columns, [[_cell(cell) for cell in row] for row in rows], right=table.right)


def _cell(text: str) -> Cell:
    style = _STYLES.get(text.rpartition(" ")[2])
    return text if style is None else Styled(text, style)
