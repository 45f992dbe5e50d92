"""Two refs of one repo in one session give what each gives alone in a fresh process, in both orders."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import isohub
from isohub import errors
from tests.real.packages import BROKEN, PAIRS, SEED, Pair, alone, export, make_inputs, same

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


def plain(outputs):
    """Outputs as the oracle saves them: tuples of tensors."""
    return tuple(plain(part) for part in outputs) if isinstance(outputs, (tuple, list)) else outputs


def loaded(session: isohub.Session, repo: str, pair: Pair) -> isohub.RemoteModule:
    return session.load(repo, pair.entrypoint, seed=SEED, **pair.kwargs)


def answer(handle: isohub.RemoteModule, pair: Pair) -> dict:
    """The same as the oracle's, by way of a handle."""
    parameters = sum(parameter.numel() for parameter in handle.parameters())
    handle.eval()
    with torch.no_grad():
        outputs = plain(handle(*make_inputs(pair, SEED)))
        second = plain(handle(*make_inputs(pair, SEED + 1)))
    return {"params": parameters, "state_dict": handle.state_dict(), "outputs": outputs, "second_outputs": second}


def first_tensor(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else first_tensor(outputs[0])


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("linformer", (44_360, 44_360)),
        ("pytorchcv", (1_241_332, 1_241_092)),
        ("kornia", (1_334_560, 55_360)),
        ("ncps", (1_746, 1_746)),
    ],
)
def test_the_oracle_answers_the_same_twice_and_depends_on_its_input(truth, tmp_path, name, params):
    """Of the newer release; that the older one does is seen below, where workers answer as its oracle did."""
    pair = next(pair for pair in PAIRS if pair.name == name)
    repo, answers = truth(pair)
    assert [answer["params"] for answer in answers] == list(params)
    for known in answers:
        assert not torch.equal(first_tensor(known["outputs"]), first_tensor(known["second_outputs"]))
    newer = export(repo, pair.versions[1], tmp_path)
    with ThreadPoolExecutor(2) as both:
        again, otherwise = both.map(lambda seed: alone(newer, pair, seed), (SEED, SEED + 1))
    assert same(answers[1], again)
    assert not same(answers[1], otherwise)


@pytest.mark.parametrize("order", ["old-new", "new-old"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_two_refs_in_one_session_are_each_as_alone(session, truth, pair, order):
    repo, (old_alone, new_alone) = truth(pair)
    assert "error" not in old_alone
    assert "error" not in new_alone
    wanted = list(zip(pair.versions, (old_alone, new_alone), strict=True))
    if order == "new-old":
        wanted.reverse()
    handles = [loaded(session, f"{repo}:{version}", pair) for version, _ in wanted]
    # Asked in turns, after both are there: what torch.hub cannot do.
    for handle, (version, expected) in zip(handles, wanted, strict=True):
        got = answer(handle, pair)
        assert got["params"] == expected["params"], version
        assert list(got["state_dict"]) == list(expected["state_dict"]), version
        assert same(got, expected), version
    for handle in handles:
        handle.close()


def test_a_broken_release_beside_a_working_one(session, truth):
    repo, (old_alone, new_alone) = truth(BROKEN)
    assert "torch._six" in old_alone["error"]
    with loaded(session, f"{repo}:{BROKEN.versions[1]}", BROKEN) as working:
        with pytest.raises(errors.RemoteError, match=r"torch\._six") as caught:
            loaded(session, f"{repo}:{BROKEN.versions[0]}", BROKEN)
        assert isinstance(caught.value, ImportError)
        assert same(answer(working, BROKEN), new_alone)


def test_all_of_them_at_once(session, truth):
    """Every ref of every pair alive in one session, called from many threads."""
    expected = {}
    handles = {}
    for pair in PAIRS:
        repo, answers = truth(pair)
        for version, alone_answer in zip(pair.versions, answers, strict=True):
            expected[pair.name, version] = alone_answer
            handles[pair.name, version] = (pair, loaded(session, f"{repo}:{version}", pair))
    with ThreadPoolExecutor(8) as threads:
        got = dict(zip(handles, threads.map(lambda item: answer(item[1], item[0]), handles.values()), strict=True))
    assert [name for name in expected if not same(got[name], expected[name])] == []
    for _, handle in handles.values():
        handle.close()
