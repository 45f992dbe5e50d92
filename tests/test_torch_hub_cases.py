"""PyTorch's own hub tests (test/test_hub.py, torch 2.13), case by case, against a server with a repo of that shape.

Each case has the name that it has there. Where the answer differs, the difference is a row in docs/torch-hub.md.
Nothing here is PyTorch's text.
"""

from __future__ import annotations

import builtins
import io
import os
import stat
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import isohub as hub
from isohub import errors
from tests.servers.files import FileServer
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer

pytestmark = pytest.mark.usefixtures("loopback_weights")

HUBCONF = '''
dependencies = ["torch"]

import torch
from mnist_model import MNIST


def _build(pretrained, url):
    model = MNIST()
    if pretrained:
        model.load_state_dict(torch.hub.load_state_dict_from_url(url, progress=False))
    return model


def mnist(pretrained=False):
    """A small model for digits."""
    return _build(pretrained, "{files}/mnist_init_ones")


def mnist_zip(pretrained=False):
    return _build(pretrained, "{files}/mnist_init_ones.zip")


def mnist_zip_1_6(pretrained=False):
    return _build(pretrained, "{files}/mnist_init_ones_1_6.zip")
'''
MODEL = """
import torch

class MNIST(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 20, 5)
        self.fc = torch.nn.Linear(320, 10)

    def forward(self, x):
        return self.fc(x.flatten(1)[:, :320])
"""
SIZES = {"conv1.weight": (20, 1, 5, 5), "conv1.bias": (20,), "fc.weight": (10, 320), "fc.bias": (10,)}
SUM = 20 * 25 + 20 + 3200 + 10


def sum_of(state):
    return sum(value.sum().item() for value in state.values())


def saved(**options) -> bytes:
    stream = io.BytesIO()
    torch.save({name: torch.ones(size) for name, size in SIZES.items()}, stream, **options)
    return stream.getvalue()


def legacy_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("mnist_init_ones", saved(_use_new_zipfile_serialization=False))
    return stream.getvalue()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with FileServer() as files, GitHubServer() as github:
        files.add("/mnist_init_ones", saved(_use_new_zipfile_serialization=False))
        files.add("/mnist_init_ones.zip", legacy_zip())
        files.add("/mnist_init_ones_1_6.zip", saved())
        repo = github.add("ailzhang", "torchhub_example", GitRepo(tmp_path_factory.mktemp("git"), branch="master"))
        repo.commit({"hubconf.py": HUBCONF.replace("{files}", files.url), "mnist_model.py": MODEL})
        repo.git("branch", "ci/test_slash")
        repo.fork = repo.orphan({"hubconf.py": "raise SystemExit"}, parent=repo.sha())
        yield github, files, repo


@pytest.fixture(autouse=True)
def own_hub_dir(servers, tmp_path, monkeypatch):
    for name, value in servers[0].environment.items():
        monkeypatch.setenv(name, value)

    def never(*_):
        raise AssertionError("nobody is asked")

    monkeypatch.setattr(builtins, "input", never)
    hub.set_dir(str(tmp_path / "hub_dir"))
    yield
    hub.set_dir(None)


EXAMPLE = "ailzhang/torchhub_example"


def test_load_from_github():
    model = hub.load(EXAMPLE, "mnist", source="github", pretrained=True, verbose=False)
    assert sum_of(model.state_dict()) == SUM


def test_load_from_local_dir():
    place = hub.fetch(EXAMPLE).path
    model = hub.load(place, "mnist", source="local", pretrained=True, verbose=False)
    assert sum_of(model.state_dict()) == SUM


def test_load_from_branch():
    model = hub.load(f"{EXAMPLE}:ci/test_slash", "mnist", pretrained=True, verbose=False)
    assert sum_of(model.state_dict()) == SUM


def test_get_set_dir(tmp_path, monkeypatch):
    previous = hub.get_dir()
    hub.set_dir(str(tmp_path / "other"))
    assert hub.get_dir() == str(tmp_path / "other") != previous
    assert sum_of(hub.load(EXAMPLE, "mnist", pretrained=True, verbose=False).state_dict()) == SUM
    assert list((tmp_path / "other" / "checkouts").rglob("hubconf.py"))
    monkeypatch.setenv("HOME", str(tmp_path))
    hub.set_dir(os.path.join("~", "hub"))
    assert hub.get_dir() == os.path.expanduser(os.path.join("~", "hub"))


def test_list_entrypoints():
    assert "mnist" in hub.list(EXAMPLE, trust_repo=True)
    assert hub.list(github=EXAMPLE) == ["MNIST", "mnist", "mnist_zip", "mnist_zip_1_6"]
    assert hub.help(github=EXAMPLE, model="mnist") == "A small model for digits."


def test_download_url_to_file(servers, tmp_path):
    place = tmp_path / "temp"
    hub.download_url_to_file(f"{servers[1].url}/mnist_init_ones", str(place), progress=False)
    assert sum_of(torch.load(place, weights_only=True)) == SUM
    reference = tmp_path / "reference"
    reference.touch()
    assert stat.S_IMODE(place.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)


def test_load_state_dict_from_url(servers):
    url = f"{servers[1].url}/mnist_init_ones"
    assert sum_of(hub.load_state_dict_from_url(url)) == SUM
    assert sum_of(hub.load_state_dict_from_url(url, file_name="the_file_name")) == SUM
    assert (Path(hub.get_dir()) / "checkpoints" / "the_file_name").exists()
    assert sum_of(hub.load_state_dict_from_url(url, weights_only=True)) == SUM


def test_load_legacy_zip_checkpoint(servers):
    assert sum_of(hub.load(EXAMPLE, "mnist_zip", pretrained=True, verbose=False).state_dict()) == SUM
    with pytest.warns(FutureWarning, match="zip"):
        assert sum_of(hub.load_state_dict_from_url(f"{servers[1].url}/mnist_init_ones.zip")) == SUM


def test_load_zip_1_6_checkpoint(servers):
    assert (
        sum_of(hub.load(EXAMPLE, "mnist_zip_1_6", pretrained=True, verbose=False, trust_repo=True).state_dict()) == SUM
    )
    assert sum_of(hub.load_state_dict_from_url(f"{servers[1].url}/mnist_init_ones_1_6.zip")) == SUM


def test_hub_parse_repo_info(servers):
    from isohub.repos.reference import parse

    parsed = parse("a/b:c")
    assert (parsed.owner, parsed.repo, parsed.ref) == ("a", "b", "c")
    # The default branch is what the server says it is, not a guess between main and master.
    assert hub.fetch(EXAMPLE).pin.ref_name == "refs/heads/master"


def test_load_commit_from_forked_repo(servers):
    fork = servers[2].fork
    with pytest.raises(ValueError, match="fork"):
        hub.load(f"{EXAMPLE}:{fork[:12]}", "mnist")
    with pytest.raises(ValueError, match="fork"):
        hub.load(f"{EXAMPLE}:{fork}", "mnist")


@pytest.mark.parametrize("trust_repo", [False, "check", None])
def test_trust_repo_false_and_check(trust_repo):
    """There: a prompt. Here a confined load needs no trust, so nobody is asked and nothing is remembered."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum_of(hub.load(EXAMPLE, "mnist_zip_1_6", pretrained=True, trust_repo=trust_repo).state_dict()) == SUM
    assert hub.trusted() == []
    # What needs trust is refused, with the same words every time.
    for _ in range(2):
        with pytest.raises(errors.UntrustedRepoError, match="not trusted"):
            hub.load(EXAMPLE, "mnist", trust_repo=trust_repo, returns="torchscript")
    assert hub.trusted() == []


def test_trust_repo_true(servers):
    hub.load(EXAMPLE, "mnist_zip_1_6", trust_repo=True)
    assert hub.trusted() == [f"{servers[0].host}/ailzhang/torchhub_example"]
    assert hub.load(EXAMPLE, "mnist", trust_repo="check", returns="torchscript") is not None
    with pytest.raises(errors.UntrustedRepoError):  # False still trusts nobody
        hub.load(EXAMPLE, "mnist", trust_repo=False, returns="torchscript")


@pytest.mark.parametrize("trust_repo", ["Check", "", "yes", 1, 0, [], "true"])
def test_trust_repo_is_strict(trust_repo):
    """torch.hub lets "Check" through as trusted."""
    for function in (
        lambda **options: hub.load(EXAMPLE, "mnist", **options),
        lambda **options: hub.list(EXAMPLE, **options),
    ):
        with pytest.raises(ValueError, match="trust_repo"):
            function(trust_repo=trust_repo)


def test_trust_repo_builtin_trusted_owners(servers, tmp_path):
    """There some owners are trusted for their names; here nobody is."""
    repo = servers[0].add("pytorch", "vision", GitRepo(tmp_path / "vision"))
    repo.commit({"hubconf.py": "import torch\ndef resnet18():\n    return torch.nn.Linear(1, 1)\n"})
    hub.load("pytorch/vision", "resnet18", trust_repo="check")
    with pytest.raises(errors.UntrustedRepoError):
        hub.load("pytorch/vision", "resnet18", trust_repo="check", returns="torchscript")
    assert hub.trusted() == []


def test_trust_repo_legacy():
    """There a repo that lies in the cache is trusted; here only the list counts."""
    hub.load(EXAMPLE, "mnist_zip_1_6", trust_repo=True)
    (Path(hub.get_dir()) / "trust.json").unlink()
    with pytest.raises(errors.UntrustedRepoError):
        hub.load(EXAMPLE, "mnist", trust_repo="check", returns="torchscript")
    assert hub.trusted() == []


def test_no_terminal_no_prompt_no_hang(servers):
    """pytorch#71205: in CI there is nobody to answer."""
    code = (
        "import sys, isohub as hub\n"
        f"print(type(hub.load({EXAMPLE!r}, 'mnist', trust_repo=False)).__name__)\n"
        "try:\n"
        f"    hub.load({EXAMPLE!r}, 'mnist', returns='torchscript')\n"
        "except hub.errors.UntrustedRepoError as error:\n"
        "    print('trust_repo=True' in error.hint)\n"
    )
    environment = {**os.environ, **servers[0].environment, "ISOHUB_HOME": hub.get_dir()}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )
    assert done.stdout.split() == ["MNIST", "True"], done.stderr
