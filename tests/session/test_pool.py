"""Which worker serves what, and for how long."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import isohub
from isohub import errors
from tests.conftest import eventually, gone, open_descriptors


@pytest.fixture
def own():
    with isohub.Session(timeout_s=60) as opened:
        yield opened


def test_one_checkout_is_one_worker(own, hub):
    handles = [own.load(hub("good"), name) for name in ("mlp", "model", "counter")]
    other = own.load(hub("edits_sys_path"), "model")
    assert len(own.workers()) == 2
    assert other is not None
    assert len(handles) == 3


def test_loads_at_once_share_one_worker(own, hub):
    barrier = threading.Barrier(8)

    def load(seed):
        barrier.wait()
        return own.load(hub("good"), "mlp", seed=seed)

    with ThreadPoolExecutor(8) as threads:
        handles = list(threads.map(load, range(8)))
    assert len(own.workers()) == 1
    x = torch.ones(1, 4)
    answers = [handle(x) for handle in handles]
    for seed, answer in enumerate(answers):
        with own.load(hub("good"), "mlp", seed=seed) as again:
            assert torch.equal(again(x), answer)


def test_a_worker_ends_when_nothing_needs_it(own, hub):
    own.list(hub("good"))
    assert own.workers() == []
    own.load(hub("good"), "returns_number")
    assert own.workers() == []
    with pytest.raises(errors.RemoteError):
        own.load(hub("raises"), "model")
    assert own.workers() == []
    with own.load(hub("good"), "mlp"):
        (worker,) = own.workers()
    assert own.workers() == []
    assert gone(worker.pid)


def test_a_failed_build_leaves_the_other_objects(own, hub):
    with own.load(hub("raises_in_entrypoint"), "in_call") as handle:
        with pytest.raises(errors.RemoteError):
            own.load(hub("raises_in_entrypoint"), "model")
        assert handle.training in (True, False)


def test_a_failed_import_is_not_tried_again_on_its_ruins(own, tmp_path):
    (tmp_path / "hubconf.py").write_text(
        "import part\nraise RuntimeError('first ' + str(part.count()))\ndef model():\n    return 1\n"
    )
    (tmp_path / "part.py").write_text("calls = []\ndef count():\n    calls.append(1)\n    return len(calls)\n")
    for _ in range(3):
        with pytest.raises(errors.RemoteError, match="first 1"):
            own.load(tmp_path, "model")


def test_a_dead_worker_is_replaced(own, hub):
    dying = own.load(hub("segfaults"), "in_call")
    with pytest.raises(errors.WorkerDiedError):
        dying(torch.ones(1))
    first = own.load(hub("segfaults"), "in_call")
    with pytest.raises(errors.WorkerDiedError):
        dying(torch.ones(1))
    dying.close()
    assert first.training in (True, False)
    assert len(own.workers()) == 1


def test_a_session_in_many_threads(own, hub):
    def work(number):
        name = ("mlp", "model")[number % 2]
        x = torch.ones(1, 4) if name == "mlp" else torch.ones(1, 3, 8, 8)
        for _ in range(5):
            with own.load(hub("good"), name, seed=number) as handle:
                assert handle(x) is not None
        return number

    with ThreadPoolExecutor(6) as threads:
        assert sorted(threads.map(work, range(12))) == list(range(12))
    assert eventually(lambda: own.workers() == [])


def test_a_zygote_that_cannot_start_says_why(monkeypatch, tmp_path):
    from isohub.environments.runtime import Runtime
    from isohub.session.background import Background
    from isohub.session.request import Placement
    from isohub.session.spawn import Zygote
    from isohub.session.watchdog import Watchdog

    background = Background()
    with pytest.raises(errors.WorkerStartError, match="could not be started"):
        Zygote(Runtime("k", str(tmp_path / "no-python")), background)
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho no torch here >&2\nexit 3\n")
    fake.chmod(0o755)
    started = []
    with pytest.raises(errors.WorkerStartError, match="exit code 3") as caught:
        started.append(Zygote(Runtime("k", str(fake)), background))
        started[0].spawn("x", "c" * 40, 20, Placement(isohub.Sandbox(), tmp_path), Watchdog())
    assert "no torch here" in str(caught.value)
    for zygote in started:
        zygote.close()
    background.close()


def test_a_fork_that_ends_normally_ends_nothing_of_its_parents(hub):
    """Python's own end in a forked child runs the exit handlers of the parent's session too."""
    code = (
        "import os, sys, torch, isohub\n"
        "handle = isohub.load(sys.argv[1], 'mlp')\n"
        "pid = os.fork()\n"
        "if pid == 0: sys.exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "print(handle(torch.ones(1, 4)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, hub("good")], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "torch.Size([1, 2])", done.stderr


def test_a_session_that_nobody_can_reach_ends_its_processes(hub):
    own = isohub.Session()
    handle = own.load(hub("good"), "mlp")
    pids = [own._pool.warm().pid, own.workers()[0].pid]
    threads = threading.active_count()
    del own
    gc.collect()
    assert handle(torch.ones(1, 4)).shape == (1, 2)  # the control: a handle keeps its session's processes
    del handle
    gc.collect()
    assert eventually(lambda: all(gone(pid) for pid in pids))
    assert eventually(lambda: threading.active_count() < threads)


def test_no_descriptors_left_is_a_clear_error(own, hub):
    import resource

    with own.load(hub("good"), "mlp") as handle:
        for _ in range(2):  # the graph of the first keeps its inbox
            handle(torch.ones(1, 4))
        own.fetch(hub("edits_sys_path"))  # its files have been read once: what is left to open is a worker's
        gc.collect()
        directories = set(Path(tempfile.gettempdir()).glob("isohub-*"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 20, hard))
        taken = []
        try:
            with pytest.raises(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            for _ in range(3):
                os.close(taken.pop())
            with pytest.raises(errors.WorkerStartError, match="descriptors"):
                own.load(hub("edits_sys_path"), "model")
            with pytest.raises(errors.WorkerStartError, match="descriptors"):
                isohub.Session().load(hub("good"), "mlp")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in taken:
                os.close(descriptor)
        assert set(Path(tempfile.gettempdir()).glob("isohub-*")) <= directories
        before = open_descriptors()
        assert handle(torch.ones(1, 4)).shape == (1, 2)
        with own.load(hub("edits_sys_path"), "model"):
            pass
        assert eventually(lambda: open_descriptors() <= before)


def test_no_directory_for_workers_is_a_clear_error(hub, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", "/proc/no-such-place")
    with pytest.raises(errors.WorkerStartError, match="TMPDIR"):
        isohub.Session().load(hub("good"), "mlp")


def test_a_fork_that_closes_a_handle_or_submits_harms_nobody(hub):
    code = (
        "import os, sys, torch, isohub\n"
        "handle = isohub.load(sys.argv[1], 'mlp')\n"
        "handle.submit(torch.ones(1, 4)).result()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try:\n"
        "        handle.submit(torch.ones(1, 4))\n"
        "    except isohub.errors.SessionClosedError:\n"
        "        handle.close()\n"
        "        os._exit(7)\n"
        "    os._exit(1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), handle(torch.ones(1, 4)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, hub("good")], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "7 torch.Size([1, 2])", done.stderr


def two_at_most(**more):
    return isohub.Session(timeout_s=60, max_workers=2, **more)


def test_one_worker_too_many_is_an_error_and_harms_nobody(hub):
    with two_at_most() as own:
        first, second = own.load(hub("good"), "mlp"), own.load(hub("edits_sys_path"), "model")
        third = own.load(hub("good"), "model")  # another object, no other worker
        with pytest.raises(errors.WorkerStartError, match="max_workers=2.*good@.*edits_sys_path@") as caught:
            own.load(hub("grads_off"), "model")
        assert "close" in caught.value.hint
        assert first(torch.ones(1, 4)).shape == (1, 2)
        second.close()
        assert own.load(hub("grads_off"), "model") is not None
        assert third is not None


def test_a_dead_worker_takes_no_room(hub):
    with two_at_most() as own:
        dying, other = own.load(hub("good"), "mlp"), own.load(hub("edits_sys_path"), "model")
        os.kill(next(worker.pid for worker in own.workers() if worker.name.startswith("good")), 9)
        assert eventually(lambda: len(own.workers()) == 1)
        assert own.load(hub("grads_off"), "model") is not None
        assert (dying, other) is not None


def test_a_load_waits_for_room(hub):
    with two_at_most(when_full="wait") as own:
        first, second = own.load(hub("good"), "mlp"), own.load(hub("edits_sys_path"), "model")
        with pytest.raises(errors.WorkerTimeoutError, match="max_workers=2.*none ended"):
            own.load(hub("grads_off"), "model", timeout_s=0.2)
        loaded = []
        thread = threading.Thread(target=lambda: loaded.append(own.load(hub("grads_off"), "model")))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        pid = second.stats().pid
        second.close()
        thread.join(60)
        assert len(loaded) == 1
        assert gone(pid)
        assert first(torch.ones(1, 4)).shape == (1, 2)


def test_never_more_processes_than_allowed(hub):
    with two_at_most(when_full="wait") as own:
        repos, most = ["good", "edits_sys_path", "grads_off", "uses_random"], []

        def work(number):
            with own.load(hub(repos[number % 4]), "mlp" if number % 4 == 0 else "model"):
                most.append(len(own.workers()))

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(work, range(16)))
        assert len(most) == 16
        assert max(most) <= 2


def test_a_waiting_load_ends_with_its_session(hub):
    own = isohub.Session(max_workers=1, when_full="wait")
    kept = own.load(hub("good"), "mlp")
    raised = []

    def work():
        try:
            own.load(hub("edits_sys_path"), "model")
        except errors.SessionClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.3)
    own.close()
    thread.join(30)
    assert len(raised) == 1
    assert kept is not None


def test_the_worker_that_was_idle_for_longest_makes_room(hub):
    with two_at_most(when_full="evict") as own:
        first, second = own.load(hub("good"), "mlp"), own.load(hub("edits_sys_path"), "model")
        first(torch.ones(1, 4))
        pid = second.stats().pid
        third = own.load(hub("grads_off"), "model")
        assert gone(pid)
        assert first(torch.ones(1, 4)).shape == (1, 2)
        with pytest.raises(errors.SessionClosedError, match="to make room for grads_off@.*max_workers=2") as caught:
            second(torch.ones(1))
        assert "on-death" in caught.value.hint
        second.close()
        assert sorted(worker.name.partition("@")[0] for worker in own.workers()) == ["good", "grads_off"]
        assert third is not None


def test_a_busy_worker_is_not_ended_for_another(hub, tmp_path):
    with isohub.Session(timeout_s=60, max_workers=1, when_full="evict") as own:
        sandbox = isohub.Sandbox(read=[str(tmp_path)])
        first = own.load(hub("good"), "mlp", sandbox=sandbox)

        def waits(module, path):
            import os as remote_os
            import time as remote_time

            while not remote_os.path.exists(path):
                remote_time.sleep(0.01)
            return "done"

        answers = []
        thread = threading.Thread(target=lambda: answers.append(first.run(waits, str(tmp_path / "go"))))
        thread.start()
        assert eventually(lambda: own.workers()[0].state == "busy")
        with pytest.raises(errors.WorkerTimeoutError, match="none ended"):
            own.load(hub("edits_sys_path"), "model", timeout_s=0.3)
        (tmp_path / "go").touch()
        thread.join()
        assert answers == ["done"]
        assert own.load(hub("edits_sys_path"), "model") is not None


def test_two_that_take_turns_in_one_place(hub):
    with isohub.Session(timeout_s=60, max_workers=1, when_full="evict") as own:
        one = own.load(hub("good"), "mlp", seed=1, restart="on-death")
        x = torch.ones(1, 4)
        expected = one(x)
        other = own.load(hub("uses_random"), "model", restart="on-death")
        for _ in range(2):
            with pytest.warns(RuntimeWarning, match="to make room"):
                assert torch.equal(one(x), expected)
            with pytest.warns(RuntimeWarning, match="to make room"):
                repr(other)
                assert other is not None
            assert len(own.workers()) == 1


def test_idle_workers_are_closed_on_request(own, hub):
    plain = own.load(hub("good"), "mlp")
    again = own.load(hub("edits_sys_path"), "model", restart="on-death")
    assert own.close_idle(older_than_s=3600) == []
    assert own.close_idle(3600) == []
    pids = [worker.pid for worker in own.workers()]
    assert sorted(name.partition("@")[0] for name in own.close_idle()) == ["edits_sys_path", "good"]
    assert all(gone(pid) for pid in pids)
    assert own.workers() == []
    with pytest.raises(errors.SessionClosedError, match="close_idle"):
        plain(torch.ones(1, 4))
    with pytest.warns(RuntimeWarning, match="close_idle"):
        assert again.training in (True, False)
    assert isohub.Session().close_idle() == []


@pytest.mark.parametrize(
    "wrong", [{"max_workers": 0}, {"max_workers": True}, {"max_workers": 1.5}, {"when_full": "kill"}]
)
def test_limits_that_are_none(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        isohub.Session(**wrong)


@pytest.mark.parametrize("seconds", [-1, True, "1", float("inf")])
def test_an_age_that_is_none(own, seconds):
    with pytest.raises(ValueError, match="older_than_s"):
        own.close_idle(seconds)
