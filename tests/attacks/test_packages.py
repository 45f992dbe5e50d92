"""C30: packages that isohub installed are anybody's, and run in workers that are confined."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import isohub
from isohub import errors
from isohub.environments.runtime import HOST, Runtime
from isohub.session import spawn
from tests.attacks import acts
from tests.conftest import all_on, require_layers
from tests.lacking import start_without

# Notes which process imports it, and tries what a worker must not do.
TELLTALE = """
import os
imported_by = os.getpid()
try:
    with open({target!r}, "a") as file:
        file.write("{name} ran outside\\n")
except OSError:
    pass
"""


@pytest.fixture
def packages(tmp_path):
    directory = tmp_path / "packages"
    directory.mkdir()
    return directory


@pytest.fixture
def outside(tmp_path):
    """A file of the caller's; what is in it was written by what was not confined."""
    file = tmp_path / "outside"
    file.write_text("")
    return file


def module(packages, outside, name, text=""):
    (packages / name).parent.mkdir(exist_ok=True)
    (packages / name).write_text(TELLTALE.format(target=str(outside), name=name) + text)


def shadowing(packages, outside):
    """A wheel of any name may hold what torch imports."""
    import typing_extensions

    module(packages, outside, "typing_extensions.py", Path(typing_extensions.__file__).read_text())


def overlay(packages):
    return Runtime(f"key-{packages}", HOST.python, (str(packages),))


def test_c30_what_torch_imports_of_an_overlay_is_imported_by_the_worker(hub, packages, outside):
    """A wheel of any name may hold a `numpy`, or what torch imports; its zygote must not be what runs it."""
    require_layers("landlock", "seccomp")
    shadowing(packages, outside)
    with isohub.Session(timeout_s=60) as own, all_on(overlay(packages)):
        echo = own.load(hub("echoes"), "echo")
        file, by, pid = echo.origin("typing_extensions")
        assert file == str(packages / "typing_extensions.py")
        assert by == pid  # in the worker itself, not before it was forked
        assert torch.equal(echo(torch.arange(3)), torch.arange(3))
        assert {"landlock", "seccomp"} <= set(own.workers()[0].confinement.active)
        # Another worker of it, and one of the host's, beside.
        other = own.load(hub("good"), "mlp")
        assert other(torch.ones(1, 4)).shape == (1, 2)
    assert outside.read_text() == ""


def test_c30_no_pth_file_and_no_customisation_runs(hub, packages, outside):
    line = f"import os; open({str(outside)!r}, 'a').write('ran')\n"
    (packages / "distutils-precedence.pth").write_text(line)
    module(packages, outside, "sitecustomize.py")
    module(packages, outside, "usercustomize.py")
    with isohub.Session(timeout_s=60) as own, all_on(overlay(packages)):
        assert own.load(hub("echoes"), "echo")("x") == "x"
    assert outside.read_text() == ""


def test_c30_packages_are_read_and_not_written_and_those_of_others_not_read(hub, packages, outside, tmp_path):
    module(packages, outside, "only_there.py")
    other = tmp_path / "other"
    other.mkdir()
    (other / "secret.py").write_text("x = 1\n")
    (packages / "file").write_text("")
    source = Path(acts.__file__).read_text()
    with isohub.Session(timeout_s=60) as own, all_on(overlay(packages)):
        echo = own.load(hub("echoes"), "echo")
        assert echo.attempt(source, "read", str(packages / "only_there.py")) == "done"
        assert echo.attempt(source, "list_directory", str(packages)) == "done"
        for act in ("overwrite", "create", "remove", "make_directory", "write_by_reopening"):
            assert echo.attempt(source, act, str(packages)) != "done", act
        assert echo.attempt(source, "read", str(other / "secret.py")) != "done"
    assert sorted(path.name for path in packages.iterdir()) == ["file", "only_there.py"]


def test_c30_nor_before_it_is_known_that_the_worker_is_confined(hub, packages, outside, tmp_path, monkeypatch):
    """On a machine that has nothing to confine with, an untrusted repo's packages do not run either."""
    layers = ("landlock", "seccomp", "namespaces")
    require_layers(*layers)
    shadowing(packages, outside)
    monkeypatch.setattr(spawn, "START", start_without(tmp_path, *layers))
    with isohub.Session(tmp_path / "store", timeout_s=60) as own, all_on(overlay(packages)):
        with pytest.raises(errors.ConfinementError):
            own.load(hub("echoes"), "echo")
        assert outside.read_text() == ""
        assert own.load(hub("echoes"), "echo", trust_repo=True)("x") == "x"
    assert outside.read_text() == "typing_extensions.py ran outside\n"  # the control
