"""torchscript, export and save of models that nobody here wrote: they answer as the handle does, to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import isohub
from isohub import errors
from tests.real.packages import PAIRS, make_inputs, materialise

pytestmark = [pytest.mark.real, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

BY_NAME = {pair.name: pair for pair in PAIRS}
NAMES = ["asteroid-filterbanks", "linformer", "pytorch-pretrained-vit", "pytorch-tcn", "resnet_pytorch"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    repos = {}
    with isohub.Session(tmp_path_factory.mktemp("cache"), timeout_s=200) as own:

        def load(name, **more):
            pair = BY_NAME[name]
            if name not in repos:
                repos[name] = materialise(pair, tmp_path_factory.mktemp(name))
            handle = own.load(f"{repos[name]}:{pair.versions[1]}", pair.entrypoint, seed=1, **more, **pair.kwargs)
            return handle.eval(), tuple(make_inputs(pair, 1))

        yield load


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def first(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else first(outputs[0])


@pytest.mark.parametrize("name", NAMES)
def test_programs_answer_as_the_handle_does(loaded, name):
    handle, inputs = loaded(name, trust_repo=True)
    with handle:
        expected = first(handle(*inputs))
        assert torch.equal(first(handle.torchscript(inputs)(*inputs)), expected)
        assert torch.equal(first(handle.export(inputs).module()(*inputs)), expected)


def test_a_model_that_can_be_scripted(loaded):
    handle, inputs = loaded("resnet_pytorch", trust_repo=True)
    with handle:
        assert torch.equal(first(handle.torchscript()(*inputs)), first(handle(*inputs)))


def test_what_torch_cannot_script_or_export_is_its_own_error(loaded):
    handle, inputs = loaded("efficientnet_pytorch", trust_repo=True)
    with handle:
        with pytest.raises(errors.RemoteRuntimeError, match="SwishImplementation(.|\n)*making TorchScript"):
            handle.torchscript(inputs)
        with pytest.raises(errors.RemoteError, match="while exporting"):
            handle.export((torch.zeros(1),))
        assert first(handle(*inputs)).isfinite().all()


@pytest.mark.parametrize("name", [*NAMES, "unet"])
def test_a_saved_state_makes_the_same_model(loaded, name, tmp_path):
    handle, inputs = loaded(name)
    with handle:
        expected, place = first(handle(*inputs)), tmp_path / "state.safetensors"
        handle.save(place)
        with safe_open(place, "pt") as file:
            said = file.metadata()
        read = load_file(place)
        read.update({alias: read[kept] for alias, kept in json.loads(said["aliases"]).items()})
        assert said["entrypoint"] == BY_NAME[name].entrypoint
        handle.load_state_dict({key: torch.zeros_like(value) for key, value in read.items()})
        assert not torch.equal(first(handle(*inputs)), expected)  # the control: the state is what counts
        handle.load_state_dict(read)
        assert torch.equal(first(handle(*inputs)), expected)
