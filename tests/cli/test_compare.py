"""``isohub compare``: tables, JSON, Markdown, reports, and an exit status for CI."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
INPUT = ("--input", "randn(4,8)", "--repeats", "0")


@pytest.fixture
def compared(isohub_here: Run, variants: Path) -> Run:
    def run(*names: str, model: str = "model", options: tuple[str, ...] = INPUT) -> subprocess.CompletedProcess[str]:
        return isohub_here("compare", *(f"{variants}:{name}" for name in names), model, *options)

    return run


def test_the_exit_status_is_for_ci(compared: Run) -> None:
    assert compared("base", "nudged").returncode == 0  # a look, and no gate
    assert compared("base", "nudged", options=(*INPUT, "--fail-on", "1e-5", "--rtol", "1")).returncode == 0
    gated = compared("base", "nudged", options=(*INPUT, "--fail-on", "1e-5", "-q"))
    assert (gated.returncode, gated.stderr) == (1, "")
    assert gated.stdout.startswith("outputs changed: max abs 0.0001 at output['logits']")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model",), "Missing argument|two references"),
        (("a/b", "model"), "two references or more"),
        (("a/b", "c/d", "model", "--input", "randn"), "expected randn"),
        (("a/b", "c/d", "model", "--fail-on", "nan"), "from 0 on"),
        (("a/b", "c/d", "model", "--report", "x.pdf"), "none of .html"),
        (("a/b", "c/d", "model", "--report", "no/where/x.md"), "no directory"),
        (("a/b", "c/d", "model", "--markdown", "--json"), "--markdown goes without"),
        (("a b", "c/d", "model"), "a b"),
    ],
)
def test_what_is_wrong_as_written_is_status_2(isohub_here: Run, arguments: tuple[str, ...], words: str) -> None:
    done = isohub_here("compare", *arguments)
    assert done.returncode == 2
    assert any(word in done.stderr for word in words.split("|"))


def test_the_table_fits_80_columns(compared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = compared("base", "values", "renamed", "broken", options=("--input", "randn(4,8)", "--repeats", "3"))
    assert done.returncode == 1  # a ref that failed
    lines = done.stdout.splitlines()
    tables = [line for line in lines if "  " in line.strip()]
    assert len(tables) > 15
    assert max(map(len, tables)) <= 80
    assert lines[0].startswith("B: outputs changed: max abs ")
    assert "C against A" in lines
    assert "D failed (load): RuntimeError: it cannot be built" in lines
    assert any(line.startswith("renamed") and "trunk.0.weight" in line for line in lines)


def test_json_markdown_and_reports(compared: Run, tmp_path: Path) -> None:
    reports = [tmp_path / name for name in ("r.html", "r.md", "r.json")]
    options = [part for report in reports for part in ("--report", str(report))]
    found: dict[str, Any] = json.loads(compared("base", "values", options=(*INPUT, *options, "--json")).stdout)
    assert json.loads(reports[2].read_text()) == found
    assert found["changed"] is True
    assert found["inputs"] == "randn(4,8)"
    assert reports[0].read_text().startswith("<!DOCTYPE html>")
    assert reports[1].read_text().startswith("**outputs changed: ")


def test_arguments_modes_and_methods(compared: Run, tmp_path: Path) -> None:
    torch.save(torch.ones(2, 8), tmp_path / "x.pt")
    options = ("--input", f"x={tmp_path / 'x.pt'}", "--method", "classify", "--eval", "--repeats", "0", "--json")
    found = json.loads(compared("base", "same", options=options).stdout)
    assert found["refs"][0]["outputs"] == [["output", "int64[2]"]]
    done = compared("base", "values", model="numbers", options=("--arg", "5", "--markdown"))
    assert done.stdout.startswith("**outputs changed: max abs 1 at `built['values']`**\n\n|  | ref | commit |  |\n")
    assert "`numbers(5)`, not called" in done.stdout
