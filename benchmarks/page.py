"""The report as a page in Markdown."""

from __future__ import annotations

from typing import Any

__all__ = ["render", "render_goals", "render_table"]

_HEAD = """\
# Performance

Written by `{command}` on {date}; it took {minutes:.1f} minutes. Run it again on your machine: the ratios \
travel, the times do not. How each figure is taken is in [benchmarks.md](benchmarks.md).

## Goals

{goals}
{absent}
## The machine

| | |
|---|---|
| Processor | {processor}, {cores} core{plural} |
| Memory | {memory_gib} GiB |
| Kernel | {kernel} |
| Python | {python} |
| torch | {torch}, {torch_threads} thread{thread_plural} |
| isohub | {isohub} |
| Load average at the start | {load_average} |

## How to read it

- Contestants take turns within each round, one at a time, and each round begins with another one.
- *p10-p90* is the spread of all samples. A ratio is taken within each round, of the round's medians; the one shown \
is the median over the rounds, its p10-p90 in brackets.
- With {cores} core{plural}, a caller, its worker and whatever else runs share them: each of two processes that use \
torch at once starts as many threads as there are cores, and these wait for each other.
- *Gives up* says what one goes without on that way. isohub's worker is another process of another commit, the \
caller unpickles nothing that it sends, and `handle.confinement` lists the layers around it.
"""


def render(report: dict[str, Any]) -> str:
    """The whole page."""
    machine = report["machine"]
    head = _HEAD.format(
        **machine,
        command=report["command"],
        date=report["date"],
        minutes=report["seconds"] / 60,
        isohub=report["isohub"],
        plural="" if machine["cores"] == 1 else "s",
        goals=render_goals(report["goals"]),
        absent=_absent(report["absent"]),
        thread_plural="" if machine["torch_threads"] == 1 else "s",
    )
    if report["quick"]:
        head += "\n**A quick run: it shows that everything runs, and its figures mean little.**\n"
    return head + "".join(f"\n{render_table(table)}" for table in report["tables"])


def render_goals(goals: list[dict[str, Any]]) -> str:
    """What was to be reached, and what this run measured of it."""
    lines = [_line(["", "goal", "this run", "reached"]), _line(["---", "---", "---", "---"])]
    words = {True: "yes", False: "**no**", None: ""}
    lines += [_line([goal["what"], goal["goal"], goal["measured"], words[goal["reached"]]]) for goal in goals]
    return "\n".join([*lines, ""])


def _absent(absent: dict[str, str]) -> str:
    if not absent:
        return ""
    return "\nNot in this run:\n\n" + "".join(f"- {name}: {why}\n" for name, why in absent.items())


def render_table(table: dict[str, Any]) -> str:
    """One table under its title."""
    unit = table["unit"]
    with_p99 = any(row["p99"] is not None for row in table["rows"])
    columns = [
        "",
        f"median, {unit}",
        "p10-p90",
        "least",
        *(["p99"] if with_p99 else []),
        "ratio",
        "samples",
        "gives up",
    ]
    lines = [f"## {table['title']}", "", _line(columns), _line(["---", *["---:"] * (len(columns) - 2), "---"])]
    for row in table["rows"]:
        ratio = "1" if row["name"] == table["reference"] else "-"
        if row["ratio"] is not None:
            ratio = f"{_figure(row['ratio'])} ({_figure(row['ratio_p10'])}-{_figure(row['ratio_p90'])})"
        lines.append(
            _line(
                [
                    row["name"],
                    f"**{_figure(row['median'])}**",
                    f"{_figure(row['p10'])}-{_figure(row['p90'])}",
                    _figure(row["min"]),
                    *([_figure(row["p99"])] if with_p99 else []),
                    ratio,
                    str(row["samples"]),
                    row["gives_up"] or "",
                ]
            )
        )
    notes = [f"Ratios are to *{table['reference']}*.", *table["notes"]]
    return "\n".join([*lines, "", " ".join(notes), ""])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _figure(value: float | None) -> str:
    """Three significant digits, or the whole number where that has more."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
