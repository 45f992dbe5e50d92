"""device= of a load: read before the build, and the worker's own error where the machine has none."""

from __future__ import annotations

import pytest
import torch

import isohub
from isohub import errors
from isohub.session.devices import Gpus, Traffic, checked_device
from isohub.session.request import gpu_variables


def test_what_names_a_device_with_memory():
    for device in (None, "cpu", "cuda", "cuda:1", 0, torch.device("cpu")):
        assert checked_device(device) == device


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", 1.5, [0], True])
def test_what_names_none(device):
    with pytest.raises(ValueError, match="names no device"):
        checked_device(device)


def test_meta_is_refused_before_anything_is_built(session, hub):
    with pytest.raises(ValueError, match="drop the model's data"):
        session.load(hub("good"), "mlp", device="meta")
    with pytest.raises(ValueError, match="names no device"):
        session.load(hub("good"), "mlp", device="gpu")


def test_a_model_that_was_moved_to_meta_says_what_it_lacks(session, hub):
    handle = session.load(hub("good"), "mlp")
    handle.to("meta")
    with pytest.raises(errors.RemoteError):
        handle(torch.ones(1, 4))
    assert handle.training


def test_the_cpu_is_a_device(session, hub):
    with session.load(hub("good"), "mlp", device="cpu") as handle:
        assert handle(torch.ones(1, 4)).device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_the_worker_s_error(session, hub):
    before = set(session.workers())
    with pytest.raises(errors.RemoteError, match=r"CUDA(.|\n)*while calling to\(\)"):
        session.load(hub("good"), "mlp", device="cuda:1")
    assert set(session.workers()) <= before


def seen(module):
    import os as remote_os

    return remote_os.environ.get("CUDA_VISIBLE_DEVICES")


def test_which_gpus_a_worker_sees_is_the_variable_s_at_its_start(hub, monkeypatch):
    with isohub.Session(timeout_s=60) as own:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        first = own.load(hub("good"), "mlp")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        second = own.load(hub("grads_off"), "model")
        assert (first.run(seen), second.run(seen)) == ("1", "0")


def test_a_policy_s_numbers_are_those_within_the_variable(hub, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-aa,7")
    with isohub.Session(timeout_s=60) as own:
        one = own.load(hub("good"), "mlp", sandbox=isohub.Sandbox(gpu=1))
        two = own.load(hub("good"), "mlp", sandbox=isohub.Sandbox(gpu=(2, 0)))
        assert (one.run(seen), two.run(seen)) == ("GPU-aa", "7,4")
        with pytest.raises(errors.PolicyError, match="leaves 3 to this process") as caught:
            own.load(hub("good"), "mlp", sandbox=isohub.Sandbox(gpu=3))
        assert caught.value.hint is not None
        assert "CUDA_VISIBLE_DEVICES" in caught.value.hint
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu_variables(isohub.Sandbox(gpu=(5, 2))) == {"CUDA_VISIBLE_DEVICES": "5,2"}
    assert gpu_variables(isohub.Sandbox(gpu=True)) == gpu_variables(isohub.Sandbox()) == {}


def test_devices_are_named_as_each_side_numbers_them(monkeypatch):
    def there(policy):
        return [Gpus.of(policy).there(name) for name in ("cuda:0", "cuda:3")]

    assert there("none") == there(isohub.Sandbox(gpu=True)) == ["cuda:0", "cuda:3"]
    assert there(isohub.Sandbox()) == [None, None]
    assert there(isohub.Sandbox(gpu=(3, 1))) == [None, "cuda:0"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    some = Gpus.of(isohub.Sandbox(gpu=(3, 1)))
    assert [some.here(number) for number in range(3)] == [torch.device("cuda", 3), torch.device("cuda", 1), None]
    assert Gpus(None).here(3) == torch.device("cuda", 3)
    assert Gpus(None).here(4) is None  # a worker may say any number


def test_arenas_that_nobody_offered_are_not_taken():
    traffic = Traffic(Gpus(None))
    traffic.answered(None)
    with pytest.raises(errors.ProtocolError, match="nobody offered"):
        traffic.answered("cuda:0")


def test_an_empty_tensor_needs_no_memory(hub):
    with isohub.Session(timeout_s=60) as own:
        assert own.load(hub("good"), "mlp").run(lambda module, x: tuple(x.shape), torch.empty(0, 4)) == (0, 4)
