"""Real models script, trace, export, compile and train under the default policy as they do without a sandbox."""

from __future__ import annotations

import pytest
import torch

import isohub
from tests.real.packages import PAIRS, make_inputs, materialise

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
SEED = 7
#: Of different kinds, and small enough to compile in half a minute.
COMPILED = ("linformer", "asteroid-filterbanks")


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


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A pair's newer release with the default policy, and without any, in one session."""
    known = {}
    with isohub.Session(timeout_s=250) as session:

        def of(pair):
            if pair.name not in known:
                repo = materialise(pair, tmp_path_factory.mktemp(pair.name))
                reference = f"{repo}:{pair.versions[1]}"
                known[pair.name] = [
                    session.load(reference, pair.entrypoint, seed=SEED, **more, **pair.kwargs)
                    for more in ({}, {"sandbox": "none", "trust_repo": True})
                ]
            return known[pair.name]

        yield of


@pytest.fixture(scope="module")
def within(both):
    """What a pair's form answers under the default policy, asked once."""
    known = {}

    def of(pair, form):
        if (pair.name, form) not in known:
            known[pair.name, form] = both(pair)[0].run(made, form, make_inputs(pair, SEED))
        return known[pair.name, form]

    return of


@pytest.mark.parametrize("form", ["script", "trace", "export"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_program_is_made_within_as_without(both, within, pair, form):
    confined, free = both(pair)
    assert "seccomp" in confined.confinement.active
    assert free.confinement.missing == ("landlock", "seccomp", "namespaces", "limits")
    (word, answer), (other_word, other_answer) = within(pair, form), free.run(made, form, make_inputs(pair, SEED))
    assert word == other_word
    if word == "made":
        torch.testing.assert_close(answer, other_answer, rtol=0, atol=0)
    else:
        assert answer == other_answer


def test_most_of_them_can_be_made(within):
    """The control: what is equal above is not equal because nothing works. Two of ten can be scripted by anybody."""
    forms = ("script", "trace", "export")
    counts = {form: sum(within(pair, form)[0] == "made" for pair in PAIRS) for form in forms}
    assert counts["trace"] >= 8
    assert counts["export"] >= 5
    assert counts["script"] >= 2


@pytest.mark.parametrize("name", COMPILED)
def test_models_are_compiled(both, name):
    pair = next(pair for pair in PAIRS if pair.name == name)
    confined, _ = both(pair)
    inputs = make_inputs(pair, SEED)
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

    pair = next(pair for pair in PAIRS if pair.name == "linformer")
    within, without = (handle.run(train, make_inputs(pair, SEED)) for handle in both(pair))
    assert within == without
    assert within[-1] < within[0]
