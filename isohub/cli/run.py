"""``isohub run``: build a model in a worker, call it with inputs, and print what came back in figures.

Side: caller. Trust: the answer is a worker's; `wire` has checked it and `output` escapes its texts.
"""

from __future__ import annotations

import time
from typing import Any

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
from isohub.cli.summary import lines, summarise
from isohub.errors import IsohubError

__all__ = ["run"]

# "\b" keeps click from filling the paragraph.
_HELP = """Build MODEL of REPO with ARGS in a worker, call it with each INPUT, and describe the output.

ARGS and values are JSON, or else text: 3, true, [1,2], resnet. Write -- before an argument that begins with a dash.

\b
INPUT is one of
  randn(1,3,224,224), rand(...), zeros(...), ones(...)   float32
  randint(1000, (1,16))                                  int64 below 1000
  array.npy, tensors.safetensors                         a file
  name=INPUT                                             passed by keyword

Without --input and --method the model is built and not called.
"""


@click.command("run", help=_HELP, short_help="Build a model in a worker, call it, describe the output.")
@click.argument("repo")
@click.argument("model")
@click.argument("arguments", nargs=-1, metavar="[ARGS]...")
@click.option("--set", "keywords", multiple=True, metavar="NAME=VALUE", help="A keyword for the entrypoint.")
@click.option("--input", "inputs", multiple=True, metavar="INPUT", help="What to call the model with; see above.")
@click.option("--method", metavar="NAME", help="Call this method and not the model itself.")
@click.option("--eval", "evaluation", is_flag=True, help="Set evaluation mode before the call.")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Seeds the worker and the random inputs.")
@repo_options
@sandbox_options
@environment_options
@timeout_option
@output_options
@pass_settings
def run(
    settings: Settings,
    /,
    repo: str,
    model: str,
    arguments: tuple[str, ...],
    keywords: tuple[str, ...],
    inputs: tuple[str, ...],
    method: str | None,
    evaluation: bool,
    seed: int | None,
    timeout_s: float | None,
    **options: Any,
) -> None:
    """Build MODEL in a worker, call it with each INPUT, and describe the output."""
    check_seed(seed)
    wanted = [parse_input(text) for text in inputs]
    entry_kwargs = parse_keywords(keywords)
    entry_args = [parse_value(text) for text in arguments]
    args, kwargs = make_inputs(wanted, seed)

    from torch import no_grad

    with opened(options, timeout_s=timeout_s) as session, no_grad():
        checkout = session.fetch(repo, verbose=settings.progress, **options)
        session.prepare(checkout, verbose=settings.progress)
        started = time.perf_counter()
        built = session.load(
            checkout,
            model,
            *entry_args,
            entry_kwargs=entry_kwargs,
            seed=seed,
            verbose=False,
        )
        seconds = {"load": time.perf_counter() - started}
        found: dict[str, Any] = {
            "repo": checkout.pin.name,
            "commit": checkout.commit,
            "model": model,
            "built": summarise(built),
        }
        words = [f"{checkout.pin.name}  {model}: loaded in {seconds['load']:.2f} s"]
        words += lines(found["built"], "built")
        if wanted or method is not None:
            if evaluation:
                _callable(built, "eval")()
            started = time.perf_counter()
            output = _callable(built, method)(*args, **kwargs)
            seconds["call"] = time.perf_counter() - started
            words[0] += f", called in {seconds['call']:.2f} s"
            found["output"] = summarise(output)
            words += lines(found["output"], "output")
    found["seconds"] = {name: round(value, 4) for name, value in seconds.items()}
    settings.output.result(found, *words)


def _callable(built: Any, method: str | None) -> Any:
    """What to call, or an error that says why nothing can be."""
    from isohub import RemoteModule, RemoteObject

    if not isinstance(built, (RemoteModule, RemoteObject)):
        raise IsohubError(
            f"the entrypoint gave a {type(built).__name__}, which is no model to call",
            hint="leave --input and --method out to see what it gave; isohub.load() in Python gives its parts",
        )
    return built if method is None else getattr(built, method)
