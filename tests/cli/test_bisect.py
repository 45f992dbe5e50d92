"""``isohub bisect``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bisection.conftest import write_history
from tests.cli.conftest import Run

SHAPE = [[], [1], [2], [3], [4], [5], [6], [7]]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, str]]:
    path = tmp_path_factory.mktemp("bisected") / "clone"
    commits = write_history(path, SHAPE, {6: "1.5"})
    return str(path), commits


def test_outputs(isohub_here: Run, clone: tuple[str, dict[int, str]]) -> None:
    path, commits = clone
    common = ["bisect", path, "--good", commits[1], "--bad", "main", "model", "--input", "randn(1,3)"]
    done = isohub_here(*common, "--tolerance", "1e-5", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{commits[6]} is the first bad commit\n")
    assert "change 6" in done.stdout
    assert "output differs by" in done.stdout
    found = json.loads(isohub_here(*common, "--json").stdout)
    assert found["first_bad"]["commit"] == commits[6]
    assert isohub_here(*common, "--quiet").stdout == f"{commits[6]}\n"
    fine = isohub_here(*common, "--tolerance", "100")
    assert fine.returncode == 1
    assert "is good" in fine.stderr


def test_a_function_and_a_command(isohub_here: Run, clone: tuple[str, dict[int, str]], tmp_path: Path) -> None:
    path, commits = clone
    program = tmp_path / "check.py"
    program.write_text(
        "import os, sys, pathlib\n"
        "def score(model):\n    import torch\n\n    return model(torch.ones(1)).item()\n\n\n"
        "if __name__ == '__main__':\n"
        "    text = pathlib.Path(os.environ['ISOHUB_CHECKOUT'], 'factor.py').read_text()\n"
        "    sys.exit(1 if '1.5' in text else 0)\n"
    )
    common = ["bisect", path, "--good", commits[1], "--bad", "main", "--quiet"]
    assert isohub_here(*common, "model", "--test", f"{program}:score").stdout == f"{commits[6]}\n"
    log = tmp_path / "log.jsonl"
    command = [*common, "--log", str(log), "--run", "--", sys.executable, str(program)]
    assert isohub_here(*command).stdout == f"{commits[6]}\n"
    assert isohub_here(*command).stdout == f"{commits[6]}\n"
    skipping = isohub_here(
        *common,
        "--run",
        "--",
        "sh",
        "-c",
        "case $ISOHUB_COMMIT in " + commits[1] + ") exit 0;; " + commits[8] + ") exit 1;; esac; exit 125",
    )
    assert skipping.returncode == 1
    assert skipping.stdout.split() == [commits[number] for number in range(2, 9)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["model"], "expected --input or --test"),
        (["--input", "randn(1)"], "expected the name of a model"),
        (["model", "more", "--input", "randn(1)"], "expected the name of a model"),
        (["--run"], "--run wants a command"),
        (["--run", "--input", "randn(1)", "--", "true"], "--run wants a command"),
        (["model", "--input", "randn(a)"], "whole numbers"),
        (["model", "--input", "randn(1)", "--ray", "auto", "--workers", "1"], "--workers is for this machine"),
    ],
)
def test_wrong_usage(isohub_here: Run, clone: tuple[str, dict[int, str]], change: list[str], words: str) -> None:
    path, commits = clone
    done = isohub_here("bisect", path, "--good", commits[1], "--bad", "main", *change)
    assert done.returncode == 2
    assert words in done.stderr
