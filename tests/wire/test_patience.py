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


# How long a wait is for who looks and for who sleeps.
SHORT = (50e-6, 120e-6)


def test_short_waits_are_looked_for_once_they_are_known(clock):
    seen = [clock.wait(clock.patient, *SHORT) for _ in range(200)]
    assert not any(seen[:20])  # nothing is known yet
    assert sum(seen[50:]) >= 149  # but for a trial


def test_long_waits_are_slept_through(clock):
    for _ in range(100):
        clock.wait(clock.patient, *SHORT)
    for _ in range(50):
        clock.wait(clock.patient, 1.0)
    before = clock.looks
    for _ in range(1000):
        assert not clock.wait(clock.patient, 1.0)
    assert clock.looks - before <= 2 * 1000  # the time is read, and that is all


def test_pauses_among_short_waits_change_little(clock):
    for _ in range(100):
        clock.wait(clock.patient, *SHORT)
    for _ in range(10):
        assert not clock.wait(clock.patient, 60.0)
        seen = [clock.wait(clock.patient, *SHORT) for _ in range(20)]
        assert sum(seen) >= 19


def test_a_look_has_an_end(clock):
    for _ in range(100):
        clock.wait(clock.patient, *SHORT)
    start, looks = clock.now, clock.looks
    assert not clock.patient.look()
    assert clock.looks - looks > 10
    assert clock.now - start < 1e-3


def test_who_looks_in_vain_sleeps(clock):
    """Looking takes a processor that the other side needs: waits are longer for it."""
    seen = [clock.wait(clock.patient, 500e-6, 300e-6) for _ in range(400)]
    assert 0 < sum(seen) < 15


def test_what_was_worse_is_found_out_when_it_is_better(clock):
    for _ in range(200):
        clock.wait(clock.patient, 500e-6, 300e-6)
    seen = [clock.wait(clock.patient, 60e-6, 300e-6) for _ in range(100)]
    assert sum(seen[40:]) >= 59
    seen = [clock.wait(clock.patient, 500e-6, 300e-6) for _ in range(100)]
    assert sum(seen[20:]) < 5


def test_nobody_looks_with_one_processor(clock, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    end, far = socket.socketpair()
    alone = Patience(end.fileno())
    one = Clock(end, far)
    monkeypatch.setattr(patience, "time", one)
    assert not any(one.wait(alone, 50e-6) for _ in range(100))
    end.close()
    far.close()
