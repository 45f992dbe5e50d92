"""The real packages themselves: downloaded as their hashes say, committed as tags, answered by torch.hub alone."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest
import torch

from tests.real import packages
from tests.real.packages import BROKEN, PAIRS, alone, export, fetch_sdist, make_inputs, materialise, same

pytestmark = pytest.mark.real

BY_NAME = {pair.name: pair for pair in PAIRS}


def git(repo, *arguments):
    return subprocess.run(["git", "-C", repo, *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    """Both checkouts of a pair, made once for this module."""
    made = {}

    def of(pair):
        if pair.name not in made:
            directory = tmp_path_factory.mktemp(pair.name)
            repo = materialise(pair, directory)
            made[pair.name] = tuple(export(repo, version, directory / "at") for version in pair.versions)
        return made[pair.name]

    return of


def test_the_list_is_as_wide_as_it_should_be():
    assert len(PAIRS) >= 8
    assert len({pair.kind for pair in PAIRS}) >= 6
    assert len({release.sha256 for pair in PAIRS for release in pair.releases}) == 2 * len(PAIRS)


def test_a_file_that_is_not_what_its_hash_says_is_refused(tmp_path, monkeypatch):
    pair = BY_NAME["linformer"]
    good = fetch_sdist(pair.name, pair.releases[0])  # the positive control
    monkeypatch.setattr(packages, "CACHE", tmp_path)
    (tmp_path / good.name).write_bytes(good.read_bytes() + b"x")
    with pytest.raises(AssertionError, match="expected"):
        fetch_sdist(pair.name, pair.releases[0])
    (tmp_path / good.name).unlink()
    with pytest.raises(AssertionError, match="could not download"):
        fetch_sdist(pair.name, dataclasses.replace(pair.releases[0], sha256="0" * 64))
    assert list(tmp_path.iterdir()) == []


def test_downloading_runs_nothing_of_the_package(tmp_path, monkeypatch):
    # setup.py of this one would write <name>.egg-info into the folder that pip unpacks to, and the
    # stand-in backend is asked instead: it is what fails here, and so no file arrives.
    pair = BY_NAME["linformer"]
    monkeypatch.setattr(packages, "CACHE", tmp_path)
    monkeypatch.setattr(packages, "_BACKEND", "raise RuntimeError('the stand-in was asked')")
    with pytest.raises(AssertionError, match="the stand-in was asked"):
        fetch_sdist(pair.name, pair.releases[0])


def test_two_tags_of_one_repository_the_same_on_every_machine(tmp_path):
    pair = BY_NAME["linformer"]
    one, two = materialise(pair, tmp_path / "one"), materialise(pair, tmp_path / "two")
    assert git(one, "tag").split() == list(pair.versions)
    commits = [git(one, "rev-parse", version) for version in pair.versions]
    assert commits == [git(two, "rev-parse", version) for version in pair.versions]
    assert git(one, "rev-parse", "main") == commits[1]
    assert git(one, "status", "--porcelain") == ""
    first = export(one, pair.versions[0], tmp_path / "at")
    assert (first / "hubconf.py").is_file()
    assert not (first / "linformer" / "reversible.py").exists()  # came with the second
    assert (export(one, pair.versions[1], tmp_path / "at") / "linformer" / "reversible.py").is_file()


def test_inputs_are_the_same_here_as_in_the_oracle():
    for pair in PAIRS:
        state = torch.random.get_rng_state()
        once, again = make_inputs(pair, 5), make_inputs(pair, 5)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(map(torch.equal, once, again))
        assert [list(tensor.shape) for tensor in once] == [spec["shape"] for spec in pair.inputs]


def test_torch_hub_gives_a_wrong_model_in_silence(checkouts):
    pair = BY_NAME["linformer"]
    first, second = checkouts(pair)
    right = alone(second, pair, seed=0)
    wrong = alone(second, pair, seed=0, after=first)
    assert "error" not in wrong
    assert wrong["params"] == right["params"]
    assert not same(wrong, right)


def test_torch_hub_hides_that_a_release_is_broken(checkouts):
    first, second = checkouts(BROKEN)
    assert "torch._six" in alone(first, BROKEN, seed=0)["error"]
    assert "error" not in alone(first, BROKEN, seed=0, after=second)
