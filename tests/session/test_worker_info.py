"""Snapshots of workers."""

from __future__ import annotations

import dataclasses
import json
import os
import threading

import psutil
import pytest
import torch

import isohub
from isohub.session.worker_info import all_workers
from tests.conftest import eventually


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # sessions of other runs have their files in the usual one
    with isohub.Session(timeout_s=60) as opened:
        yield opened


def test_a_snapshot_says_what_a_worker_is(own, hub):
    handle = own.load(hub("good"), "mlp")
    (before,) = own.workers()
    handle(torch.ones(1, 4))
    (after,) = own.workers()
    assert (after.name, after.commit, after.reference) == (before.name, handle.commit, handle.reference)
    assert (after.pid, after.session_pid) == (handle.stats().pid, os.getpid())
    assert after.calls == before.calls + 1
    assert after.age_s > before.age_s > 0
    assert after.rss_bytes > 10 << 20
    assert (after.state, after.doing) == ("idle", None)
    assert after.confinement == handle.confinement
    assert after == before
    assert len({after, before}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.calls = 0
    assert json.loads(json.dumps(after.to_dict()))["pid"] == after.pid


def test_a_busy_worker_says_with_what(own, hub, tmp_path):
    handle = own.load(hub("good"), "mlp", sandbox=isohub.Sandbox(write=[str(tmp_path)]))

    def waits(module, path):
        import os as remote_os
        import time as remote_time

        while not remote_os.path.exists(path):
            remote_time.sleep(0.01)

    thread = threading.Thread(target=lambda: handle.run(waits, str(tmp_path / "go")))
    thread.start()
    try:
        assert eventually(lambda: own.workers()[0].state == "busy")
        (seen,) = own.workers()
        (elsewhere,) = all_workers()  # by the file, as another process does; the worker answers nobody now
        assert seen == elsewhere
        assert (seen.doing, elsewhere.doing) == ("running waits()", "running waits()")
        assert elsewhere.calls == seen.calls
        assert abs(elsewhere.age_s - seen.age_s) < 60
    finally:
        (tmp_path / "go").touch()
        thread.join()
    assert eventually(lambda: own.workers()[0].state == all_workers()[0].state == "idle")


def test_a_worker_that_was_killed_is_none(own, hub):
    own.load(hub("edits_sys_path"), "model")
    handle = own.load(hub("good"), "mlp")
    (worker,) = [worker for worker in own.workers() if worker.name.startswith("good")]
    psutil.Process(worker.pid).kill()
    assert eventually(lambda: worker not in own.workers())
    assert handle is not None


def test_what_the_kernel_does_not_tell_is_none(own, hub, monkeypatch):
    def refuses(self):
        raise psutil.AccessDenied(self.pid)

    handle = own.load(hub("good"), "mlp")
    monkeypatch.setattr(psutil.Process, "memory_full_info", refuses)
    (worker,) = own.workers()
    assert worker.rss_bytes > 0
    assert (worker.pss_bytes, worker.uss_bytes) == (None, None)
    assert handle is not None
