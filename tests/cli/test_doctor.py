"""``isohub doctor``: its text, its JSON and its exit status, here and where there is less."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require_layers

LACKING = str(Path(__file__).parents[1] / "lacking.py")


@pytest.fixture
def doctor(tmp_path):
    def run(*arguments, lacking=""):
        command = [sys.executable, "-m", "isohub", "doctor", *arguments]
        if lacking:
            command = [sys.executable, LACKING, lacking, "--", *command]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def test_where_all_holds(doctor):
    require_layers("landlock", "seccomp", "namespaces")
    done = doctor()
    assert (done.returncode, done.stderr) == (0, "")
    assert 'Sandbox(require="all") holds.' in done.stdout
    assert "BAD" not in done.stdout
    assert doctor("--require", "all").returncode == 0


def test_as_json(doctor):
    require_layers("landlock", "seccomp", "namespaces")
    found = json.loads(doctor("--json").stdout)
    assert found["default_holds"] is found["all_holds"] is True
    assert {"landlock", "seccomp", "namespaces", "limits"} <= set(found["active"])
    assert all(trial["holds"] for trial in found["trials"])


@pytest.mark.parametrize(
    ("lacking", "default", "everything"),
    [("namespaces", 0, 1), ("landlock", 1, 1), ("seccomp", 1, 1), ("landlock,seccomp,namespaces", 1, 1)],
)
def test_where_there_is_less(doctor, lacking, default, everything):
    require_layers("landlock", "seccomp", "namespaces")
    done = doctor(lacking=lacking)
    assert done.returncode == default
    for name in lacking.split(","):
        assert f"{name:<12} NO " in done.stdout
    assert ("Untrusted repos are refused here" in done.stdout) is bool(default)
    done = doctor("--json", "--require", "all", lacking=lacking)
    assert done.returncode == everything
    found = json.loads(done.stdout)
    assert set(found["missing"]) == set(lacking.split(","))
    assert all(found["details"][name] for name in found["missing"])


def test_a_mistake_is_one_of_usage(doctor):
    assert doctor("--require", "some").returncode == 2
