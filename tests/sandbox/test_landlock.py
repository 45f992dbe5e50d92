"""Landlock of every ABI: what is handled, what the kernel is given, and that it holds, in a process of its own."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from isohub.sandbox import landlock
from isohub.sandbox.landlock import NEWEST_ABI, Rule, Ruleset, handled_rights
from tests.conftest import require_layers

ROOT = Path(__file__).parents[2]
#: linux/landlock.h of 6.18: the number of file rights, of rights on ports, of scopes, and the bytes of the attribute.
ABIS = {
    1: (13, 0, 0, 8),
    2: (14, 0, 0, 8),
    3: (15, 0, 0, 8),
    4: (15, 2, 0, 16),
    5: (16, 2, 0, 16),
    6: (16, 2, 2, 24),
    7: (16, 2, 2, 24),
}


@pytest.mark.parametrize("version", ABIS)
def test_all_rights_of_an_abi_are_handled(version):
    files, net, scopes, _ = ABIS[version]
    assert handled_rights(version) == ((1 << files) - 1, (1 << net) - 1, (1 << scopes) - 1)


def test_the_newest_known_is_the_last_here():
    assert max(ABIS) == NEWEST_ABI


class Kernel:
    """Takes notes, and answers as the kernel does."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(landlock, "system_call", self.call)
        monkeypatch.setattr(landlock, "prctl", lambda *args: self.calls.append(("prctl", *args)))

    def call(self, name, number, *args):
        words = [arg.value if hasattr(arg, "value") else arg for arg in args]
        if name == "landlock_create_ruleset":
            self.size = words[1]
            self.calls.append((name, number))
            return os.open(os.devnull, os.O_RDONLY)
        if name == "landlock_add_rule":
            self.calls.append((name, number, words[1]))
            return 0
        self.calls.append((name, number))
        return 0


@pytest.mark.parametrize("version", [*ABIS, 8, 99])
def test_the_kernel_gets_a_struct_of_its_size(monkeypatch, version, tmp_path):
    kernel = Kernel(monkeypatch)
    ruleset = Ruleset(version)
    ruleset.allow([Rule(str(tmp_path), "read"), Rule("/dev/null", "device")])
    ruleset.allow_connecting([80])
    ruleset.restrict()
    _files, net, _, size = ABIS[min(version, NEWEST_ABI)]
    assert kernel.size == size
    assert [name for name, *_ in kernel.calls] == [
        "landlock_create_ruleset",
        "landlock_add_rule",
        "landlock_add_rule",
        *(["landlock_add_rule"] if net else []),
        "prctl",
        "landlock_restrict_self",
    ]
    assert kernel.calls[-2][:3] == ("prctl", 38, 1)


def test_a_path_that_is_missing_is_an_error(monkeypatch, tmp_path):
    Kernel(monkeypatch)
    with pytest.raises(FileNotFoundError):
        Ruleset(7).allow([Rule(str(tmp_path / "nothing"), "read")])


@pytest.fixture(scope="module")
def abi():
    require_layers("landlock")
    return landlock.abi()


TRIALS = r"""
import errno, fcntl, json, os, signal, socket, struct, sys
from isohub.sandbox.landlock import Rule, Ruleset
version, place, port, name, other = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), "\0" + sys.argv[4], int(sys.argv[5])
rules = [Rule(f"{place}/read", "read"), Rule(f"{place}/write", "write"), Rule(f"{place}/list", "list"),
         Rule(f"{place}/one/file", "read"), Rule("/dev/null", "device"), Rule("/dev/zero", "read")]
free = "--free" in sys.argv
if not free:
    ruleset = Ruleset(version)
    ruleset.allow(rules)
    ruleset.allow_connecting([] if "--ports" not in sys.argv else [port])
    ruleset.restrict()
answers = {}
def trial(label, act):
    try: act()
    except OSError as error: answers[label] = errno.errorcode[error.errno]
    else: answers[label] = "done"
def touch(path): os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
def connect(family, address):
    with socket.socket(family) as end: end.connect(address)
def terminal(path):
    descriptor = os.open(path, os.O_RDONLY)
    try: fcntl.ioctl(descriptor, 0x5401, bytes(64))
    finally: os.close(descriptor)
def take(source, target):
    os.rename(source, target); os.rename(target, source)
trial("read", lambda: open(f"{place}/read/file").close())
trial("list read", lambda: os.listdir(f"{place}/read"))
trial("write read", lambda: os.close(os.open(f"{place}/read/file", os.O_WRONLY)))
trial("create in read", lambda: touch(f"{place}/read/new"))
trial("create in write", lambda: touch(f"{place}/write/new"))
trial("read write", lambda: open(f"{place}/write/file").close())
trial("list list", lambda: os.listdir(f"{place}/list"))
trial("read list", lambda: open(f"{place}/list/file").close())
trial("read hidden", lambda: open(f"{place}/hidden/file").close())
trial("list hidden", lambda: os.listdir(f"{place}/hidden"))
trial("read one", lambda: open(f"{place}/one/file").close())
trial("read beside one", lambda: open(f"{place}/one/other").close())
trial("write device", lambda: os.close(os.open("/dev/null", os.O_WRONLY)))
trial("write zero", lambda: os.close(os.open("/dev/zero", os.O_WRONLY)))
trial("make a device", lambda: os.mknod(f"{place}/write/device", 0o20600, os.makedev(1, 3)))
trial("move within write", lambda: take(f"{place}/write/file", f"{place}/write/sub/file"))
trial("truncate hidden", lambda: os.truncate(f"{place}/hidden/file", 1))
trial("truncate write", lambda: os.truncate(f"{place}/write/file", 1))
trial("connect", lambda: connect(socket.AF_INET, ("127.0.0.1", port)))
trial("abstract", lambda: connect(socket.AF_UNIX, name))
trial("signal", lambda: os.kill(other, 0))
trial("ioctl of a device", lambda: terminal("/dev/zero"))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def tried(abi, tmp_path_factory):
    import socket

    stream = socket.create_server(("127.0.0.1", 0))
    name = f"isohub-landlock-{os.getpid()}"
    local = socket.socket(socket.AF_UNIX)
    local.bind("\0" + name)
    local.listen(64)
    number = iter(range(1000))

    def run(version, *options):
        place = tmp_path_factory.mktemp(f"abi{version}-{next(number)}")
        for directory in ("read", "write", "write/sub", "list", "hidden", "one"):
            (place / directory).mkdir()
            (place / directory / "file").write_text("whole") if directory != "write/sub" else None
        (place / "one" / "other").write_text("whole")
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                TRIALS,
                str(version),
                str(place),
                str(stream.getsockname()[1]),
                name,
                str(os.getpid()),
                *options,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    yield run
    stream.close()
    local.close()


@pytest.mark.parametrize("version", ABIS)
def test_each_abi_holds_what_it_can(abi, tried, version):
    if version > abi:
        pytest.skip(f"the kernel's ABI is {abi}")
    got = tried(version)
    wanted = {
        "read": "done", "list read": "done", "write read": "EACCES", "create in read": "EACCES",
        "create in write": "done", "read write": "done", "list list": "done", "read list": "EACCES",
        "read hidden": "EACCES", "list hidden": "EACCES", "read one": "done", "read beside one": "EACCES",
        "write device": "done", "write zero": "EACCES", "truncate write": "done",
        "move within write": "done" if version >= 2 else "EXDEV",
        "truncate hidden": "EACCES" if version >= 3 else "done",
        "connect": "EACCES" if version >= 4 else "done",
        "ioctl of a device": "EACCES" if version >= 5 else "ENOTTY",
        "abstract": "EPERM" if version >= 6 else "done",
        "signal": "EPERM" if version >= 6 else "done",
    }  # fmt: skip
    assert got.pop("make a device") in ("EACCES", "EPERM")
    assert got == wanted


def test_without_it_all_of_that_is_done(tried):
    got = tried(1, "--free")
    if os.geteuid():
        assert got.pop("make a device") == "EPERM"
    assert got.pop("ioctl of a device") == "ENOTTY"
    assert set(got.values()) == {"done"}


def test_a_port_that_is_named_is_reached(abi, tried):
    if abi < 4:
        pytest.skip(f"the kernel's ABI is {abi}")
    assert tried(abi, "--ports")["connect"] == "done"


def test_ports_are_left_alone_where_that_is_asked(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch)
    attributes = []
    monkeypatch.setattr(
        landlock.struct,
        "pack",
        lambda form, *values: attributes.append((form, values)) or struct.Struct(form).pack(*values),
    )
    Ruleset(7, tcp=False).allow_connecting([80])
    assert dict(attributes)["QQQ"][1] == 0
    assert kernel.size == 24
