"""Figures of two tensors: held against numpy's, and at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isohub.comparison import tally as module
from isohub.comparison.tally import DECADES, Measures, Tally


def measured(expected: torch.Tensor, got: torch.Tensor, atol: float = 0.0, rtol: float = 0.0) -> Measures:
    tally = Tally(atol, rtol)
    tally.add(expected, got)
    return tally.result()


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40), st.integers(1, 7))
def test_figures_are_numpy_s(pairs: list[tuple[float, float]], chunk: int) -> None:
    a, b = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    whole, module._CHUNK_ELEMENTS = module._CHUNK_ELEMENTS, chunk
    try:
        found = measured(a, b, 0.5, 0.25)
    finally:
        module._CHUNK_ELEMENTS = whole
    x, y = (side.numpy().astype(np.float64) for side in (a, b))
    equal = (x == y) | (np.isnan(x) & np.isnan(y))
    finite = np.isfinite(x) & np.isfinite(y)
    with np.errstate(all="ignore"):
        far = np.where(finite, np.abs(x - y), np.where(equal, 0, np.inf))
    assert found.elements == len(pairs)
    assert found.differing == (~equal).sum()
    assert found.max_abs == far.max()
    assert found.mean_abs == pytest.approx(far[finite].mean() if finite.any() else 0.0)
    assert found.beyond == (~equal & (~finite | (far > 0.5 + 0.25 * np.abs(x)))).sum()
    assert found.nan == (np.isnan(x).sum(), np.isnan(y).sum())
    assert found.infinite == (np.isinf(x).sum(), np.isinf(y).sum())
    assert sum(found.histogram) == (far > 0).sum()
    if found.differing:
        assert far[found.worst[0]] == found.max_abs
    else:
        assert found.worst is None


def test_an_expected_infinity_allows_nothing() -> None:
    assert measured(torch.tensor([math.inf]), torch.tensor([1.0]), 1.0, 1.0).beyond == 1
    assert measured(torch.tensor([math.inf]), torch.tensor([math.inf]), 0.0, 0.0).beyond == 0


DTYPES = [
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int64",
    "bool",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "complex64",
]


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name: str) -> None:
    dtype = getattr(torch, name)
    found = measured(torch.ones(2, 3).to(dtype), torch.tensor([[1, 1, 1], [1, 0, 1]]).to(dtype))
    assert (found.differing, found.max_abs, found.worst) == (1, 1.0, (1, 1))


def test_whole_numbers_are_compared_exactly() -> None:
    a = torch.tensor([(1 << 62) + 1])
    assert measured(a, a - 1).differing == 1
    assert measured(a, a.clone()).differing == 0
    # Both are one number in float64: the difference is there all the same, and at its place.
    found = measured(torch.tensor([5, 1 << 60]), torch.tensor([5, (1 << 60) + 1]))
    assert (found.beyond, found.max_abs, found.worst) == (1, 1.0, (1,))


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "uint64"])
def test_uint64_against_every_dtype(name: str) -> None:
    one = torch.tensor([1, 0], dtype=torch.uint64)
    other = torch.tensor([1, 1]).to(getattr(torch, name))
    assert measured(one, other).differing == measured(other, one).differing == 1


def test_sparse_and_quantised_and_empty_ones() -> None:
    a = torch.zeros(4, 5)
    a[1, 2], a[3, 4] = 2.0, -1.0
    b = a.clone()
    b[3, 4] = 1.0
    for pair in ((a.to_sparse(), b.to_sparse()), (a.to_sparse(), b), (a, b.to_sparse())):
        found = measured(*pair)
        assert (found.max_abs, found.worst, found.differing, found.elements) == (2.0, (3, 4), 1, 20)
    hybrid = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3), (4, 3), check_invariants=True)
    other = torch.sparse_coo_tensor([[0, 2]], torch.tensor([[1.0, 1, 1], [1, 5, 1]]), (4, 3), check_invariants=True)
    assert measured(hybrid, other).worst == (2, 1)
    assert measured(torch.empty(0, 3), torch.empty(0, 3)).max_abs == 0
    with pytest.raises(ValueError, match="one shape"):
        measured(a, a[:2])


def test_agreement_of_rows() -> None:
    a = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [1, 9, 2, 3, 4, 5, 6]])
    b = a.clone()
    b[1, 0] = 10  # another first; and one of five is another
    found = measured(a, b)
    assert (found.top1, found.k, found.top_k) == (0.5, 5, 0.9)
    assert measured(a[:, :5], b[:, :5]).top_k is None
    assert measured(a[0], b[0]).top1 is None
    assert measured(a.long(), b.long()).top1 is None


def test_sums_go_on_over_calls() -> None:
    tally = Tally()
    tally.add(torch.zeros(2, 2), torch.full((2, 2), 0.5))
    tally.add(torch.zeros(3), torch.tensor([0.0, 4.0, 0.0]))
    found = tally.result()
    assert (found.elements, found.differing, found.max_abs) == (7, 5, 4.0)
    assert (found.worst, found.worst_call, found.mean_abs) == ((1,), 1, 6 / 7)
    assert found.norm == pytest.approx(math.sqrt(17))
    assert found.cosine is None
    assert found.histogram[np.searchsorted(DECADES, math.log10(4))] == 1


def test_the_cosine_is_that_of_vectors() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert measured(a, b).cosine == pytest.approx(math.sqrt(0.5))
    assert measured(a, -a).cosine == -1
    huge = torch.full((2,), 3e38)
    assert measured(huge, huge).cosine == pytest.approx(1)
