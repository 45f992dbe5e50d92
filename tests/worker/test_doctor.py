"""What the examining process finds on this machine, and on ones that have less, by their own kernel's word."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from isohub.session.spawn import START
from tests.conftest import require_layers

LACKING = Path(__file__).parents[1] / "lacking.py"
TRIALS = {
    "read a file of the caller's": True,
    "write a file of the caller's": True,
    "open a socket": True,
    "signal the caller": True,
    "read the caller's environment": True,
    "enter a new user namespace": True,
    "write to its own directory": False,
}


@pytest.fixture
def examined(tmp_path):
    def run(*lacking: str, before: str = ""):
        command = [sys.executable, "-I", str(START), "doctor", str(tmp_path)]
        if before:
            code = (
                f"import runpy, sys; sys.argv = {command[2:]!r}; runpy.run_path(sys.argv[0])['_package']()\n{before}\n"
            )
            command = [sys.executable, "-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')"]
        if lacking:
            command = [sys.executable, str(LACKING), ",".join(lacking), "--", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_what_is_there_is_applied_and_tried(examined):
    require_layers("landlock", "seccomp", "namespaces")
    found = examined()
    assert found["machine"] == platform.machine()
    assert found["kernel"] == platform.release()
    assert found["user"] == os.geteuid()
    assert found["landlock_abi"] >= 1
    assert {"landlock", "seccomp", "namespaces", "limits"} <= set(found["active"])
    assert found["missing"] == []
    assert found["fault"] is None
    assert dict(TRIALS.items()) == {name: outcome != "succeeded" for name, (_, outcome) in found["trials"].items()}
    assert all(holds for holds, _ in found["trials"].values())


@pytest.mark.parametrize(
    ("lacking", "bad"),
    [
        (["landlock"], set()),
        (["seccomp"], set()),
        (["namespaces"], set()),
        (["landlock", "namespaces"], {"read a file of the caller's", "write a file of the caller's"}),
        (["seccomp", "namespaces"], {"open a socket"}),
        (["landlock", "seccomp", "namespaces"], {"read a file of the caller's", "write a file of the caller's", "open a socket", "signal the caller"}),
    ],
    ids=lambda value: "+".join(sorted(value)) or "nothing",
)  # fmt: skip
def test_what_is_missing_is_named_and_what_does_not_hold_is_seen(examined, lacking, bad):
    require_layers("landlock", "seccomp", "namespaces")
    found = examined(*lacking)
    assert set(found["missing"]) == set(lacking)
    assert all(found["details"][name] for name in lacking)
    fails = {name for name, (holds, _) in found["trials"].items() if not holds}
    assert bad <= fails
    if lacking in (["namespaces"],):
        assert fails == set()
    assert "write to its own directory" not in fails


def test_a_layer_that_is_there_by_its_word_and_holds_nothing_is_seen(examined):
    """Seen by what is tried, not by what is asked."""
    require_layers("landlock", "seccomp", "namespaces")
    found = examined(before="from isohub.sandbox import seccomp; seccomp.install = lambda *args: None")
    assert "seccomp" in found["active"]
    assert found["trials"]["open a socket"] == [False, "succeeded"]


def test_a_process_that_cannot_be_confined_says_why(examined):
    require_layers("landlock")
    found = examined(
        before="from isohub.sandbox import landlock\ndef no(*args): raise OSError(1, 'refused')\nlandlock.Ruleset.restrict = no"
    )
    assert "refused" in found["fault"]
    assert found["trials"] == {}
