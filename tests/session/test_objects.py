"""Handles to what is no module: iteration, contexts, arithmetic, signatures and docstrings."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import io
import pydoc
import warnings

import pytest
import torch

import isohub
from isohub import errors
from isohub.errors import ProtocolError
from tests.attacks.liar import Liar, frame, value
from tests.conftest import eventually


@pytest.fixture
def streams(session, hub):
    with session.load(hub("streams"), "streams") as handle:
        yield handle


# Iterations.


def test_a_generator_makes_one_item_when_it_is_asked(streams):
    items = streams.count(1000)
    assert streams.written() == []
    assert next(items).tolist() == [0, 0]
    assert streams.written() == ["made 0"]  # and other calls in between
    assert next(items).tolist() == [1, 1]
    assert streams.written() == ["made 0", "made 1"]


def test_two_generators_interleave(streams):
    pairs = list(zip(streams.count(3), streams.count(3), strict=True))
    assert [(a[0].item(), b[0].item()) for a, b in pairs] == [(0, 0), (1, 1), (2, 2)]


def test_what_a_generator_returns_comes_back(streams):
    def whole():
        return (yield from streams.count(2))

    items, result = whole(), None
    while result is None:
        try:
            next(items)
        except StopIteration as end:
            result = end.value
    assert result == "all"


def test_an_exception_comes_with_its_item(streams):
    seen = []
    with pytest.raises(KeyError, match="no item 2"):
        for item in streams.count(5, fail_at=2):
            seen += [item[0].item()]
    assert seen == [0, 1]
    assert streams.written()[-1] == "ended"


def test_a_generator_is_closed(streams):
    items = streams.count(5)
    next(items)
    items.close()
    assert streams.written() == ["made 0", "ended"]
    assert list(items) == []


def test_a_loop_that_is_left_ends_its_generator_before_the_next_question(streams):
    for _ in range(20):
        for _ in streams.count(5):
            break
        assert streams.written()[-1] == "ended"


def test_a_loop_that_is_left_ends_its_generator_without_another_question(streams, tmp_path):
    where = streams.run(lambda module: __import__("os").getcwd())  # the worker's own; what it printed is seen here

    def stream(module):
        try:
            yield 1
            yield 2
        finally:
            print("the generator has ended", flush=True)

    assert where
    items = streams.run(stream)
    next(items)
    outputs = streams._isohub.link.worker._outputs
    del items
    gc.collect()
    assert eventually(lambda: "the generator has ended" in outputs[0].tail())


def test_a_generator_takes_what_is_sent(streams):
    def echoing(module):
        got = None
        while True:
            got = yield got

    items = streams.run(echoing)
    assert next(items) is None
    assert items.send(5) == 5
    with pytest.raises(ZeroDivisionError):
        items.throw(ZeroDivisionError("x"))


def test_an_iterator_outlives_the_object_that_made_it(streams):
    pairs = streams.run(lambda module: {"a": 1, "b": 2}.items())
    iterator = iter(pairs)
    del pairs
    gc.collect()
    assert list(iterator) == [("a", 1), ("b", 2)]
    assert dict(**streams.run(lambda module: type("M", (dict,), {"extra": 1})(a=1))) == {"a": 1}


def test_what_is_no_iterable_says_so(streams):
    with pytest.raises(TypeError, match="not iterable"):
        iter(streams.scope())


def test_async_generators_in_async_and_plain_loops(streams):
    async def collect():
        return [item async for item in streams.acount(3)]

    assert asyncio.run(collect()) == [0, 1, 2]
    assert streams.written() == ["made 0", "made 1", "made 2", "ended"]
    assert list(streams.acount(3)) == [0, 1, 2]


def test_async_generators_end_early(streams):
    async def first():
        async for item in streams.acount(9):
            return item
        return None

    assert asyncio.run(first()) == 0
    gc.collect()
    assert streams.written() == ["made 0", "ended"]
    items = streams.acount(9)
    assert next(items) == 0
    items.close()
    assert streams.written() == ["made 0", "ended"] * 2
    assert next(iter(streams.acount(9))) == 0
    gc.collect()
    assert streams.written() == ["made 0", "ended"] * 3


def test_async_exceptions_come_with_their_item(streams):
    seen = []

    async def collect():
        async for item in streams.acount(9, fail_at=2):
            seen.extend([item])

    with pytest.raises(KeyError, match="no item 2"):
        asyncio.run(collect())
    assert seen == [0, 1]


def test_plain_generators_may_be_iterated_without_holding_up_the_loop(streams):
    async def collect():
        return [item[0].item() async for item in streams.count(3)]

    assert asyncio.run(collect()) == [0, 1, 2]


# Coroutines.


def test_coroutines_run_in_the_worker_when_they_are_awaited(streams):
    coroutine = streams.twice(torch.ones(2))
    assert asyncio.iscoroutine(coroutine)
    assert streams.written() == []

    async def wait():
        return await coroutine

    assert asyncio.run(wait()).tolist() == [2, 2]
    assert asyncio.run(streams.twice(3)) == 6
    assert streams.twice(4).result() == 8

    async def many():
        return await asyncio.gather(*(streams.twice(number) for number in range(4)))

    assert asyncio.run(many()) == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="later"):
        asyncio.run(streams.fails())


def test_a_coroutine_that_is_cancelled_stops_in_the_worker(streams):
    async def impatient():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(streams.twice(1, pause=3600), 0.2)

    asyncio.run(impatient())
    assert streams.written() == []
    assert asyncio.run(streams.twice(2)) == 4


def test_a_coroutine_that_is_never_awaited_warns_in_the_worker_alone(streams):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coroutine = streams.twice(1)
        coroutine.close()
        del coroutine
        gc.collect()
    assert streams.written() == []


# Contexts.


def test_contexts_are_entered_and_left_in_the_worker(streams):
    scope = streams.scope()
    with scope as inside:
        assert inside is scope
        assert streams.written() == ["enter"]
    assert streams.written() == ["enter", "exit None: None"]


def test_exceptions_are_passed_to_contexts(streams):
    class Own(ValueError):
        pass

    with pytest.raises(Own, match="mine"), streams.scope():
        raise Own("mine")
    assert streams.written()[-1] == "exit Own: mine"
    with streams.scope(KeyError):
        raise KeyError("swallowed")
    with streams.scope(IndexError):
        streams.run(lambda module: [].pop(1))  # what the worker raised is what it gets
    assert streams.written()[-1].startswith("exit RemoteIndexError: IndexError: pop from empty list")
    with streams.managed() as inside:
        assert inside == "inside"
        raise ValueError("told")
    assert streams.written()[-1] == "caught told"

    class Locked(Exception):
        def __init__(self):
            super().__init__("locked")
            self.file = io.StringIO()
            self.generator = (item for item in ())

    with pytest.raises(Locked), streams.scope():
        raise Locked
    assert streams.written()[-1] == "exit Exception: locked"


def test_what_is_no_context_says_so(streams):
    with pytest.raises(TypeError, match="'Number' object does not support the context manager protocol"):
        with streams.number(1):
            pass


def test_async_contexts(streams):
    async def use():
        async with streams.ascope() as inside:
            assert inside == 5
        async with streams.scope():
            pass
        with pytest.raises(KeyError):
            async with streams.ascope():
                raise KeyError

    asyncio.run(use())
    assert streams.written() == ["aenter", "aexit None", "enter", "exit None: None", "aenter", "aexit KeyError"]


# Numbers and the like.


def test_arithmetic_and_order_are_the_objects(streams):
    three, four = streams.number(3), streams.number(4)
    assert (three + four).value == 7
    assert (three + 1).value == (1 + three).value == 4
    assert 10 - three == 7
    assert three * 5 == 15
    assert three < 4
    assert not four < 4
    assert (-three, int(three), float(four)) == (-3, 3, 4.0)
    kept = three
    three += 10
    assert three is kept
    assert three.value == 13
    with pytest.raises(TypeError):
        _ = three @ four


def test_a_handle_equals_itself_alone(streams):
    number = streams.number(1)
    assert number == number
    assert number != streams.number(1)
    assert streams.echo(number) is number
    assert {number: "a"}[streams.echo(number)] == "a"


# What help shows.


def test_a_method_has_the_remote_signature_and_docstring(streams):
    method = streams.documented
    assert (
        str(inspect.signature(method))
        == "(x: torch.Tensor, /, size: int = 3, *rest, scale=inf, **options) -> list[int]"
    )
    assert list(inspect.signature(method).parameters) == ["x", "size", "rest", "scale", "options"]
    assert inspect.getdoc(method) == "What it does.\n\nAnd more of it."
    assert method.__name__ == "documented"
    shown = pydoc.plain(pydoc.render_doc(method))
    assert "documented(x: torch.Tensor, /, size: int = 3, *rest, scale=inf, **options) -> list[int]" in shown
    assert "And more of it." in shown
    assert functools.wraps(method)(lambda: None).__name__ == "documented"


def test_the_workflow_that_torch_hub_documents(streams):
    assert "documented" in dir(streams)
    assert "Twice x, later." in pydoc.plain(pydoc.render_doc(streams.twice))
    assert str(inspect.signature(streams)) == "(x)"
    assert str(inspect.signature(streams.forward)) == "(x)"
    assert streams.forward.__func__ is isohub.RemoteModule.forward
    assert "forward(x)" in pydoc.plain(pydoc.render_doc(streams.forward))
    assert streams.forward(torch.ones(1)).tolist() == [2]


def test_classes_of_handles_have_their_own_words():
    assert "lives in a worker" in isohub.RemoteObject.__doc__
    assert "lives in a worker" in pydoc.plain(pydoc.render_doc(isohub.RemoteObject))
    assert list(inspect.signature(isohub.RemoteObject).parameters) == ["remote"]


def test_a_closed_handle_has_words_too(session, hub):
    with session.load(hub("streams"), "streams") as handle:
        method = handle.documented
        method._isohub.close()
        assert "lives in a worker" in method.__doc__
        with pytest.raises(errors.SessionClosedError):
            method(1)


DESCRIPTION = ["t", "name", "doc", ["l", ["t", "x", "POSITIONAL_OR_KEYWORD", "1", None]], None]


def described(liar, tree):
    [function] = liar.answer(frame(value(["l", ["r", 1, "function", "function", False]], number=1)))
    liar.later(frame(value(tree, number=2)))
    return inspect.signature(function)


def test_a_description_is_text():
    with Liar() as liar:
        shown = ["t", "n", "d", ["l", ["t", "x", "KEYWORD_ONLY", "__import__('os')\x1b[2J", "\x1b]0;x"]], "1"]
        assert str(described(liar, shown)) == "(*, x: \\x1b]0;x = __import__('os')\\x1b[2J) -> 1"


@pytest.mark.parametrize(
    "row",
    [
        ["t", "x", "NO_KIND", None, None], ["t", "x y", "KEYWORD_ONLY", None, None], ["t", "class", "KEYWORD_ONLY", None, None],
        ["t", "x", "KEYWORD_ONLY", 1, None], ["t", "x", "KEYWORD_ONLY", None], ["t", "x", "VAR_KEYWORD", "1", None], ["l"], 5,
        ["t", "x", ["l"], None, None],
    ],
    ids=str,
)  # fmt: skip
def test_a_signature_that_lies_is_refused(row):
    with Liar() as liar:
        function = liar.answer(frame(value(["r", 1, "function", "function", False])))
        liar.later(frame(value(["t", "n", None, ["l", row], None], number=2)))
        with pytest.raises(ProtocolError):
            from isohub.session.descriptions import describe

            describe(function._isohub)
        assert liar.dead()


@pytest.mark.parametrize(
    "answer", [1, ["t", 1, 2], ["t", 1], ["l", True, 1], ["r", 7, "iterator", "x", False]], ids=str
)
def test_an_item_that_lies_is_refused(answer):
    with Liar() as liar:
        iterator = liar.answer(frame(value(["r", 1, "iterator", "generator", False])))
        liar.later(frame(value(answer, number=2)))
        with pytest.raises(ProtocolError, match="an item of a wrong form"):
            next(iterator)
        assert liar.dead()
