"""Samples, rounds and ratios: how contestants are measured side by side."""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Contestant", "Row", "Sizes", "Table", "compete", "machine", "no_collections", "quantile", "timed"]

#: A parallel operator leaves OpenMP's threads spinning for some milliseconds (libgomp's GOMP_SPINCOUNT);
#: the next contestant is to meet an idle machine.
_SETTLE_S = 0.02


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rounds: Rounds of what takes seconds; what takes less gets more samples in each.
        call_rounds: Rounds of calls.
        call_bytes: Sizes of the argument of one call; the answer is as large.
        call_s: Seconds that each contestant calls for in each round; twice as long where a call takes milliseconds.
        short_rounds: Rounds of a few calls each, where a difference of one in a hundred is to be seen.
        model_mb: Size of the model that is loaded.
        state_mb: Size of the state dict.
        loads: Loads in each round, where one takes milliseconds.
        workers: How many workers live at once when memory is measured.
        refs: How many refs are evaluated.
        batches: Over how many batches each.
        idle_s: Seconds of doing nothing.
    """

    rounds: int = 6
    call_rounds: int = 10
    call_bytes: tuple[int, ...] = (4, 600_000, 38_000_000)
    call_s: float = 0.25
    model_mb: int = 11
    state_mb: int = 1024
    loads: int = 8
    workers: int = 8
    refs: int = 8
    batches: int = 1000
    short_rounds: int = 150
    idle_s: float = 10.0

    @classmethod
    def quick(cls) -> Sizes:
        """Enough to see that everything runs; the figures mean little."""
        return cls(
            rounds=1,
            call_rounds=2,
            call_bytes=(4, 600_000),
            call_s=0.02,
            model_mb=2,
            state_mb=16,
            loads=2,
            workers=2,
            refs=2,
            batches=10,
            short_rounds=4,
            idle_s=0.5,
        )


@dataclass
class Contestant:
    """One way of doing the same thing.

    Attributes:
        name: As it stands in the table.
        run: Does it, and gives samples in the table's unit: as many as it took.
        gives_up: What one does without when one takes this way; empty for isohub.
    """

    name: str
    run: Callable[[], Sequence[float]]
    gives_up: str = ""


@dataclass
class Row:
    """A contestant's samples, round by round."""

    name: str
    gives_up: str
    rounds: list[list[float]] = field(default_factory=list)

    def samples(self) -> list[float]:
        """All of them, ascending."""
        return sorted(sample for samples in self.rounds for sample in samples)

    def summary(self, reference: Row) -> dict[str, Any]:
        """Figures of all samples, and ratios to the reference taken within each round."""
        samples = self.samples()
        ratios = sorted(
            statistics.median(ours) / statistics.median(theirs)
            for ours, theirs in zip(self.rounds, reference.rounds, strict=True)
            if ours and theirs and statistics.median(theirs) > 0
        )
        figures: dict[str, Any] = {
            "name": self.name,
            "gives_up": self.gives_up,
            "samples": len(samples),
            "median": statistics.median(samples),
            "min": samples[0],
            "p10": quantile(samples, 0.1),
            "p90": quantile(samples, 0.9),
            # Of fewer than a hundred samples the 99th percentile is the slowest one.
            "p99": quantile(samples, 0.99) if len(samples) >= 100 else None,
            "ratio": None,
            "ratio_p10": None,
            "ratio_p90": None,
            # What goals are reckoned from (`benchmarks.goals`); None for a round without samples.
            "round_medians": [statistics.median(samples) if samples else None for samples in self.rounds],
        }
        if ratios and self is not reference:
            figures["ratio"] = statistics.median(ratios)
            figures["ratio_p10"], figures["ratio_p90"] = quantile(ratios, 0.1), quantile(ratios, 0.9)
        return figures


@dataclass
class Table:
    """One question put to all contestants.

    Attributes:
        part: The part of the run that it belongs to.
        key: Its name, for scripts.
        title: Its name, for people.
        unit: Of every sample.
        reference: Name of the contestant that the others are divided by.
        rows: The contestants.
        notes: What one must know to read it.
    """

    part: str
    key: str
    title: str
    unit: str
    reference: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The table as plain values."""
        reference = next(row for row in self.rows if row.name == self.reference)
        return {
            "part": self.part,
            "key": self.key,
            "title": self.title,
            "unit": self.unit,
            "reference": self.reference,
            "rows": [row.summary(reference) for row in self.rows],
            "notes": self.notes,
        }


def compete(
    contestants: Sequence[Contestant], rounds: int, warm_ups: int = 0, *, settle_s: float = _SETTLE_S
) -> list[Row]:
    """Let the contestants take turns; each round begins with another one.

    Args:
        contestants: Who.
        rounds: Rounds that count.
        warm_ups: Rounds before, that do not.
        settle_s: Seconds between turns; 0 for turns of a few calls each, which follow each other at once.
    """
    rows = [Row(contestant.name, contestant.gives_up) for contestant in contestants]
    for number in range(-warm_ups, rounds):
        for step in range(len(contestants)):
            place = (number + step) % len(contestants)
            if settle_s:
                gc.collect()
                time.sleep(settle_s)
            samples = list(contestants[place].run())
            if number >= 0:
                rows[place].rounds.append(samples)
    return rows


def timed(action: Callable[[], Any], scale: float = 1e3) -> float:
    """How long it takes, in milliseconds (or seconds times `scale`). What it returns lives on until after."""
    start = time.perf_counter()
    result = action()
    took = time.perf_counter() - start
    del result
    return took * scale


@contextmanager
def no_collections(*, first: bool = True) -> Iterator[None]:
    """No garbage collection within, as ``timeit`` has it; one before, unless there is no time for that."""
    if first:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quantile(ascending: Sequence[float], share: float) -> float:
    """A quantile, interpolated between neighbours."""
    place = share * (len(ascending) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ascending[low] + (ascending[high] - ascending[low]) * (place - low)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "kernel": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
