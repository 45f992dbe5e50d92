"""Real models script, trace, export, compile and train under the default policy as they do without a sandbox.

What `torchscript`, `export` and `save` give of them answers as the handle does, to the bit.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import isohub
from isohub import errors
from tests.real.packages import PAIRS, make_inputs, materialise

pytestmark = [pytest.mark.real, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SEED = 7
BY_NAME = {pair.name: pair for pair in PAIRS}
#: Whose programs are opened here, by the handle's own methods; all others are made and called in the worker.
OPENED = {
    "asteroid-filterbanks": ("trace", "export"),
    "linformer": ("trace", "export"),
    "pytorch-pretrained-vit": ("trace", "export"),
    "pytorch-tcn": ("trace", "export"),
    "resnet_pytorch": ("script", "trace", "export"),
}
#: Of different kinds, and small enough to compile in a quarter of a minute.
COMPILED = {"linformer": {"dim": 16, "depth": 1}, "asteroid-filterbanks": {}}


def made(model, form, inputs):
    """What this form of the model answers, or the kind of error that making it raises. Runs in the worker."""
    import warnings

    warnings.simplefilter("ignore")
    torch.manual_seed(SEED)
    model.eval()
    with torch.no_grad():
        try:
            if form == "script":
                answer = torch.jit.script(model)(*inputs)
            elif form == "trace":
                answer = torch.jit.trace(model, inputs, check_trace=False)(*inputs)
            elif form == "export":
                answer = torch.export.export(model, inputs).module()(*inputs)
            else:
                answer = torch.compile(model)(*inputs)
        except Exception as error:
            return type(error).__name__, str(error).partition("\n")[0][:200]
    return "made", answer[0] if isinstance(answer, (tuple, list)) else answer


def opened(handle, form, inputs):
    """The same by the handle's own methods: made in its worker, opened and called here."""
    handle.eval()
    with torch.no_grad():
        if form == "export":
            program = handle.export(inputs).module()
        else:
            program = handle.torchscript(inputs if form == "trace" else None)
        answer, expected = first(program(*inputs)), first(handle(*inputs))
    assert torch.equal(answer, expected)
    return "made", answer


def first(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else first(outputs[0])


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """A pair's git repository, made once."""
    known = {}

    def of(name):
        if name not in known:
            known[name] = materialise(BY_NAME[name], tmp_path_factory.mktemp(name))
        return known[name]

    return of


@pytest.fixture(scope="module")
def load(repos, tmp_path_factory):
    """A handle to a pair's newer release, in a session and a cache of these tests' own."""
    with isohub.Session(tmp_path_factory.mktemp("cache"), timeout_s=250) as session:

        def loaded(name, **more):
            pair = BY_NAME[name]
            return session.load(f"{repos(name)}:{pair.versions[1]}", pair.entrypoint, seed=SEED, **pair.kwargs, **more)

        yield loaded


@pytest.fixture(scope="module")
def both(load):
    """A pair's newer release with the default policy, and without any, in one session."""
    known = {}

    def of(pair):
        if pair.name not in known:
            known[pair.name] = [
                load(pair.name, trust_repo=True, **more) for more in ({}, {"sandbox": "none"})
            ]  # fmt: skip
        return known[pair.name]

    return of


@pytest.fixture(scope="module")
def answers(both):
    """What a pair's form answers under the default policy and without any, asked once, and both at a time."""
    known = {}

    def of(pair, form):
        if (pair.name, form) not in known:
            confined, free = both(pair)
            inputs = make_inputs(pair, SEED)
            with ThreadPoolExecutor(1) as other:
                without = other.submit(free.run, made, form, inputs)
                if form in OPENED.get(pair.name, ()):
                    within = opened(confined, form, tuple(inputs))
                else:
                    within = confined.run(made, form, inputs)
                known[pair.name, form] = within, without.result()
        return known[pair.name, form]

    return of


@pytest.mark.parametrize("form", ["script", "trace", "export"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_program_is_made_within_as_without(both, answers, pair, form):
    confined, free = both(pair)
    assert "seccomp" in confined.confinement.active
    assert free.confinement.missing == ("landlock", "seccomp", "namespaces", "limits")
    (word, answer), (other_word, other_answer) = answers(pair, form)
    assert word == other_word
    if word == "made":
        torch.testing.assert_close(answer, other_answer, rtol=0, atol=0)
    else:
        assert answer == other_answer


def test_most_of_them_can_be_made(answers):
    """The control: what is equal above is not equal because nothing works. Two of ten can be scripted by anybody."""
    forms = ("script", "trace", "export")
    counts = {form: sum(answers(pair, form)[0][0] == "made" for pair in PAIRS) for form in forms}
    assert counts["trace"] >= 8
    assert counts["export"] >= 5
    assert counts["script"] >= 2


def test_what_torch_cannot_script_or_export_is_its_own_error(both):
    pair = BY_NAME["efficientnet_pytorch"]
    handle, inputs = both(pair)[0].eval(), tuple(make_inputs(pair, SEED))
    with torch.no_grad():
        with pytest.raises(errors.RemoteRuntimeError, match="SwishImplementation(.|\n)*making TorchScript"):
            handle.torchscript(inputs)
        with pytest.raises(errors.RemoteError, match="while exporting"):
            handle.export((torch.zeros(1),))
        assert first(handle(*inputs)).isfinite().all()


@pytest.mark.parametrize("name", [*OPENED, "unet"])
def test_a_saved_state_makes_the_same_model(load, name, tmp_path):
    inputs = make_inputs(BY_NAME[name], SEED)
    with load(name) as handle, torch.no_grad():
        handle.eval()
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


@pytest.mark.parametrize("name", COMPILED)
def test_models_are_compiled(load, name):
    inputs = make_inputs(BY_NAME[name], SEED)
    with load(name, **COMPILED[name]) as confined:
        assert "seccomp" in confined.confinement.active
        word, answer = confined.run(made, "compile", inputs)
        assert word == "made", answer
        with torch.no_grad():
            plain = confined.eval()(*inputs)
    torch.testing.assert_close(answer, plain[0] if isinstance(plain, (tuple, list)) else plain, rtol=1e-4, atol=1e-4)


def test_a_model_is_trained(both):
    def train(model, inputs):
        torch.manual_seed(SEED)
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = []
        for _ in range(4):
            optimiser.zero_grad()
            loss = model(*inputs).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
        return losses

    pair = BY_NAME["linformer"]
    within, without = (handle.run(train, make_inputs(pair, SEED)) for handle in both(pair))
    assert within == without
    assert within[-1] < within[0]
