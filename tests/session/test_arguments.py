"""Functions and objects of the caller's in a worker, and what cannot leave the caller's process."""

from __future__ import annotations

import asyncio
import functools
import io
import mmap
import site
import socket
import sys
import threading
from concurrent.futures import Future

import cloudpickle
import pytest
import torch

from isohub.errors import ValueNotTransferableError
from isohub.session.arguments import pickled, place_of
from tests.session import test_handles as another_module_of_ours

HELPERS = """
import dataclasses
import math

import helpers_of_ours as itself

FACTOR = 3
FILE = open(__file__)
FILE.close()

def scale(value):
    return value * FACTOR

@dataclasses.dataclass
class Scaler:
    by: int
    def work(self, module, value):
        return scale(value) * self.by
    @property
    def child(self):
        return math.sqrt(self.by)
"""


@pytest.fixture
def mlp(session, hub):
    with session.load(hub("good"), "mlp", seed=0) as handle:
        yield handle


@pytest.fixture
def helpers(tmp_path, monkeypatch):
    """A module of the caller's, which no worker can import."""
    (tmp_path / "helpers_of_ours.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import helpers_of_ours

    yield helpers_of_ours
    del sys.modules["helpers_of_ours"]


# Functions.


def test_closures_lambdas_and_partials(mlp, helpers):
    offset = torch.ones(2)

    def outer(factor):
        def inner(module, value):
            return helpers.scale(value) * factor + offset

        return inner

    assert mlp.run(outer(2), torch.ones(2)).tolist() == [7, 7]
    assert mlp.run(lambda module, value: helpers.scale(value), 2) == 6
    assert mlp.run(functools.partial(outer(2), value=torch.ones(2))).tolist() == [7, 7]
    assert mlp.run(functools.partial(lambda module, f, v: f(v), f=helpers.scale), v=1) == 3
    assert mlp.run(helpers.Scaler(2).work, 1) == 6
    assert mlp.run(lambda module, functions: [function(1) for function in functions], [helpers.scale, abs]) == [3, 1]


def test_objects_of_ours_are_of_one_class_in_each_call(mlp, helpers):
    kept = mlp.run(lambda module, one: setattr(module, "kept", one), helpers.Scaler(4))
    assert kept is None
    assert mlp.run(lambda module, one: type(module.kept) is type(one) and one.child, helpers.Scaler(9)) == 3.0


def test_a_function_of_another_module_of_ours(mlp):
    assert mlp.run(lambda module: another_module_of_ours.Point(1, 2)) == (1, 2)


def test_a_module_goes_without_what_cannot(mlp, helpers):
    assert mlp.run(lambda module: (helpers.scale(1), helpers.itself.FACTOR, hasattr(helpers, "FILE"))) == (3, 3, False)


def test_cloudpickles_own_list_stays_as_it_was(mlp, helpers):
    before = cloudpickle.list_registry_pickle_by_value()
    mlp.run(lambda module, value: helpers.scale(value), 2)
    with pytest.raises(ValueNotTransferableError):
        mlp.run(lambda module, value: value, threading.Lock())
    assert cloudpickle.list_registry_pickle_by_value() == before


def test_functions_of_many_threads(mlp, helpers):
    wrong = []

    def work(number):
        for _ in range(5):
            got = mlp.run(lambda module, value: helpers.scale(value), number)
            if got != 3 * number:
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_hook_that_is_registered_there_runs_there(mlp):
    def hook(module, inputs, output):
        return output * 0 + 5

    assert mlp.run(lambda module, hook: bool(module.register_forward_hook(hook)), hook)
    assert mlp(torch.ones(1, 4)).tolist() == [[5, 5]]


# Handles within functions and objects.


def test_a_handle_within_a_function_is_the_object_there(mlp):
    first = mlp[0]
    assert mlp.run(lambda module: module[0] is first)
    assert mlp.run(functools.partial(lambda module, part: part is module[0], part=first))
    counter = mlp.run(lambda module: __import__("collections").deque([1]))
    mlp.run(lambda module: counter.append(2))
    assert list(counter) == [1, 2]


def test_a_local_module_that_holds_a_handle_holds_the_module_there(mlp):
    both = torch.nn.Sequential(torch.nn.Identity(), mlp)
    assert mlp.run(lambda module, given: given[1] is module, both)


def test_a_handle_of_another_worker_within_a_function_is_refused(mlp, session, hub):
    with session.load(hub("returns_unknown"), "model") as other:
        with pytest.raises(ValueNotTransferableError, match="each lives in a process of its own"):
            mlp.run(lambda module: other.name)
        with pytest.raises(
            ValueNotTransferableError, match="^argument 2, at \\['a'\\]: a handle to an object of returns_unknown"
        ):
            mlp.run(lambda module, *given: None, 1, {"a": other})


# What lives in this process alone.


def live():
    a, b = socket.socketpair()
    with a, b, open(__file__) as file, open(__file__, "rb") as binary:
        yield "an open file", file
        yield "an open file", binary
        yield "a socket", a
    yield "a lock", threading.Lock()
    yield "a lock", threading.RLock()
    yield "a lock", threading.Condition()
    yield "a thread", threading.current_thread()
    yield "a generator", (item for item in ())
    yield "mapped memory", mmap.mmap(-1, 10)
    yield "a memoryview", memoryview(b"a")
    yield "a future", Future()
    coroutine = asyncio.sleep(0)
    yield "a coroutine", coroutine
    coroutine.close()


def refused(words, place, call, *args):
    with pytest.raises(ValueNotTransferableError, match=f"^{place}: {words}") as raised:
        call(*args)
    assert "h.run(fn, ...)" in raised.value.hint


def test_what_is_alive_is_refused_by_the_name_of_its_argument(mlp):
    kinds = 0
    for words, value in live():
        kinds += 1
        told = f"{words} cannot be sent to a worker"
        refused(told, "argument 1", mlp, value)
        refused(told, "argument 1", mlp.run, lambda module, given: None, value)
        refused(told, "argument 1", mlp[0], value)
        refused(told, "argument 2", setattr, mlp, "attribute", value)
        refused(told, r"argument mask=, at \[1\]\['a'\]", functools.partial(mlp, 1, mask=[0, {"a": value}]))
        refused(f".* it holds {words}", "the function", mlp.run, functools.partial(max, value))
        if hasattr(value, "close"):
            value.close()
    assert kinds == 12


def test_files_of_memory_and_streams_are_values(mlp):
    assert mlp.run(lambda module, file: file.read(), io.StringIO("text")) == "text"
    assert mlp.run(lambda module, file: file.read(), io.BytesIO(b"data")) == b"data"


def test_a_refused_argument_leaves_the_worker_as_it_was(mlp):
    with pytest.raises(ValueNotTransferableError):
        mlp.run(lambda module, *given: None, torch.ones(3), threading.Lock())
    assert mlp(torch.ones(1, 4)).shape == (1, 2)


def test_the_session_is_refused(mlp, session):
    with pytest.raises(ValueNotTransferableError, match="argument 1: a session cannot be sent"):
        mlp.run(lambda module, given: None, session)


def test_places():
    value = object()
    assert place_of(value, "call", ("", (1, [0, value]), {})) == "argument 2, at [1]"
    assert place_of(value, "call", ("", (), {"x": {"k": (value,)}})) == "argument x=, at ['k'][0]"
    assert place_of(value, "call", ("", (), {})) is None
    assert place_of(value, "run", (value, (), {})) == "the function"
    loop = []
    loop.append(loop)
    assert place_of(value, "call", ("", (loop,), {})) is None


def test_pickles_of_no_handle_need_no_link():
    assert pickled(ValueError("x"))


def test_tensors_that_require_a_gradient_are_told_once():
    wanted, other = torch.ones(2, requires_grad=True), torch.ones(2)
    found = []
    pickled([wanted, {"again": wanted}, lambda: wanted, other], lambda value: None, found)
    assert [each is wanted for each in found] == [True]
    found.clear()
    with pytest.raises(ValueNotTransferableError):
        pickled([wanted, threading.Lock()], None, found)
    assert found == []


def test_tensors_of_own_modules_that_go_are_told(helpers):
    helpers.WANTED = torch.ones(2, requires_grad=True)
    helpers.UNUSED = torch.ones(2, requires_grad=True)
    exec("def use():\n    return itself.WANTED", vars(helpers))
    found = []
    pickled(helpers.use, None, found)
    assert [each is helpers.WANTED for each in found] == [True]


@pytest.mark.parametrize("used", [True, False])
def test_what_a_user_has_installed_is_imported_there(tmp_path, monkeypatch, used):
    name = f"of_the_user_{used}".lower()
    (tmp_path / f"{name}.py").write_text("class Thing:\n    pass\n")
    monkeypatch.setattr(site, "ENABLE_USER_SITE", used)
    monkeypatch.setattr(site, "USER_SITE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    thing = __import__(name).Thing()
    by_name = b"_make_skeleton_class" not in pickled(thing)  # by value otherwise: a worker could not import it
    assert by_name is used
