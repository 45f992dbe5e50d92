"""What of the caller's state of torch a call carries, and that the worker has its own again afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from isohub.session.modes import carried


@pytest.fixture
def mlp(session, hub):
    with session.load(hub("good"), "mlp", seed=0) as handle:
        yield handle


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


def state(module):
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
    )


def test_nothing_is_sent_where_all_is_torchs_default():
    assert carried() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache", [True, False])
def test_autocast(mlp, dtype, cache):
    before = mlp.run(state)
    x = torch.ones(2, 4)
    with torch.autocast("cpu", dtype=dtype, cache_enabled=cache):
        assert mlp.run(state) == state(None)
        assert mlp(x).dtype is dtype
        with torch.autocast("cpu", enabled=False):
            assert mlp(x).dtype is torch.float32
    assert mlp(x).dtype is torch.float32
    assert mlp.run(state) == before


def test_autocast_for_a_device_that_the_worker_lacks_changes_nothing(mlp):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert mlp(torch.ones(2, 4)).dtype is torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_gradients_under_autocast_are_a_local_models(mlp):
    torch.manual_seed(0)
    local = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    local.load_state_dict(mlp.state_dict())
    x, y = torch.ones(2, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = mlp(x), local(y)
    assert torch.equal(got, expected)
    got.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, y.grad)
    for parameter, other in zip(mlp.parameters(), local.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_the_default_dtype_of_loads_and_calls(session, hub, mlp):
    torch.set_default_dtype(torch.float64)
    assert mlp.run(lambda module: torch.zeros(1)).dtype is torch.float64
    with session.load(hub("good"), "mlp") as double:
        assert next(double.parameters()).dtype is torch.float64
    torch.set_default_dtype(torch.float32)
    assert mlp.run(lambda module: torch.zeros(1)).dtype is torch.float32


def test_what_the_repo_set_for_itself_stays(mlp):
    mlp.run(lambda module: torch.set_default_dtype(torch.float64))
    torch.set_default_dtype(torch.float16)
    assert mlp.run(lambda module: torch.zeros(1)).dtype is torch.float16
    torch.set_default_dtype(torch.float32)
    assert mlp.run(lambda module: torch.zeros(1)).dtype is torch.float64
    mlp.run(lambda module: torch.set_default_dtype(torch.float32))


@pytest.mark.parametrize("warn_only", [True, False])
def test_deterministic_algorithms(mlp, warn_only):
    before = mlp.run(state)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    assert mlp.run(state) == state(None)
    torch.use_deterministic_algorithms(False)
    assert mlp.run(state) == before


def test_the_precision_of_products(mlp):
    before = mlp.run(state)
    torch.set_float32_matmul_precision("medium")
    assert mlp.run(state) == state(None)
    torch.set_float32_matmul_precision("highest")
    assert mlp.run(state) == before


def test_the_state_comes_back_after_an_error_too(mlp):
    before = mlp.run(state)
    torch.set_default_dtype(torch.float64)
    with torch.no_grad(), torch.autocast("cpu"), pytest.raises(ZeroDivisionError):
        mlp.run(lambda module: 1 / 0)
    torch.set_default_dtype(torch.float32)
    assert mlp.run(state) == before


def test_submitted_calls_have_the_state_of_where_they_were_submitted(mlp):
    x = torch.ones(2, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = mlp.submit(x)
    with torch.inference_mode():
        inferred = mlp.submit(x)
    assert plain.result().dtype is torch.bfloat16
    assert not plain.result().requires_grad
    assert inferred.result().is_inference()
    assert mlp.submit(x).result().requires_grad


def test_answers_lie_in_memory_whatever_device_new_tensors_are_made_on(session, hub):
    x = torch.ones(1, 4)
    large = torch.ones(1 << 19)
    views = torch.ones(4, 4).t()
    sparse = torch.eye(3).to_sparse()
    with session.load(hub("good"), "plus", 2.0) as handle:
        expected = [handle(value) for value in (x, large, views)]
        for place in ("meta", "cpu"):
            with torch.device(place):
                for value, wanted in zip((x, large, views), expected, strict=True):
                    assert torch.equal(handle(value), wanted)
                answer = handle.run(lambda _, *values: values, sparse, torch.tensor([True], device="cpu"), views)
                assert torch.equal(answer[0].to_dense(), torch.eye(3, device="cpu"))
                assert [value.device.type for value in answer] == ["cpu"] * 3
    with torch.device("meta"):
        state = session.load(hub("good"), "mlp", seed=0, returns="state_dict")
    assert {value.device.type for value in state.values()} == {"cpu"}


def test_gradients_come_back_whatever_device_new_tensors_are_made_on(mlp):
    x = torch.ones(1, 4, requires_grad=True)
    with torch.device("meta"):
        mlp(x).sum().backward()
    assert x.grad is not None
    assert x.grad.device.type == "cpu"
