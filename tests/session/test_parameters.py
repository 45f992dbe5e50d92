"""Copies of remote parameters: their gradients are the worker's, and changing them is an error."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from isohub import errors


@pytest.fixture
def mlp(session, hub):
    with session.load(hub("good"), "mlp", seed=0) as handle:
        yield handle


def test_it_is_a_parameter_with_the_workers_gradient(mlp):
    before = mlp.get_parameter("0.weight")
    assert isinstance(before, torch.nn.Parameter)
    assert before.is_leaf
    assert before.requires_grad
    assert before.grad is None
    mlp(torch.ones(2, 4)).sum().backward()
    for parameter in (before, mlp[0].weight, next(mlp.parameters()), mlp.get_submodule("0")._parameters["weight"]):
        assert torch.equal(parameter.grad, mlp.run(lambda module: module[0].weight.grad))
    before.grad = torch.ones(8, 4)
    assert mlp.run(lambda module: float(module[0].weight.grad.sum())) == 32.0
    before.grad = None
    assert mlp.run(lambda module: module[0].weight.grad is None)


def test_freezing_by_the_usual_loop(mlp):
    for parameter in mlp.parameters():
        parameter.requires_grad = False
    assert not mlp.run(lambda module: any(p.requires_grad for p in module.parameters()))
    assert not mlp(torch.ones(2, 4)).requires_grad
    for parameter in mlp.parameters():
        assert parameter.requires_grad_() is parameter
        assert parameter.requires_grad
    assert mlp.run(lambda module: all(p.requires_grad for p in module.parameters()))


def test_a_penalty_on_parameters_reaches_the_worker(mlp):
    local = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    local.load_state_dict(mlp.state_dict())
    x = torch.ones(2, 4)
    for model in (mlp, local):
        (model(x).sum() + 0.5 * sum(parameter.pow(2).sum() for parameter in model.parameters())).backward()
    for parameter, other in zip(mlp.parameters(), local.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad)
    norms = [
        torch.linalg.vector_norm(torch.stack([parameter.grad.norm() for parameter in model.parameters()]))
        for model in (mlp, local)
    ]
    assert torch.allclose(*norms)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.zero_(),
        lambda p: p.data.copy_(torch.zeros(8, 4)),
        lambda p: p.__setitem__(0, 1.0),
        lambda p: p.add_(1),
        lambda p: torch.nn.init.zeros_(p),
        lambda p: torch.add(torch.zeros(8, 4), 1, out=p),
        lambda p: setattr(p, "data", torch.zeros(8, 4)),
        lambda p: torch._foreach_mul_([p], 2.0),
        lambda p: p.grad.zero_(),
        lambda p: torch.nn.utils.clip_grad_norm_([p], 0.001),
        lambda p: torch.optim.SGD([p], lr=0.1).step(),
        lambda p: torch.optim.Adam([p]).step(),
        lambda p: torch.optim.AdamW([p], foreach=False).step(),
    ],
)
def test_changing_a_copy_is_an_error(mlp, change):
    parameter = mlp.get_parameter("0.weight")
    mlp(torch.ones(2, 4)).sum().backward()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"'0.weight' is a copy[\s\S]*h\.run"):
        change(parameter)


def test_what_is_computed_from_a_copy_is_ones_own(mlp):
    parameter = mlp.get_parameter("0.weight")
    for own in (parameter.detach().clone(), parameter * 2, parameter.clone(), copy.deepcopy(parameter)):
        assert type(own) in (torch.Tensor, torch.nn.Parameter)
        with torch.no_grad():
            own.zero_()
    assert type(pickle.loads(pickle.dumps(parameter))) is torch.nn.Parameter
    assert torch.equal(pickle.loads(pickle.dumps(parameter)), parameter)
    total = torch.zeros(8, 4)
    total.add_(parameter.detach())
    assert torch.equal(total, parameter)
    assert "Parameter" in repr(parameter)
    assert parameter.numpy(force=True).shape == (8, 4)
    assert parameter.data.tolist() == parameter.tolist()


def test_tied_parameters_are_one_copy(session, hub):
    with session.load(hub("good"), "tied_weights") as handle:
        named = list(handle.named_parameters(remove_duplicate=False))
        assert len(named) == len({id(parameter) for _, parameter in named}) + 1
        assert len(list(handle.named_parameters())) == len(named) - 1


def test_after_the_handle_a_gradient_is_not_to_be_had(session, hub):
    handle = session.load(hub("good"), "mlp")
    parameter = handle[0].weight  # of a handle that nobody else holds
    assert parameter.grad is None
    kept = next(handle.parameters())
    handle.close()
    with pytest.raises(errors.SessionClosedError):
        kept.grad  # noqa: B018
    assert kept.sum().requires_grad


def test_buffers_are_plain_tensors(session, hub):
    with session.load(hub("good"), "with_buffers") as handle:
        assert type(handle.mean) is torch.Tensor
        assert all(type(buffer) is torch.Tensor for buffer in handle.buffers())
        assert type(handle.weight).__name__ == "RemoteParameter"
