"""The main job: refs of one GitHub repo, side by side in one session, over a real HTTP server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import isohub
from isohub import errors
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer

HUBCONF = """
dependencies = ["torch"]
from models import Net as _Net

def model(width={width}):
    \"\"\"Version {version}.\"\"\"
    return _Net(width)
"""
MODELS = """
import torch

class Net(torch.nn.Module):
    version = {version}

    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((width,), float({version})))

    def forward(self, x):
        from utils import scale
        return scale(x * self.weight.sum())
"""
UTILS = "def scale(x):\n    return x * {version}\n"


def files(version):
    names = {"hubconf.py": HUBCONF, "models.py": MODELS, "utils.py": UTILS}
    return {name: text.format(version=version, width=version + 1) for name, text in names.items()}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """org/repo with versions 1 to 5 as a tag, an annotated tag, a branch with a slash, a pull request, and main."""
    repo = GitRepo(tmp_path_factory.mktemp("git") / "repo")
    commits = {1: repo.commit(files(1))}
    repo.tag("v1")
    commits[2] = repo.commit(files(2))
    repo.tag("v2", annotated=True)
    commits[3] = repo.commit(files(3))
    repo.branch("feature/three")
    repo.checkout("main")
    commits[9] = repo.commit(files(9))  # no tip: only reachable
    commits[5] = repo.commit(files(5))
    repo.branch("aside")
    commits[4] = repo.commit(files(4))
    repo.ref("refs/pull/7/head")
    repo.checkout("main")
    repo.git("branch", "-D", "aside")
    with GitHubServer() as server, pytest.MonkeyPatch.context() as patch:
        for name, text in server.environment.items():
            patch.setenv(name, text)
        server.add("org", "repo", repo)
        yield server, commits


@pytest.fixture(scope="module")
def own(served, tmp_path_factory):
    with isohub.Session(tmp_path_factory.mktemp("cache"), timeout_s=60) as opened:
        yield opened


def expected(version):
    return float(version * (version + 1) * version)


def test_six_refs_side_by_side(own, served):
    _, commits = served
    refs = {
        "org/repo:v1": 1,
        "org/repo:v2": 2,
        "org/repo:feature/three": 3,
        "org/repo:pull/7": 4,
        "org/repo": 5,
        f"org/repo:{commits[9]}": 9,
    }
    handles = {ref: own.load(ref, "model") for ref in refs}
    x = torch.ones(1)
    for _ in range(2):
        for ref, version in refs.items():
            assert handles[ref](x).item() == expected(version), ref
            assert handles[ref].version == version
            assert handles[ref].commit == commits[version]
    assert len(own.workers()) == 6
    for ref, handle in handles.items():
        assert handle.reference == ref
        handle.close()


@pytest.mark.parametrize(
    ("ref", "version"),
    [
        ("refs/tags/v1", 1),
        ("refs/heads/main", 5),
        ("pull/7/head", 4),
        ("HEAD", 5),
        ("main", 5),
    ],
)
def test_every_way_to_name_a_ref(own, ref, version):
    with own.load(f"org/repo:{ref}", "model") as handle:
        assert handle.version == version


def test_full_and_short_shas(own, served):
    _, commits = served
    for version in (1, 3, 9):
        for length in (40, 10, 7):
            with own.load(f"org/repo:{commits[version][:length]}", "model") as handle:
                assert (handle.version, handle.commit) == (version, commits[version])


def test_one_commit_by_two_names_is_one_worker(own):
    with own.load("org/repo:main", "model") as first, own.load("org/repo", "model") as second:
        assert first.commit == second.commit
        assert len(own.workers()) == 1
        assert first.run(lambda module: __import__("os").getpid()) == second.run(
            lambda module: __import__("os").getpid()
        )


def test_a_url_is_the_same_repo(own, served):
    server, commits = served
    with own.load(f"{server.url}/org/repo.git@v1", "model") as handle:
        assert handle.commit == commits[1]


def test_a_stored_commit_needs_no_request(own, served):
    server, commits = served
    own.fetch(f"org/repo:{commits[1]}")
    server.forget()
    with own.load(f"org/repo:{commits[1]}", "model") as handle:
        assert handle.version == 1
    assert server.count() == 0


def test_a_ref_that_is_not_there_names_the_near_ones(own):
    with pytest.raises(errors.RefNotFoundError) as caught:
        own.load("org/repo:v11", "model")
    assert "v1" in caught.value.near


def test_a_repo_that_is_not_there(own):
    with pytest.raises(errors.SourceUnavailableError, match="org/none"):
        own.load("org/none", "model")


def test_a_branch_that_moves_is_followed_and_the_old_handle_stays(tmp_path, monkeypatch):
    repo = GitRepo(tmp_path / "moving")
    repo.commit(files(1))
    with GitHubServer() as server, isohub.Session(tmp_path / "cache") as fresh:
        for name, text in server.environment.items():
            monkeypatch.setenv(name, text)
        server.add("org", "moving", repo)
        old = fresh.load("org/moving:main", "model")
        repo.commit(files(2))
        new = fresh.load("org/moving:main", "model")
        assert (old.version, new.version) == (1, 2)
        assert (old(torch.ones(1)).item(), new(torch.ones(1)).item()) == (expected(1), expected(2))


def test_a_local_clone_with_refs(own, served, tmp_path):
    server, commits = served
    GitRepo(tmp_path / "home").git("clone", "--quiet", f"{server.url}/org/repo.git", str(tmp_path / "clone"))
    clone = str(tmp_path / "clone")
    with own.load(f"{clone}:v1", "model") as first, own.load(f"{clone}:feature/three", "model") as third:
        with own.load(clone, "model") as tree, own.load(f"git+file://{clone}@v2", "model") as second:
            assert [handle.version for handle in (first, second, third, tree)] == [1, 2, 3, 5]
            assert (first.commit, second.commit) == (commits[1], commits[2])
        Path(clone, "models.py").write_text(files(8)["models.py"])
        with own.load(clone, "model") as dirty:
            assert dirty.version == 8


def test_list_help_and_inspect_of_a_ref(own):
    assert own.list("org/repo:v1") == ["model"]
    assert own.help("org/repo:v2", "model") == "Version 2."
    assert own.inspect("org/repo:feature/three").entrypoints[0].doc == "Version 3."
    assert own.workers() == []
