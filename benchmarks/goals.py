"""The goals of the project, held against a run: reached or not is reckoned here and nowhere else.

A ratio or a difference is taken within each round, of the round's medians, and the median over the rounds counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import calls, confinement, idle, memory, start, state

__all__ = ["GOALS", "Goal", "Tables", "judge"]


class Tables:
    """The tables of a run, by key. Whatever was not measured is None."""

    def __init__(self, tables: list[dict[str, Any]]) -> None:
        self._tables = {table["key"]: table for table in tables}

    def row(self, key: str, name: str) -> dict[str, Any] | None:
        """A contestant's figures."""
        rows = self._tables.get(key, {"rows": []})["rows"]
        return next((row for row in rows if row["name"] == name), None)

    def names(self, key: str) -> list[str]:
        """The contestants of a table."""
        return [row["name"] for row in self._tables.get(key, {"rows": []})["rows"]]

    def over_rounds(self, key: str, name: str, other: str, reckon: Callable[[float, float], float]) -> float | None:
        """The median over the rounds of what is reckoned of both medians."""
        ours, theirs = self.row(key, name), self.row(key, other)
        if ours is None or theirs is None:
            return None
        pairs = zip(ours["round_medians"], theirs["round_medians"], strict=True)
        found = [reckon(a, b) for a, b in pairs if a is not None and b is not None]
        return statistics.median(found) if found else None


@dataclass(frozen=True)
class Measured:
    """One figure of a run.

    Attributes:
        value: It.
        text: It, as the page has it.
        reached: Whether that is what was to be reached.
    """

    value: float
    text: str
    reached: bool


@dataclass(frozen=True)
class Goal:
    """What is to be reached.

    Attributes:
        what: Of what.
        goal: In words.
        measure: Gives the figure, or None where the run does not have it.
    """

    what: str
    goal: str
    measure: Callable[[Tables], Measured | None]


def judge(tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal, what the run measured of it, and whether it was reached (None: not in this run)."""
    found = Tables(tables)
    judged = []
    for goal in GOALS:
        measured = goal.measure(found)
        judged.append(
            {
                "what": goal.what,
                "goal": goal.goal,
                "value": None if measured is None else measured.value,
                "measured": "not in this run" if measured is None else measured.text,
                "reached": None if measured is None else measured.reached,
            }
        )
    return judged


def _most(key: str, name: str, other: str, most: float, words: str = "times") -> Callable[[Tables], Measured | None]:
    """At most so many times the other."""

    def measure(tables: Tables) -> Measured | None:
        ratio = tables.over_rounds(key, name, other, lambda ours, theirs: ours / theirs)
        return None if ratio is None else Measured(ratio, f"{_figure(ratio)} {words}", ratio <= most)

    return measure


def _share(key: str, name: str, other: str, parts: float) -> Callable[[Tables], Measured | None]:
    """At most one of so many parts of the other."""

    def measure(tables: Tables) -> Measured | None:
        times = tables.over_rounds(key, name, other, lambda ours, theirs: theirs / ours)
        return None if times is None else Measured(1 / times, f"1/{_figure(times)}", times >= parts)

    return measure


def _faster(key: str, name: str, others: Callable[[Tables], list[str]], least: float) -> Callable[[Tables], Any]:
    """At least so many times faster than each of the others; the closest of them counts."""

    def measure(tables: Tables) -> Measured | None:
        found = {
            other: tables.over_rounds(key, name, other, lambda ours, theirs: theirs / ours) for other in others(tables)
        }
        times = {other: value for other, value in found.items() if value is not None}
        if not times:
            return None
        closest = min(times, key=lambda other: times[other])
        worst = times[closest]
        # As fast as the other is not faster.
        return Measured(worst, f"{_figure(worst)} times ({closest})", worst >= least if least > 1 else worst > 1)

    return measure


def _added(key: str, name: str, other: str, most: float, unit: str) -> Callable[[Tables], Measured | None]:
    """At most so much more than the other."""

    def measure(tables: Tables) -> Measured | None:
        more = tables.over_rounds(key, name, other, lambda ours, theirs: ours - theirs)
        return None if more is None else Measured(more, f"{more:+.3g} {unit}", more <= most)

    return measure


def _below(key: str, name: str, figure: str, limit: float, unit: str) -> Callable[[Tables], Measured | None]:
    """A figure of a row's own, below a limit."""

    def measure(tables: Tables) -> Measured | None:
        row = tables.row(key, name)
        value = None if row is None else row[figure]
        return None if value is None else Measured(value, f"{_figure(value)} {unit}", value < limit)

    return measure


def _percent(key: str, name: str, other: str, below: float) -> Callable[[Tables], Measured | None]:
    """Below so many percent more than the other."""

    def measure(tables: Tables) -> Measured | None:
        ratio = tables.over_rounds(key, name, other, lambda ours, theirs: ours / theirs)
        if ratio is None:
            return None
        percent = (ratio - 1) * 100
        return Measured(percent, f"{percent:+.2f} %", percent < below)

    return measure


#: What the tables of `benchmarks.many` say when as many lived as the goal asks for.
_LIVE = "64"


def _live_in(limit_mib: float) -> Callable[[Tables], Measured | None]:
    """All of them at once, in so much memory."""

    def measure(tables: Tables) -> Measured | None:
        names = [name for name in tables.names("many_memory") if _LIVE in name.split()]
        row = tables.row("many_memory", names[0]) if names else None
        if row is None:
            return None
        return Measured(row["median"], f"{row['median'] / 1024:.3g} GiB", row["median"] <= limit_mib)

    return measure


def _later_starts(most: float) -> Callable[[Tables], Measured | None]:
    """The last ones against the first ones."""

    def measure(tables: Tables) -> Measured | None:
        names = tables.names("many_start")
        if len(names) != 2 or _LIVE not in names[1].split():
            return None
        ratio = tables.over_rounds("many_start", names[1], names[0], lambda ours, theirs: ours / theirs)
        return None if ratio is None else Measured(ratio, f"{_figure(ratio)} times", ratio <= most)

    return measure


def _figure(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _named(*names: str) -> Callable[[Tables], list[str]]:
    return lambda _: list(names)


def _peers_of(key: str) -> Callable[[Tables], list[str]]:
    return lambda tables: [name for name in tables.names(key) if name not in calls.NO_PEERS]


_SMALL, _MIDDLE, _LARGE = "call_4", "call_600000", "call_38000000"
GOALS = (
    Goal(
        "warm worker: request to hubconf's first line, fully confined",
        "at most 1/200 of a fresh process's `import torch`",
        _share("first_line", start.LINE_ISOHUB, start.IMPORT_IN_FRESH, 200),
    ),
    Goal(
        "load of an 11 MB model, cached repo, warm session",
        "at most in-process `torch.hub.load` + 15 ms",
        _added("warm_load", start.NEW_WORKER, start.HERE, 15, "ms"),
    ),
    Goal(
        "first load of a session, cached repo",
        "at most 1.10 times a fresh process that does the same with torch.hub",
        _most("first_load", start.FIRST_ISOHUB, start.FIRST_TORCH, 1.10),
    ),
    Goal(
        "call, 4 B",
        "at most 1.2 bare socketpair ping-pongs with idle CPUs",
        _most(_SMALL, calls.ISOHUB, calls.APART, 1.2, "ping-pongs"),
    ),
    Goal(
        "call, 4 B",
        "at least 30 times faster than a Ray actor call",
        _faster(_SMALL, calls.ISOHUB, _named(calls.RAY_ARRAYS, calls.RAY_TENSORS), 30),
    ),
    Goal(
        "call, 4 B",
        "at least 25 times faster than ProcessPoolExecutor",
        _faster(_SMALL, calls.ISOHUB, _named(calls.POOL), 25),
    ),
    Goal("call, 600 kB", "at most in-process + 100 µs", _added(_MIDDLE, calls.ISOHUB, calls.HERE, 100, "µs")),
    Goal("call, 600 kB", "p99 below 500 µs", _below(_MIDDLE, calls.ISOHUB, "p99", 500, "µs")),
    Goal("call, 38 MB", "at most 2.0 times in-process", _most(_LARGE, calls.ISOHUB, calls.HERE, 2.0)),
    Goal("call, 38 MB", "faster than every peer", _faster(_LARGE, calls.ISOHUB, _peers_of(_LARGE), 1)),
    Goal(
        "state dict, 1 GB, ready in the caller after it is built",
        "at least 8 times faster than safetensors through /dev/shm",
        _faster("state_transfer", state.GIVEN, _named(state.SAFETENSORS), 8),
    ),
    Goal(
        'state dict, 1 GB: whole `load(returns="state_dict")`',
        "at most 1.15 times the build alone",
        _most("state_load", state.ISOHUB, state.BUILT_HERE, 1.15),
    ),
    Goal(
        "state dict, 1 GB: memory at the peak",
        "no doubling: at most 1.1 times the state dict built in one process",
        _most("state_memory", state.ISOHUB, state.BUILT_HERE, 1.1),
    ),
    Goal(
        "memory of each further worker (small model)",
        "USS at most 1/20 of a fresh process's",
        _share("memory_small", memory.SMALL_ISOHUB, memory.SMALL_FRESH, 20),
    ),
    Goal("64 refs live", "works in 24 GB", _live_in(24 << 10)),
    Goal("64 refs live", "start of the 64th no slower than twice the 2nd", _later_starts(2)),
    Goal("idle", "0 CPU", _below("idle", idle.ISOHUB, "median", idle.NOTHING_MS, "ms a second")),
    Goal(
        "confinement's cost in a call, 4 B",
        "below 2 %",
        _percent("confinement_call_4", confinement.CONFINED, confinement.FREE, 2),
    ),
    Goal(
        "confinement's cost in a call, 600 kB",
        "below 2 %",
        _percent("confinement_call_600000", confinement.CONFINED, confinement.FREE, 2),
    ),
)
