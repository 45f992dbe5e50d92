"""What a worker and its processes use, as the watchdog counts it, and when it looks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

import isohub
from isohub import errors
from isohub.session import watchdog
from isohub.session.watchdog import Watchdog, measure
from tests.conftest import eventually

HOLD = """
import os, sys, time
kept = bytearray(int(sys.argv[1]) << 20)
descriptor = os.memfd_create("kept")
os.write(descriptor, bytes(int(sys.argv[2]) << 20))
children = []
for _ in range(int(sys.argv[3])):
    pid = os.fork()
    if pid == 0:
        break
os.write(1, b"ready\\n")  # in one piece: several write to it
time.sleep(60)
"""


@pytest.fixture
def held():
    started = []

    def start(mebibytes, of_files, children):
        arguments = [sys.executable, "-c", HOLD, *map(str, (mebibytes, of_files, children))]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        for _ in range(children + 1):
            assert process.stdout.readline() == "ready\n"
        return process.pid

    yield start
    for process in started:
        os.killpg(process.pid, 9)
        process.wait()
        process.stdout.close()


def test_memory_and_memory_files_are_counted_once(held):
    usage = measure([held(200, 100, 3)])
    assert usage.processes == 4
    assert usage.file_bytes() == 100 << 20
    assert usage.most_bytes(100 << 20) >= 900 << 20  # the plain sum counts shared pages for each
    assert 300 << 20 <= usage.memory_bytes(100 << 20) <= 450 << 20
    assert 0 < usage.table_bytes < 100 << 20
    sizes = [*usage.resident_bytes.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_processes_that_are_gone_are_not_there(held):
    assert measure([2**22 + 1]).processes == 0
    pid = held(1, 1, 0)
    assert measure([pid, pid, 2**22 + 1]).processes == 1


def test_processor_time_is_counted_for_those_that_have_ended():
    code = "import subprocess, sys, time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}])\nprint('done', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "done\n"
        assert measure([process.pid]).cpu_s >= 0.3
        process.stdin.close()


def test_an_idle_worker_is_looked_at_too(hub, monkeypatch):
    monkeypatch.setattr(watchdog, "_IDLE_S", 0.1)

    def later(module):
        def fill():
            time.sleep(0.5)
            kept.extend(os.memfd_create("filled") for _ in range(8))
            for descriptor in kept:
                os.write(descriptor, bytes(100 << 20))
            time.sleep(60)

        kept = []
        threading.Thread(target=fill, daemon=True).start()

    with (
        isohub.Session(timeout_s=60) as own,
        own.load(hub("good"), "mlp", sandbox=isohub.Sandbox(memory="512 MiB")) as handle,
    ):
        worker = own._pool.workers()[0]
        handle.run(later)
        assert not worker.busy
        assert eventually(lambda: measure([worker.pid]).processes == 0)
        with pytest.raises(errors.WorkerLimitError, match="of memory"):
            handle.run(len)


def test_it_ends_with_its_session_and_when_nobody_has_it(hub):
    def watching():
        return sum(thread.name == "isohub-watchdog" for thread in threading.enumerate())

    before = watching()
    with isohub.Session(timeout_s=60) as own, own.load(hub("good"), "mlp"):
        assert watching() == before + 1
    assert watching() == before
    idle = Watchdog()
    idle.nudge()
    idle.close()
    idle.close()
    assert watching() == before


@pytest.mark.parametrize("sandbox", [None, "none"])
def test_short_calls_are_not_looked_at_one_by_one(hub, monkeypatch, sandbox):
    looks = []
    look = Watchdog.look
    monkeypatch.setattr(Watchdog, "look", lambda self: looks.append(None) or look(self))
    with (
        isohub.Session(timeout_s=60) as own,
        own.load(hub("good"), "mlp"),  # is looked at
        own.load(hub("good"), "mlp", sandbox=sandbox, trust_repo=True) as handle,
    ):
        looks.clear()
        for _ in range(1000):
            handle.eval()
        assert len(looks) < 500
