"""The tree of files and the namespaces around it, made in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isohub.sandbox import namespaces
from tests.conftest import require_layers

ROOT = Path(__file__).parents[2]
WORK = r"""
import errno, json, os, sys
from isohub.sandbox import namespaces
from isohub.sandbox.landlock import Rule
place, given, own = sys.argv[1:4]
namespaces.become_own_user(namespaces.NEW_PID)
if os.fork():
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
namespaces.leave_host(network=False)
tree = namespaces.Tree(place, os.uname().machine)
rules = [Rule("/usr", "read"), Rule("/bin", "read"), Rule("/lib", "read"), Rule("/dev/null", "device"), Rule(given + "/linked/file", "read"),
         Rule(given + "/read", "read"), Rule(given + "/write", "write"), Rule(given + "/read/below", "read"),
         Rule(given + "/write/below", "read"), Rule(given + "/list", "list"), Rule(given + "/one", "read"), Rule("/proc/self", "read")]
tree.bind(rules)
tree.show_processes()
tree.own(own, 1 << 20)
tree.hide(given + "/read/.git")
tree.hide(given + "/read/.git-file")
tree.hide(given + "/nothing")
process = tree.pivot()
namespaces.become_own_user(process=process)
answers = {}
def trial(label, act):
    try: value = act()
    except OSError as error: answers[label] = errno.errorcode[error.errno]
    else: answers[label] = value if value is not None else "done"
def write(path):
    with open(path, "w") as file: file.write("x")
def fill(path):
    with open(path, "wb") as file:
        for _ in range(64): file.write(bytes(1 << 16))
def read(path):
    with open(path) as file: return file.read()
trial("root", lambda: sorted(os.listdir("/")))
trial("processes", lambda: [name for name in os.listdir("/proc") if name.isdigit()])
trial("own number", os.getpid)
trial("name", lambda: os.uname().nodename)
trial("devices", lambda: sorted(os.listdir("/dev")))
trial("interfaces", lambda: read("/proc/net/dev").count(":"))
trial("write root", lambda: write("/x"))
trial("write usr", lambda: write("/usr/x"))
trial("write dev", lambda: write("/dev/x"))
trial("write null", lambda: write("/dev/null"))
trial("change null", lambda: os.chmod("/dev/null", 0o666))
trial("write proc", lambda: write("/proc/sys/kernel/core_pattern"))
trial("write own proc", lambda: write("/proc/self/comm"))
trial("read", lambda: read(given + "/read/file"))
trial("write read", lambda: write(given + "/read/file"))
trial("git", lambda: os.listdir(given + "/read/.git"))
trial("write git", lambda: write(given + "/read/.git/x"))
trial("git file", lambda: read(given + "/read/.git-file"))
trial("write", lambda: write(given + "/write/new"))
trial("write below", lambda: write(given + "/write/below/new"))
trial("one", lambda: read(given + "/one"))
trial("hidden", lambda: read(given + "/hidden"))
trial("list", lambda: os.listdir(given + "/list"))
trial("linked", lambda: read(given + "/linked/file"))
trial("above", lambda: sorted(os.listdir(given)))
trial("own", lambda: write(own + "/file"))
trial("shared memory", lambda: write("/dev/shm/file"))
trial("more than its size", lambda: fill(own + "/large"))
trial("device", lambda: os.mknod(own + "/device", 0o20600, os.makedev(1, 3)))
trial("mount", lambda: namespaces._mount("tmpfs", own, "tmpfs", 0))
trial("remount", lambda: namespaces._mount("none", given + "/read", None, 0x20 | 0x1000))
trial("old root", lambda: sorted(os.listdir("/..")))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    require_layers("namespaces")
    given = tmp_path_factory.mktemp("given")
    for name in ("read/below", "read/.git", "write/below", "list", "real"):
        (given / name).mkdir(parents=True)
    for name in ("read/file", "read/.git/config", "read/.git-file", "one", "hidden", "list/file", "real/file"):
        (given / name).write_text(name)
    (given / "linked").symlink_to("real")
    place, own = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("own")
    command = [sys.executable, "-c", WORK, str(place), str(given), str(own)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return given, own, json.loads(done.stdout)


def test_a_process_sees_itself_alone(seen):
    _, _, got = seen
    assert got["processes"] == ["1"]
    assert got["own number"] == 1
    assert got["name"] == "isohub"
    assert got["interfaces"] == 1  # the loopback
    assert got["devices"] == ["fd", "null", "shm", "stderr", "stdin", "stdout"]
    assert got["root"] == got["old root"]
    assert not {"root", "home", "etc", "var", "run", "sys", "opt"} & set(got["root"])


def test_what_is_given_is_at_its_place_and_no_more(seen):
    given, _, got = seen
    assert got["read"] == "read/file"
    assert got["one"] == "one"
    assert got["linked"] == "real/file"
    assert got["hidden"] == "ENOENT"
    assert got["list"] == []  # names alone, of what is shown in it
    assert got["above"] == ["linked", "list", "one", "read", "real", "write"]
    assert (given / "hidden").exists()


def test_what_is_hidden_is_empty(seen):
    given, _, got = seen
    assert got["git"] == []
    assert got["git file"] == ""
    assert got["write git"] == "EROFS"
    assert (given / "read/.git/config").read_text() == "read/.git/config"


def test_what_is_given_to_read_is_not_written(seen):
    given, _, got = seen
    assert {got[name] for name in ("write root", "write usr", "write dev", "write read")} == {"EROFS"}
    assert {got[name] for name in ("change null", "write proc", "write own proc")} == {"EROFS"}
    assert (given / "read/file").read_text() == "read/file"
    assert got["write"] == got["write null"] == "done"
    assert (given / "write/new").read_text() == "x"


def test_its_own_directory_is_in_memory_of_a_size(seen):
    _, own, got = seen
    assert got["own"] == got["shared memory"] == "done"
    assert got["more than its size"] == "ENOSPC"
    assert list(own.iterdir()) == []


def test_nothing_of_it_can_be_changed_from_the_user_namespace_within(seen):
    _, _, got = seen
    assert got["mount"] == got["remount"] == got["device"] == "EPERM"


def test_no_fault_here(tmp_path):
    require_layers("namespaces")
    code = "import os, sys; from isohub.sandbox.namespaces import fault; print(fault(sys.argv[1], os.uname().machine))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None"


def test_a_fault_is_said_in_words(tmp_path):
    code = (
        "import os, sys; from tests.lacking import take_away; take_away('namespaces')\n"
        "from isohub.sandbox.namespaces import fault; print(fault(sys.argv[1], os.uname().machine))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("a user namespace: unshare: Operation not permitted")


def test_switches_of_this_machine_are_named(monkeypatch, tmp_path):
    real = open

    def files(path, *args):
        names = {
            "/proc/sys/user/max_user_namespaces": "0\n",
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n",
        }
        if path in names:
            (tmp_path / "value").write_text(names[path])
            return real(tmp_path / "value")
        return real(path, *args)

    monkeypatch.setattr("builtins.open", files)
    said = namespaces._advice()
    assert "user.max_user_namespaces=0" in said
    assert "kernel.apparmor_restrict_unprivileged_userns=1" in said


@pytest.mark.parametrize("path", ["/a", "/a/b/c"])
def test_a_loop_of_symlinks_is_an_error(tmp_path, path):
    tree = object.__new__(namespaces.Tree)
    tree._root, tree._machine, tree._bound = str(tmp_path / "root"), "x86_64", {}
    tree._made, tree._plain = set(), set()
    os.mkdir(tmp_path / "root")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        tree._links(str(tmp_path / "loop") + path)
