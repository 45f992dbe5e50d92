"""The small processes around a zygote: what ends with what, and what a worker is in its namespace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import isohub
from isohub import errors
from tests.conftest import companions, eventually, gone, zygote_of


@pytest.fixture
def own():
    with isohub.Session(timeout_s=60) as opened:
        yield opened


@pytest.fixture
def family(own, hub):
    """A worker's handle, and the processes around it by name."""
    handle = own.load(hub("good"), "mlp")
    outer = psutil.Process(own._pool.warm().pid)
    (keeper,) = outer.children()
    worker = own._pool.workers()[0]
    zygote = zygote_of(own)
    assert worker.pid in [child.pid for child in zygote.children()]
    return handle, {"outer": outer.pid, "keeper": keeper.pid, "zygote": zygote.pid, "init": worker.init_pid}


@pytest.mark.parametrize("name", ["outer", "keeper", "zygote"])
def test_all_of_it_ends_with_any_of_those_around_it(own, hub, family, name):
    handle, around = family
    pids = [*around.values(), handle.stats().pid]
    os.kill(around[name], signal.SIGKILL)
    assert eventually(lambda: all(gone(pid) for pid in pids), 5)
    with pytest.raises(errors.WorkerDiedError):
        handle(torch.ones(1, 4))
    with own.load(hub("good"), "mlp") as again:  # another zygote, with all around it
        assert again(torch.ones(1, 4)).shape == (1, 2)


def test_a_worker_ends_with_its_init_and_the_session_goes_on(own, hub, family):
    handle, around = family
    pid = handle.stats().pid
    os.kill(around["init"], signal.SIGKILL)
    assert eventually(lambda: gone(pid), 5)
    with pytest.raises(errors.WorkerDiedError, match="SIGKILL"):
        handle(torch.ones(1, 4))
    with own.load(hub("good"), "mlp") as again:
        assert again(torch.ones(1, 4)).shape == (1, 2)
    assert not gone(around["zygote"])


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda module: os.abort(), "SIGABRT"),
        (lambda module: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda module: os.kill(os.getpid(), signal.SIGTERM), "SIGTERM"),
        (lambda module: os.kill(os.getpid(), signal.SIGSEGV), "SIGSEGV"),
    ],
)
def test_signals_to_itself_do_what_they_do_elsewhere(own, hub, act, name):
    with own.load(hub("good"), "mlp") as handle, pytest.raises(errors.WorkerDiedError) as caught:
        handle.run(act)
    assert caught.value.signal_name == name


def test_a_worker_is_the_second_of_its_namespace_and_its_orphans_are_reaped(own, hub):
    def leave(module):
        for _ in range(20):
            if os.fork() == 0:
                if os.fork() == 0:
                    time.sleep(0.05)
                os._exit(0)
        while True:
            try:
                os.wait()
            except ChildProcessError:
                return os.getpid(), os.getppid()

    with own.load(hub("good"), "mlp") as handle:
        assert handle.run(leave) == (2, 0)
        pid = handle.stats().pid
        assert eventually(lambda: len(companions(pid)) == 2, 5)  # no zombie stays


def test_there_is_nothing_around_a_zygote_without_namespaces(own, hub):
    with own.load(hub("good"), "mlp", sandbox="none", trust_repo=True) as handle:
        zygote = psutil.Process(own._pool.warm(confined=False).pid)
        assert handle.stats().pid in [child.pid for child in zygote.children()]
        assert zygote_of(own, confined=False) == zygote
        assert own._pool.workers()[0].init_pid == 0
        assert os.readlink(f"/proc/{zygote.pid}/ns/pid") == os.readlink("/proc/self/ns/pid")


def test_their_directories_go_with_them(own, hub, family):
    handle, around = family
    directory = Path(psutil.Process(around["zygote"]).cwd())
    assert directory.name.startswith("isohub-")
    handle.close()
    os.kill(around["zygote"], signal.SIGKILL)
    assert eventually(lambda: not directory.exists(), 5)


def test_a_fork_of_a_worker_is_executed_anew(own, hub):
    def execute(module):
        return subprocess.run(["sh", "-c", "echo $$; id -u"], capture_output=True, text=True, check=True).stdout.split()

    with own.load(hub("good"), "mlp") as handle:
        pid, user = handle.run(execute)
        assert int(pid) > 2
        assert int(user) == os.getuid()


FAILING_FORK = """
import os, socket, sys
from isohub.sandbox import namespaces
from isohub.worker import keeper
namespaces.become_own_user(namespaces.NEW_PID)
if os.fork():
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
own, fork = os.open("/proc/self/ns/pid_for_children", os.O_RDONLY), os.fork
def failing():
    raise BlockingIOError(11, "no more processes")
for kind in (failing, fork, fork):
    os.fork = kind
    keeper._make_init(ours, own, 400)
    print(theirs.recv(4096).decode(), flush=True)
os._exit(0)
"""


def test_a_fork_that_fails_is_said_and_the_next_is_made():
    done = subprocess.run(
        [sys.executable, "-c", FAILING_FORK],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == ["BlockingIOError: [Errno 11] no more processes", "ok", "ok"], done.stderr
