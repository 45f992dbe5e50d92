"""`assert_close`: quiet where nothing changed, and the worst places where something did."""

from __future__ import annotations

from pathlib import Path

import pytest

import isohub


def refs(variants: Path, *names: str) -> list[str]:
    return [f"{variants}:{name}" for name in names]


def test_what_is_close(variants: Path, session: isohub.Session) -> None:
    found = isohub.assert_close(refs(variants, "base", "same", "renamed"), "model", "randn(4,8)", session=session)
    assert not found.changed
    assert found.refs[0].call is None  # nothing is timed
    isohub.assert_close(refs(variants, "noisy", "noisy_again"), "model", "randn(4,8)", session=session)
    nudged = refs(variants, "base", "nudged")
    isohub.assert_close(nudged, "model", "randn(4,8)", rtol=0, atol=1e-3, session=session)
    with pytest.raises(AssertionError, match=r"allowed: 1e-05 \+ 1.3e-06 \* \|expected\|"):
        isohub.assert_close(nudged, "model", "randn(4,8)", session=session)
    with pytest.raises(ValueError, match="both or neither"):
        isohub.assert_close(nudged, "model", "randn(4,8)", rtol=1, session=session)


def test_the_worst_places_are_named(variants: Path, session: isohub.Session) -> None:
    with pytest.raises(AssertionError) as caught:
        isohub.assert_close(
            refs(variants, "base", "values", "wider", "raises"), "model", ["randn(4,8)"], session=session
        )
    text = str(caught.value)
    found = isohub.compare(refs(variants, "base", "values"), "model", "randn(4,8)", repeats=0, session=session)
    worst = found.differences[0].worst
    index = ", ".join(map(str, worst.measures.worst))
    expected, got = worst.measures.worst_pair
    assert text.startswith("model is not the same in all refs: B: outputs changed: max abs")
    assert f"worst at {worst.path}[{index}]: got {got}, expected {expected}, differs by " in text
    assert "output['logits']: shape: got float32[4, 7], expected float32[4, 6]" in text
    assert ":raises (" in text
    assert "failed (call): ValueError: a sum of \\x1b[31mred" in text


def test_what_was_built_is_what_counts_where_nothing_is_called(variants: Path, session: isohub.Session) -> None:
    with pytest.raises(AssertionError, match=r"state, body.0.weight: 1 of 64 differ, by 0.25"):
        isohub.assert_close(refs(variants, "base", "values"), "model", session=session)
