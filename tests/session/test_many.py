"""Many workers at once: each answers for itself, all end, and none does anything that nobody asked for."""

from __future__ import annotations

import os
import subprocess
import threading
import time

import psutil
import pytest
import torch

import isohub
from tests.conftest import eventually

_COUNT = 16


@pytest.fixture
def many(tmp_path):
    """References to commits of one repo, each of which adds another number."""
    repo = tmp_path / "many"
    repo.mkdir()

    def git(*words):
        command = ["git", "-C", str(repo), "-c", "user.name=many", "-c", "user.email=many@localhost", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    for number in range(_COUNT):
        (repo / "hubconf.py").write_text(f"def add(x):\n    return x + {number}\ndef adder():\n    return add\n")
        git("add", "hubconf.py")
        git("commit", "--quiet", "--message", str(number))
    return [f"{repo}:{commit}" for commit in git("rev-list", "--reverse", "HEAD").split()]


def test_many_refs_live_at_once_and_are_called_at_once(many, tmp_path):
    with isohub.Session(cache_dir=tmp_path / "cache", timeout_s=60) as own:
        adders = [own.load(reference, "adder") for reference in many]
        assert len({info.pid for info in own.workers()}) == _COUNT
        answers: dict[int, set[float]] = {}

        def call(number: int) -> None:
            answers[number] = {adders[number](torch.zeros(1)).item() for _ in range(50)}

        threads = [threading.Thread(target=call, args=(number,)) for number in range(_COUNT)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {number: {float(number)} for number in range(_COUNT)}
        pids = [info.pid for info in own.workers()]
    assert eventually(lambda: not any(map(psutil.pid_exists, pids)))


def _ticks(pids):
    used = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat", "rb") as file:
            used += sum(map(int, file.read().rpartition(b")")[2].split()[11:15]))
    return used


def test_a_session_with_nothing_to_do_does_nothing(many, tmp_path):
    with isohub.Session(cache_dir=tmp_path / "cache", timeout_s=60) as own:
        adders = [own.load(reference, "adder") for reference in many[:4]]
        assert [adder(torch.zeros(1)).item() for adder in adders] == [0, 1, 2, 3]
        chain = psutil.Process(own.workers()[0].pid).parents()
        around = [process.pid for process in chain[: [process.pid for process in chain].index(os.getpid())]]
        assert len(around) >= 1  # the zygote, and what stands around it
        pids = [*around, *(info.pid for info in own.workers())]
        time.sleep(0.5)
        before = _ticks(pids)
        time.sleep(3)
        assert _ticks(pids) == before
