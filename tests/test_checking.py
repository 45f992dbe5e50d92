from __future__ import annotations

import math

import numpy as np
import pytest

from isohub.checking import (
    check_choice,
    check_name,
    checked_bytes,
    checked_seed,
    checked_timeout,
    checked_trust,
    merged,
)


def test_what_may_be_given() -> None:
    assert [checked_seed(seed) for seed in (None, 0, 7, np.int64(9), 2**63 - 1)] == [None, 0, 7, 9, 2**63 - 1]
    assert [checked_timeout(seconds) for seconds in (None, 1, 0.5)] == [None, 1, 0.5]
    assert [checked_trust(trust) for trust in (None, "check", True, False)] == ["check", "check", True, False]
    assert checked_bytes(1) == 1
    assert merged({"a": 1}, {"b": 2}) == {"a": 1, "b": 2}
    check_name("model")
    check_choice("returns", "handle", ("handle",))


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", True, []])
def test_seeds_that_are_none(seed: object) -> None:
    with pytest.raises(ValueError, match="seed"):
        checked_seed(seed)


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan, "1", True])
def test_times_that_are_none(seconds: object) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        checked_timeout(seconds)


@pytest.mark.parametrize("trust", ["Check", "", "true", 1, 0, [], object()])
def test_trust_is_strict(trust: object) -> None:
    with pytest.raises(ValueError, match="trust_repo"):
        checked_trust(trust)


def test_mistakes() -> None:
    with pytest.raises(TypeError, match=r"twice.*a"):
        merged({"a": 1}, {"a": 2})
    with pytest.raises(TypeError, match="name of an entrypoint"):
        check_name(7)
    with pytest.raises(ValueError, match="max_reply_bytes"):
        checked_bytes(True)
    with pytest.raises(ValueError, match="returns='x'; expected one of 'handle'"):
        check_choice("returns", "x", ("handle",))
