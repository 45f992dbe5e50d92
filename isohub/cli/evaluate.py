"""``isohub evaluate``: a metric of the user's over the same data, for several refs.

Exit status: 0; 1 if a ref or a batch has no result; 2 for wrong usage.

Side: caller. Trust: names of metrics and messages of failures are a worker's; `isohub.evaluation` and `output` escape
them.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from isohub.cli.executors import as_usage, check_executor, executor_of, ray_option
from isohub.cli.functions import is_named, named_object
from isohub.cli.inputs import parse_keywords, parse_value
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

__all__ = ["evaluate"]

# "\b" keeps click from filling the paragraph.
_HELP = """Run FUNCTION(model, batch) in workers of every REPO, over all batches, and reduce what it gives.

FUNCTION is file.py:name and gives a dict of names to numbers and tensors. DATA is file.py:name too, an iterable of
batches or a function that gives one; or files of one batch each: a path, a directory, or a glob of .npy, .safetensors
and .pt files.

\b
  isohub evaluate metric.py:accuracy owner/repo:v1 owner/repo:v2 --model resnet18 --data 'batches/*.pt'

With --results each result is kept as it comes, and the same command goes on from there after any end.
"""


@click.command("evaluate", help=_HELP, short_help="Run a metric of yours in workers of several refs.")
@click.argument("function")
@click.argument("repos", nargs=-1, required=True, metavar="REPO...")
@click.option("--model", required=True, metavar="NAME", help="The entrypoint, in all of them.")
@click.option("--data", required=True, metavar="DATA", help="The batches; see above.")
@click.option("--arg", "arguments", multiple=True, metavar="VALUE", help="An argument for the entrypoint.")
@click.option("--set", "keywords", multiple=True, metavar="NAME=VALUE", help="A keyword for the entrypoint.")
@click.option(
    "--reduce",
    "reducers",
    multiple=True,
    metavar="[METRIC=]REDUCER",
    help="mean, sum, min, max, count, list or concat.",
)
@click.option("--weight", metavar="METRIC", help="What a batch weighs in a mean; else its number of examples.")
@click.option("--batch-size", type=click.IntRange(1), metavar="N", help="Collate so many items of DATA to one batch.")
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Of loads and batches.")
@click.option(
    "--retries", type=click.IntRange(0), default=1, metavar="N", help="Tries of what failed, on fresh workers."
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="How many at once; else one each core.")
@click.option(
    "--results", type=click.Path(dir_okay=False), metavar="FILE", help="Keep results there, and go on from it."
)
@ray_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@repo_options
@sandbox_options
@environment_options
@timeout_option
@output_options
@pass_settings
@click.pass_context
def evaluate(
    ctx: click.Context,
    settings: Settings,
    /,
    function: str,
    repos: tuple[str, ...],
    model: str,
    data: str,
    arguments: tuple[str, ...],
    keywords: tuple[str, ...],
    reducers: tuple[str, ...],
    weight: str | None,
    batch_size: int | None,
    seed: int,
    retries: int,
    workers: int | None,
    results: str | None,
    ray: str | None,
    as_csv: bool,
    markdown: bool,
    timeout_s: float | None,
    **options: Any,
) -> None:
    """Run a metric in workers of several refs."""
    if as_csv + markdown + settings.json + settings.quiet > 1:
        raise click.UsageError("--csv, --markdown, --json and --quiet exclude each other")
    check_seed(seed)
    check_executor(workers, ray)
    chosen = _reducers(reducers)
    entry_kwargs = parse_keywords(keywords)
    metric = named_object(function, "FUNCTION")
    batches = named_object(data, "--data") if is_named(data) else data
    if callable(batches) and not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        batches = batches()

    from isohub.evaluation.evaluate import evaluate as evaluate_refs

    with opened(options, timeout_s=timeout_s) as session:
        executor = executor_of(session, workers, ray)
        try:
            found = evaluate_refs(
                metric,
                repos,
                model,
                batches,
                args=[parse_value(text) for text in arguments],
                kwargs=entry_kwargs,
                seed=seed,
                reducers=chosen,
                weight=weight,
                batch_size=batch_size,
                results=results,
                retries=retries,
                progress=None if settings.progress else False,
                executor=executor,
                timeout_s=timeout_s,
                **options,
            )
        except (TypeError, ValueError, OSError) as error:
            raise as_usage(error) from error
    if as_csv or markdown:
        sys.stdout.write(found.to_csv() if as_csv else found.to_markdown())
        sys.stdout.flush()
    else:
        lines = [f"{row.repo} {name} {value!r}" for row in found.rows for name, value in row.metrics.items()]
        settings.output.result(found.to_dict(), str(found), quiet=lines)
    if not found.complete:
        ctx.exit(1)


def _reducers(texts: tuple[str, ...]) -> str | dict[str, str]:
    """``--reduce``: one for all, or by metric."""
    found: dict[str, str] = {}
    everywhere = "mean"
    for text in texts:
        name, equals, reducer = text.rpartition("=")
        if equals:
            found[name] = reducer
        else:
            everywhere = text
    return {"": everywhere, **found} if found else everywhere
