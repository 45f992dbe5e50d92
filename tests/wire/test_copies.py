"""Long copies by several processors."""

from __future__ import annotations

import _thread
import subprocess
import sys
import threading
import time

import pytest
import torch

from isohub.wire.copies import move, move_by_torch


@pytest.mark.parametrize("how", [move, move_by_torch])
@pytest.mark.parametrize("size", [0, 1, 63, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, (24 << 20) + 4097])
def test_every_byte_is_copied_and_no_more(how, size):
    source = torch.randint(0, 256, (size + 128,), dtype=torch.uint8)
    target = torch.zeros(size + 128, dtype=torch.uint8)
    how(target.data_ptr() + 64, source.data_ptr() + 64, size)
    assert torch.equal(target[64 : 64 + size], source[64 : 64 + size])
    assert not target[:64].any()
    assert not target[64 + size :].any()


def test_many_threads_copy_at_once():
    sources = [torch.full((3 << 20,), number, dtype=torch.int32) for number in range(8)]
    targets = [torch.empty_like(source) for source in sources]

    def copy(number):
        for _ in range(5):
            move(targets[number].data_ptr(), sources[number].data_ptr(), sources[number].nbytes)

    threads = [threading.Thread(target=copy, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


def test_an_interruption_waits_for_what_is_still_written():
    source = torch.arange(32 << 20, dtype=torch.int32)
    interrupted = 0
    for attempt in range(20):
        target = torch.zeros_like(source)
        timer = threading.Timer(0.001 * attempt, _thread.interrupt_main)
        try:
            timer.start()
            move(target.data_ptr(), source.data_ptr(), source.nbytes)
            timer.join()
            for _ in range(1000):
                pass
        except KeyboardInterrupt:
            interrupted += 1
            target.zero_()
            time.sleep(0.01)
            assert not target.any()  # nobody writes to it any more
    assert interrupted


_NO_THREADS = """
import threading, torch
from isohub.wire.copies import move
def refused(self): raise RuntimeError("can't start new thread")
threading.Thread.start = refused
source = torch.arange(4 << 20)
target = torch.zeros_like(source)
move(target.data_ptr(), source.data_ptr(), source.nbytes)
assert torch.equal(target, source)
"""


def test_without_another_thread_one_copies():
    assert subprocess.run([sys.executable, "-c", _NO_THREADS], timeout=60, check=False).returncode == 0


_FORK = """
import os, sys, torch
from isohub.wire.copies import move
source = torch.arange(4 << 20)
target = torch.zeros_like(source)
move(target.data_ptr(), source.data_ptr(), source.nbytes)
pid = os.fork()
if pid == 0:
    other = torch.frombuffer(bytearray(source.nbytes), dtype=torch.int64)
    move(other.data_ptr(), source.data_ptr(), source.nbytes)
    os._exit(0 if int(other[-1]) == len(source) - 1 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_fork_has_threads_of_its_own():
    assert subprocess.run([sys.executable, "-c", _FORK], timeout=60, check=False).returncode == 0
