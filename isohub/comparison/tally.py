"""How far two tensors of one shape are from each other, summed up over as many pairs as there are.

Rules:

1. All is reckoned in float64 (complex128), a chunk at a time; of float16, bfloat16 and float32 that is exact. Whole
   numbers beyond 2**53 are compared exactly, and the size of their difference is rounded, to 1 at least.
2. NaN is equal to NaN, an infinity to the same infinity. Where one side alone is not finite, or both are in another
   way, the difference is infinite; means, norms and the cosine are of what is finite on both sides.
3. The first of a pair is what was expected: it is what a relative difference is relative to.
4. An element is beyond the tolerance if ``|a - b| > atol + rtol * |a|``.

Side: caller. Trust: numbers are a worker's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["DECADES", "Measures", "Tally"]

#: The bins of a histogram of differences: from 10**-12 to 10**4, two a decade, one below and one above.
DECADES = tuple(-12 + number / 2 for number in range(33))
# Numbers that are converted to float64 at once: 16 MB a side.
_CHUNK_ELEMENTS = 1 << 21
_K = 5


@dataclass(frozen=True)
class Measures:
    """How far what was got is from what was expected.

    Attributes:
        elements: How many there were.
        differing: How many were not equal.
        beyond: How many were beyond the tolerance.
        max_abs: The largest difference.
        mean_abs: The mean difference, of what is finite on both sides.
        max_rel: The largest difference relative to what was expected, of what is finite and not 0 there.
        cosine: Of the two as vectors; None if either has no length.
        norm: Euclidean length of the difference.
        expected_norm: Euclidean length of what was expected.
        nan: Numbers of NaNs: expected, got.
        infinite: Numbers of infinities: expected, got.
        worst: Index of the largest difference (in the first pair that has it); None if all are equal.
        worst_pair: What was expected and got there, as text.
        worst_call: Which pair that was, from 0.
        top1: Share of the rows of two-dimensional floats whose largest element is at one place; None for others.
        top_k: Mean share of the places of the `k` largest that both have; None where a row has no more than `k`.
        k: That number.
        histogram: How many differences that are not 0 were in each bin of `DECADES`.
    """

    elements: int
    differing: int
    beyond: int
    max_abs: float
    mean_abs: float
    max_rel: float
    cosine: float | None
    norm: float
    expected_norm: float
    nan: tuple[int, int]
    infinite: tuple[int, int]
    worst: tuple[int, ...] | None
    worst_pair: tuple[str, str] | None
    worst_call: int
    top1: float | None
    top_k: float | None
    k: int
    histogram: tuple[int, ...]


class Tally:
    """Adds up pairs.

    Args:
        atol: Absolute tolerance.
        rtol: Relative tolerance, of what is expected.
    """

    def __init__(self, atol: float = 0.0, rtol: float = 0.0) -> None:
        self._atol, self._rtol = atol, rtol
        self._calls = self._elements = self._differing = self._beyond = self._finite = 0
        self._max_abs = self._max_rel = self._sum_abs = 0.0
        self._dot = self._square = self._expected_square = self._got_square = 0.0
        self._nan, self._infinite = [0, 0], [0, 0]
        self._worst: tuple[tuple[int, ...], tuple[str, str], int] | None = None
        self._rows, self._top1, self._top_k, self._has_k = 0, 0, 0.0, False
        self._histogram: torch.Tensor | None = None  # of none but zeros: most places are equal

    @property
    def max_abs(self) -> float:
        """The largest difference so far."""
        return self._max_abs

    @property
    def mean_abs(self) -> float:
        """The mean difference so far."""
        return self._sum_abs / self._finite if self._finite else 0.0

    def add(self, expected: torch.Tensor, got: torch.Tensor) -> None:
        """One pair of tensors of one shape."""
        if expected.shape != got.shape:
            raise ValueError(f"tensors of one shape are compared, got {tuple(expected.shape)} and {tuple(got.shape)}")
        expected, got = expected.cpu(), got.cpu()
        shape = tuple(expected.shape)
        flat_expected, flat_got, places = _aligned(expected, got)
        self._elements += expected.numel()
        for start in range(0, flat_expected.numel(), _CHUNK_ELEMENTS):
            end = start + _CHUNK_ELEMENTS
            worst = self._add(flat_expected[start:end], flat_got[start:end])
            if worst is not None:
                place = start + worst[0] if places is None else int(places[start + worst[0]])
                self._worst = _index(place, shape), worst[1], self._calls
        if _is_ranked(expected) and _is_ranked(got):
            self._rank(expected, got)
        self._calls += 1

    def _add(self, expected: torch.Tensor, got: torch.Tensor) -> tuple[int, tuple[str, str]] | None:
        """One chunk; the place and the words of a difference that is larger than all before."""
        worst = None
        a, b = _wide(expected), _wide(got)
        unequal = expected != got if _are_comparable(expected, got) else a != b
        for number, side in enumerate((a, b)):
            self._nan[number] += int(torch.isnan(side).sum())
            self._infinite[number] += int(torch.isinf(side).sum())
        finite = torch.isfinite(a) & torch.isfinite(b)
        unequal &= ~(torch.isnan(a) & torch.isnan(b))
        distance = (a - b).abs()
        distance = torch.where(finite, distance, torch.where(unequal, math.inf, 0.0))
        distance = torch.where(unequal & (distance == 0), 1.0, distance)  # whole numbers that round to one float64
        size = a.abs()
        self._differing += int(unequal.sum())
        limit = torch.where(torch.isfinite(size), self._atol + self._rtol * size, self._atol)
        self._beyond += int((unequal & (distance > limit)).sum())
        if distance.numel():
            place = int(distance.argmax())
            largest = float(distance[place])
            if largest > self._max_abs or (self._worst is None and self._max_abs == 0 and bool(unequal[place])):
                self._max_abs = largest
                worst = place, (_shown(expected[place]), _shown(got[place]))
        a, b, near = a[finite], b[finite], distance[finite]
        self._finite += near.numel()
        self._sum_abs += float(near.sum())
        self._square += float((near * near).sum())
        self._dot += float((a.conj() * b).sum().real)
        self._expected_square += float((a.abs() ** 2).sum())
        self._got_square += float((b.abs() ** 2).sum())
        relative = near[a != 0] / a[a != 0].abs()
        if relative.numel():
            self._max_rel = max(self._max_rel, float(relative.max()))
        some = distance[distance > 0]
        if some.numel():
            edges = torch.tensor(DECADES, dtype=torch.float64)
            counts = torch.bincount(torch.bucketize(some.log10(), edges), minlength=len(DECADES) + 1)
            self._histogram = counts if self._histogram is None else self._histogram + counts
        return worst

    def _rank(self, expected: torch.Tensor, got: torch.Tensor) -> None:
        self._rows += expected.shape[0]
        self._top1 += int((expected.argmax(1) == got.argmax(1)).sum())
        if expected.shape[1] > _K:
            self._has_k = True
            first, second = expected.topk(_K, 1).indices, got.topk(_K, 1).indices
            both = (first.unsqueeze(2) == second.unsqueeze(1)).any(2)
            self._top_k += float(both.sum()) / _K

    def result(self) -> Measures:
        """What was found."""
        lengths = math.sqrt(self._expected_square) * math.sqrt(self._got_square)
        worst = self._worst
        return Measures(
            elements=self._elements,
            differing=self._differing,
            beyond=self._beyond,
            max_abs=self._max_abs,
            mean_abs=self.mean_abs,
            max_rel=self._max_rel,
            cosine=min(1.0, max(-1.0, self._dot / lengths)) if lengths > 0 and math.isfinite(lengths) else None,
            norm=math.sqrt(self._square),
            expected_norm=math.sqrt(self._expected_square),
            nan=(self._nan[0], self._nan[1]),
            infinite=(self._infinite[0], self._infinite[1]),
            worst=None if worst is None else worst[0],
            worst_pair=None if worst is None else worst[1],
            worst_call=0 if worst is None else worst[2],
            top1=self._top1 / self._rows if self._rows else None,
            top_k=self._top_k / self._rows if self._rows and self._has_k else None,
            k=_K,
            histogram=(0,) * (len(DECADES) + 1) if self._histogram is None else tuple(self._histogram.tolist()),
        )


def _is_ranked(tensor: torch.Tensor) -> bool:
    """Whether its rows are scores of classes, for all that can be told."""
    if tensor.dim() != 2 or not tensor.is_floating_point() or tensor.is_quantized:
        return False
    return tensor.layout is torch.strided and tensor.numel() > 0 and tensor.element_size() > 1


def _aligned(expected: torch.Tensor, got: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Two tensors of one shape as vectors whose elements belong together, and their places unless those are in order.

    What is quantised stands for its numbers. What is sparse is reckoned where either has an element.
    """
    pair = [_comparable(tensor) for tensor in (expected, got)]
    if all(tensor.layout is torch.strided for tensor in pair):
        return pair[0].reshape(-1), pair[1].reshape(-1), None
    places, values = zip(*(_entries(tensor) for tensor in pair), strict=True)
    union: torch.Tensor = torch.unique(torch.cat(places))
    both = []
    for place, value in zip(places, values, strict=True):
        whole = torch.zeros(len(union), dtype=value.dtype)
        whole[torch.searchsorted(union, place)] = value
        both.append(whole)
    return both[0], both[1], union


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype that torch's comparisons know."""
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return tensor.to(torch.float32)
    if tensor.dtype in (torch.uint16, torch.uint32):
        return tensor.to(torch.int64)
    return tensor


def _are_comparable(expected: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether torch knows a dtype for both: for uint64 and another one it does not."""
    return expected.dtype == got.dtype or torch.uint64 not in (expected.dtype, got.dtype)


def _entries(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places, counted in the flat tensor, and values of what is not 0."""
    if tensor.layout is torch.strided:
        flat = tensor.reshape(-1)
        places = flat.nonzero().reshape(-1)
        return places, flat[places]
    coo = tensor.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
    indices, values = coo.indices(), coo.values()
    dense = values.shape[1:]  # of hybrid tensors
    width = math.prod(dense)
    places = torch.zeros(indices.shape[1], dtype=torch.int64)
    for dimension in range(indices.shape[0]):
        places = places * tensor.shape[dimension] + indices[dimension]
    places = (places.unsqueeze(1) * width + torch.arange(width)).reshape(-1)
    return places, values.reshape(-1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _index(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        index.append(rest)
    return tuple(reversed(index))


def _shown(element: torch.Tensor) -> str:
    value = element.item()
    return f"{value:.9g}" if isinstance(value, float) else str(value)
