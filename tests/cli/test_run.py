"""``isohub run``: arguments in, figures out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import isohub

Run = Callable[..., subprocess.CompletedProcess[str]]
Hub = Callable[[str], str]


@pytest.fixture
def run_json(isohub_here: Run) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str) -> dict[str, Any]:
        done = isohub_here("--json", "run", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


def test_arguments_and_keywords_arrive_as_they_are_meant(run_json: Callable[..., Any], hub: Hub) -> None:
    found = run_json(hub("good"), "echo", "3", "text", "[1]", "--set", "a=true", "--set", "seed=x=y", "--", "-1")
    args, kwargs = (entry["value"] for entry in found["built"]["entries"])
    assert [item.get("value") for item in args["items"]] == [3, "text", None, -1]
    assert {entry["key"]: entry["value"]["value"] for entry in kwargs["entries"]} == {"a": True, "seed": "x=y"}


def test_output_is_that_of_the_library(
    run_json: Callable[..., Any], hub: Hub, session: isohub.Session, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4).numpy())
    found = run_json(hub("good"), "model", "4", "--set", "pretrained=true", "--input", str(tmp_path / "x.npy"))
    with session.load(hub("good"), "model", 4, pretrained=True) as model, torch.no_grad():
        wanted = model(torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4))
    assert found["built"] == {"kind": "module", "class": "models.Cnn", "parameters": 468}
    assert found["output"]["shape"] == [2, 4]
    assert found["output"]["mean"] == pytest.approx(wanted.double().mean().item(), abs=1e-7)
    assert found["seconds"].keys() == {"load", "call"}


def test_a_seed_makes_it_repeatable(run_json: Callable[..., Any], hub: Hub) -> None:
    command = [hub("good"), "model", "--input", "randn(2,3,8,8)", "--eval", "--seed"]
    first, again, other = (run_json(*command, seed)["output"] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_methods_and_keywords_of_a_call(run_json: Callable[..., Any], hub: Hub) -> None:
    assert run_json(hub("good"), "counter", "3", "--method", "add")["output"] == {"kind": "int", "value": 4}
    found = run_json(
        hub("good"), "talkative", "--method", "predict", "--input", "ones(1,2)", "--input", "threshold=ones(1)"
    )
    assert found["output"]["dtype"] == "bool"


def test_human_text(isohub_here: Run, hub: Hub) -> None:
    done = isohub_here("run", hub("good"), "namedtuple_output", "--input", "x=ones(3)")
    first, *rest = done.stdout.splitlines()
    assert first.startswith("good@")
    assert rest == [
        "built: module models.NamedTupleOutput, 0 parameters",
        "output: Detection of 2",
        "  boxes: float32[3]  mean 2  std 0  min 2  max 2",
        "  scores: float32[]  mean 3  min 3  max 3",
    ]


def test_a_structure_is_shown_and_not_called(isohub_here: Run, hub: Hub) -> None:
    done = isohub_here("run", hub("good"), "pair")
    assert "  0: module models.Cnn, 468 parameters\n  1: tuple of 3\n" in done.stdout
    called = isohub_here("run", hub("good"), "pair", "--input", "ones(1)")
    assert called.returncode == 1
    assert called.stderr.startswith("error: the entrypoint gave a tuple")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "error: "),
        ("segfaults", "SIGSEGV"),
        ("os_exit", "exit code"),
        ("raises_in_entrypoint", "Traceback (most recent call last)"),
        ("missing_dependencies", "hint: "),
        ("syntax_error", "is no valid Python"),
    ],
)
def test_failures_end_with_1(isohub_here: Run, hub: Hub, name: str, words: str) -> None:
    done = isohub_here("run", hub(name), "model")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "isohub/cli" not in done.stderr


def test_timeout(isohub_here: Run, hub: Hub) -> None:
    done = isohub_here("run", hub("sleeps_forever"), "model", "--timeout", "3")
    assert done.returncode == 1
    assert done.stderr.endswith("hint: give it longer with --timeout SECONDS\n")
