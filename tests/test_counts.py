"""Counts of a fixed workload stay what they were, and the check sees what would make isohub slower."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.counts import BASELINE, compare

ROOT = Path(__file__).parents[1]

# Each of the ways in which a path becomes slow, without a wrong answer.
SLOWED = """
import mmap
from concurrent.futures import ThreadPoolExecutor

import isohub
from benchmarks import counts
from isohub.errors import printable
from isohub.session import mailbox, supervisor

pack, ask, load = mailbox.Mailbox.pack, supervisor.Worker.ask, isohub.Session.load
pool = ThreadPoolExecutor(1)


def into_new_memory(self, *args, **kwargs):
    with mmap.mmap(-1, 600_000) as copy:
        copy.write(bytes(600_000))
    return pack(self, *args, **kwargs)


def by_another_thread(self, *args, **kwargs):
    return pool.submit(ask, self, *args, **kwargs).result()


def encoding_often(handle):
    from isohub.worker.serve import Server

    encode = Server._encode

    def often(self, *args):
        for _ in range(9):
            encode(self, *args)
        return encode(self, *args)

    Server._encode = often


def slow_worker(self, *args, **kwargs):
    handle = load(self, *args, **kwargs)
    if "returns" not in kwargs:
        handle.run(encoding_often)
    return handle


def thinking_long(self, *args, **kwargs):
    for _ in range(50):
        printable("some text")
    return packing(self, *args, **kwargs)


chosen = CHOSEN
if "memory" in chosen:
    mailbox.Mailbox.pack = into_new_memory
if "thread" in chosen:
    supervisor.Worker.ask = by_another_thread
if "worker" in chosen:
    isohub.Session.load = slow_worker
if "thinking" in chosen:
    packing = mailbox.Mailbox.pack
    mailbox.Mailbox.pack = thinking_long
raise SystemExit(counts.main(["--once"]))
"""


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=110)


def test_counts_are_not_more_than_they_were():
    done = run("-m", "benchmarks.counts")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        (
            {"memory", "worker", "thinking"},
            [
                "a call of 4 B, caller: page faults: ",
                "a call of 4 B, worker: lines: ",
                "a call of 4 B, caller: lines: ",
            ],
        ),
        ({"thread"}, ["a call of 4 B, caller: further sleeps: "]),
    ],
    ids=["more is done", "another thread does it"],
)
def test_a_slowed_path_is_seen(chosen, seen):
    done = run("-c", SLOWED.replace("CHOSEN", repr(chosen)))
    assert done.returncode == 1, done.stderr
    for start in seen:
        assert any(line.startswith(start) for line in done.stderr.splitlines()), (start, done.stderr)
    assert "hint: if that is as it should be, python -m benchmarks.counts --write" in done.stderr


def test_what_passes_is_a_share_and_some_room_more():
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    baseline = {python: {"a call, caller: lines": 1000.0}}
    assert compare({"a call, caller: lines": 1108.0}, baseline) == []
    assert compare({"a call, caller: lines": 10.0}, baseline) == []
    assert compare({"a call, caller: lines": 1109.0}, baseline) == [
        "a call, caller: lines: 1109, at most 1108 (it was 1000)"
    ]


def test_what_is_new_was_nothing_before():
    baseline = {"3.11": {}}
    assert compare({"a call, caller: kernel's poll": 1.0}, baseline) == []
    assert compare({"a call, caller: kernel's poll": 2.0}, baseline) == [
        "a call, caller: kernel's poll: 2, at most 1 (it was 0)"
    ]


def test_another_minor_version_has_more_room():
    baseline = {"2.7": {"a call, caller: lines": 1000.0}}
    assert compare({"a call, caller: lines": 1308.0}, baseline) == []
    assert len(compare({"a call, caller: lines": 1309.0}, baseline)) == 1


def test_the_baseline_has_figures_of_all_that_is_counted():
    for figures in json.loads(BASELINE.read_text()).values():
        assert figures["import isohub: modules of torch"] == 0
        assert figures["a call of 600,000 B, caller: lines"] > 0
        assert figures["a call of 600,000 B, worker: lines"] > 0
        assert figures["warm loads, caller: descriptors that stay, each"] < 1  # another thread may have some open
