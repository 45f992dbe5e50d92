"""``isohub evaluate`` and ``file.py:name``."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import click
import pytest
import torch

from isohub.cli.functions import named_object
from tests.cli.conftest import Run

METRICS = """\
import torch
from words import NAME


def mean(model, x):
    y = model(x)
    return {NAME: y.mean(), "rows": len(y)}


def data():
    return [torch.full((2, 3, 8, 8), float(n)) for n in range(4)]


def fails(model, x):
    raise RuntimeError("\\x1b[2Jgone")


listed = data()
number = 3
"""


@pytest.fixture
def metrics(tmp_path: Path) -> str:
    (tmp_path / "words.py").write_text('NAME = "mean"\n')
    path = tmp_path / "metrics.py"
    path.write_text(METRICS)
    return str(path)


def test_a_table_and_its_other_forms(isohub_here: Run, metrics: str, hub, tmp_path: Path) -> None:
    torch.save(torch.ones(2, 3, 8, 8), tmp_path / "a.pt")
    torch.save(torch.zeros(1, 3, 8, 8), tmp_path / "b.pt")
    results = tmp_path / "r.jsonl"
    common = ["evaluate", f"{metrics}:mean", hub("good"), "--model", "plus", "--arg", "2.0", "--results", str(results)]
    common += ["--data", str(tmp_path / "*.pt"), "--reduce", "rows=sum", "--workers", "1"]
    done = isohub_here(*common)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:6] == ["ref", "mean", "rows", "batches", "failed", "seconds"]
    assert "2.66667" in done.stdout
    found = json.loads(isohub_here(*common, "--json").stdout)
    assert found["resumed"] == 2
    assert found["rows"][0]["metrics"] == {"mean": pytest.approx(8 / 3), "rows": 3}
    (row,) = csv.DictReader(io.StringIO(isohub_here(*common, "--csv").stdout))
    assert float(row["mean"]) == pytest.approx(8 / 3)
    assert isohub_here(*common, "--markdown").stdout.startswith("| ref | mean | rows |")
    assert f"{hub('good')} rows 3\n" in isohub_here(*common, "--quiet").stdout
    refused = isohub_here(*common, "--seed", "3")
    assert refused.returncode == 1
    assert "seed was 0, and is 3" in refused.stderr


def test_failures_are_an_exit_status(isohub_here: Run, metrics: str, hub) -> None:
    done = isohub_here(
        "evaluate", f"{metrics}:fails", hub("good"), hub("raises"), "--model", "model", "--data", f"{metrics}:data"
    )
    assert done.returncode == 1
    assert "batch 0: RuntimeError: \\x1b[2Jgone" in done.stdout
    assert "ImportError: this repo cannot be imported" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data", "no-such-*.pt"], "no file is"),
        (["--data", "METRICS:gone"], "has no 'gone'"),
        (["--data", "METRICS:number"], "data is a int"),
        (["--reduce", "median"], "expected one of"),
        (["--csv", "--json"], "exclude each other"),
        (["--ray", "auto", "--workers", "2"], "--workers is for this machine"),
        (["--seed", str(1 << 63)], "is not below"),
    ],
)
def test_wrong_usage(isohub_here: Run, metrics: str, hub, change: list[str], words: str) -> None:
    change = [text.replace("METRICS", metrics) for text in change]
    arguments = ["evaluate", f"{metrics}:mean", hub("good"), "--model", "plus", "--data", f"{metrics}:listed", *change]
    done = isohub_here(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_an_object_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("value = 3\n")
    assert named_object(f"{tmp_path}/torch.py:value", "--data") == 3
    assert torch.ones(1).item() == 1
    (tmp_path / "bad.py").write_text("import sys\nsys.exit(3)\n")
    for text, words in (
        (f"{tmp_path}/bad.py:x", "cannot be imported: SystemExit"),
        (f"{tmp_path}/gone.py:x", "there is no file"),
        (f"{tmp_path}/bad.py", "expected file.py:name"),
        ("bad.py:1x", "expected file.py:name"),
    ):
        with pytest.raises(click.BadParameter, match=words):
            named_object(text, "--data")
