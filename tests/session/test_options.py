"""Deadlines of a block, pipelined calls, cancelled ones, and asyncio."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest
import torch

from isohub import errors
from tests.conftest import eventually


@pytest.fixture
def streams(session, hub):
    with session.load(hub("streams"), "streams") as handle:
        yield handle


@pytest.fixture
def mlp(session, hub):
    with session.load(hub("good"), "mlp") as handle:
        yield handle


@pytest.fixture
def own(hub):
    """A worker that a test may lose."""
    import isohub

    with isohub.Session(timeout_s=60) as session, session.load(hub("streams"), "streams") as handle:
        yield handle


# Deadlines.


def test_a_deadline_holds_for_a_block(own):
    with own.options(timeout_s=30):
        assert own.sleep(0) == 0
        with pytest.raises(errors.WorkerTimeoutError) as raised, own.options(timeout_s=0.2):
            own.sleep(3600)
    assert raised.value.fields["timeout_s"] == 0.2
    assert "was still calling sleep() after" in raised.value.message
    assert "load it again" in raised.value.hint


def test_a_deadline_holds_for_other_handles_to_that_worker(own):
    sleep = own.sleep
    items = own.run(lambda module: iter(lambda: module.sleep(3600), 1))
    with pytest.raises(errors.WorkerTimeoutError), sleep.options(timeout_s=0.2):
        next(items)


def test_a_deadline_holds_for_no_other_worker_thread_or_block(streams, session, hub):
    from isohub.session.options import timeout_of

    with session.load(hub("good"), "plus") as other:
        mine, theirs, seen = streams._isohub.link, other._isohub.link, []
        with streams.options(timeout_s=5), other.options(timeout_s=None), streams.options(timeout_s=3):
            assert (timeout_of(mine, 60), timeout_of(theirs, 60)) == (3, None)
            thread = threading.Thread(target=lambda: seen.append(timeout_of(mine, 60)))
            thread.start()
            thread.join()
        assert seen == [60]
        assert timeout_of(mine, 60) == 60


def test_what_a_block_submits_has_its_deadline_and_modes(streams):
    from isohub.session.options import timeout_of

    link = streams._isohub.link
    with streams.options(timeout_s=7), torch.no_grad():
        future = link.submit(lambda: (timeout_of(link, 60), torch.is_grad_enabled()))
    assert future.result(30) == (7, False)
    with torch.inference_mode():
        future = streams._isohub.link.submit(torch.is_inference_mode_enabled)
    assert future.result(30) is True
    assert streams._isohub.link.submit(torch.is_grad_enabled).result(30) is True


def test_autocast_and_gradient_modes_go_with_what_is_awaited_and_mapped(mlp):
    async def call():
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            return await mlp.call_async(torch.ones(2, 4))

    out = asyncio.run(call())
    assert (out.dtype, out.requires_grad) == (torch.bfloat16, False)
    assert all(item.requires_grad for item in mlp.map([torch.ones(2, 4)] * 3))


@pytest.mark.parametrize("wrong", [0, -1, float("nan")])
def test_deadlines_that_are_none(streams, wrong):
    with pytest.raises(ValueError, match="timeout_s"), streams.options(timeout_s=wrong):
        pass


# Pipelined.


def test_map_keeps_the_order(streams):
    inputs = [torch.full((2,), float(number)) for number in range(20)]
    for got, sent in zip(streams.map(inputs), inputs, strict=True):
        assert torch.equal(got, sent + 1)
    assert list(streams.echo.map(range(5))) == [0, 1, 2, 3, 4]
    assert next(streams.twice.map([1, 2])).result() == 2


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_map_reads_as_far_as_it_has_to(streams, ahead):
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield number

    results = streams.echo.map(endless(), ahead=ahead)
    assert taken == []
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(taken) == 3 + ahead
    results.close()
    assert streams.echo(1) == 1


def test_map_takes_an_item_of_each(streams):
    assert list(streams.echo.map(zip([1, 2], "ab", strict=True))) == [(1, "a"), (2, "b")]
    function = streams.run(lambda module: lambda a, b: a + b)
    assert list(function.map([1, 2, 3], [10, 20])) == [11, 22]
    with pytest.raises(TypeError):
        streams.map()
    with pytest.raises(ValueError, match="ahead"):
        streams.map([1], ahead=-1)


def test_an_exception_comes_with_its_item(streams):
    def odd(module):
        def work(number):
            if number == 2:
                raise KeyError(number)
            return number

        return work

    results = streams.run(odd).map(range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError):
        next(results)


def test_cancel_before_the_start_cancels_and_after_it_says_no(streams):
    begun = streams.sleep.submit(0.5)
    waiting = streams.sleep.submit(0)
    assert eventually(begun.running)
    assert waiting.cancel()
    assert not begun.cancel()
    assert begun.result(30) == 0.5
    assert waiting.cancelled()


# Asyncio.


def test_calls_do_not_hold_up_the_loop(streams):
    async def work():
        turns = 0
        task = asyncio.ensure_future(streams.sleep.call_async(0.3))
        while not task.done():
            await asyncio.sleep(0.01)
            turns += 1
        return task.result(), turns, await streams.call_async(torch.zeros(1))

    slept, turns, result = asyncio.run(work())
    assert slept == 0.3
    assert turns > 1
    assert result.tolist() == [1]


def test_a_cancelled_task_interrupts_its_call(streams):
    async def work():
        task = asyncio.ensure_future(streams.sleep.call_async(3600))
        while not streams._isohub.link.worker._owner:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await streams.call_async(torch.zeros(1))

    pid = streams.stats().pid
    assert asyncio.run(work()).tolist() == [1]
    assert streams.stats().pid == pid


def test_a_cancelled_task_that_has_not_begun_is_never_sent(streams):
    write = streams.run(lambda module: lambda: module.log.append("sent"))

    async def work():
        first = asyncio.ensure_future(streams.sleep.call_async(0.3))
        second = asyncio.ensure_future(write.call_async())
        await asyncio.sleep(0)
        second.cancel()
        await first
        with pytest.raises(asyncio.CancelledError):
            await second

    asyncio.run(work())
    assert streams.written() == []
    write()
    assert streams.written() == ["sent"]


def test_many_threads_and_a_loop_may_use_one_handle(streams):
    wrong = []

    def work(number):
        for turn in range(30):
            got = streams.echo((number, turn))
            wrong.extend([got] if got != (number, turn) else [])

    async def ask():
        return await asyncio.gather(*(streams.echo.call_async(number) for number in range(30)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert asyncio.run(ask()) == list(range(30))
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_handle_may_be_closed_by_a_loop(session, hub):
    async def use():
        async with session.load(hub("streams"), "streams") as handle:
            return await handle.call_async(torch.zeros(1)), handle

    result, handle = asyncio.run(use())
    assert result.tolist() == [1]
    with pytest.raises(errors.SessionClosedError):
        handle(torch.zeros(1))
