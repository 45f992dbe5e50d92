"""C28 and C29: what a worker uses has limits, each of which ends in an error of its own; and what it shows is text."""

from __future__ import annotations

import contextlib
import os
import time

import pytest
import torch

import isohub
from isohub import errors
from isohub.sandbox.policy import Sandbox
from tests.conftest import companions, eventually, gone

MIB = 1 << 20


@pytest.fixture(scope="module")
def own():
    with isohub.Session(timeout_s=60) as opened:
        yield opened


@pytest.fixture
def within(own, hub):
    """Runs a function in a worker with these limits, and closes the worker."""
    with contextlib.ExitStack() as closing:

        def run(function, *args, **limits):
            handle = closing.enter_context(own.load(hub("good"), "mlp", sandbox=Sandbox(**limits)))
            return handle.run(function, *args)

        yield run


def allocate(module, mebibytes):
    return len(bytearray(mebibytes << 20))


def test_c28_memory_of_one_process(within):
    with pytest.raises(MemoryError) as caught:
        within(allocate, 900, memory="512 MiB")
    assert "Sandbox(memory=...)" in caught.value.hint
    assert within(allocate, 300, memory="512 MiB") == 300 * MIB


def test_c28_memory_of_torch(within):
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        within(lambda module: torch.ones(1 << 28).sum().item(), memory="512 MiB")
    assert "Sandbox(memory=...)" in caught.value.hint
    assert within(lambda module: torch.ones(1 << 26).sum().item(), memory="512 MiB") == 1 << 26


def test_c28_memory_of_several_processes(within):
    def spread(module, count):
        for _ in range(count):
            if os.fork() == 0:
                kept = bytearray(200 << 20)
                time.sleep(60)
                os._exit(len(kept) & 1)
        time.sleep(3)
        return count

    with pytest.raises(errors.WorkerLimitError) as caught:
        within(spread, 5, memory="512 MiB")
    assert (caught.value.limit, caught.value.allowed) == ("memory", 512 * MIB)
    assert caught.value.used > 512 * MIB
    assert within(spread, 1, memory="512 MiB") == 1


@pytest.mark.skipif(
    os.geteuid() != 0, reason="who is not root cannot look at a worker's descriptors; SECURITY.md says so"
)
def test_c28_memory_that_no_process_maps(within):
    def fill(module, count):
        kept = [os.memfd_create("filled") for _ in range(count)]
        for descriptor in kept:
            os.write(descriptor, bytes(range(256)) * (50 << 12))
        time.sleep(1)
        return len(kept)

    with pytest.raises(errors.WorkerLimitError, match="of memory"):
        within(fill, 40, memory="512 MiB")
    assert within(fill, 4, memory="512 MiB") == 4


def test_c28_processor_time(within):
    def spin(module, seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return True

    with pytest.raises(errors.WorkerLimitError) as caught:
        within(spin, 30, cpu_time_s=1)
    assert (caught.value.limit, caught.value.allowed) == ("cpu_time_s", 1)
    assert within(spin, 0.2, cpu_time_s=1)


def test_c28_processor_time_of_processes_that_take_turns(within):
    def relay(module, seconds):
        end = time.monotonic() + 30
        while time.monotonic() < end and seconds > 0:
            child = os.fork()
            if child == 0:
                stop = time.process_time() + 0.3
                while time.process_time() < stop:
                    pass
                os._exit(0)
            os.waitpid(child, 0)
            seconds -= 0.3
        return True

    with pytest.raises(errors.WorkerLimitError, match="of processor time"):
        within(relay, 20, cpu_time_s=2)
    assert within(relay, 0.3, cpu_time_s=2)


def test_c28_a_fork_bomb(within, own):
    def bomb(module):
        made = 0
        while True:
            try:
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
            except OSError as error:
                return made, error.errno
            made += 1

    def crowd(module):
        for _ in range(100):
            if os.fork() == 0:
                time.sleep(5)
                os._exit(0)
        time.sleep(5)

    made, number = within(bomb, processes=400)
    assert made < 400
    assert number == 11
    # Fewer than the kernel counts for root are the watchdog's to see.
    with pytest.raises((errors.WorkerLimitError, OSError), match="processes|Resource temporarily"):
        within(crowd, processes=20)
    pids = companions(own.workers()[0].pid) if own.workers() else set()
    assert len(pids) < 402


def test_c28_a_bomb_that_never_stops_ends_with_its_worker(own, hub):
    def bomb(module):
        with contextlib.suppress(OSError):
            for _ in range(50):
                if os.fork() == 0:
                    while True:
                        with contextlib.suppress(OSError):
                            os.fork()
        return True

    handle = own.load(hub("good"), "mlp", sandbox=Sandbox(processes=310))
    handle.run(bomb)
    pids = companions(handle.stats().pid)
    assert len(pids) > 50  # the control
    handle.close()
    assert eventually(lambda: all(gone(pid) for pid in pids), within_s=60)  # three hundred that spin, on few cores


@pytest.mark.parametrize(
    ("limit", "value", "kind"),
    [("disk", "8 MiB", OSError), ("file_size", "8 MiB", OSError), ("open_files", 100, OSError)],
)
def test_c28_files(within, limit, value, kind):
    def use(module, mebibytes, count):
        with contextlib.ExitStack() as kept:
            for _ in range(count):
                kept.enter_context(open("/dev/null"))
            with open("large", "wb") as file:
                for _ in range(mebibytes):
                    file.write(bytes(1 << 20))
        os.unlink("large")
        return count

    many = 200 if limit == "open_files" else 0
    with pytest.raises(kind) as caught:
        within(use, 0 if many else 20, many, **{limit: value})
    assert f"Sandbox({limit}=...)" in caught.value.hint
    assert within(use, 4, many // 4, **{limit: value}) == many // 4


def test_c28_output(within):
    def print_much(module, mebibytes):
        for _ in range(mebibytes << 10):
            print("x" * 1023)
        return True

    with pytest.raises(errors.WorkerLimitError, match="printed") as caught:
        within(print_much, 40, output="4 MiB")
    assert caught.value.limit == "output"
    assert within(print_much, 2, output="4 MiB")


def test_c28_time_of_a_call(own, hub):
    with own.load(hub("sleeps_in_call"), "model", timeout_s=20) as handle, pytest.raises(errors.WorkerTimeoutError):
        handle._isohub.link.timeout_s = 0.3
        handle(torch.ones(1))


def test_c28_the_session_goes_on_after_any_limit(own, hub, within):
    with own.load(hub("good"), "mlp") as kept:
        with pytest.raises(errors.WorkerLimitError):
            within(lambda module: [print("x" * 1023) for _ in range(1 << 14)], output="1 MiB")
        assert kept(torch.ones(1, 4)).shape == (1, 2)


def test_c29_a_notebook_is_given_no_page_of_a_worker_s(own, hub):
    def with_pages(module):
        class Pages:
            def _repr_html_(self):
                return "<script>alert(1)</script>"

            _repr_mimebundle_ = _repr_javascript_ = _repr_svg_ = _ipython_display_ = _repr_html_

            def html(self):
                return "<b>asked for</b>"

        return Pages()

    with own.load(hub("good"), "mlp") as handle:
        thing = handle.run(with_pages)
        for name in ("_repr_html_", "_repr_mimebundle_", "_repr_javascript_", "_repr_svg_", "_ipython_display_"):
            assert getattr(thing, name, None) is None
            assert getattr(handle, name, None) is None
        assert thing.html() == "<b>asked for</b>"  # the control: what is asked for comes
