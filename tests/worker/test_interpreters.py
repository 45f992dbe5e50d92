"""What runs in a worker is Python from 3.8 on: read by each interpreter that is here, and run without torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import isohub
from isohub.environments.interpreters import find_interpreter
from isohub.errors import EnvironmentBuildError
from isohub.sandbox.policy import LAYERS
from tests.conftest import layers_here

PACKAGE = Path(isohub.__file__).parent
MINORS = ("3.8", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14")
# Imports all of the worker's side as a zygote would, and frames one message by the wire's own code.
IMPORTS = """
import importlib, os, socket, sys, types
root = sys.argv[1]
package = types.ModuleType("isohub"); package.__path__ = [root]; sys.modules["isohub"] = package
for part in ("worker", "wire", "sandbox"):
    for name in sorted(os.listdir(os.path.join(root, part))):
        if name.endswith(".py") and name not in ("__init__.py", "start.py"):
            importlib.import_module("isohub." + part + "." + name[:-3])
import isohub.errors
assert "torch" not in sys.modules, "torch was imported early"
from isohub.wire.channel import Channel
one, other = socket.socketpair()
Channel(one).send(1, b'{"number":1}', [0])
frame = Channel(other).receive()
assert bytes(frame.body) == b'{"number":1}' and len(frame.descriptors) == 1
from isohub.sandbox.grants import interpreter_rules, is_below
rules = [os.path.realpath(rule.path) for rule in interpreter_rules(root)]
assert any(is_below(os.path.realpath(os.__file__), path) for path in rules)
print(sys.version_info[1])
"""


@pytest.fixture(params=MINORS)
def python(request):
    """Path of an interpreter of this minor version."""
    try:
        return find_interpreter(request.param).executable
    except EnvironmentBuildError as error:
        pytest.skip(f"no Python {request.param} here: {error}")


def run(python, *arguments):
    command = [python, "-I", "-S", "-W", "error", "-W", "ignore::ResourceWarning", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_every_module_is_imported(python):
    done = run(python, "-c", IMPORTS, str(PACKAGE))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdigit()


def test_the_same_confinement(python, tmp_path):
    """A process of this interpreter is confined, and tries what a worker must not do."""
    done = run(python, str(PACKAGE / "worker" / "start.py"), "doctor", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    lacking = layers_here()
    assert set(found["missing"]) == set(LAYERS) & set(lacking)
    if not lacking:
        assert found["trials"]
        assert all(refused for refused, _ in found["trials"].values()), found["trials"]


def test_an_interpreter_that_is_too_old_says_so(tmp_path):
    """Which is the first thing that it reads."""
    text = (PACKAGE / "worker" / "start.py").read_text()
    assert "sys.version_info < (3, 8)" in text
    for place in sorted((Path.home() / ".pyenv" / "versions").glob("3.[67].*/bin/python")):
        done = subprocess.run(
            [str(place), "-I", str(PACKAGE / "worker" / "start.py"), "doctor", str(tmp_path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert "isohub's workers run on 3.8 or newer" in done.stderr
