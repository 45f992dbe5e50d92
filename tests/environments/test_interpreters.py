"""isohub.environments.interpreters: those that this machine has, and files that only look like one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isohub.environments.interpreters import find_interpreter, this_interpreter
from isohub.errors import EnvironmentBuildError


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_this_one(tmp_path: Path):
    found = this_interpreter()
    assert found.version == sys.version_info[:3]
    assert found.executable == (getattr(sys, "_base_executable", None) or sys.executable)
    version = ".".join(map(str, found.version))
    assert find_interpreter(version) == found
    assert find_interpreter(version.rpartition(".")[0]).version[:2] == found.version[:2]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    assert find_interpreter(str(tmp_path / "venv" / "bin" / "python")).executable == found.executable


def test_versions_of_pyenv_s(tmp_path: Path, monkeypatch):
    own = this_interpreter()
    said = f'exec {own.executable} "$@"'
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    # What its name says is not believed, and a script is no interpreter: a shim would say the version of the directory.
    script(tmp_path / "versions" / "3.50.1" / "bin" / "python", said)
    with pytest.raises(
        EnvironmentBuildError, match=r"no Python 3.50 was found on this machine; there is .*3.50.1"
    ) as caught:
        find_interpreter("3.50")
    assert "pyenv install 3.50" in caught.value.hint
    (tmp_path / "versions" / "3.51.1" / "bin").mkdir(parents=True)
    (tmp_path / "versions" / "3.51.1" / "bin" / "python").symlink_to(own.executable)
    with pytest.raises(EnvironmentBuildError):
        find_interpreter("3.51")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("echo no json", "no Python that can be asked"),
        ("exit 3", "exit 3"),
        ("yes [ | head -c 100000", "no Python that can be asked"),
        ("printf '\\033[2Jevil' >&2; exit 1", "evil"),
    ],
)
def test_what_is_no_interpreter(tmp_path: Path, body: str, match: str):
    with pytest.raises(EnvironmentBuildError, match=match) as caught:
        find_interpreter(str(script(tmp_path / "python", body)))
    assert "\x1b" not in str(caught.value)


def test_one_that_cannot_be_run(tmp_path: Path):
    (tmp_path / "python").write_bytes(b"\x7fELF")
    with pytest.raises(EnvironmentBuildError, match="cannot be run"):
        find_interpreter(str(tmp_path / "python"))
    with pytest.raises(EnvironmentBuildError, match="is not there"):
        find_interpreter(str(tmp_path / "nothing"))


def test_too_old_and_another_implementation(tmp_path: Path):
    answer = (
        '{"version": [3, %d, 0], "executable": "/x", "prefix": "/", "platform": "linux", "abi": "", '
        '"markers": {"implementation_name": "%s"}}'
    )
    with pytest.raises(EnvironmentBuildError, match="Python 3.7.0; workers run on 3.8"):
        find_interpreter(str(script(tmp_path / "old", f"echo '{answer % (7, 'cpython')}'")))
    with pytest.raises(EnvironmentBuildError, match="is pypy"):
        find_interpreter(str(script(tmp_path / "pypy", f"echo '{answer % (10, 'pypy')}'")))


def test_it_is_started_with_nothing_of_the_caller_s(tmp_path: Path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('the caller\\'s module was imported')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "python"
    os.symlink(sys.executable, link)
    assert find_interpreter(str(link)).version == sys.version_info[:3]


def test_a_program_that_does_not_answer(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("isohub.environments.interpreters._TIMEOUT_S", 0.2)
    with pytest.raises(EnvironmentBuildError, match=r"python did not say in 0\.2 s what it is") as caught:
        find_interpreter(str(script(tmp_path / "python", "exec sleep 30")))
    assert "import json" not in str(caught.value)
