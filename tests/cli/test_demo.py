"""``isohub demo``: right to the bit, and it says so only then."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isohub.cli import demo
from isohub.cli.torch_hub_loads import measured

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def done(isohub_process: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    keep = tmp_path_factory.mktemp("demo") / "digits"
    process = isohub_process("demo", "--json", "--keep", str(keep))
    assert (process.returncode, process.stderr) == (0, "")
    return json.loads(process.stdout), keep


def test_isohub_is_right_where_torch_hub_is_wrong(done: tuple[dict[str, Any], Path]) -> None:
    found, _ = done
    alone, together, isolated = (group["models"] for group in found["groups"])
    assert [model["verdict"] for model in together] == ["right", "WRONG"]
    assert [model["verdict"] for model in isolated] == ["right", "right"]
    assert [model["parameters"] for model in alone] == [29_339, 46_434]
    assert together[1]["parameters"] == 45_753
    for wanted, model in zip(alone, isolated, strict=True):
        assert {**model, "verdict": ""} == {**wanted, "verdict": ""}
    assert found["correct"]
    assert found["containment"]["exit_code"] == 7


def test_the_repository_is_a_real_one(done: tuple[dict[str, Any], Path]) -> None:
    found, keep = done
    for tag, commit in found["commits"].items():
        told = subprocess.run(["git", "rev-parse", tag], cwd=keep, capture_output=True, text=True, check=True)
        assert told.stdout.strip() == commit
    status = subprocess.run(["git", "status", "--short"], cwd=keep, capture_output=True, text=True, check=True)
    assert status.stdout == ""
    subprocess.run(["git", "fsck", "--strict"], cwd=keep, capture_output=True, check=True)


def test_the_commits_are_the_same_everywhere(tmp_path: Path) -> None:
    assert demo.make_repository(tmp_path / "a") == demo.make_repository(tmp_path / "b")


def test_keep_does_not_overwrite(isohub_here: Run, tmp_path: Path) -> None:
    assert isohub_here("demo", "--keep", str(tmp_path)).returncode == 2


def test_one_bit_makes_a_difference() -> None:
    state = {"a": torch.zeros(3), "b": torch.arange(2)}
    output = torch.ones(2, 2)
    first = measured(5, state, output)
    assert first == measured(5, {name: tensor.clone() for name, tensor in state.items()}, output.clone())
    changed = torch.ones(2, 2)
    changed[1, 1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert first != measured(5, state, changed)
    assert first != measured(5, {**state, "a": torch.tensor([0.0, 0.0, -0.0])}, output)
    assert first != measured(5, dict(reversed(state.items())), output)
    assert first != measured(5, {**state, "b": torch.arange(2, dtype=torch.int32)}, output)


def test_it_fails_when_isohub_is_wrong(isohub_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [measured(count, {}, torch.ones(1)) for count in (1, 2)]
    swapped = [figures[0], {**figures[1], "parameters": 3}]
    monkeypatch.setattr(demo, "_torch_hub", lambda trees, place: figures[: len(trees)])
    contained = {"error": "it ended", "exit_code": 7, "correct": True}
    for isolated, wanted in ((swapped, 1), ([figures[0], figures[0]], 0)):
        monkeypatch.setattr(demo, "_isohub", lambda repository, store, given=isolated: (given, contained, 0.1))
        ended = isohub_here("demo")
        assert ended.returncode == wanted
        assert ("NOT right" in ended.stdout) == bool(wanted)
