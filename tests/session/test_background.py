"""The session's one thread: lines, floods, and work that a finalizer hands over."""

from __future__ import annotations

import gc
import logging
import os
import threading

import pytest

from isohub.session.background import Background, Output
from tests.conftest import eventually, open_descriptors


@pytest.fixture
def background():
    made = Background()
    made.start()
    yield made
    made.close()


@pytest.fixture
def stream(background):
    read, write = os.pipe()
    output = Output(read, logging.getLogger("isohub.worker.test"), logging.INFO)
    background.watch(output)
    yield output, write
    try:
        os.close(write)
    except OSError:
        pass


def test_lines_are_logged_escaped_and_the_last_are_kept(stream, caplog):
    output, write = stream
    with caplog.at_level(logging.INFO, logger="isohub.worker"):
        os.write(write, b"one\ntwo \x1b[0m\r\n\xff\nhalf")
        assert eventually(lambda: len(caplog.records) == 3)
    assert [record.getMessage() for record in caplog.records] == ["one", "two \\x1b[0m", "\ufffd"]
    assert output.tail() == "one\ntwo \\x1b[0m\n\ufffd\nhalf"


def test_an_end_is_noticed_and_the_descriptor_closed(background, caplog):
    before = open_descriptors()
    read, write = os.pipe()
    output = Output(read, logging.getLogger("isohub.worker.test"), logging.INFO)
    background.watch(output)
    with caplog.at_level(logging.INFO, logger="isohub.worker"):
        os.write(write, b"last words")
        os.close(write)
        assert eventually(lambda: output.descriptor == -1)
    assert [record.getMessage() for record in caplog.records] == ["last words"]
    assert open_descriptors() == before
    assert output.drain() is False


def test_a_stream_can_be_forgotten_before_its_end(background, stream):
    output, write = stream
    os.write(write, b"kept\n")
    background.forget(output)
    assert eventually(lambda: output.descriptor == -1)
    assert output.tail() == "kept"
    background.forget(output)


def test_drained_by_others_at_the_same_time(stream):
    output, write = stream
    threads = [threading.Thread(target=lambda: [output.drain() for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(2000):
        os.write(write, b"%d\n" % number)
    for thread in threads:
        thread.join()
    assert eventually(lambda: output.tail().endswith("1999"))


def test_work_is_done_in_order_and_failures_do_not_end_the_thread(background, caplog):
    done = []
    background.defer(lambda: done.append(1))
    background.defer(lambda: 1 / 0)
    background.defer(lambda: done.append(2))
    assert eventually(lambda: done == [1, 2])
    assert "background work failed" in caplog.text


def test_close_does_what_is_left():
    background, done = Background(), []
    background.start()
    for number in range(100):
        background.defer(lambda number=number: done.append(number))
    background.close()
    assert done == list(range(100))
    background.close()
    background.defer(lambda: done.append("late"))
    background.start()
    assert done == list(range(100))


def test_work_handed_over_after_the_end_writes_to_nobody():
    """Found by a worker that saw a byte too many: a closed descriptor's number had become its socket's."""
    background = Background()
    background.start()
    background.close()
    ends = [os.pipe() for _ in range(20)]
    for _ in range(100):
        background.defer(lambda: None)
    for read, write in ends:
        os.close(write)
        assert os.read(read, 10) == b""
        os.close(read)
    gc.collect()  # what other tests left
    before = open_descriptors()
    del background
    gc.collect()
    assert open_descriptors() <= before - 2  # workers of other tests may go meanwhile
