"""Tools of torch that look through a module as it runs: each is told that it cannot look through a handle."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

# Of torch's own, where it imports its compiler and its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def handle(session, hub):
    with session.load(hub("conforms"), "smooth") as loaded:
        yield loaded


@pytest.fixture
def x():
    return torch.ones(2, 3, dtype=torch.float64)


def test_trace_and_script(handle, x):
    with pytest.raises(NotImplementedError, match=r"torch.jit.trace cannot see .*\n.*h.torchscript"):
        torch.jit.trace(lambda value: handle(value) + 1, x)
    for holder in (handle, torch.nn.Sequential(handle)):
        with pytest.raises(NotImplementedError, match=r"cannot be scripted from here\nhint: h.torchscript"):
            torch.jit.script(holder)
    assert handle(x).shape == (2, 2)  # the control, here and below: the handle itself is as it was


def test_export(handle, x):
    with pytest.raises(NotImplementedError, match=r"cannot see into the worker of conforms@.*\n.*h.export"):
        torch.export.export(torch.nn.Sequential(handle), (x,))
    assert handle(x).shape == (2, 2)


@pytest.mark.parametrize(
    "transform", [torch.func.vmap, torch.func.jacrev, lambda f: torch.func.grad(lambda y: f(y).sum())]
)
def test_transforms_of_functions(handle, x, transform):
    with pytest.raises(NotImplementedError, match=r"torch.func or torch.vmap cannot see .*\nhint: h.run"):
        transform(handle)(x)
    assert handle(x).shape == (2, 2)
    assert torch.equal(
        handle.run(lambda module, x: torch.func.vmap(module)(x), x), torch.func.vmap(lambda row: row)(handle(x))
    )


def test_forward_mode(handle, x):
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode differentiation cannot see"):
            handle(forward_ad.make_dual(x, x))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation cannot see"):
            handle.run(lambda module, rows: module(rows[0]["x"]), [{"x": forward_ad.make_dual(x, x)}])
        assert handle(x).shape == (2, 2)  # nothing is lost: there is no tangent


def test_a_counter_would_count_nothing(handle, x):
    with FlopCounterMode(display=False):
        with pytest.raises(NotImplementedError, match=r"FlopCounterMode cannot see .*\nhint: h.run"):
            handle(x)
        assert handle.training is True  # what computes nothing is not its concern

    def counted(module, x):
        with FlopCounterMode(display=False) as counter:
            module(x)
        return counter.get_total_flops()

    assert handle.run(counted, x) == 2 * 2 * (3 * 4 + 4 * 2)


def test_tensors_without_numbers(handle, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.raises(NotImplementedError, match="FakeTensorMode cannot see"):
            handle(mode.from_tensor(x))
        with pytest.raises(NotImplementedError, match="FakeTensorMode cannot see"):
            handle.state_dict()
    assert handle.state_dict()["0.bias"].numel() == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at it
def test_a_function_that_is_compiled_calls_a_handle_as_it_is(handle, x):
    torch._dynamo.reset()
    for compiled in (
        torch.compile(handle, backend="eager"),
        torch.compile(lambda y: handle(y * 2) + 1, backend="eager"),
    ):
        assert compiled(x).shape == (2, 2)
    leaf, same = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(leaf).sum().backward()
    (handle(same * 2) + 1).sum().backward()
    assert torch.equal(leaf.grad, same.grad)
    torch._dynamo.reset()
