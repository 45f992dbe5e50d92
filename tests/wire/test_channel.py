"""Frames over a real socket."""

from __future__ import annotations

import array
import os
import select
import socket
import threading

import pytest

from isohub.errors import ProtocolError
from isohub.wire.channel import Channel, ChannelClosed, discard
from isohub.wire.protocol import MAX_DESCRIPTORS, pack
from tests.conftest import open_descriptors


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def send_with(end, data, descriptors):
    end.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def test_large_frames_and_descriptors_cross(ends):
    channel, theirs = ends
    other = Channel(theirs)
    body = os.urandom(5_000_000)
    read, write = os.pipe()
    sender = threading.Thread(target=other.send, args=(7, body, [read]))
    sender.start()
    frame = channel.receive()
    sender.join()
    assert frame.body == body
    os.write(write, b"through")
    assert os.read(frame.descriptors[0], 10) == b"through"
    for descriptor in (read, write, *frame.descriptors):
        os.close(descriptor)


def test_a_closed_end_is_told_between_and_within_frames(ends):
    channel, theirs = ends
    theirs.sendall(pack(7, b"whole") + pack(7, b"cut")[:-1])
    theirs.close()
    assert channel.receive().body == b"whole"
    with pytest.raises(ChannelClosed):
        channel.receive()
    with pytest.raises(ChannelClosed):
        channel.send(7, b"nobody listens")


@pytest.mark.parametrize("count", [1, MAX_DESCRIPTORS + 1, 100])
def test_descriptors_that_no_frame_claims_are_refused_and_closed(ends, count):
    channel, theirs = ends
    read, write = os.pipe()
    before = open_descriptors()
    send_with(theirs, pack(7, b"x"), [read] * count)
    with pytest.raises(ProtocolError):
        channel.receive()
    channel.close()
    assert open_descriptors() == before - 1
    os.close(read)
    os.close(write)


def test_what_waits_decides():
    ours, far = socket.socketpair()
    events = []

    def wait(event):
        events.append(event)
        if event == select.POLLIN:
            far.sendall(pack(7, b"late"))
        else:
            far.recv(1 << 20)

    channel = Channel(ours, wait)
    assert channel.receive().body == b"late"
    channel.send(7, b"x" * 3_000_000)
    assert set(events) == {select.POLLIN, select.POLLOUT}
    channel.close()
    far.close()


def test_what_waits_is_asked_before_each_further_read_of_a_frame():
    ours, far = socket.socketpair()
    events = []
    channel = Channel(ours, events.append)
    far.sendall(pack(7, b"x" * 100))
    assert len(channel.receive().body) == 100
    assert events == []  # whole at once
    far.sendall(pack(7, b"x" * 100_000))  # all of it is there, and more than one read takes
    assert len(channel.receive().body) == 100_000
    assert set(events) == {select.POLLIN}
    assert not channel.begun
    far.sendall(pack(7, b"x" * 100)[:50])
    far.close()
    with pytest.raises(ChannelClosed):
        channel.receive()
    assert channel.begun
    channel.close()
    channel.close()


def test_what_is_discarded_is_closed():
    before = open_descriptors()
    read, write = os.pipe()
    made = [os.memfd_create("x", os.MFD_ALLOW_SEALING), read, write, os.open("/", os.O_RDONLY)]
    discard(made)
    assert open_descriptors() == before
    discard(made)  # closed already
    discard([])


def test_a_frame_that_comes_byte_by_byte(ends):
    channel, theirs = ends

    def drip():
        for byte in pack(7, b"slow"):
            theirs.sendall(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    assert channel.receive().body == b"slow"
    thread.join()
