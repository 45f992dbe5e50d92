"""Backward passes that go on in the worker, and those that cannot and say so."""

from __future__ import annotations

import asyncio
import gc

import pytest
import torch

import isohub
from isohub import errors
from tests.conftest import eventually


@pytest.fixture
def mlp(session, hub):
    with session.load(hub("good"), "mlp", seed=0) as handle:
        yield handle


@pytest.fixture
def load(session, hub):
    """Loads from the repo of conforming models."""
    made = []

    def one(name):
        made.append(session.load(hub("conforms"), name))
        return made[-1]

    yield one
    for handle in made:
        handle.close()


def graphs(handle):
    """How many calls the worker keeps the graphs of, once it has heard what it may forget."""
    code = "[len(o._kept) for o in __import__('gc').get_objects() if type(o).__name__ == 'Tapes'][0]"
    with torch.no_grad():
        return handle.run(eval_there, code)


def eval_there(module, code):
    return eval(code)


def test_outputs_depend_on_the_parameters(mlp):
    out = mlp(torch.ones(2, 4))
    assert out.requires_grad
    assert not out.is_leaf
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in mlp.parameters())


def test_without_gradient_mode_nothing_is_recorded(mlp):
    x = torch.ones(2, 4, requires_grad=True)
    with torch.no_grad():
        assert not mlp(x).requires_grad
    with torch.inference_mode():
        assert mlp(x).is_inference()
    assert graphs(mlp) == 0
    mlp.requires_grad_(False)
    assert not mlp(x.detach()).requires_grad
    assert mlp(x).requires_grad
    mlp(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in mlp.parameters())


def test_the_graph_is_kept_until_the_last_output_is_gone(load):
    several = load("several")
    left, (right, again), more = several(torch.ones(2, 3))
    assert graphs(several) == 1
    del left, right, more
    gc.collect()
    assert graphs(several) == 1
    again.sum().backward()
    del again
    assert graphs(several) == 0
    with pytest.raises(errors.RemoteError):
        load("raises")(torch.ones(2, 3, requires_grad=True), "key")
    assert graphs(several) == 0


def test_an_output_used_twice_and_one_not_used(load):
    several = load("several")
    x = torch.ones(2, 3, requires_grad=True)
    left, (right, _), more = several(x)
    (right.sum() + (right * 2).sum()).backward(retain_graph=True)
    there = dict(several.named_parameters())
    assert there["left.weight"].grad is None
    assert torch.equal(there["right.bias"].grad, torch.full((2,), 6.0))
    assert not more["best"].requires_grad
    assert not more["plain"].requires_grad
    left.sum().backward()
    assert torch.equal(there["left.bias"].grad, torch.full((2,), 2.0))
    assert torch.equal(more["input"], x)


def test_a_second_pass_is_torchs_own_error_unless_the_graph_was_kept(mlp):
    x = torch.ones(2, 4, requires_grad=True)
    loss = mlp(x).pow(2).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)
    out = mlp(x)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        out.sum().backward()


def test_parameters_get_gradients_when_a_local_models_would(mlp):
    x = torch.ones(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(mlp(x).sum(), x)
    assert gradient.shape == (2, 4)
    mlp(x).sum().backward(inputs=[x])
    assert all(parameter.grad is None for parameter in mlp.parameters())
    between = x * 2
    (gradient,) = torch.autograd.grad(mlp(between).sum(), between)
    assert all(parameter.grad is None for parameter in mlp.parameters())
    mlp(x).sum().backward()  # the control
    assert all(parameter.grad is not None for parameter in mlp.parameters())


def test_the_gradient_of_a_gradient(mlp):
    local = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    local.load_state_dict(mlp.state_dict())
    found = []
    for model in (mlp, local):
        torch.manual_seed(0)
        x = torch.randn(2, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x * 2).pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(3).sum(), x, create_graph=True)
        ((gradient.norm() - 1).pow(2) + second.pow(2).sum()).backward()
        found.append([gradient, second, x.grad, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert graphs(mlp) > 0
    del found, model, gradient, second, one, other
    gc.collect()
    assert graphs(mlp) == 0


@pytest.mark.filterwarnings("ignore:Using backward")  # torch's own, of circles
def test_a_penalty_on_the_gradients_of_parameters_is_an_error(mlp):
    mlp(torch.ones(2, 4)).pow(2).sum().backward(create_graph=True)
    penalty = sum(parameter.grad.pow(2).sum() for parameter in mlp.parameters())
    with pytest.raises(RuntimeError, match=r"has reached an input of an earlier call[\s\S]*h\.run"):
        penalty.backward()


def test_gradgradcheck(load):
    smooth = load("smooth")
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(smooth, (x,))
    assert torch.autograd.gradgradcheck(lambda x: smooth(x * 2).tanh(), (x,))


def test_an_input_that_was_changed_is_torchs_own_error_where_it_is_needed(mlp):
    x = torch.ones(2, 4, requires_grad=True)
    given = x * 1
    out = mlp(given)
    given.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_an_output_may_be_changed_in_place(mlp):
    x, y = torch.ones(2, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    mlp(x).mul_(3).sum().backward()
    (mlp(y) * 3).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_an_input_that_is_changed_later_is_no_matter(mlp):
    x, y = torch.ones(2, 4), torch.ones(2, 4)
    out = mlp(x)
    x.zero_()
    out.sum().backward()
    found = [parameter.grad.clone() for parameter in mlp.parameters()]
    mlp.zero_grad()
    mlp(y).sum().backward()
    assert all(torch.equal(one, p.grad) for one, p in zip(found, mlp.parameters(), strict=True))


def test_one_tensor_given_twice_is_one_tensor_there(mlp):
    x = torch.ones(3, requires_grad=True)
    out = mlp.run(lambda module, pair: (pair["a"] is pair["b"][0], pair["a"] * pair["b"][0]), {"a": x, "b": [x]})
    assert out[0]
    out[1].sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_methods_submodules_functions_and_items(mlp):
    x = torch.ones(2, 4, requires_grad=True)
    for call in (mlp.forward, mlp[0], lambda x: mlp.run(lambda module, x: module(x), x), mlp.__call__):
        x.grad = None
        call(x).sum().backward()
        assert x.grad is not None
    scaled = mlp.run(lambda module: lambda x: x * 5)
    x.grad = None
    scaled(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 4), 5.0))
    future = mlp.submit(x)
    future.result().sum().backward()
    with torch.no_grad():
        assert not mlp.submit(x).result().requires_grad
    each = mlp.run(lambda module: (module(torch.ones(1, 4)) for _ in range(2)))
    assert all(item.requires_grad for item in each)


def test_chained_calls_of_one_worker(load):
    recurrent = load("recurrent")
    x = torch.ones(1, 2, 3, requires_grad=True)
    state, total = None, torch.zeros(())
    for _ in range(3):
        out, state = recurrent(x, state)
        total = total + out.sum()
    total.backward()
    assert x.grad is not None
    whole = recurrent.run(
        lambda module, x: torch.autograd.grad(module(torch.cat([x, x, x], 1))[0].sum(), x),
        x.detach().requires_grad_(),
    )
    assert torch.allclose(x.grad, whole[0], atol=1e-6)


def test_a_gradient_that_would_go_to_an_earlier_call_is_an_error(load):
    remembers = load("remembers")
    first, second = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    remembers(first)
    with pytest.raises(RuntimeError, match=r"has reached an input of an earlier call[\s\S]*h\.run"):
        remembers(second).sum().backward()
    holds = load("holds")
    held = holds(first)
    with pytest.raises(RuntimeError, match="has reached an input of an earlier call"):
        held.read().sum().backward()
    holds(first.detach()).read().sum().backward()  # the control
    assert holds.linear.weight.grad is not None


class Two:
    def __init__(self, x):
        self.x = x


def test_a_tensor_within_an_object_that_goes_by_pickle_gets_no_gradient_and_says_so(load):
    pair = load("pair")
    leaf = torch.ones(2, 3, requires_grad=True)
    for x in (leaf, leaf * 2):
        with pytest.raises(RuntimeError, match="for tensors within objects that go by pickle"):
            pair(Two(x)).sum().backward()
    pair(Two(leaf.detach())).sum().backward()  # the control
    assert pair.linear.weight.grad is not None


def test_outputs_outlive_the_handle_and_the_backward_pass_says_so(hub):
    with isohub.Session(timeout_s=60) as own:
        handle = own.load(hub("good"), "mlp")
        out = handle(torch.ones(2, 4))
        handle.close()
        assert eventually(lambda: not own.workers())
        with pytest.raises(errors.SessionClosedError, match="needs its worker, which is gone"):
            out.sum().backward()


def test_graphs_go_when_there_are_too_many(mlp):
    outs = [mlp(torch.ones(1, 4)) for _ in range(4096 + 5)]
    assert graphs(mlp) == 4096
    outs[-1].sum().backward()
    with pytest.raises(RuntimeError, match=r"not kept any more: a worker keeps 4096[\s\S]*torch\.no_grad\(\)"):
        outs[0].sum().backward()
    assert mlp(torch.ones(1, 4)).requires_grad


def test_graphs_go_when_memory_is_short(hub):
    with isohub.Session(timeout_s=60, sandbox=isohub.Sandbox(memory="1GiB")) as own, own.load(hub("good"), "plus") as h:
        h.run(lambda module: setattr(module, "weight", torch.nn.Parameter(torch.ones(1))))
        work = lambda module, x: (x.expand(8 << 20).clone() * module.weight).exp().sum()  # noqa: E731
        outs = [h.run(work, torch.zeros(1, requires_grad=True)) for _ in range(24)]  # 64 MiB of graph each
        assert 1 <= graphs(h) < 12
        outs[-1].backward()
        with pytest.raises(RuntimeError, match="fewer where memory is short"):
            outs[0].backward()


def test_a_graph_that_nobody_can_ask_for_frees_its_memory(mlp):
    def live(module):
        return sum(isinstance(o, torch.Tensor) and o.shape == (3, 4) for o in __import__("gc").get_objects())

    for x in (torch.ones(3, 4), torch.ones(3, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True) * 2):
        for _ in range(3):
            mlp(x)
        with torch.no_grad():
            assert mlp.run(live) == 0


def test_what_an_error_leaves_is_nothing(mlp):
    x = torch.ones(2, 4, requires_grad=True)

    def complain(module, _):
        module[0].weight.register_hook(lambda grad: 1 / 0)

    mlp.run(complain, None)
    with pytest.raises(ZeroDivisionError):
        mlp(x).sum().backward()
    assert x.grad is None
    assert mlp(x).requires_grad


def test_autograds_anomalies_and_checkpoints_around_a_handle(mlp):
    from torch.utils.checkpoint import checkpoint

    x, y = torch.ones(2, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    checkpoint(mlp, x, use_reentrant=False).sum().backward()
    mlp(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_calls_that_share_a_part_of_their_graph(mlp):
    def cache(module):
        module.twice = module[0].weight * 2

    mlp.run(cache)
    work = lambda module, x: torch.tanh(x @ module.twice.exp().T)  # noqa: E731
    outs = [mlp.run(work, torch.ones(1, 4)) for _ in range(2)]
    (outs[0].sum() + outs[1].sum()).backward(retain_graph=True)
    assert mlp.get_parameter("0.weight").grad is not None


class Scaled:
    """Arithmetic and a context that give what a module gives."""

    def __init__(self, module):
        self.module = module

    def __add__(self, x):
        return self.module(x)

    __radd__ = __add__

    def __enter__(self):
        return self.module(torch.ones(1, 4))

    def __exit__(self, *error):
        return False

    async def __aenter__(self):
        return self.module(torch.ones(1, 4))

    async def __aexit__(self, *error):
        return False


async def later(module):
    return module(torch.ones(1, 4))


async def one_by_one(module):
    yield module(torch.ones(1, 4))


def entered(handle):
    with handle as out:
        return out


async def entered_async(handle):
    async with handle as out:
        return out


async def first_of(stream):
    return await stream.__anext__()


@pytest.mark.parametrize(
    "take",
    [
        lambda mlp, x: next(mlp.run(lambda module: (module(torch.ones(1, 4)) for _ in range(2)))),
        lambda mlp, x: next(iter(mlp.run(lambda module: Items([module(torch.ones(1, 4))])))),
        lambda mlp, x: next(mlp.run(one_by_one)),
        lambda mlp, x: asyncio.run(first_of(mlp.run(one_by_one))),
        lambda mlp, x: mlp.run(later).result(),
        lambda mlp, x: entered(mlp.run(Scaled)),
        lambda mlp, x: asyncio.run(entered_async(mlp.run(Scaled))),
        lambda mlp, x: mlp.run(Scaled) + x,
        lambda mlp, x: x + mlp.run(Scaled),
        lambda mlp, x: mlp.run(lambda module: module.forward)(x),
    ],
    ids=["generator", "items", "stream", "async stream", "coroutine", "with", "async with", "add", "radd", "function"],
)
def test_what_objects_give_depends_on_the_parameters(mlp, take):
    mlp.zero_grad()
    x = torch.ones(1, 4, requires_grad=True)
    out = take(mlp, x)
    assert out.requires_grad
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in mlp.parameters())


class Items:
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_an_item_that_would_need_a_gradient_of_an_earlier_call_is_an_error(mlp):
    x = torch.ones(1, 4, requires_grad=True)
    items = mlp.run(lambda module, x: (module(x) for _ in range(2)), x)
    with pytest.raises(RuntimeError, match="has reached an input of an earlier call"):
        next(items).sum().backward()


def test_a_tensor_that_a_function_refers_to_gets_no_gradient_and_says_so(mlp):
    x = torch.ones(1, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="for tensors within objects that go by pickle"):
        mlp.run(lambda module: module(x)).sum().backward()
    x = x.detach()
    mlp.run(lambda module: module(x)).sum().backward()  # the control


def test_a_sparse_tensor_with_a_gradient_loses_none_in_silence(mlp):
    made = mlp.run(lambda module: module(torch.ones(1, 4)).to_sparse())
    assert not isinstance(made, torch.Tensor)  # it stays there, with its graph
    made.to_dense().sum().backward()
    assert mlp[0].weight.grad is not None
    with torch.no_grad():
        assert mlp.run(lambda module: module(torch.ones(1, 4)).to_sparse()).layout is torch.sparse_coo
    x = torch.ones(1, 4).to_sparse().requires_grad_()
    with pytest.raises(RuntimeError, match="for tensors within objects that go by pickle"):
        mlp.run(lambda module, x: module(x.to_dense()), x).sum().backward()


def test_sparse_and_meta_parameters_are_read(mlp):
    def add(module):
        module.sparse = torch.nn.Parameter(torch.eye(2).to_sparse())
        module.one, module.other = (torch.nn.Parameter(torch.empty(2, device="meta")) for _ in range(2))

    def remove(module):
        del module.sparse, module.one, module.other

    mlp.run(add)
    try:
        found = dict(mlp.named_parameters())
        assert found["sparse"].requires_grad
        assert torch.equal(found["sparse"].detach().to_dense(), torch.eye(2))
        assert found["one"].is_meta
        assert found["one"] is not found["other"]
    finally:
        mlp.run(remove)
