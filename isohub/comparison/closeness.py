"""`assert_close`: refs that must give the same, as ``torch.testing.assert_close`` says it of tensors.

Side: caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from isohub.comparison.measure import compare
from isohub.comparison.outputs import LeafDifference
from isohub.comparison.render import indented
from isohub.comparison.result import Comparison, Difference, RefResult
from isohub.hub import RepoOrDir

__all__ = ["assert_close", "complaint_of"]

# The worst places of each ref; a model's outputs are few, a hostile one's need not be.
_WORST = 5


def assert_close(
    repos: Sequence[RepoOrDir],
    model: str,
    inputs: Any = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    **options: Any,
) -> Comparison:
    """Raise unless every ref gives what the first one gives.

    Args:
        repos: Two or more; the first is what is expected.
        model: Name of the entrypoint.
        inputs: As `compare` takes them.
        rtol: Relative tolerance, of what is expected.
        atol: Absolute tolerance. With neither given, those of ``torch.testing.assert_close`` for float32: 1.3e-6 and
            1e-5. Give both or neither, as there.
        **options: More keywords of `compare`. Nothing is timed unless `repeats` says so.

    Returns:
        The comparison.

    Raises:
        AssertionError: A ref failed, or its outputs differ: the worst places with index, what was got, what was
            expected and the tolerance. A difference that is no more than a model's own noise is none.
        ValueError: One of the tolerances was given without the other.
    """
    __tracebackhide__ = True
    if (rtol is None) != (atol is None):
        raise ValueError("rtol and atol go together: give both or neither")
    if rtol is None or atol is None:
        rtol, atol = _default_tolerances()
    found = compare(repos, model, inputs, tolerance=(atol, rtol), **{"repeats": 0, **options})
    complaint = complaint_of(found)
    if complaint:
        raise AssertionError(complaint)
    return found


def _default_tolerances() -> tuple[float, float]:
    rtol, atol = torch.testing._comparison.default_tolerances(torch.float32)
    return float(rtol), float(atol)


def complaint_of(comparison: Comparison) -> str:
    """Why it is not close, the worst first; empty if it is."""
    if not comparison.changed:
        return ""
    return "\n".join(_lines(comparison))


def _lines(comparison: Comparison) -> Iterator[str]:
    base = comparison.base
    yield f"{comparison.model} is not the same in all refs: {comparison.verdict}"
    yield f"expected: {base.label}"
    for ref in comparison.refs:
        if ref.failure is not None:
            yield ""
            yield f"{ref.label} failed ({ref.failure.phase}): {ref.failure.type}: {indented(ref.failure.message)}"
    for ref, difference in zip(comparison.refs[1:], comparison.differences, strict=True):
        yield from _of_one(comparison, ref, difference)


def _of_one(comparison: Comparison, ref: RefResult, difference: Difference) -> Iterator[str]:
    changed = sorted(
        (leaf for leaf in difference.outputs or () if leaf.verdict == "changed"), key=lambda leaf: -leaf.max_abs
    )
    built = not comparison.calls and ref.failure is None
    parts = (difference.state, difference.modules) if built else ()
    if not changed and not any(part is not None and part.any for part in parts):
        return
    yield ""
    yield f"got: {ref.label}"
    for leaf in changed[:_WORST]:
        yield from _of_leaf(comparison, leaf)
    if len(changed) > _WORST:
        yield f"  and {len(changed) - _WORST:,} places more"
    if built and difference.state is not None and difference.state.any:
        for entry in sorted(difference.state.changed, key=lambda entry: -entry.max_abs)[:_WORST]:
            share = f"{entry.differing:,} of {entry.elements:,}"
            yield f"  state, {entry.name}: {share} differ, by {entry.max_abs:.6g} at most"
        yield f"  state: {len(difference.state.missing):,} missing, {len(difference.state.added):,} added"
    if built and difference.modules is not None and difference.modules.any:
        for name, before, after in difference.modules.changed[:_WORST]:
            yield f"  module {name or '(the whole)'}: got {after}, expected {before}"


def _of_leaf(comparison: Comparison, leaf: LeafDifference) -> Iterator[str]:
    found = leaf.measures
    if leaf.change != "values" or found is None or found.worst_pair is None:
        got, expected = leaf.got or "nothing", leaf.expected or "nothing"
        yield f"  {leaf.path}: {leaf.change}: got {got}, expected {expected}"
        return
    share = 100 * found.beyond / found.elements
    index = f"[{', '.join(map(str, found.worst))}]" if found.worst else ""
    call = f", call {found.worst_call + 1}" if comparison.calls > 1 else ""
    yield f"  {leaf.path}: {found.beyond:,} of {found.elements:,} numbers ({share:.1f}%) are beyond the tolerance"
    yield (
        f"    worst at {leaf.path}{index}{call}: got {found.worst_pair[1]}, expected {found.worst_pair[0]}, "
        f"differs by {found.max_abs:.6g}"
    )
    yield (
        f"    allowed: {comparison.atol:g} + {comparison.rtol:g} * |expected|; largest relative difference "
        f"{found.max_rel:.3g}; own noise {leaf.noise:.3g}"
    )
