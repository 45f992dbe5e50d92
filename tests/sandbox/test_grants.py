"""Which paths a worker is given, from interpreters and checkouts of every form."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from isohub.sandbox import grants
from isohub.sandbox.grants import interpreter_rules, is_below, worker_rules
from isohub.sandbox.landlock import Rule

WANTED = {"checkout": "", "read": [], "write": [], "gpu": False, "network": "none"}


def wanted(**fields):
    return {**WANTED, **fields}


def kinds(rules, *kinds_):
    return {rule.path for rule in rules if rule.kind in (kinds_ or ("read", "write", "device", "list"))}


@pytest.mark.parametrize(
    ("path", "directory", "below"),
    [
        ("/a", "/a", True), ("/a/b", "/a", True), ("/ab", "/a", False), ("/a", "/a/b", False), ("/a", "/", True),
        ("/", "/", True), ("/a/b", "/a/", True),
    ],
)  # fmt: skip
def test_below(path, directory, below):
    assert is_below(path, directory) is below


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """An interpreter in a directory of somebody's, with a path of its own."""
    home = tmp_path / "home"
    prefix = home / "env"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "python").write_text("")
    for name in ("prefix", "exec_prefix", "base_prefix", "base_exec_prefix"):
        monkeypatch.setattr(sys, name, str(prefix))
    monkeypatch.setattr(sys, "executable", str(prefix / "bin" / "python"))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(grants, "_home", lambda: str(home))
    return home


def test_an_interpreter_its_packages_and_the_systems_programs(interpreter):
    rules = interpreter_rules("/package/that/is/not/there")
    assert str(interpreter / "env") in kinds(rules, "read")
    assert "/usr" in kinds(rules, "read")
    assert "/dev/null" in kinds(rules, "device")
    assert kinds(rules, "write") == set()
    held = (
        "/home",
        "/root",
        "/run",
        "/var",
        "/tmp",
        "/opt",
        "/srv",
        "/mnt",
        "/etc",
        "/",
        str(interpreter),
        str(Path.home()),
    )
    for path in held:
        assert not any(is_below(path, given) for given in kinds(rules, "read", "write")), path
    for path in ("/etc/shadow", "/etc/sudoers", "/etc/hostname", "/etc/machine-id", "/etc/ssh"):
        assert not any(is_below(path, given) for given in kinds(rules)), path


@pytest.mark.parametrize("above", [".", ".."], ids=["home itself", "what is above it"])
def test_an_interpreter_installed_into_a_home_does_not_open_it(interpreter, monkeypatch, above):
    """``./configure --prefix=$HOME``, as on machines where nothing else may be written to."""
    place = (interpreter / above).resolve()
    for name in ("bin", "lib", "include"):
        (place / name).mkdir(exist_ok=True)
    (interpreter / ".ssh").mkdir()
    for name in ("prefix", "exec_prefix", "base_prefix", "base_exec_prefix"):
        monkeypatch.setattr(sys, name, str(place))
    monkeypatch.setattr(sys, "executable", str(place / "bin" / "python"))
    given = kinds(interpreter_rules("/package"), "read")
    assert {str(place / name) for name in ("bin", "lib", "include")} <= given
    assert not any(is_below(str(interpreter / ".ssh"), path) for path in given)


def test_of_an_editable_install_modules_and_packages_alone(interpreter, monkeypatch):
    place = interpreter / "project"
    for name in ("package", "data", ".git", "dist-1.0.dist-info", "egg.egg-info", ".hidden"):
        (place / name).mkdir(parents=True)
    (place / "package" / "__init__.py").write_text("")
    (place / ".hidden" / "__init__.py").write_text("")
    for name in (
        "module.py",
        "native.so",
        ".env",
        "secrets.txt",
        "path.pth",
        "README.md",
        ".secret.py",
        "compiled.pyc",
    ):
        (place / name).write_text("")
    (place / "linked.py").symlink_to("secrets.txt")
    (place / "linked").symlink_to(interpreter)
    monkeypatch.setattr(sys, "path", ["", str(place), str(place / "nothing"), str(interpreter / "env" / "lib")])
    rules = interpreter_rules("/package")
    given = {os.path.relpath(path, place) for path in kinds(rules, "read") if is_below(path, str(place))}
    assert given == {
        "package",
        "module.py",
        "native.so",
        "path.pth",
        "compiled.pyc",
        "dist-1.0.dist-info",
        "egg.egg-info",
    }
    assert str(place) in kinds(rules, "list")


def test_a_zip_on_the_path_is_read(interpreter, monkeypatch):
    archive = interpreter / "modules.zip"
    archive.write_bytes(b"")
    monkeypatch.setattr(sys, "path", [str(archive)])
    assert str(archive) in kinds(interpreter_rules("/package"), "read")


def test_a_checkout_is_read_and_its_git_directory_is_not(tmp_path):
    (tmp_path / "hubconf.py").write_text("")
    (tmp_path / "models").mkdir()
    (tmp_path / "keys").symlink_to("/home/somebody/.ssh")
    plain = worker_rules(wanted(checkout=str(tmp_path)), [])
    assert plain == [Rule(str(tmp_path), "read")]
    (tmp_path / ".git").mkdir()
    rules = worker_rules(wanted(checkout=str(tmp_path)), [])
    assert kinds(rules, "read") == {str(tmp_path / "hubconf.py"), str(tmp_path / "models")}
    assert kinds(rules, "list") == {str(tmp_path)}


def test_what_the_caller_names_is_given_and_must_be_there(tmp_path):
    rules = worker_rules(wanted(checkout=str(tmp_path), read=["/etc/hosts"], write=[str(tmp_path)]), ["/own"])
    assert Rule("/etc/hosts", "read") in rules
    assert kinds(rules, "write") == {str(tmp_path), "/own"}
    for field in ("read", "write"):
        with pytest.raises(FileNotFoundError):
            worker_rules(wanted(checkout=str(tmp_path), **{field: [str(tmp_path / "nothing")]}), [])


def test_names_of_the_network_come_with_a_network(tmp_path):
    assert "/etc/resolv.conf" not in kinds(worker_rules(wanted(checkout=str(tmp_path)), []))
    for network in ("proxy", "open"):
        assert "/etc/hosts" in kinds(worker_rules(wanted(checkout=str(tmp_path), network=network), []), "read")


def test_gpus_come_when_they_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "nvidia0").write_text("")
    (tmp_path / "caps").mkdir()
    monkeypatch.setattr(grants, "_GPU_DEVICES", (f"{tmp_path}/*",))
    monkeypatch.setattr(grants, "_GPU_READ", ("/sys", str(tmp_path / "nothing")))
    assert kinds(worker_rules(wanted(checkout=str(tmp_path)), []), "device") == set()
    rules = worker_rules(wanted(checkout=str(tmp_path), gpu=True), [])
    assert kinds(rules, "device") == {str(tmp_path / "nvidia0")}
    assert kinds(rules, "read") == {"/sys", str(tmp_path)}
