"""device= of a load: read before the build, and the worker's own error where the machine has none."""

from __future__ import annotations

import pytest
import torch

from isohub import errors
from isohub.session.devices import checked_device


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


def test_which_gpus_a_worker_sees_is_the_variable_s_at_its_start(hub, monkeypatch):
    import isohub

    def seen(module):
        import os as remote_os

        return remote_os.environ.get("CUDA_VISIBLE_DEVICES")

    with isohub.Session(timeout_s=60) as own:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        first = own.load(hub("good"), "mlp")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        second = own.load(hub("grads_off"), "model")
        assert (first.run(seen), second.run(seen)) == ("1", "0")
