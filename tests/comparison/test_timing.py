"""Turns and their sums. The times are made up: no clock is asked."""

from __future__ import annotations

import pytest

from isohub.comparison.timing import summed_up, take_turns


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
    assert len(take_turns(lambda number, calls: 0.01 * calls, 2, runs=None, time_s=9)[0][1]) == 5
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


def test_a_ratio_is_told_where_the_spreads_are_apart() -> None:
    quick, slow = summed_up([1.0, 1.01, 1.02], 1, 2), summed_up([1.3, 1.31, 1.32], 1, 2)
    assert quick.ratio(slow) == pytest.approx(1.31 / 1.01)
    assert slow.ratio(quick) == pytest.approx(1.01 / 1.31)
    assert quick.ratio(summed_up([1.02, 1.03, 1.04], 1, 2)) is None  # too near
    assert quick.ratio(summed_up([1.0, 1.1, 1.3], 1, 2)) is not None
    assert quick.ratio(summed_up([0.9, 1.1, 1.15], 1, 2)) is None  # overlapping
    assert summed_up([1, 9, 10], 1, 2).ratio(summed_up([20, 21, 22], 1, 2)) is None  # unsteady
    assert summed_up([0.0], 1, 2).ratio(slow) is None
    assert (quick.median_s, quick.lower_s, quick.upper_s) == pytest.approx((1.01, 1.005, 1.015))
