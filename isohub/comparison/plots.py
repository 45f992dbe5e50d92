"""A comparison's plots, as pictures that a page holds in itself: one for a light page and one for a dark one.

Rules:

1. A picture is SVG within an `img`: nothing in it can run, and nothing is fetched.
2. Texts are drawn as outlines. What is a repo's is escaped, cut, and never read as mathematics.

Side: caller. Trust: figures and names are the workers'.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isohub.comparison.result import Comparison, Difference
from isohub.comparison.tally import DECADES
from isohub.comparison.words import letter
from isohub.errors import printable

if TYPE_CHECKING:
    from isohub.comparison.states import EntryChange

__all__ = ["Plot", "plots_of_difference", "plots_of_times"]

# Inches: a phone's width, so that letters are of a readable size there.
_WIDTH, _HEIGHT = 4.2, 2.6
_MOST_ENTRIES = 30
_NAME_CHARS = 30
_LIGHT = {"ink": "#1b1f24", "line": "#b9c0c8", "first": "#1f6feb", "second": "#d1570a"}
_DARK = {"ink": "#e6e9ed", "line": "#4a525b", "first": "#79b8ff", "second": "#ffa657"}

# matplotlib repeats each text in one.
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)

_Colours = dict[str, str]


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        caption: What it shows.
        light: As a URL that holds it, for a light page.
        dark: The same for a dark one.
    """

    caption: str
    light: str
    dark: str


def plots_of_times(comparison: Comparison) -> list[Plot]:
    """How the times of calls are distributed."""
    timed = [(letter(number), ref.call) for number, ref in enumerate(comparison.refs) if ref.call is not None]
    if not timed:
        return []
    longest = max(timing.median_s for _, timing in timed)
    unit, factor = ("s", 1.0) if longest >= 1 else ("ms", 1e3) if longest >= 1e-3 else ("µs", 1e6)

    def draw(axes: Any, colours: _Colours) -> None:
        samples = [[second * factor for second in timing.samples_s] for _, timing in reversed(timed)]
        drawn = axes.boxplot(samples, orientation="horizontal", widths=0.5, showfliers=False, patch_artist=True)
        for box in drawn["boxes"]:
            box.set(facecolor="none", edgecolor=colours["first"])
        for part in ("whiskers", "caps"):
            for line in drawn[part]:
                line.set(color=colours["first"])
        for line in drawn["medians"]:
            line.set(color=colours["second"], linewidth=2)
        for row, values in enumerate(samples, start=1):
            axes.plot(values, [row] * len(values), ".", color=colours["ink"], alpha=0.35, markersize=3)
        axes.set_yticks(range(1, len(timed) + 1), [name for name, _ in reversed(timed)])
        axes.set_xlabel(f"{unit} a call")

    return [_plot("Times of calls: median, quartiles, and each run", draw, 1.2 + 0.4 * len(timed))]


def plots_of_difference(name: str, difference: Difference, atol: float) -> list[Plot]:
    """How the differences of outputs are distributed, and which entries of the state changed."""
    plots = []
    counts = [0] * (len(DECADES) + 1)
    for leaf in difference.outputs or ():
        if leaf.measures is not None:
            counts = [sum(pair) for pair in zip(counts, leaf.measures.histogram, strict=True)]
    if any(counts):
        noise = max((leaf.noise for leaf in difference.outputs or ()), default=0.0)
        equal = sum(
            leaf.measures.elements - leaf.measures.differing for leaf in difference.outputs or () if leaf.measures
        )
        caption = f"Differences of the outputs of {name} from A; {equal:,} numbers more are equal"
        plots.append(_plot(caption, lambda axes, colours: _histogram(axes, colours, counts, atol, noise), _HEIGHT))
    changed = difference.state.changed if difference.state is not None else ()
    measured = [entry for entry in changed if entry.relative_norm and math.isfinite(entry.relative_norm)]
    if measured:
        kept = set(sorted(measured, key=lambda entry: -(entry.relative_norm or 0.0))[:_MOST_ENTRIES])
        shown = [entry for entry in measured if entry in kept]
        caption = (
            f"Change of {name}'s state, relative to A's: {len(shown)} of {len(changed)} entries, in the model's order"
        )
        plots.append(_plot(caption, lambda axes, colours: _entries(axes, colours, shown), 0.9 + 0.19 * len(shown)))
    return plots


def _histogram(axes: Any, colours: _Colours, counts: Sequence[int], atol: float, noise: float) -> None:
    filled = [number for number, count in enumerate(counts) if count]
    first, last = max(0, filled[0] - 1), min(len(counts) - 1, filled[-1] + 1)
    edges = [DECADES[0] - 0.5, *DECADES, DECADES[-1] + 0.5]
    numbers = range(first, last + 1)
    axes.bar(
        [edges[number] for number in numbers],
        [counts[number] for number in numbers],
        width=0.5,
        align="edge",
        color=colours["first"],
    )
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("size of the difference, as a power of 10")
    axes.set_ylabel("numbers")
    for value, words in ((atol, "tolerance"), (noise, "noise")):
        if value > 0 and math.isfinite(value):
            axes.axvline(math.log10(value), color=colours["second"], linestyle="--" if words == "tolerance" else ":")
            axes.text(math.log10(value), 0.98, f" {words}", color=colours["second"], va="top", fontsize=8,
                      transform=axes.get_xaxis_transform())  # fmt: skip


def _entries(axes: Any, colours: _Colours, entries: Sequence[EntryChange]) -> None:
    rows = range(len(entries))
    axes.barh(rows, [entry.relative_norm for entry in entries], color=colours["first"], height=0.7)
    axes.set_yticks(rows, [_short(entry.name) for entry in entries], fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=min(entry.relative_norm or 1.0 for entry in entries) / 3)
    axes.set_xlabel("length of the change / length before")


def _short(name: str) -> str:
    name = printable(name, newlines=False)
    return name if len(name) <= _NAME_CHARS else f"...{name[3 - _NAME_CHARS :]}"


def _plot(caption: str, draw: Callable[[Any, _Colours], None], height: float) -> Plot:
    return Plot(caption, _picture(draw, _LIGHT, height), _picture(draw, _DARK, height))


def _picture(draw: Callable[[Any, _Colours], None], colours: _Colours, height: float) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "path",
        "svg.hashsalt": "isohub",
        "font.size": 9,
        "text.usetex": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours["ink"]),
        "axes.edgecolor": colours["line"],
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.subplots(), colours)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = _COMMENT.sub(b"", stream.getvalue())
    return "data:image/svg+xml;base64," + base64.b64encode(drawn).decode("ascii")
