"""How the command line is run: as a process of its own, or in this one for what starts no worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from isohub.cli.main import main
from tests.comparison.conftest import variants

__all__ = ["isohub_here", "isohub_process", "variants"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def isohub_process(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``isohub_process("list", repo)``: what it printed and its exit status."""
    directory = tmp_path_factory.mktemp("cwd")

    def run(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "isohub", *arguments],
            cwd=cwd or directory,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return run


@pytest.fixture
def isohub_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The same in this process, with a store of its own."""
    monkeypatch.setenv("ISOHUB_HOME", str(tmp_path / "isohub-home"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        code = ended.value.code
        return subprocess.CompletedProcess(arguments, code if isinstance(code, int) else 1, captured.out, captured.err)

    return run
