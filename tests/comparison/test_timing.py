"""Turns and their sums. The times are made up: no clock is asked."""

from __future__ import annotations

import pytest

from isohub.comparison.timing import Timing, summed_up, take_turns


def test_refs_take_turns_in_opposite_orders() -> None:
    made: list[tuple[int, int]] = []

    def run(number: int, calls: int) -> float:
        made.append((number, calls))
        return calls * (0.001 if number else 0.1)

    found = take_turns(run, 2, runs=3, time_s=1)
    assert made == [(0, 1), (1, 1), (0, 1), (1, 6), (1, 6), (0, 1), (0, 1), (1, 6)]
    assert [pair and pair[0] for pair in found] == [1, 6]
    assert found[1][1] == pytest.approx([0.001] * 3)


def test_runs_go_on_until_they_agree_or_the_time_is_up() -> None:
    assert len(take_turns(lambda number, calls: 0.01 * calls, 2, runs=None, time_s=9)[0][1]) == 7
    uneven = iter(range(1, 1000))
    assert len(take_turns(lambda number, calls: next(uneven) * 0.1, 1, runs=None, time_s=2)[0][1]) == 5
    one = take_turns(lambda number, calls: 30.0, 2, runs=None, time_s=0.5)
    assert [len(samples) for _, samples in one] == [1, 1]


def test_who_fails_is_left_out() -> None:
    calls = {0: 0, 1: 0}

    def run(number: int, count: int) -> float | None:
        calls[number] += 1
        return None if number == 1 and calls[1] == 3 else 0.01

    (first, second) = take_turns(run, 2, runs=4, time_s=1)
    assert second is None
    assert len(first[1]) == 4


def around(second: float, spread: float = 0.01, runs: int = 9) -> list[float]:
    return [second * (1 + spread * (number - runs // 2) / runs) for number in range(runs)]


def test_a_ratio_is_told_where_the_spreads_are_apart() -> None:
    def timing(second: float, spread: float = 0.01, runs: int = 9) -> Timing:
        return summed_up(around(second, spread, runs), 1, 2)

    quick, slow = timing(1.0), timing(1.3)
    assert quick.ratio(slow) == pytest.approx(1.3)
    assert slow.ratio(quick) == pytest.approx(1 / 1.3)
    assert quick.ratio(timing(1.03)) is None  # too near
    assert quick.ratio(timing(1.1, 0.4)) is None  # overlapping
    assert quick.ratio(timing(2.0, 0.9)) is None  # unsteady
    assert quick.ratio(timing(9.0, 0.9)) == pytest.approx(9)  # and yet
    assert not timing(2.0, 0.9).steady
    assert timing(1.0, runs=5).ratio(timing(1.3, runs=5)) is None  # too few
    lucky = summed_up([0.5, 0.5, *around(1.3)[2:]], 1, 2)
    assert lucky.lower_s > 1.2
    assert quick.ratio(lucky) is None  # two rounds of nine say the opposite
    assert summed_up([0.0] * 9, 1, 2).ratio(slow) is None


def test_median_and_quartiles() -> None:
    found = summed_up([1.02, 1.0, 1.01], 4, 2)
    assert (found.median_s, found.lower_s, found.upper_s) == pytest.approx((1.01, 1.005, 1.015))
    assert (found.runs, found.calls, found.samples_s) == (3, 4, (1.02, 1.0, 1.01))
