"""A worker's death, deadline and interruption, and that nothing is left of either."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
import torch

import isohub
from isohub import errors
from tests.conftest import companions, eventually, gone, open_descriptors, spare_of


def test_a_worker_killed_during_a_call_is_told_at_once_a_hundred_times(session, hub):
    keep = session.load(hub("good"), "mlp")  # so that the session has threads and arenas before the count
    keep(torch.ones(1, 4))
    before, rss, threads = open_descriptors(), psutil.Process().memory_info().rss, threading.active_count()
    slowest = 0.0
    for _ in range(100):
        handle = session.load(hub("sleeps_in_call"), "model")
        (worker,) = [worker for worker in session._pool.workers() if worker.name.startswith("sleeps_in_call")]
        future = handle.submit(torch.ones(1))
        while not worker._lock.locked():
            time.sleep(0.0005)
        killed = time.perf_counter()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(errors.WorkerDiedError) as caught:
            future.result(10)
        slowest = max(slowest, time.perf_counter() - killed)
        assert caught.value.signal_name == "SIGKILL"
        assert caught.value.phase == "calling forward()"
        assert caught.value.pid == worker.pid
        assert gone(worker.pid)
        del handle, future, caught
    gc.collect()
    assert eventually(lambda: open_descriptors() <= before)
    assert eventually(lambda: threading.active_count() <= threads)
    assert psutil.Process().memory_info().rss - rss < 64 << 20
    assert [worker.name.split("@")[0] for worker in session.workers()] == ["good"]
    assert keep(torch.ones(1, 4)).shape == (1, 2)
    print(f"slowest report of a death: {slowest * 1000:.1f} ms")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_the_signal_is_named(session, hub, number):
    handle = session.load(hub("good"), "mlp")
    with pytest.raises(errors.WorkerDiedError, match=signal.Signals(number).name) as caught:
        handle.run(lambda module, n: os.kill(os.getpid(), n), int(number))
    assert caught.value.signal_name == signal.Signals(number).name
    with pytest.raises(errors.WorkerDiedError):  # and again, for every later question
        handle(torch.ones(1, 4))


def test_an_exit_code_is_told(session, hub):
    handle = session.load(hub("os_exit"), "in_call")
    with pytest.raises(errors.WorkerDiedError, match="exit code 7") as caught:
        handle(torch.ones(1))
    assert (caught.value.exit_code, caught.value.signal_name) == (7, None)


def test_one_workers_death_is_no_others(session, hub):
    kept, dying = session.load(hub("good"), "mlp"), session.load(hub("segfaults"), "in_call")
    with pytest.raises(errors.WorkerDiedError):
        dying(torch.ones(1))
    assert kept(torch.ones(1, 4)).shape == (1, 2)
    again = session.load(hub("segfaults"), "in_call")
    assert isinstance(again, isohub.RemoteModule)


def test_a_worker_that_dies_with_a_child_that_holds_its_channel(session, hub):
    def fork_and_die(module):
        if os.fork() == 0:
            time.sleep(60)
        os._exit(5)

    handle = session.load(hub("good"), "mlp", timeout_s=20)
    with pytest.raises(errors.WorkerDiedError, match="exit code 5"):
        handle.run(fork_and_die)


def test_a_worker_that_closes_its_channel_and_lives_on_is_killed(session, hub):
    def close_everything(module):
        os.closerange(3, 100)
        time.sleep(60)

    handle = session.load(hub("good"), "mlp", timeout_s=20)
    (worker,) = [worker for worker in session._pool.workers() if worker.name.startswith("good")]
    with pytest.raises(errors.ProtocolError, match="lived on"):
        handle.run(close_everything)
    assert gone(worker.pid)


def test_children_and_daemons_of_a_worker_end_with_it(session, hub, tmp_path):
    pids = tmp_path / "pids"

    def leave_processes(module, path):
        import subprocess as remote_subprocess

        remote_subprocess.Popen(["sleep", "600"])
        script = f"import os, time\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\nopen({path!r}, 'a').write(str(os.getpid()) + ' ')\ntime.sleep(600)"
        remote_subprocess.run([__import__("sys").executable, "-c", script], check=True)

    handle = session.load(hub("good"), "mlp", sandbox=isohub.Sandbox(write=[tmp_path]))
    handle.run(leave_processes, str(pids))
    assert eventually(lambda: pids.exists() and pids.read_text().strip() != "")
    left = companions(handle.stats().pid)
    assert len(left) == 4  # the first of its namespace, the worker, its child and its daemon
    handle.close()
    assert eventually(lambda: all(gone(pid) for pid in left), 5)


def test_forks_of_a_repo_do_not_answer_for_it(session, hub):
    handle = session.load(hub("forks"), "model")
    assert torch.equal(handle(torch.ones(2)), torch.full((2,), 2.0))
    handle.close()


CALLER = """
    import os, sys, threading, time
    import torch, isohub
    session = isohub.Session()
    handles = [session.load(path, "model") for path in sys.argv[1:]]
    threading.Thread(target=lambda: handles[0](torch.ones(1)), daemon=True).start()
    time.sleep(0.2)
    print("pids", session._pool.warm().pid, *[worker.pid for worker in session.workers()], flush=True)
    print("directory", session._pool.warm()._directory, flush=True)
    {end}
"""


@pytest.mark.parametrize(
    ("end", "sent"),
    [
        ("time.sleep(600)", signal.SIGKILL),
        ("time.sleep(600)", signal.SIGTERM),
        ("os._exit(3)", None),
        ("os.abort()", None),
        ("raise SystemExit(0)", None),
        ("os.kill(os.getpid(), 9)", None),
    ],
)
def test_whatever_ends_the_caller_ends_its_processes(hub, end, sent):
    code = textwrap.dedent(CALLER).replace("{end}", end)
    process = subprocess.Popen(
        [sys.executable, "-c", code, hub("sleeps_in_call"), hub("forks"), hub("good")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as lines:
        pids = [int(word) for word in lines.readline().split()[1:]]
        directory = lines.readline().split()[1]
        assert len(pids) == 4
        if sent is not None:
            process.send_signal(sent)
        process.wait(20)
        ended = time.monotonic()
    assert eventually(lambda: all(gone(pid) for pid in pids), 5), [pid for pid in pids if not gone(pid)]
    print(f"all gone after {time.monotonic() - ended:.3f} s")
    assert eventually(lambda: not os.path.exists(directory), 5)


def test_a_caller_killed_while_the_zygote_imports_torch(hub):
    code = "import isohub, time, os\nfrom isohub.session.pool import Pool\np = Pool()\nprint(p.warm().pid, flush=True)\ntime.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as lines:
        zygote = int(lines.readline())
        process.kill()
        process.wait()
    assert eventually(lambda: gone(zygote), 5)


def test_a_zygote_that_is_killed_takes_its_workers_along_and_is_replaced(hub):
    with isohub.Session() as own:
        handle = own.load(hub("good"), "mlp")
        zygote, worker = own._pool.warm().pid, own.workers()[0].pid
        os.kill(zygote, signal.SIGKILL)
        assert eventually(lambda: gone(worker))
        with pytest.raises(errors.WorkerDiedError):
            handle(torch.ones(1, 4))
        with own.load(hub("good"), "mlp") as again:
            assert again(torch.ones(1, 4)).shape == (1, 2)


def test_an_interrupted_call_leaves_the_session_usable(session, hub):
    handle = session.load(hub("good"), "mlp")

    def slow(module, seconds):
        time.sleep(seconds)
        return seconds

    for _ in range(5):
        timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            handle.run(slow, 0.3)
        timer.join()
        assert handle.run(slow, 0.0) == 0.0
        assert handle(torch.ones(1, 4)).shape == (1, 2)


def test_an_interrupt_reaches_the_worker(session, hub):
    """Ctrl-C stops what runs there too: the next question does not wait for the rest of it."""
    handle = session.load(hub("good"), "mlp")
    state = handle.state_dict()

    def endless(module):
        while True:
            time.sleep(0.01)

    for _ in range(3):
        timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            handle.run(endless)
        timer.join()
        started = time.monotonic()
        assert torch.equal(handle.state_dict()["0.weight"], state["0.weight"])
        assert time.monotonic() - started < 30
    pid = session.workers()[0].pid
    for _ in range(50):  # an interrupt of a worker that is idle, or about to be, is none
        os.kill(pid, signal.SIGINT)
        assert handle(torch.ones(1, 4)).shape == (1, 2)


def test_objects_of_an_answer_that_nobody_takes_are_given_back(session, hub):
    handle = session.load(hub("good"), "mlp")

    def stubborn(module):
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
        return [object(), {"more": object()}]

    def held(module):
        import gc as remote_gc

        return max(len(o._objects) for o in remote_gc.get_objects() if type(o).__name__ == "Server")

    before = handle.run(held)
    for _ in range(4):
        timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            handle.run(stubborn)
        timer.join()
        handle(torch.ones(1, 4))
    assert handle.run(held) <= before


def test_a_worker_that_does_not_stop_is_named_for_what_it_still_does(session, hub):
    handle = session.load(hub("good"), "mlp", timeout_s=1)

    def stubborn(module):
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass

    timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        handle.run(stubborn)
    timer.join()
    with pytest.raises(errors.WorkerTimeoutError, match=r"running stubborn\(\), from which its caller was interrupted"):
        handle(torch.ones(1, 4))


def test_a_deadline_holds_while_another_thread_has_the_worker(session, hub):
    slow, quick = session.load(hub("good"), "mlp"), session.load(hub("good"), "mlp", timeout_s=0.5)
    (worker,) = [worker for worker in session._pool.workers() if worker.name.startswith("good")]
    thread = threading.Thread(target=lambda: slow.run(lambda module: time.sleep(2)))
    thread.start()
    assert eventually(worker._lock.locked)
    with pytest.raises(errors.WorkerTimeoutError, match="busy running"):
        quick(torch.ones(1, 4))
    thread.join()
    assert quick(torch.ones(1, 4)).shape == (1, 2)


def test_a_handle_used_within_its_own_call_is_an_error(session, hub):
    handle = session.load(hub("good"), "mlp")
    seen = []

    def again(*_):
        try:
            handle(torch.ones(1, 4))
        except errors.WorkerError as error:
            seen.append(error)

    before = signal.signal(signal.SIGUSR1, again)
    timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGUSR1])
    timer.start()
    try:
        handle.run(lambda module: time.sleep(0.5))
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert "within its own question" in str(seen[0])
    assert handle(torch.ones(1, 4)).shape == (1, 2)


def test_a_deadline_counts_from_the_question(session, hub):
    handle = session.load(hub("good"), "mlp", timeout_s=5)
    for _ in range(3):
        assert handle.run(lambda module: time.sleep(0.05)) is None
    assert handle(torch.ones(1, 4)).shape == (1, 2)


def test_a_session_closed_in_the_middle_of_a_call(hub):
    own = isohub.Session()
    handle = own.load(hub("sleeps_in_call"), "model")
    (worker,) = own._pool.workers()
    future = handle.submit(torch.ones(1))
    assert eventually(worker._lock.locked)
    own.close()
    with pytest.raises(errors.SessionClosedError):
        future.result(10)
    assert gone(worker.pid)


def test_output_goes_to_the_log_by_name_and_escaped(session, hub, caplog):
    with caplog.at_level(logging.INFO, logger="isohub.worker"):
        with session.load(hub("good"), "mlp") as handle:
            handle.run(
                lambda module: (print("to stdout \x1b[31mred"), print("to stderr", file=__import__("sys").stderr))
            )
            assert eventually(lambda: len(caplog.records) >= 2)
    assert {record.name.split("@")[0] for record in caplog.records} == {"isohub.worker.good"}
    assert "to stdout \\x1b[31mred" in [record.getMessage() for record in caplog.records]
    assert "to stderr" in [record.getMessage() for record in caplog.records]


def test_a_flood_of_output_grows_nothing(session, hub):
    handle = session.load(hub("good"), "mlp")
    rss = psutil.Process().memory_info().rss

    def flood(module, lines):
        if lines:
            for _ in range(2000):
                os.write(1, (b"x" * 99 + b"\n") * 500)
        else:
            for _ in range(100):
                os.write(2, b"y" * 1_000_000)

    handle.run(flood, True)
    handle.run(flood, False)
    assert psutil.Process().memory_info().rss - rss < 64 << 20
    assert handle(torch.ones(1, 4)).shape == (1, 2)


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_ten_thousand_calls_leave_nothing(session, hub):
    handle = session.load(hub("good"), "plus", 1.0)
    small, large = torch.ones(1), torch.ones(1 << 17)
    for _ in range(200):
        handle(small), handle(large), handle.run(lambda module: object())
    gc.collect()
    process, remote = psutil.Process(), psutil.Process(session.workers()[0].pid)
    before = open_descriptors(), process.memory_info().rss, remote.num_fds(), remote.memory_info().rss
    for i in range(10_000):
        handle(large if i % 10 == 0 else small)
        if i % 100 == 0:
            handle.run(lambda module: object())
    gc.collect()
    after = open_descriptors(), process.memory_info().rss, remote.num_fds(), remote.memory_info().rss
    print("descriptors, rss, remote descriptors, remote rss:", before, after)
    assert eventually(lambda: open_descriptors() <= before[0])  # the watchdog has one for a moment
    assert after[2] <= before[2]
    assert after[1] - before[1] < 16 << 20
    assert after[3] - before[3] < 16 << 20


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_two_hundred_loads_and_closes_leave_nothing(session, hub):
    def once():
        with session.load(hub("good"), "mlp") as handle:
            handle(torch.ones(1, 4))

    handle = session.load(hub("good"), "mlp")
    zygote = psutil.Process(session.workers()[0].pid).parent()  # not what stands around it
    handle.close()
    for _ in range(10):
        once()
    gc.collect()
    process = psutil.Process()
    spare_of(session)
    kept, workers = len(zygote.children(recursive=True)), len(session.workers())
    before = (
        open_descriptors(),
        process.num_threads(),
        process.memory_info().rss,
        zygote.num_fds(),
        zygote.memory_info().rss,
    )
    for _ in range(200):
        once()
    gc.collect()
    assert eventually(lambda: open_descriptors() <= before[0])
    after = (
        open_descriptors(),
        process.num_threads(),
        process.memory_info().rss,
        zygote.num_fds(),
        zygote.memory_info().rss,
    )
    print("descriptors, threads, rss, zygote descriptors, zygote rss:", before, after)
    assert after[1] <= before[1]
    assert after[2] - before[2] < 16 << 20
    assert after[3] <= before[3]
    assert after[4] - before[4] < 16 << 20
    assert len(session.workers()) == workers
    assert eventually(lambda: len(zygote.children(recursive=True)) <= kept)
