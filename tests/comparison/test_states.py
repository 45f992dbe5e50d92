"""States in parts: the same whatever the parts are, and a worker that sends something else is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from isohub.comparison import states
from tests.comparison.conftest import Compared

NAMES = ("base", "values", "renamed", "tied", "wider", "half")


def test_parts_change_nothing(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compared(*NAMES, inputs=None)
    parts = []
    real = states._part

    def part(state: states.State, names: list[str]) -> dict[str, object]:
        parts.append(sum(state.entries[name].size_bytes for name in names if len(names) > 1))
        return real(state, names)

    monkeypatch.setattr(states, "PART_BYTES", 100)
    monkeypatch.setattr(states, "_part", part)
    found = compared(*NAMES, inputs=None)
    assert [each.state for each in found.differences] == [each.state for each in whole.differences]
    assert len(parts) > 20
    assert max(parts) <= 100


@pytest.mark.parametrize(
    ("variant", "phase"), [("liar_index", "state"), ("liar_part", "state"), ("liar_modules", "modules")]
)
def test_a_worker_that_sends_something_else_is_refused(compared: Compared, variant: str, phase: str) -> None:
    found = compared("base", variant, "values")
    assert found.refs[1].failure is not None
    assert (found.refs[1].failure.phase, found.refs[1].failure.type) == (phase, "ProtocolError")
    assert found.differences[0].state is None
    assert found.differences[1].state is not None
    assert found.differences[1].outputs_changed
    reversed_ = compared(variant, "base")
    assert reversed_.base.failure is not None
    assert reversed_.refs[1].failure is None


def test_threads_that_are_no_number_are_none(compared: Compared) -> None:
    found = compared("base", "liar_threads", repeats=1)
    assert found.refs[1].failure is None
    assert found.refs[1].call is not None
    assert found.refs[1].call.threads == 0


def test_what_was_found_is_frozen(compared: Compared) -> None:
    found = compared("base", "values", inputs=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.seed = 3  # type: ignore[misc]
    assert hash(found.differences[0].state.changed[0])


def test_extra_state_is_compared_place_by_place() -> None:
    def extra(last: float) -> dict[str, object]:
        return {"counts": torch.arange(3), "scale": float("nan"), "history": [1.0, last]}

    assert states._same_value(extra(2.0), extra(2.0))
    assert not states._same_value(extra(2.0), extra(3.0))
    assert not states._same_value(extra(2.0), {**extra(2.0), "more": 1})


def test_names_of_one_tensor_are_the_same_in_any_order() -> None:
    def tied(*names: str) -> set[str]:
        entries = {name: states.Entry(name, "float32", (1,), 4) for name in names}
        return states.State(None, entries, dict.fromkeys(names, 0)).tied(names)  # type: ignore[arg-type]

    assert tied("a", "b") == tied("b", "a") == {"a = b"}
