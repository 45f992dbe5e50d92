"""How long calls take, measured so that refs can be compared: in turns, many times, told with their spread.

Rules, which are those of torch.utils.benchmark, and one more:

1. What was called before is the warm-up. A run is as many calls as take `_LEAST_RUN_S` together, so that the clock's
   own time does not count.
2. Runs go on until the middle half of each ref's runs lies within `_STEADY` of its median, or its time is used up.
   Median and quartiles are what is told; the threads that torch has there are told with them.
3. The refs take turns, each round in the opposite order: what the machine does in the meantime befalls all of them.

The time is the worker's own: it is the model's, without the way there and back. A worker can tell less than it took,
and never more than the question took here; an answer that says so is refused. What the first calls took from here, the
way included, is `round_trip_s`.

Side: caller. Trust: the worker's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isohub.session.link import Remote

__all__ = ["Timing", "summed_up", "take_turns", "timed"]

_LEAST_RUN_S = 0.005
_MOST_CALLS = 1000
_LEAST_RUNS, _MOST_RUNS = 7, 200
_STEADY = 0.02
# Medians closer than that are nobody's gain.
_LEAST_RATIO = 1.05
# Of the rounds, how many have to say the same: all of seven, which chance does once in sixty-four times.
_AGREEING = 0.9
# With a wider middle half, relative to the median, the machine was busy with something else.
_UNSTEADY = 0.3
# That far apart the middle halves have to be then.
_FAR = 2.0


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        median_s: Half of the runs were quicker.
        lower_s: A quarter of the runs were quicker.
        upper_s: A quarter of the runs were slower.
        runs: How many there were.
        calls: Calls in each.
        threads: How many threads an operator of torch's may use there.
        samples_s: What each run took, for one call, in the order in which they were made.
    """

    median_s: float
    lower_s: float
    upper_s: float
    runs: int
    calls: int
    threads: int
    samples_s: tuple[float, ...]

    @property
    def steady(self) -> bool:
        """Whether its middle half is narrow enough to be compared with another's."""
        return self.upper_s - self.lower_s <= _UNSTEADY * self.median_s

    def ratio(self, other: Timing) -> float | None:
        """How many times the time of this one the other takes; None where that cannot be told from their spread."""
        rounds = list(zip(self.samples_s, other.samples_s, strict=False))
        needed = 1.0 if self.steady and other.steady else _FAR
        if len(rounds) < _LEAST_RUNS:
            return None
        apart = other.lower_s > needed * self.upper_s or needed * other.upper_s < self.lower_s
        slower = sum(theirs > own for own, theirs in rounds) / len(rounds)
        ratio = other.median_s / self.median_s if self.median_s > 0 else None
        if not apart or ratio is None or 1 / _LEAST_RATIO < ratio < _LEAST_RATIO:
            return None
        return ratio if (slower if ratio > 1 else 1 - slower) >= _AGREEING else None


def timed(
    remote: Remote, seed: int | None, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], calls: int
) -> float:
    """Seconds that so many calls took, by the worker's clock.

    Raises:
        ProtocolError: It tells more than they took here, or no time at all.
    """
    phase = f"calling {method or 'forward'}()"
    started = time.perf_counter()
    told: Any = remote.ask("time", seed, method, list(args), dict(kwargs), calls, phase=phase)
    took_s = time.perf_counter() - started
    if type(told) is not float or not 0 <= told <= took_s:
        raise remote.refuse("a time", phase)
    return told


def take_turns(
    run: Callable[[int, int], float | None],
    count: int,
    *,
    runs: int | None,
    time_s: float,
    most_calls: int = _MOST_CALLS,
) -> list[tuple[int, list[float]] | None]:
    """Run each of so many in turns.

    Args:
        run: Makes so many calls of the one of that number: seconds, or None if it failed, which ends it.
        count: How many take turns.
        runs: How many runs each gets; None: as many as it takes.
        time_s: Seconds for each, if `runs` is None.
        most_calls: In a run.

    Returns:
        Calls in a run, and seconds of each run; None for those that failed.
    """
    calls: dict[int, int] = {}
    for number in range(count):
        took_s = run(number, 1)
        if took_s is not None:
            calls[number] = max(1, min(most_calls, int(_LEAST_RUN_S / max(took_s, 1e-9)) + 1))
    samples: dict[int, list[float]] = {number: [] for number in calls}
    used_s = dict.fromkeys(calls, 0.0)
    for turn in range(_MOST_RUNS if runs is None else runs):
        for number in sorted(samples, reverse=turn % 2 == 1):
            took_s = run(number, calls[number])
            if took_s is None:
                del samples[number]
                continue
            samples[number].append(took_s / calls[number])
            used_s[number] += took_s
        if runs is None and samples and _enough(samples, used_s, time_s):
            break
    return [(calls[number], samples[number]) if number in samples else None for number in range(count)]


def _enough(samples: Mapping[int, Sequence[float]], used_s: Mapping[int, float], time_s: float) -> bool:
    if all(used_s[number] >= time_s for number in samples):
        return True
    made = min(len(runs) for runs in samples.values())
    return made >= _LEAST_RUNS and all(_spread(runs) <= _STEADY for runs in samples.values())


def _spread(runs: Sequence[float]) -> float:
    lower, median, upper = _quartiles(runs)
    return (upper - lower) / median if median > 0 else 0.0


def _quartiles(runs: Sequence[float]) -> tuple[float, float, float]:
    if len(runs) == 1:
        return runs[0], runs[0], runs[0]
    lower, median, upper = statistics.quantiles(runs, n=4, method="inclusive")
    return lower, median, upper


def summed_up(runs: Sequence[float], calls: int, threads: int) -> Timing:
    """Median and quartiles."""
    lower, median, upper = _quartiles(runs)
    return Timing(median, lower, upper, len(runs), calls, threads, tuple(runs))
