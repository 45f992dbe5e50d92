"""`compare` tells what truly differs between two releases: held against git's own diff and torch.hub's own answers."""

from __future__ import annotations

import subprocess

import pytest
import torch

import isohub
from tests.real.packages import BROKEN, PAIRS, SEED, make_inputs

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
#: Those whose outputs, state or names changed, and two that changed in nothing but their code.
CHOSEN = {
    "pytorch-pretrained-vit": "outputs changed",
    "unet": "no change",
    "asteroid-filterbanks": "outputs equal; state changed",
    "linformer": "outputs changed",
    "pytorch-tcn": "outputs equal; state changed",
    "ncps": "no change",
}


def flat(value):
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, (tuple, list)) else [value]


def git_diff(repo, before, after):
    """Path to (status letter, added, removed), by git itself."""
    command = ["git", "-C", str(repo), "-c", "core.quotePath=false", "diff", "--no-renames", before, after]
    numbers = subprocess.run([*command, "--numstat"], capture_output=True, text=True, check=True).stdout
    letters = subprocess.run([*command, "--name-status"], capture_output=True, text=True, check=True).stdout
    status = {line.split("\t")[1]: line[0] for line in letters.splitlines()}
    return {path: (status[path], *counts) for *counts, path in (line.split("\t") for line in numbers.splitlines())}


def compared(session, repo, pair):
    refs = [f"{repo}:{version}" for version in pair.versions]
    inputs = make_inputs(pair, SEED)
    return isohub.compare(
        refs, pair.entrypoint, inputs, kwargs=pair.kwargs, seed=SEED, training=False, repeats=0, session=session
    )


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.name in CHOSEN], ids=lambda pair: pair.name)
def test_the_report_tells_what_changed(session, truth, pair):
    repo, (before, after) = truth(pair)
    found = compared(session, repo, pair)
    (difference,) = found.differences
    assert found.verdict.startswith(CHOSEN[pair.name])

    expected, got = flat(before["outputs"]), flat(after["outputs"])
    assert [leaf.max_abs for leaf in difference.outputs if leaf.measures is not None] == [
        (b.double() - a.double()).abs().max().item() for a, b in zip(expected, got, strict=True)
    ]
    assert found.changed == any(not torch.equal(a, b) for a, b in zip(expected, got, strict=True))

    old, new, state = before["state_dict"], after["state_dict"], difference.state
    assert {entry.name for entry in state.missing} | {name for name, _ in state.renamed} == old.keys() - new.keys()
    assert {entry.name for entry in state.added} | {name for _, name in state.renamed} == new.keys() - old.keys()
    assert all(torch.equal(old[name], new[other]) for name, other in state.renamed)
    both = [name for name in old if name in new and old[name].shape == new[name].shape]
    assert {change.name for change in state.changed} == {name for name in both if not torch.equal(old[name], new[name])}
    for change in state.changed:
        norm = (new[change.name].double() - old[change.name].double()).norm().item()
        assert change.norm == pytest.approx(norm, rel=1e-9)

    wanted = git_diff(repo, *pair.versions)
    assert {file.path for file in difference.code.files} == set(wanted)
    for file in difference.code.files:
        status, added, removed = wanted[file.path]
        assert file.status == {"A": "added", "D": "removed", "M": "modified"}[status]
        if added == "-":
            assert file.added is None
        else:
            assert file.added - file.removed == int(added) - int(removed), file.path
            assert file.added <= int(added), file.path  # git does not always find the shortest
    told = sum(file.added or 0 for file in difference.code.files)
    assert told >= 0.9 * sum(int(added) for _, added, _ in wanted.values() if added != "-")


def test_a_release_that_cannot_be_imported_is_a_result(session, truth):
    repo, _ = truth(BROKEN)
    found = compared(session, repo, BROKEN)
    assert found.changed
    assert found.base.failure.phase == "load"
    assert "torch._six" in found.base.failure.message
    assert found.refs[1].failure is None
    assert found.refs[1].outputs == (("output", "float32[1, 10]"),)
