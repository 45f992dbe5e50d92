"""A handle against the same model in this process: outputs, state, gradients, hooks, errors, text."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import isohub
from tests.conftest import HUBS

INPUTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "conv_norm": lambda: (torch.randn(2, 3, 5, 5),),
    "dropout": lambda: (torch.randn(4, 3),),
    "recurrent": lambda: (torch.randn(2, 5, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))),
    "tied": lambda: (torch.tensor([[1, 2, 6], [0, 0, 3]]),),
    "several": lambda: (torch.randn(4, 3),),
    "buffered": lambda: (torch.randn(2, 3),),
    "outputs": lambda: (torch.randn(4, 3),),
    "forces": lambda: (torch.randn(4, 3),),
    "smooth": lambda: (torch.randn(4, 3, dtype=torch.float64),),
}


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    """The repo's hubconf, imported here."""
    spec = importlib.util.spec_from_file_location("conforms_hubconf", HUBS / "conforms" / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


@pytest.fixture
def both(session: isohub.Session, hub: Any, models: Any) -> Iterator[Callable[[str], tuple[Any, Any]]]:
    """A handle and the model in this process, by the name of their entrypoint."""
    made = []

    def pair(name: str) -> tuple[Any, Any]:
        handle = session.load(hub("conforms"), name)
        made.append(handle)
        return handle, getattr(models, name)()

    yield pair
    for handle in made:
        handle.close()


def flat(value: Any) -> list[Any]:
    """Tensors and plain values in order, whatever holds them."""
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in flat(item)]
    if isinstance(value, dict):
        return [part for key, item in value.items() for part in [key, *flat(item)]]
    if hasattr(value, "__dataclass_fields__"):
        return flat({name: getattr(value, name) for name in value.__dataclass_fields__})
    return [value]


def same(got: Any, expected: Any) -> None:
    got, expected = flat(got), flat(expected)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert one.stride() == other.stride()
            assert one.requires_grad == other.requires_grad
            assert torch.equal(one, other)
        else:
            assert one == other


def same_gradients(handle: Any, model: Any) -> None:
    remote, local = dict(handle.named_parameters()), dict(model.named_parameters())
    assert list(remote) == list(local)
    for name, parameter in local.items():
        assert remote[name].requires_grad == parameter.requires_grad
        assert torch.equal(remote[name], parameter)
        if parameter.grad is None:
            assert remote[name].grad is None
        else:
            assert torch.equal(remote[name].grad, parameter.grad)


def inputs_of(name: str) -> tuple[Any, Any]:
    """Inputs twice over: floating ones are leaves that require a gradient."""
    torch.manual_seed(7)
    given = INPUTS[name]()

    def fresh(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(fresh, value))
        return value.clone().requires_grad_(value.is_floating_point())

    return fresh(given), fresh(given)


def total(value: Any) -> torch.Tensor:
    """A loss that every output which has a gradient enters with a weight of its own."""
    parts = [part for part in flat(value) if isinstance(part, torch.Tensor) and part.requires_grad]
    return sum(((place + 1) * part.pow(2).sum() for place, part in enumerate(parts)), torch.zeros(()))


def seeded(handle: Any) -> None:
    """One seed for both processes."""
    torch.manual_seed(3)
    handle.run(lambda module: torch.manual_seed(3) and None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_outputs_state_and_gradients(both, name, training):
    handle, model = both(name)
    handle.train(training)
    model.train(training)
    assert handle.training is model.training is training
    for _ in range(2):  # buffers change, gradients add up
        remote_inputs, local_inputs = inputs_of(name)
        seeded(handle)
        got = handle(*remote_inputs)
        expected = model(*local_inputs)
        same(got, expected)
        total(got).backward()
        total(expected).backward()
        for one, other in zip(flat(remote_inputs), flat(local_inputs), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert other.grad is None or torch.equal(one.grad, other.grad)
    same_gradients(handle, model)
    same(handle.state_dict(), model.state_dict())
    same(dict(handle.named_buffers()), dict(model.named_buffers()))
    assert repr(handle) == repr(model)


@pytest.mark.parametrize("form", ["dict", "mapping", "dataclass"])
def test_named_outputs_keep_their_names_and_gradients(both, form):
    handle, model = both("outputs")
    remote_inputs, local_inputs = inputs_of("outputs")
    got, expected = handle(*remote_inputs, form=form), model(*local_inputs, form=form)
    same(got, expected)
    if form != "dict":
        assert torch.equal(got.logits, expected["logits"] if form == "mapping" else expected.logits)
        got = {"loss": got.loss}
        expected = {"loss": expected["loss"] if form == "mapping" else expected.loss}
    got["loss"].backward()
    expected["loss"].backward()
    assert torch.equal(remote_inputs[0].grad, local_inputs[0].grad)
    same_gradients(handle, model)


def test_a_state_loads_both_ways(both):
    handle, model = both("conv_norm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert str(handle.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    same(handle.state_dict(), model.state_dict())
    partial = {"head.bias": torch.zeros(2), "more": torch.zeros(1)}
    same(list(handle.load_state_dict(partial, strict=False)), list(model.load_state_dict(partial, strict=False)))
    double = {name: value.double() for name, value in model.state_dict().items()}
    handle.load_state_dict(double, assign=True)
    model.load_state_dict(double, assign=True)
    same(handle.state_dict(), model.state_dict())


def test_a_state_that_does_not_fit_is_torchs_own_error(both):
    handle, model = both("conv_norm")
    for state in ({}, {**model.state_dict(), "head.bias": torch.zeros(5)}):
        with pytest.raises(RuntimeError) as remote:
            handle.load_state_dict(state)
        with pytest.raises(RuntimeError) as local:
            model.load_state_dict(state)
        assert remote.value.remote_message == str(local.value)


@pytest.mark.parametrize("kind", ["key", "value", "index", None])
def test_exceptions_have_their_type_and_message(both, kind):
    handle, model = both("raises")
    x = torch.randn(2, 5)
    with pytest.raises(Exception) as local:
        model(x, kind)
    with pytest.raises(type(local.value)) as remote:
        handle(x, kind)
    assert remote.value.remote_message == str(local.value)


def test_in_place_on_a_leaf_is_torchs_own_error(both):
    handle, model = both("changes")
    for make in (handle, model):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
            make(torch.ones(3, requires_grad=True))
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    handle(x * 3).sum().backward()
    model(y * 3).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_hooks_see_what_a_local_models_hooks_see(both):
    handle, model = both("smooth")
    seen: dict[str, list[Any]] = {"handle": [], "model": []}

    def register(who: str, module: Any) -> list[Any]:
        note = seen[who].append
        return [
            module.register_forward_pre_hook(lambda _, args: note(["pre", *args])),
            module.register_forward_hook(lambda _, args, out: note(["after", *args, out])),
            module.register_forward_hook(lambda _, args, kwargs, out: out * 2, with_kwargs=True),
            module.register_full_backward_pre_hook(lambda _, grads: note(["backward_pre", *grads])),
            module.register_full_backward_hook(lambda _, ins, outs: note(["backward", *ins, *outs])),
        ]

    removable = [*register("handle", handle), *register("model", model)]
    (x,), (y,) = inputs_of("smooth")
    x.register_hook(lambda grad: grad * 10)
    y.register_hook(lambda grad: grad * 10)
    got, expected = handle(x), model(y)
    got.register_hook(lambda grad: grad + 1)
    expected.register_hook(lambda grad: grad + 1)
    same(got, expected)
    got.sum().backward()
    expected.sum().backward()
    same(seen["handle"], seen["model"])
    assert [row[0] for row in seen["handle"]] == ["pre", "after", "backward_pre", "backward"]
    assert torch.equal(x.grad, y.grad)
    same_gradients(handle, model)
    for hook in removable:
        hook.remove()
    with torch.no_grad():
        same(handle(x), model(y))
    assert len(seen["handle"]) == 4


def test_gradcheck(both):
    handle, _ = both("smooth")
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(handle, (x,))
    assert torch.autograd.gradcheck(lambda x: handle(x * 2).tanh() + x.sum(), (x,))


def test_training_gives_the_same_weights_to_the_bit(both):
    handle, model = both("smooth")
    handle.run(lambda module: setattr(module, "optimizer", torch.optim.Adam(module.parameters(), lr=0.1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(5)
    losses = []
    x, wanted = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator)
    for _ in range(8):
        loss, local = (handle(x) - wanted[:, :2]).pow(2).mean(), (model(x) - wanted[:, :2]).pow(2).mean()
        assert torch.equal(loss, local)
        handle.zero_grad()
        loss.backward()
        handle.run(lambda module: module.optimizer.step() and None)
        optimizer.zero_grad()
        local.backward()
        optimizer.step()
        losses.append(loss.item())
    same(handle.state_dict(), model.state_dict())
    assert losses[-1] < losses[0]


def test_between_local_modules(both):
    handle, model = both("smooth")
    torch.manual_seed(1)
    before, after = torch.nn.Linear(5, 3).double(), torch.nn.Linear(2, 1).double()
    whole = torch.nn.Sequential(before, handle, after)
    x = torch.randn(2, 5, dtype=torch.float64)
    found = []
    for middle in (handle, model):
        before.zero_grad()
        after.zero_grad()
        torch.nn.Sequential(before, middle, after)(x).sum().backward()
        found.append([before.weight.grad.clone(), after.weight.grad.clone()])
    same(*found)
    same_gradients(handle, model)
    local = torch.nn.Sequential(before, model, after)
    assert [name for name, _ in whole.named_parameters()] == [name for name, _ in local.named_parameters()]
    assert [name for name, _ in whole.named_modules()] == [name for name, _ in local.named_modules()]
    same(whole.state_dict(), local.state_dict())
    changed = {name: value + 1 for name, value in local.state_dict().items()}
    whole.load_state_dict(changed)
    local.load_state_dict(changed)
    same(handle.state_dict(), model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"1.0.weight\"") as error:
        whole.load_state_dict({name: value for name, value in changed.items() if name != "1.0.weight"})
    with pytest.raises(RuntimeError) as expected:
        local.load_state_dict({name: value for name, value in changed.items() if name != "1.0.weight"})
    assert str(error.value) == str(expected.value)
    assert repr(whole) == repr(local)
    assert list(handle._modules) == list(model._modules)  # torch, as it loads, sees none: they were loaded with it
    whole.zero_grad()
    assert all(parameter.grad is None for parameter in handle.parameters())
    whole.requires_grad_(False)
    assert not handle.run(lambda module: any(p.requires_grad for p in module.parameters()))
    assert whole.eval().training is handle.training is False


def test_containers(both):
    handle, model = both("module_list")
    assert len(handle) == len(model) == 2
    assert [repr(part) for part in handle] == [repr(part) for part in model]
    assert repr(handle[-1]) == repr(model[-1])
    assert repr(handle[:1]) == repr(model[:1])
    assert handle[0] in handle
    assert isinstance(handle[0], torch.nn.Module)
    with pytest.raises(IndexError):
        handle[7]
    by_name, local = both("module_dict")
    assert list(by_name.keys()) == list(local.keys())
    assert "a" in by_name
    assert "c" not in by_name
    assert repr(by_name["b"]) == repr(local["b"])
    held = torch.nn.ModuleList([handle, by_name])
    assert len(list(held.parameters())) == 8
    sequence, same_here = both("smooth")
    assert repr(sequence[1:]) == repr(same_here[1:])
    x = torch.randn(2, 3, dtype=torch.float64)
    same(torch.nn.Sequential(*sequence)(x), same_here(x))
