"""What a session tells other processes of its user, and what it takes no notice of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import isohub
from isohub.session import register
from isohub.session.register import Register, recorded, start_ticks
from tests.conftest import eventually, gone

LOADS = (
    "import sys, isohub, torch, time\n"
    "handle = isohub.load(sys.argv[1], 'mlp')\n"
    "handle(torch.ones(1, 4))\n"
    "print('ready', flush=True)\n"
    "sys.stdin.readline()\n"
)


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    directory = tmp_path / "runtime"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    monkeypatch.setattr(register.tempfile, "tempdir", str(tmp_path))
    return directory / "isohub"


def enter(own, pid=None, **more):
    facts = {"name": "a@1", "reference": "a", "commit": "1" * 40, "active": ("seccomp",), "missing": ()}
    facts.update(environment="host", python="3.11.7", torch="2.13.0")
    pid = os.getpid() if pid is None else pid
    return own.enter(**{**facts, "pid": pid, "ticks": start_ticks(pid), **more})


@pytest.fixture
def own(runtime):
    opened = Register()
    yield opened
    opened.close()


def start(hub):
    child = subprocess.Popen(
        [sys.executable, "-c", LOADS, hub("good")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    return child


def test_another_process_is_seen_until_it_ends(runtime, hub):
    with start(hub) as child:
        (seen,) = recorded()
        assert (seen.session_pid, seen.here, seen.doing) == (child.pid, True, None)
        assert (seen.name.partition("@")[0], seen.reference) == ("good", hub("good"))
        assert seen.calls > 2
        assert "seccomp" in seen.active
        assert seen.ticks == start_ticks(seen.pid) > 0
        child.stdin.write("\n")
    assert recorded() == []
    assert list(runtime.iterdir()) == []


def test_what_a_killed_process_left_is_swept(runtime, hub):
    with start(hub) as child:
        (seen,) = recorded()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert eventually(lambda: gone(seen.pid))
    assert len(list(runtime.iterdir())) == 1
    assert recorded() == []
    assert list(runtime.iterdir()) == []


def test_a_fork_that_outlives_its_parent_keeps_no_file(runtime):
    code = (
        "import os, sys, time\n"
        "from isohub.session.register import Register\n"
        "own = Register()\n"
        "own.enter(name='a@1', reference='a', commit='1', pid=os.getpid(), ticks=1, active=(), missing=(),\n"
        "          environment='host', python='3', torch='2')\n"
        "if os.fork() == 0:\n    sys.stdout.close(); os.close(1); time.sleep(60); os._exit(0)\n"
        "print(os.getpid(), flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    done.stdout.read()
    done.wait()
    try:
        assert len(list(runtime.iterdir())) == 1  # locked by the fork
        assert recorded() == []
        assert list(runtime.iterdir()) == []
    finally:
        os.killpg(done.pid, signal.SIGKILL)
        done.stdout.close()


def test_what_a_worker_does_is_written_over(own):
    row = enter(own)
    row.write(3, "calling forward()")
    (seen,) = recorded()
    assert (seen.calls, seen.doing) == (3, "calling forward()")
    row.write(4, None)
    assert (recorded()[0].calls, recorded()[0].doing) == (4, None)
    row.write(5, "x" * 100_000)
    assert len(recorded()[0].doing) < 1000
    row.close()
    assert recorded() == []
    enter(own, name="b@2")
    row.write(9, "a question that ends after its worker")
    row.close()
    enter(own, name="c@3")
    assert [(seen.name, seen.calls) for seen in recorded()] == [("b@2", 0), ("c@3", 0)]


def test_a_number_that_is_another_process_s_by_now_is_not_shown(own, monkeypatch):
    enter(own)
    assert len(recorded()) == 1  # the control
    monkeypatch.setattr(register, "start_ticks", lambda pid: 1)
    assert recorded() == []


def test_a_dead_worker_is_not_shown(own):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        enter(own, pid=child.pid)
        assert len(recorded()) == 1
    assert recorded() == []
    enter(own, pid=child.pid)  # gone before it was entered
    assert recorded() == []


@pytest.mark.parametrize("harm", ["mode", "link", "file", "owner"])
def test_a_directory_of_somebody_else_s_is_not_used(runtime, tmp_path, harm, hub, monkeypatch):
    other = tmp_path / f".isohub-{os.geteuid()}"  # where it goes next
    for place in (runtime, other):
        if harm == "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700, exist_ok=True)
            place.symlink_to(tmp_path / "elsewhere")
        elif harm == "file":
            place.write_text("")
        else:
            place.mkdir(mode=0o700)
            place.chmod(0o755 if harm == "mode" else 0o700)
    if harm == "owner":
        another = os.geteuid() + 1
        monkeypatch.setattr(register.os, "geteuid", lambda: another)
        (tmp_path / f".isohub-{another}").mkdir(mode=0o700)
    own = Register()
    enter(own).write(1, "x")
    assert recorded() == []
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".rows"]
    own.close()
    with isohub.Session() as session, session.load(hub("good"), "mlp") as handle:
        assert handle(torch.ones(1, 4)).shape == (1, 2)


def test_files_that_are_not_the_session_s_are_left_alone(own, runtime, tmp_path):
    enter(own)
    (real,) = runtime.iterdir()
    open_to_all = runtime / "1-a.rows"
    open_to_all.write_bytes(real.read_bytes())
    open_to_all.chmod(0o666)
    (runtime / "2-b.rows").symlink_to(real)
    os.link(tmp_path / "runtime" / "isohub" / real.name, runtime / "3-c.rows")
    assert recorded() == []  # a file of two names is nobody's
    (runtime / "3-c.rows").unlink()
    os.mkfifo(runtime / "4-d.rows", 0o600)
    for number, junk in enumerate([b"", b"{", b"\xff" * 9000, b"[1]" + b" " * 4093, json.dumps({"pid": -1}).encode()]):
        (runtime / f"5-{number}.rows").write_bytes(junk)
        (runtime / f"5-{number}.rows").chmod(0o600)
    assert [seen.name for seen in recorded()] == ["a@1"]
    assert open_to_all.exists()
    assert (runtime / "4-d.rows").exists()


def test_a_full_disk_ends_no_call(own, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    row = enter(own)
    monkeypatch.setattr(register.os, "pwrite", full)
    row.write(1, "calling forward()")
    row.close()
