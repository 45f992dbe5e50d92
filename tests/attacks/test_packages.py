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
from tests.conftest import all_on, require_layers, telltale
from tests.lacking import start_without


def shadowing(packages, outside):
    """A wheel of any name may hold what torch imports."""
    import typing_extensions

    telltale(packages, outside, "typing_extensions.py", Path(typing_extensions.__file__).read_text())


def overlay(packages):
    return Runtime(f"key-{packages}", HOST.python, (str(packages),))


def test_c30_what_torch_imports_of_an_overlay_is_imported_by_the_worker(hub, packages, outside):
    """A wheel of any name may hold a `numpy`, or what torch imports; its zygote must not be what runs it."""
    require_layers("landlock", "seccomp")
    shadowing(packages, outside)
    with isohub.Session(timeout_s=60, environment="auto") as own, all_on(overlay(packages)):
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


@pytest.fixture
def echo(hub, packages, outside):
    """In a worker over packages that try to run as its interpreter starts."""
    line = f"import os; open({str(outside)!r}, 'a').write('ran')\n"
    (packages / "distutils-precedence.pth").write_text(line)
    for name in ("sitecustomize.py", "usercustomize.py", "only_there.py"):
        telltale(packages, outside, name)
    with isohub.Session(timeout_s=60, environment="auto") as own, all_on(overlay(packages)):
        yield own.load(hub("echoes"), "echo")


def test_c30_packages_are_read_and_not_written_and_those_of_others_not_read(echo, packages, outside, tmp_path):
    assert outside.read_text() == ""  # no hook of theirs ran
    before = sorted(path.name for path in packages.iterdir())
    other = tmp_path / "other"
    other.mkdir()
    (other / "secret.py").write_text("x = 1\n")
    source = Path(acts.__file__).read_text()
    assert echo.attempt(source, "read", str(packages / "only_there.py")) == acts.DONE
    assert echo.attempt(source, "list_directory", str(packages)) == acts.DONE
    for act in ("create", "make_directory", "write_by_a_symlink_to_the_directory", "symlink_into"):
        assert echo.attempt(source, act, str(packages)) != acts.DONE, act
    assert echo.attempt(source, "append_to", str(packages / "only_there.py")) != acts.DONE
    assert echo.attempt(source, "read", str(other / "secret.py")) != acts.DONE
    assert sorted(path.name for path in packages.iterdir()) == before
    assert outside.read_text() == ""


def test_c30_nor_before_it_is_known_that_the_worker_is_confined(hub, packages, outside, tmp_path, monkeypatch):
    """On a machine that has nothing to confine with, an untrusted repo's packages do not run either."""
    layers = ("landlock", "seccomp", "namespaces")
    require_layers(*layers)
    shadowing(packages, outside)
    monkeypatch.setattr(spawn, "START", start_without(tmp_path, *layers))
    with isohub.Session(tmp_path / "store", timeout_s=60, environment="auto") as own, all_on(overlay(packages)):
        with pytest.raises(errors.ConfinementError):
            own.load(hub("echoes"), "echo")
        assert outside.read_text() == ""
        assert own.load(hub("echoes"), "echo", trust_repo=True)("x") == "x"
    assert outside.read_text() == "typing_extensions.py ran outside\n"  # the control
