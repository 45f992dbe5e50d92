"""restart="on-death": what is built again, what is done again, what is named as lost, and where it stops."""

from __future__ import annotations

import os
import re
import signal
import threading

import pytest
import torch

import isohub
from isohub import errors
from tests.conftest import eventually, gone


@pytest.fixture
def own():
    with isohub.Session(timeout_s=60) as opened:
        yield opened


def kill(session, name="good"):
    (worker,) = [worker for worker in session.workers() if worker.name.startswith(name)]
    os.kill(worker.pid, signal.SIGKILL)
    assert eventually(lambda: worker not in session.workers())
    return worker


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def test_without_it_a_dead_worker_stays_dead(own, hub):
    handle = own.load(hub("good"), "mlp")
    kill(own)
    for _ in range(2):
        with pytest.raises(errors.WorkerDiedError):
            handle(X)


def test_the_same_is_built_again_without_a_seed(own, hub):
    handle = own.load(hub("good"), "mlp", (4, 8, 2), restart="on-death")
    expected, commit = handle(X), handle.commit
    first = kill(own)
    with pytest.warns(RuntimeWarning, match="SIGKILL.*Lost: what calls left in it") as caught:
        assert torch.equal(handle(X), expected)
    assert caught[0].filename == __file__
    (second,) = own.workers()
    assert second.pid != first.pid
    assert handle.commit == commit
    handle.close()
    assert own.workers() == []
    assert gone(second.pid)


def test_modes_and_conversions_are_done_again_and_the_rest_is_named(own, hub):
    handle = own.load(hub("good"), "mlp", seed=3, restart="on-death")
    handle.eval()
    handle.train()
    handle.eval()
    handle.double().to("cpu").requires_grad_(False)
    state = {name: torch.zeros_like(value) for name, value in handle.state_dict().items()}
    handle.load_state_dict(state)
    handle.note = 5

    def rescale(module):
        module.scale = 2

    handle.run(rescale)
    handle[0].half()
    kill(own)
    with pytest.warns(RuntimeWarning) as caught:
        assert not handle.training
    (text,) = [str(each.message) for each in caught]
    assert re.search(r"Done again: train\(\), double\(\), to\(\), requires_grad_\(\)\. ", text)
    lost = text.partition("Lost: ")[2]
    for part in ("load_state_dict()", "rescale() of run() changed", "attribute 'note'", "half() of a", "Linear"):
        assert part in lost, lost
    assert handle[0].weight.dtype == torch.float64
    assert not any(parameter.requires_grad for parameter in handle.parameters())
    torch.manual_seed(3)
    fresh = torch.nn.Linear(4, 8)
    assert torch.equal(handle.state_dict()["0.weight"], fresh.weight.double())
    kill(own)
    with pytest.warns(RuntimeWarning) as caught:
        handle.eval()
    assert "load_state_dict" not in str(caught[0].message)  # told once


def test_a_repetition_that_fails_is_named(own, tmp_path):
    (tmp_path / "hubconf.py").write_text(
        "import torch\n"
        "class Picky(torch.nn.Linear):\n"
        "    allowed = False\n"
        "    def half(self):\n"
        "        if not self.allowed: raise ValueError('not yet')\n"
        "        return super().half()\n"
        "def model(): return Picky(1, 1)\n"
    )
    handle = own.load(tmp_path, "model", restart="on-death")
    handle.run(lambda module: setattr(module, "allowed", True))
    handle.half()
    kill(own, tmp_path.name)
    with pytest.warns(
        RuntimeWarning, match=r"Done again: nothing\. Lost: .*half\(\), which failed: ValueError: not yet"
    ):
        assert handle.weight.dtype == torch.float32


def test_structures_and_objects(own, hub):
    net, (normalise, _, helper) = own.load(hub("good"), "pair", restart="on-death", seed=1)
    made = helper(net)
    image = torch.rand(1, 3, 8, 8)
    expected, plain = net(image), normalise(image)
    kill(own)
    with pytest.warns(RuntimeWarning):
        assert torch.equal(normalise(image), plain)
    assert torch.equal(net(image), expected)
    assert torch.equal(helper(net)(image), net(image[::2]))
    with pytest.raises(errors.SessionClosedError, match="has died") as caught:
        made(image)
    assert "take it again" in caught.value.hint
    with pytest.raises(errors.SessionClosedError, match="has died"):
        net.run(lambda module, other: None, made)


def test_two_loads_of_one_worker_are_built_again_in_one(own, hub):
    first = own.load(hub("good"), "mlp", seed=1, restart="on-death")
    second = own.load(hub("good"), "model", seed=2, restart="on-death")
    third = own.load(hub("good"), "mlp", seed=1)
    expected = first(X), second(torch.ones(1, 3, 8, 8))
    kill(own)
    with pytest.warns(RuntimeWarning):
        assert torch.equal(second(torch.ones(1, 3, 8, 8)), expected[1])
        assert torch.equal(first(X), expected[0])
    assert len(own.workers()) == 1
    with pytest.raises(errors.WorkerDiedError):
        third(X)


def test_an_argument_that_has_died_too_is_built_again(own, hub):
    first = own.load(hub("good"), "mlp", seed=1, restart="on-death")
    second = own.load(hub("good"), "mlp", seed=2, restart="on-death")
    expected = first.run(lambda one, other, x: one(x) + other(x), second, X)
    kill(own)
    with pytest.warns(RuntimeWarning) as caught:
        assert torch.equal(first.run(lambda one, other, x: one(x) + other(x), second, X), expected)
    assert len(caught) == 2


def test_many_threads_build_it_again_once(own, hub):
    handle = own.load(hub("good"), "mlp", restart="on-death")
    expected = handle(X)
    kill(own)
    answers, barrier = [], threading.Barrier(6)

    def work():
        barrier.wait()
        answers.append(handle(X))

    threads = [threading.Thread(target=work) for _ in range(6)]
    with pytest.warns(RuntimeWarning) as caught:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caught) == 1
    assert len(answers) == 6
    assert all(torch.equal(answer, expected) for answer in answers)


def test_three_deaths_in_a_row_are_enough(own, hub):
    handle = own.load(hub("segfaults"), "in_call", restart="on-death")
    with pytest.raises(errors.WorkerDiedError, match="SIGSEGV"):
        handle(torch.ones(1))
    for _ in range(2):
        with pytest.warns(RuntimeWarning), pytest.raises(errors.WorkerDiedError, match="SIGSEGV"):
            handle(torch.ones(1))
    for _ in range(2):
        with pytest.raises(errors.WorkerDiedError, match="SIGSEGV") as caught:
            handle(torch.ones(1))
        assert "not built again" in caught.value.hint
    assert own.workers() == []


def test_an_answer_between_deaths_begins_the_count_anew(own, hub):
    handle = own.load(hub("good"), "mlp", restart="on-death")
    for _ in range(5):
        kill(own)
        with pytest.warns(RuntimeWarning):
            handle(X)


def test_a_deadline_that_was_passed_is_a_death(own, hub):
    warm = own.load(hub("good"), "mlp")  # torch is imported before the clock runs
    handle = own.load(hub("sleeps_in_call"), "model", restart="on-death", timeout_s=5)
    with pytest.raises(errors.WorkerTimeoutError):
        handle(torch.ones(1))
    with pytest.warns(RuntimeWarning, match="still calling forward"):
        assert handle.training in (True, False)
    assert warm(X).shape == (2, 2)


def test_a_directory_that_has_changed_is_not_built(own, tmp_path):
    (tmp_path / "hubconf.py").write_text("import torch\ndef model(): return torch.nn.Linear(1, 1)\n")
    handle = own.load(tmp_path, "model", restart="on-death")
    kill(own, tmp_path.name)
    (tmp_path / "hubconf.py").write_text("import torch\ndef model(): return torch.nn.Linear(1, 2)\n")
    with pytest.raises(errors.FetchError, match="changed|has"):
        handle(torch.ones(1, 1))


def test_an_entrypoint_that_gives_something_else_is_refused(own, tmp_path):
    (tmp_path / "hubconf.py").write_text(
        "import torch, random, os\ndef model(kinds):\n    return torch.nn.Linear(1, 1) if kinds else [1]\n"
    )
    kinds = [1]
    handle = own.load(tmp_path, "model", kinds, restart="on-death")
    kill(own, tmp_path.name)
    kinds.clear()
    with pytest.raises(errors.WorkerStartError, match="something else"):
        handle(torch.ones(1, 1))


def test_a_liar_and_a_closed_session_are_not_built_again(own, hub):
    handle = own.load(hub("good"), "mlp", restart="on-death")

    def close_everything(module):
        import time as remote_time

        os.closerange(3, 100)
        remote_time.sleep(60)

    with pytest.raises(errors.ProtocolError):
        handle.run(close_everything)
    with pytest.raises(errors.ProtocolError):
        handle(X)
    again = own.load(hub("good"), "mlp", restart="on-death")
    own.close()
    with pytest.raises(errors.SessionClosedError):
        again(X)


def test_what_makes_no_sense_is_refused(own, hub):
    with pytest.raises(ValueError, match="restart"):
        own.load(hub("good"), "mlp", restart="always")
    with pytest.raises(ValueError, match="ends its worker"):
        own.load(hub("good"), "mlp", restart="on-death", returns="state_dict")


def test_handles_that_were_dropped_are_not_kept_by_it(own, hub):
    import gc

    handle = own.load(hub("good"), "mlp", restart="on-death")
    kill(own)
    with pytest.warns(RuntimeWarning):
        handle(X)
    del handle
    gc.collect()
    assert eventually(lambda: own.workers() == [])


def test_what_iterations_contexts_arithmetic_and_gradients_change_is_named(own, hub):
    handle = own.load(hub("good"), "mlp", restart="on-death")

    class Scope:
        def __enter__(self):
            return 1

        def __exit__(self, *error):
            return False

        def __iadd__(self, other):
            return self

    async def later(module):
        return 1

    assert next(handle.run(lambda module: iter([1]))) == 1
    assert handle.run(later).result() == 1
    scope = handle.run(lambda module: Scope())
    with scope:
        pass
    scope += 1
    handle[0].weight.grad = torch.ones(8, 4)
    handle(X).sum().backward()
    handle.register_parameter("more", torch.nn.Parameter(torch.ones(1)))
    lost = set(handle._isohub.link.recovery._lost)
    for part in (
        "what an iteration of a builtins.list_iterator in it changed",
        "what awaiting of a builtins.coroutine in it changed",
        "the gradients that a backward pass brought",
        "the parameter 'more'",
    ):
        assert part in lost, lost
    for part in (
        "the context of a ",
        "what leaving a context of a ",
        "what iadd of a ",
        "the gradient of 'weight' of a ",
    ):
        assert any(each.startswith(part) for each in lost), lost


def test_a_graph_of_the_worker_that_died_is_not_taken_for_one_of_the_next(own, hub):
    handle = own.load(hub("good"), "mlp", restart="on-death")
    for _ in range(3):
        out = handle(X)
    kill(own)
    with pytest.warns(RuntimeWarning):
        kept = [handle(X) for _ in range(9)]  # the next worker's questions have the same numbers
    with pytest.raises(errors.SessionClosedError, match="needs its worker, which is gone"):
        out.sum().backward()
    kept[0].sum().backward()  # the control


def test_a_deadline_of_a_block_holds_for_the_next_worker_too(own, hub):
    handle = own.load(hub("streams"), "streams", restart="on-death")
    with handle.options(timeout_s=30):
        kill(own, "streams")
        with pytest.warns(RuntimeWarning):
            assert handle.sleep(0) == 0
        assert own.workers()
        from isohub.session.options import timeout_of

        assert timeout_of(handle._isohub.link, 60) == 30
    assert timeout_of(handle._isohub.link, 60) == 60
