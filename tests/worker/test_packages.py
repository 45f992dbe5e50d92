"""What isohub has installed runs in confined workers alone, and is found before what the host has."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import time

import pytest
import torch

import isohub
from isohub import errors
from isohub.environments.runtime import HOST, Runtime
from isohub.worker.packages import put_on_path, shadowed
from tests.conftest import all_on, telltale


def overlay(packages):
    return Runtime(f"key-{packages}", HOST.python, (str(packages),))


def test_an_overlay_comes_before_the_hosts_packages_and_after_the_standard_library(hub, packages, outside):
    for name in ("requests/__init__.py", "json.py", "only_there.py"):
        telltale(packages, outside, name)
    with isohub.Session(timeout_s=60, environment="auto") as own, all_on(overlay(packages)):
        echo = own.load(hub("echoes"), "echo")
        file, by, pid = echo.origin("requests")
        assert (file, by) == (str(packages / "requests/__init__.py"), pid)
        assert echo.origin("only_there")[0] == str(packages / "only_there.py")
        assert echo.origin("json")[0] == json.__file__
        assert echo.origin("torch")[:2] == (torch.__file__, None)
        (worker,) = own.workers()
        assert (worker.environment, worker.torch) == (f"key-{packages}", torch.__version__)
        assert worker.python == ".".join(map(str, sys.version_info[:3]))
        # It shares what its zygote has, as those of the host do: torch takes more than twice as much.
        assert worker.uss_bytes is None or worker.uss_bytes < 64 << 20
    assert outside.read_text() == ""


def test_what_is_imported_already_is_shadowed(packages, monkeypatch):
    for name in (
        "torch/__init__.py",
        "numpy.py",
        "json.py",
        "not_imported.py",
        "torch-2.dist-info/METADATA",
        "nvidia/x",
    ):
        (packages / name).parent.mkdir(exist_ok=True)
        (packages / name).write_text("")
    monkeypatch.setitem(sys.modules, "numpy", __import__("numpy"))
    assert shadowed([str(packages)]) == ["numpy", "torch"]
    assert shadowed([]) == []


def test_the_place_on_the_path(monkeypatch):
    standard = sysconfig.get_path("stdlib")
    before = ["/checkout", standard, os.path.join(standard, "lib-dynload"), "/site-packages"]
    monkeypatch.setattr(sys, "path", before)
    put_on_path(["/one", "/two"])
    assert sys.path == [*before[:3], "/one", "/two", "/site-packages"]


# Interpreters without a torch that workers can use.


@pytest.fixture
def bare(tmp_path):
    """A virtual environment's interpreter with nothing in it."""
    import venv

    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    return str(tmp_path / "bare" / "bin" / "python")


def test_no_torch_in_an_interpreter(hub, bare):
    with isohub.Session(timeout_s=60, environment="auto") as own, all_on(Runtime("bare", bare)):
        with pytest.raises(errors.WorkerStartError) as caught:
            own.load(hub("good"), "mlp")
        assert own.workers() == []
    told = str(caught.value)
    assert bare in told
    assert "No module named 'torch'" in told
    assert f"hint: run `{bare} -I -c 'import torch'`" in told
    assert "No module named 'torch'" in caught.value.stderr_tail


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise OSError('libcudnn.so.8: cannot open shared object file: No such file')", "libcudnn.so.8"),
        ("__version__ = '1.12.1'", "torch 1.12.1; isohub's workers run on torch 1.13 or newer"),
        ("raise ImportError('\\x1b[2J' + 'x' * 100000)", "x1b[2J"),
        ("import os; os._exit(3)", "exit code 3 while importing torch"),
    ],
)
def test_a_torch_that_cannot_be_used(hub, packages, bare, text, words):
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text(text)
    with isohub.Session(timeout_s=60, environment="auto") as own, all_on(Runtime("broken", bare, (str(packages),))):
        with pytest.raises(errors.WorkerError) as caught:
            own.load(hub("good"), "mlp")
        assert own.workers() == []
    told = str(caught.value)
    assert words in told
    assert "\x1b" not in told
    assert len(told) < 30_000
    if isinstance(caught.value, errors.WorkerStartError):
        assert f"PYTHONPATH={packages} {bare} -c 'import torch'" in told


def test_packages_that_never_finish_are_ended_in_time(hub, packages, bare):
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text("import time; time.sleep(600)")
    with isohub.Session(timeout_s=1, environment="auto") as own, all_on(Runtime("slow", bare, (str(packages),))):
        began = time.monotonic()
        with pytest.raises(errors.WorkerTimeoutError, match="importing torch"):
            own.load(hub("good"), "mlp")
        assert time.monotonic() - began < 60
        assert own.workers() == []
