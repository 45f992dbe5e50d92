"""When it pays to look before sleeping, by a clock of the test's."""

from __future__ import annotations

import os
import socket

import pytest

from isohub.wire import patience
from isohub.wire.patience import Patience


class Clock:
    """Goes on by a microsecond at each look; what is waited for comes after `wait_s`."""

    def __init__(self, end: socket.socket, far: socket.socket) -> None:
        self.now = 0.0
        self.looks = 0
        self._end, self._far = end, far
        self._due = float("inf")

    def perf_counter(self) -> float:
        self.looks += 1
        self.now += 1e-6
        if self.now >= self._due:
            self._due = float("inf")
            self._far.send(b"x")
        return self.now

    def wait(self, patient: Patience, looked_s: float, slept_s: float | None = None) -> bool:
        """One wait, so long for who looks and so long for who sleeps; whether looking saw its end."""
        start = self.now
        self._due = start + looked_s
        seen = patient.look()
        if not seen:
            self.now = max(self.now, start + (looked_s if slept_s is None else slept_s))
            if self._due != float("inf"):
                self._due = float("inf")
                self._far.send(b"x")
            patient.slept()
        self._end.recv(1)
        return seen


@pytest.fixture
def clock(monkeypatch):
    end, far = socket.socketpair()
    made = Clock(end, far)
    monkeypatch.setattr(patience, "time", made)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    made.patient = Patience(end.fileno())
    yield made
    end.close()
    far.close()


def test_short_waits_are_looked_for_once_they_are_known(clock):
    assert not clock.wait(clock.patient, 50e-6)  # nothing is known yet
    seen = [clock.wait(clock.patient, 50e-6) for _ in range(100)]
    assert all(seen[20:])


def test_long_waits_are_slept_through(clock):
    for _ in range(100):
        clock.wait(clock.patient, 50e-6)
    for _ in range(10):
        clock.wait(clock.patient, 1.0)
    before = clock.looks
    for _ in range(100):
        assert not clock.wait(clock.patient, 1.0)
    assert clock.looks - before <= 2 * 100  # the time is read, and that is all


def test_one_long_wait_among_short_ones_changes_little(clock):
    for _ in range(50):
        clock.wait(clock.patient, 50e-6)
    assert not clock.wait(clock.patient, 60.0)
    seen = [clock.wait(clock.patient, 50e-6) for _ in range(20)]
    assert all(seen[10:])


def test_a_look_has_an_end(clock):
    for _ in range(50):
        clock.wait(clock.patient, 50e-6)
    start = clock.now
    assert not clock.patient.look()
    assert clock.now - start < 1e-3


def test_waits_that_only_waking_makes_long_are_found_out(clock):
    seen = [clock.wait(clock.patient, 90e-6, 800e-6) for _ in range(100)]
    assert not any(seen[:30])
    assert all(seen[60:])


def test_nobody_looks_with_one_processor(clock, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    end, far = socket.socketpair()
    alone = Patience(end.fileno())
    one = Clock(end, far)
    monkeypatch.setattr(patience, "time", one)
    assert not any(one.wait(alone, 50e-6) for _ in range(100))
    end.close()
    far.close()
