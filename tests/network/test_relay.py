"""Bytes between sockets: counted, bounded, and ended by one descriptor."""

from __future__ import annotations

import os
import select
import socket
import threading
import time

import pytest

from isohub.network.relay import ClosedError, Flow, Meter, ShortError, SpentError, Waiter, relay


@pytest.fixture
def wake():
    descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def pairs():
    """Two connections: what is written to one's far end is to come out of the other's."""
    ends = [*socket.socketpair(), *socket.socketpair()]
    for end in ends[1:3]:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


def test_a_meter_counts_within_another_and_nothing_beyond():
    total = Meter(10)
    one, other = Meter(8, total), Meter(8, total)
    one.take(8)
    with pytest.raises(SpentError):
        one.take(1)
    with pytest.raises(SpentError):
        other.take(3)
    other.take(2)
    assert (one.count_bytes, other.count_bytes, total.count_bytes) == (8, 2, 10)


def test_all_waiting_ends_with_one_descriptor(wake, pairs):
    waiter = Waiter(wake)
    with pytest.raises(TimeoutError):
        waiter.wait({pairs[1].fileno(): select.POLLIN}, time.monotonic() + 0.01)
    threading.Timer(0.05, os.eventfd_write, (wake, 1)).start()
    with pytest.raises(ClosedError):
        waiter.wait({pairs[1].fileno(): select.POLLIN}, None)
    for act in (
        lambda: waiter.receive(pairs[1], time.monotonic() + 9),
        lambda: waiter.send(pairs[1], b"x", time.monotonic() + 9),
    ):
        with pytest.raises(ClosedError):
            act()


def test_a_flow_of_so_many_bytes_takes_no_more(wake, pairs):
    far, near, out, end = pairs
    far.sendall(b"0123456789")
    flow = Flow(near, out, Meter(100), left_bytes=4, pending=b"> ")
    relay(Waiter(wake), (flow,), flow, 5)
    assert end.recv(100) == b"> 0123"
    assert near.recv(100) == b"456789"
    assert end.recv(100) == b""  # its end was passed on


def test_a_flow_that_ends_early_says_so(wake, pairs):
    far, near, out, end = pairs
    far.sendall(b"01")
    far.shutdown(socket.SHUT_WR)
    flow = Flow(near, out, Meter(100), left_bytes=4)
    with pytest.raises(ShortError):
        relay(Waiter(wake), (flow,), flow, 5)
    assert end.recv(100) == b"01"


def test_silence_ends_it_and_a_slow_reader_slows_its_writer(wake, pairs):
    far, near, out, _ = pairs
    far.setblocking(False)
    meter = Meter(1 << 30)
    ended = []

    def work():
        flow = Flow(near, out, meter)
        try:
            relay(Waiter(wake), (flow,), flow, 0.3)
        except TimeoutError:
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    sent = 0
    try:
        while sent < 64 << 20:  # nobody reads at the other end
            sent += far.send(b"x" * 65536)
            time.sleep(0.001)
    except BlockingIOError:
        pass
    thread.join(5)
    assert ended
    assert sent < 8 << 20
    assert meter.count_bytes <= sent


def test_a_connection_is_to_an_address(wake):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        Waiter(wake).connect("127.0.0.1", port, time.monotonic() + 5).close()
    with pytest.raises(ConnectionRefusedError):
        Waiter(wake).connect("127.0.0.1", port, time.monotonic() + 5)
    with pytest.raises(TimeoutError):
        Waiter(wake).wait({}, time.monotonic())
