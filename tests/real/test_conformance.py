"""Real models by torch.hub in a fresh interpreter, and their handles: the same answers to the same questions."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import isohub
from tests.real import observed
from tests.real.installed import user_site
from tests.real.models import MODELS, repo_of
from tests.real.packages import quiet_threads

pytestmark = [pytest.mark.real, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]
SEED = 5
ORACLE = Path(observed.__file__)


@pytest.fixture(scope="module")
def site_folder():
    with user_site() as folder:
        yield folder


@pytest.fixture(scope="module")
def own(site_folder, tmp_path_factory):
    with isohub.Session(tmp_path_factory.mktemp("cache"), timeout_s=200) as session:
        yield session


@pytest.fixture(scope="module")
def seen(own, site_folder, tmp_path_factory):
    """What is seen of a model here by a handle, and alone by torch.hub."""
    known = {}

    def of(model):
        if model.name not in known:
            repo = repo_of(model, tmp_path_factory.mktemp(model.name))
            folder = str(site_folder) if model.installed else None
            options = {"entrypoint": "model", "kwargs": model.kwargs, "seed": SEED, "inputs": model.inputs,
                       "expressions": model.expressions, "site": folder}  # fmt: skip
            out = repo.parent / "seen.pt"
            command = [sys.executable, "-I", "-W", "ignore", str(ORACLE), str(repo), json.dumps(options), str(out)]
            with tempfile.TemporaryFile("w+") as said:
                alone = subprocess.Popen(command, stdout=said, stderr=said, cwd=repo.parent, env=quiet_threads())
                try:
                    built = own.load(str(repo), "model", seed=SEED, **model.kwargs)
                    got = observed.observe(built, options)
                finally:
                    code = alone.wait(200)
                said.seek(0)
                assert code == 0, said.read()[-3000:]
            known[model.name] = got, torch.load(out, weights_only=True)
        return known[model.name]

    return of


def differences(got, expected, where=""):
    """Places in two plain values that are not the same, to the bit."""
    if isinstance(expected, str) and expected == observed.OF_A_PART:
        return []
    if isinstance(expected, torch.Tensor):
        if not isinstance(got, torch.Tensor) or got.dtype != expected.dtype or got.shape != expected.shape:
            return [f"{where}: {got!r:.200} is not {expected!r:.200}"]
        same = torch.equal(got, expected) or torch.equal(torch.nan_to_num(got), torch.nan_to_num(expected))
        return [] if same else [f"{where}: differs by {(got.double() - expected.double()).abs().max()}"]
    if isinstance(expected, list) and isinstance(got, list) and len(got) == len(expected):
        return [
            line
            for place, (one, other) in enumerate(zip(got, expected, strict=True))
            for line in differences(one, other, f"{where}[{place}]")
        ]
    same = type(got) is type(expected) and (got == expected or (got != got and expected != expected))
    return [] if same else [f"{where}: {got!r:.400} is not {expected!r:.400}"]


#: What a handle has beside the module's own names.
BEYOND = {"call_async", "close", "commit", "confinement", "export", "map", "options", "reference", "run", "save", "stats",
          "submit", "torchscript"}  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_a_handle_is_seen_as_the_model_is(seen, model):
    got, expected = seen(model)
    names, own_names = set(got.pop("described: dir")), set(expected.pop("described: dir"))
    assert own_names - names == set()
    assert names - own_names == BEYOND - own_names
    assert list(got) == list(expected)
    assert [line for name in expected for line in differences(got[name], expected[name], name)] == []
