"""A backward pass that would need the worker is an error, and never a wrong gradient."""

from __future__ import annotations

import pytest
import torch


def test_a_gradient_that_would_lack_the_models_part_is_an_error(session, hub):
    with session.load(hub("good"), "mlp") as handle:
        x = torch.ones(2, 4, requires_grad=True)
        total = handle(x).sum() + x.sum()
        with pytest.raises(RuntimeError, match=r"gradients do not cross to the worker of good@[\s\S]*h\.run"):
            total.backward()
        assert x.grad is None
        with pytest.raises(RuntimeError, match="gradients do not cross"):
            handle[0](x).sum().backward()
        detached = handle(x.detach())
        (detached.sum() + x.sum()).backward()  # the control: what does not depend on the model
        assert torch.equal(x.grad, torch.ones(2, 4))


def test_without_gradients_outputs_are_plain(session, hub):
    with session.load(hub("good"), "mlp") as handle:
        x = torch.ones(2, 4, requires_grad=True)
        with torch.no_grad():
            assert not handle(x).requires_grad
        assert not handle(x.detach()).requires_grad
        assert handle(x).requires_grad  # as it is with the model in this process


@pytest.mark.parametrize("entrypoint", ["namedtuple_output", "dict_output"])
def test_structures_keep_their_types(session, hub, entrypoint):
    with session.load(hub("good"), entrypoint) as handle:
        x = torch.ones(2, 4)
        plain, tied = handle(x), handle(x.clone().requires_grad_())
        assert type(plain) is type(tied)
        assert repr(plain).split("(")[0] == repr(tied).split("(")[0]
        first = tied[0] if isinstance(tied, tuple) else next(iter(tied.values()))
        with pytest.raises(RuntimeError, match="gradients do not cross"):
            first.sum().backward()
