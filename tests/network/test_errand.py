from __future__ import annotations

import select
import threading

import pytest

from isohub.network.errand import Errand
from tests.conftest import eventually, open_descriptors


def wait(errand: Errand[object]) -> None:
    poll = select.poll()
    poll.register(errand.fileno(), select.POLLIN)
    assert poll.poll(30_000)


def test_a_result_is_waited_for_and_taken() -> None:
    before = open_descriptors()
    dropped: list[object] = []
    errand: Errand[object] = Errand(lambda: 7, dropped.append, lambda: None)
    wait(errand)
    assert errand.take() == 7
    errand.leave()
    errand.leave()
    assert dropped == []
    assert open_descriptors() == before


def test_what_it_raises_is_raised_where_it_is_taken() -> None:
    def work() -> object:
        raise KeyError("inside")

    errand: Errand[object] = Errand(work, lambda _: None, lambda: None)
    wait(errand)
    with pytest.raises(KeyError, match="inside"):
        errand.take()
    errand.leave()


def test_who_leaves_before_the_end_waits_for_nothing() -> None:
    before = open_descriptors()
    go, cancelled = threading.Event(), threading.Event()
    dropped: list[object] = []

    def work() -> object:
        go.wait(30)
        return "late"

    errand: Errand[object] = Errand(work, dropped.append, cancelled.set)
    errand.leave()
    assert cancelled.is_set()
    assert open_descriptors() == before
    go.set()
    assert eventually(lambda: dropped == ["late"])


def test_who_leaves_after_the_end_drops_the_result() -> None:
    dropped: list[object] = []
    errand: Errand[object] = Errand(lambda: "unwanted", dropped.append, lambda: None)
    wait(errand)
    errand.leave()
    assert dropped == ["unwanted"]
