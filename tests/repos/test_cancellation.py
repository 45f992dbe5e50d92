from __future__ import annotations

import threading
from pathlib import Path

import pytest

from isohub.errors import SourceUnavailableError
from isohub.repos.cancellation import Cancellation, ends_by, is_cancelled
from isohub.repos.credentials import Credentials
from isohub.repos.disk import locked
from isohub.repos.download import download
from isohub.repos.http import HttpClient
from tests.servers.files import Fault, FileServer


def in_scope(cancellation: Cancellation, work) -> tuple[threading.Thread, list[BaseException]]:  # type: ignore[no-untyped-def]
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with cancellation.scope():
                work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def test_a_stalled_download_is_given_up(tmp_path: Path) -> None:
    cancellation = Cancellation()
    with FileServer() as server:
        url = server.add("/w.bin", b"bytes" * 1000)
        fault = server.fail("w.bin", Fault(stall=100))

        def work() -> None:
            with HttpClient(Credentials(anonymous=True)) as client:
                download(client, url, tmp_path / "part", name="w", limit_bytes=1 << 20)

        thread, raised = in_scope(cancellation, work)
        assert fault.stalled.wait(30)
        cancellation.cancel()
        thread.join(30)
        fault.resume.set()
    assert isinstance(raised[0], SourceUnavailableError)
    assert "given up" in str(raised[0])


def test_a_wait_for_a_lock_is_given_up(tmp_path: Path) -> None:
    cancellation = Cancellation()
    begun = threading.Event()

    def work() -> None:
        begun.set()
        with locked(tmp_path):
            raise AssertionError("the lock is held by another")

    with locked(tmp_path):
        thread, raised = in_scope(cancellation, work)
        begun.wait(10)
        cancellation.cancel()
        thread.join(30)
    assert isinstance(raised[0], SourceUnavailableError)
    with cancellation.scope(), pytest.raises(SourceUnavailableError), locked(tmp_path), locked(tmp_path):
        pass
    with locked(tmp_path):  # and nothing is held on to
        pass


def test_what_begins_after_it_ends_at_once() -> None:
    cancellation = Cancellation()
    ended = []
    with ends_by(lambda: ended.append("no scope")):
        assert not is_cancelled()
    with cancellation.scope():
        with ends_by(lambda: ended.append("over")):
            pass
        cancellation.cancel()
        assert is_cancelled()
        with ends_by(lambda: ended.append("late")):
            pass
    assert ended == ["late"]
    assert not is_cancelled()
