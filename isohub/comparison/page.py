"""A comparison as one HTML page: it loads nothing, runs nothing, and reads on a phone as on a wall.

Rules:

1. The page says so itself: a Content-Security-Policy without scripts, frames, forms and network; pictures are within.
2. Every text passes `printable` and then jinja2's autoescape; none is marked as safe.

Side: caller. Trust: texts are the repos'.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isohub.comparison.document import Block, Heading, Line, Named, Table, Words
from isohub.comparison.result import Comparison
from isohub.comparison.words import blocks_of, letter
from isohub.errors import MissingExtraError, SaveError, printable

__all__ = ["page_of", "require_extras", "write_whole"]

_TEMPLATES = Path(__file__).with_name("templates")


def page_of(comparison: Comparison) -> str:
    """The page.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    require_extras()
    import jinja2

    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    machine = ", ".join(f"{name} {value}" for name, value in comparison.machine.items())
    return environment.get_template("page.html").render(
        title=printable(f"compare {comparison.model}", newlines=False),
        blocks=_with_plots(comparison),
        footer=f"isohub compare; {machine}",
    )


def require_extras() -> None:
    """See that a page can be made.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    for name in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                f"an HTML report needs {name}, which is not installed",
                hint="python -m pip install 'isohub[report]'",
                extra="report",
            )


def _with_plots(comparison: Comparison) -> list[tuple[str, Any]]:
    from isohub.comparison.plots import plots_of_difference, plots_of_times

    by_heading = {
        f"{letter(number)} against A": plots_of_difference(letter(number), difference, comparison.atol)
        for number, difference in enumerate(comparison.differences, start=1)
    }
    blocks: list[tuple[str, Any]] = []
    for block in blocks_of(comparison):
        if isinstance(block, Heading):
            if not any(kind == "heading" for kind, _ in blocks):
                blocks += _plots(plots_of_times(comparison))
            blocks.append(("heading", block))
            blocks += _plots(by_heading[block.text])
        else:
            blocks.append(_escaped(block))
    return blocks


def _plots(plots: Sequence[Any]) -> list[tuple[str, Any]]:
    return [("plots", plots)] if plots else []


def _escaped(block: Line | Table) -> tuple[str, Block]:
    if isinstance(block, Line):
        kind = "verdict" if block.tone else "line"
        return kind, replace(block, parts=[_printable(part) for part in block.parts])
    return "table", replace(block, rows=[[_printable(cell) for cell in row] for row in block.rows])


def _printable(words: Words) -> Words:
    if isinstance(words, Named):
        return Named(printable(words.text, newlines=False))
    return printable(words, newlines=False)


def write_whole(target: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        SaveError: It cannot be written; what was there is as it was.
    """
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with new.open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(target)
    except OSError as error:
        raise SaveError(
            f"{printable(str(target), newlines=False)} cannot be written: {error.strerror or error}",
            hint="is there room, and may you write to its directory?",
            path=str(target),
        ) from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink()
