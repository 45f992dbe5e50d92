"""What a worker says that it runs on: taken in one form, else it is ended."""

from __future__ import annotations

import re

import pytest
import torch

from isohub import errors
from isohub.environments.runtime import HOST, Runtime
from isohub.session.preparing import could_not_start, prepare
from isohub.wire.arena import dtype_names
from tests.attacks.liar import Liar, frame, value

DTYPES = ["l", "float32", "float8_of_tomorrow"]


@pytest.fixture
def liar():
    with Liar() as made:
        yield made


def test_the_truth_is_taken(liar):
    liar.later(frame(value(["t", "3.9.18", "1.13.1+cpu", DTYPES])))
    prepare(liar.worker, 10)
    assert liar.worker.versions == ("3.9.18", "1.13.1+cpu")
    assert liar.worker.lacking == set(dtype_names()) - {"float32"}


@pytest.mark.parametrize(
    "tree",
    [
        ["t", "3.9.18", "1.13.1"],
        ["l", "3.9.18", "1.13.1", DTYPES],
        ["t", "3.9", "1.13.1", DTYPES],
        ["t", "3.9.18\x1b[2J", "1.13.1", DTYPES],
        ["t", "3.9.18\n", "1.13.1", DTYPES],
        ["t", "3.9.18", "1.13.1\x1b[2J", DTYPES],
        ["t", "3.9.18", "1" * 100, DTYPES],
        ["t", "3.9.18", "<b>1</b>", DTYPES],
        ["t", "3.٩.18", "1.13.1", DTYPES],
        ["t", 3, "1.13.1", DTYPES],
        ["t", "3.9.18", "1.13.1", "float32"],
        ["t", "3.9.18", "1.13.1", ["l", 1]],
        ["t", "3.9.18", "1.13.1", ["l", ["l"]]],
        ["r", 1, "object", "x", False],
        None,
    ],
)
def test_a_lie_ends_the_worker(liar, tree):
    liar.later(frame(value(tree)))
    with pytest.raises(errors.ProtocolError) as caught:
        prepare(liar.worker, 10)
    assert "\x1b" not in str(caught.value)
    assert liar.dead()
    assert liar.worker.versions == ("", "")


def test_an_error_is_of_the_interpreter(liar):
    fault = {"details": [], "bases": ["ImportError"], "type": "ImportError\x1b[2J", "message": "m" * 100_000}
    liar.later(
        frame({"event": "error", "number": 1, "kind": "raised", "kept": False, "traceback": "t\n" * 5000, **fault})
    )
    with pytest.raises(errors.WorkerStartError) as caught:
        prepare(liar.worker, 10)
    told = str(caught.value)
    assert HOST.python in told
    assert "\x1b" not in told
    assert len(told) < 2000


def test_the_hint_is_a_command_for_that_interpreter():
    told = str(could_not_start("it ended", Runtime("k", "/a b/python", ("/one", "/two")), ""))
    assert "hint: run `PYTHONPATH=/one:/two '/a b/python' -c 'import torch'`" in told
    assert f"`{HOST.python} -I -c 'import torch'`" in str(could_not_start("it ended", HOST, ""))


def test_the_hosts_worker_says_what_it_runs_on(session, hub):
    handle = session.load(hub("good"), "mlp")
    (worker,) = [each for each in session.workers() if each.pid == handle.stats().pid]
    assert (worker.environment, worker.torch) == ("host", torch.__version__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", worker.python)
