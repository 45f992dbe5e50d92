"""Two models' answers, leaf by leaf, over as many calls as there are; and what a model's own noise is.

Rules:

1. Leaves belong together by their place. What is at a place on one side alone, or in another kind, shape or dtype, is
   a change whatever the tolerance is; of another dtype the values are compared as well.
2. A model that is asked the same twice, with the same seed, shows its noise. A difference is a change only if it is
   beyond the tolerance and more than `NOISE_FACTOR` times what either shows against itself.
3. A place that is not the same in a model's own answers (a text, a number of detections) shows nothing: it is named
   as noise.

Side: caller. Trust: what is compared is the workers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from isohub.comparison.leaves import Leaf
from isohub.comparison.tally import Measures, Tally

__all__ = ["NOISE_FACTOR", "LeafDifference", "Noise", "OutputPair"]

#: How much more than the noise that a few calls showed has to be seen. The largest of a handful of draws is passed by
#: a further draw often, and seldom by as much again.
NOISE_FACTOR = 2.0

Change = Literal["missing", "added", "kind", "shape", "dtype", "value", "values"]
Verdict = Literal["same", "opaque", "tolerated", "noise", "changed"]


@dataclass(frozen=True)
class Noise:
    """What a model shows against itself at one place.

    Attributes:
        max_abs: The largest difference.
        unstable: Whether kind, shape, dtype or a plain value were not the same.
    """

    max_abs: float = 0.0
    unstable: bool = False


@dataclass(frozen=True)
class LeafDifference:
    """One place of two models' answers.

    Attributes:
        path: Where it is, as Python writes it.
        expected: What was there at the base: dtype and shape, or a plain value; None if nothing was.
        got: The same of the other.
        change: How they differ, if they do; the first way in the order of `Change`.
        verdict: "same"; "opaque", objects of one class, which stay in their workers and are not compared; "tolerated",
            within the tolerance; "noise", no more than either shows against itself; "changed".
        measures: Of tensors, arrays and numbers of one shape; None for others.
        noise: The largest difference that either of the two shows against itself.
    """

    path: str
    expected: str | None
    got: str | None
    change: Change | None
    verdict: Verdict
    measures: Measures | None
    noise: float

    @property
    def max_abs(self) -> float:
        """The largest difference; 0 where there are no numbers to compare."""
        return 0.0 if self.measures is None else self.measures.max_abs


@dataclass
class _Place:
    tally: Tally
    expected: str | None = None
    got: str | None = None
    change: Change | None = None
    compared: bool = False
    opaque: bool = False

    def note(self, change: Change, expected: str | None, got: str | None) -> None:
        if self.change is None:
            self.change, self.expected, self.got = change, expected, got


@dataclass
class OutputPair:
    """The answers of two models, or of one model twice.

    Args:
        atol: Absolute tolerance.
        rtol: Relative tolerance.
    """

    atol: float = 0.0
    rtol: float = 0.0
    _places: dict[str, _Place] = field(default_factory=dict)

    def add(self, expected: Mapping[str, Leaf], got: Mapping[str, Leaf]) -> None:
        """The answers to one call."""
        for path in {**expected, **got}:
            place = self._places.get(path)
            if place is None:
                place = self._places[path] = _Place(Tally(self.atol, self.rtol))
            first, second = expected.get(path), got.get(path)
            if place.expected is None and first is not None:
                place.expected = first.form
            if place.got is None and second is not None:
                place.got = second.form
            if first is None or second is None:
                place.note("added" if first is None else "missing", place.expected, place.got)
            else:
                _add(place, first, second)

    def noise(self) -> dict[str, Noise]:
        """By place, of one model's answers to the same question."""
        return {
            path: Noise(place.tally.max_abs, place.change is not None and place.change != "values")
            for path, place in self._places.items()
        }

    def result(self, *noises: Mapping[str, Noise]) -> tuple[LeafDifference, ...]:
        """What was found, given what either shows against itself."""
        return tuple(_judged(path, place, noises) for path, place in self._places.items())


def _add(place: _Place, first: Leaf, second: Leaf) -> None:
    forms = first.form, second.form
    if first.kind != second.kind or (first.tensor is None) != (second.tensor is None):
        place.note("kind", *forms)
    elif first.tensor is None or second.tensor is None:
        if not _equal(first.value, second.value):
            shown = forms if first.kind in ("container", "object") else (first.shown, second.shown)
            place.note("value", *shown)
        place.opaque = first.kind == "object"
    elif first.tensor.shape != second.tensor.shape:
        place.note("shape", *forms)
    else:
        if first.tensor.dtype != second.tensor.dtype or first.tensor.layout != second.tensor.layout:
            place.note("dtype", *forms)
        if first.tensor.is_meta != second.tensor.is_meta:
            place.note("kind", *forms)
        elif not first.tensor.is_meta:  # those have no values
            place.compared = True
            place.tally.add(first.tensor, second.tensor)


def _judged(path: str, place: _Place, noises: tuple[Mapping[str, Noise], ...]) -> LeafDifference:
    known = [noise[path] for noise in noises if path in noise]
    noise = max((each.max_abs for each in known), default=0.0)
    measures = place.tally.result() if place.compared else None
    change = place.change
    verdict: Verdict = "opaque" if place.opaque else "same"
    if change is not None:
        verdict = "noise" if any(each.unstable for each in known) else "changed"
    elif measures is not None and measures.differing:
        change = "values"
        drowned = measures.max_abs <= NOISE_FACTOR * noise
        verdict = "noise" if drowned else "changed" if measures.beyond else "tolerated"
    return LeafDifference(path, place.expected, place.got, change, verdict, measures, noise)


def _equal(first: Any, second: Any) -> bool:
    """Whether two plain values are equal. What cannot be told is not."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        return first.tobytes() == second.tobytes()
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return False
    try:
        return type(first) is type(second) and bool(first == second)
    except Exception:  # noqa: BLE001 - a value whose comparison fails is not shown to be equal
        return False
