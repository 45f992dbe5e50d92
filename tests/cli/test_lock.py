"""isohub lock: add, upgrade, check; and what a lockfile makes of later loads."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isohub.repos import http
from isohub.repos.credentials import Credentials
from isohub.repos.lockfile import Lockfile
from isohub.repos.reference import parse
from isohub.repos.weights import Weights
from tests.servers.files import FileServer
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def github(isohub_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHubServer]:
    monkeypatch.setattr(http, "BACKOFF_S", 0.001)
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    with GitHubServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def repo(github: GitHubServer, tmp_path: Path) -> GitRepo:
    made = github.add("o", "r", GitRepo(tmp_path / "git" / "r"))
    made.commit({"hubconf.py": "one\n"})
    made.tag("v1")
    return made


def read(done: subprocess.CompletedProcess[str], status: int = 0) -> list[dict]:
    assert (done.returncode, done.stderr) == (status, "")
    return json.loads(done.stdout)["entries"]


def test_lock_stays_until_it_is_upgraded(isohub_here: Run, repo: GitRepo, github: GitHubServer) -> None:
    one = repo.sha()
    (row,) = read(isohub_here("lock", "o/r:main", "--json"))
    assert (row["status"], row["commit"], row["reference"]) == ("added", one, "o/r:main")
    before = Path("isohub.lock").read_bytes()
    assert f'commit = "{one}"' in before.decode()
    two = repo.commit({"hubconf.py": "two\n"})
    done = isohub_here("lock", "o/r:main", "o/r:v1")
    assert done.returncode == 0
    assert [line.split()[:3] for line in done.stdout.splitlines()[1:3]] == [
        ["o/r:main", "unchanged", one[:16]], ["o/r:v1", "added", one[:16]]
    ]  # fmt: skip
    assert done.stdout.endswith(f"2 locked in {Path('isohub.lock').absolute()}\n")
    done = isohub_here("lock", "--upgrade")
    assert f"{one[:16]} -> {two[:16]}" in done.stdout
    assert {entry.reference: entry.commit for entry in Lockfile("isohub.lock").entries()} == {
        "o/r:main": two, "o/r:v1": one
    }  # fmt: skip
    assert [row["status"] for row in read(isohub_here("lock", "--upgrade", "--json"))] == ["unchanged"] * 2
    assert isohub_here("lock", "o/r:main", "-q").stdout == f"{two} o/r:main\n"


def test_a_lock_binds_what_is_loaded_later(isohub_here: Run, repo: GitRepo) -> None:
    one = repo.sha()
    isohub_here("lock", "o/r:main")
    repo.commit({"hubconf.py": "two\n"})
    found = json.loads(isohub_here("fetch", "o/r:main", "--frozen", "--json").stdout)
    assert found["commit"] == one
    assert json.loads(isohub_here("fetch", "o/r:main", "--json").stdout)["commit"] == repo.sha()
    refused = isohub_here("fetch", "o/r:v1", "--frozen")
    assert refused.returncode == 1
    assert "is not locked" in refused.stderr
    assert "hint: isohub lock o/r:v1" in refused.stderr


def test_check(isohub_here: Run, repo: GitRepo, github: GitHubServer, tmp_path: Path) -> None:
    isohub_here("lock", "o/r:main", "o/r:v1")
    before = Path("isohub.lock").read_bytes()
    repo.commit({"hubconf.py": "two\n"})
    assert [row["status"] for row in read(isohub_here("lock", "--check", "--json"))] == ["same", "same"]
    isohub_here("cache", "rm", "--all")
    assert [row["status"] for row in read(isohub_here("lock", "--check", "--json"))] == ["same", "same"]
    missing = isohub_here("lock", "--check", "o/r")
    assert missing.returncode == 1
    assert "o/r is not locked" in missing.stdout
    isohub_here("cache", "rm", "--all")
    rows = read(isohub_here("lock", "--check", "--offline", "--json"), 1)
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert Path("isohub.lock").read_bytes() == before


def test_check_finds_other_bytes_in_the_store(isohub_here: Run, repo: GitRepo) -> None:
    isohub_here("lock", "o/r:main")
    path = Path(json.loads(isohub_here("fetch", "o/r:main", "--json").stdout)["path"]) / "hubconf.py"
    path.chmod(0o644)
    path.write_text("One\n")
    (row,) = read(isohub_here("lock", "--check", "--json"), 1)
    assert row["status"] == "differs"
    assert "tree" in row["problem"]
    done = isohub_here("lock", "o/r:main")
    assert done.returncode == 1
    assert "is not what" in done.stderr


def test_check_of_weights(isohub_here: Run, repo: GitRepo, tmp_path: Path) -> None:
    isohub_here("lock", "o/r:main")
    lock, reference = Lockfile("isohub.lock"), parse("o/r:main")
    scope = (reference.host, reference.owner, reference.repo)
    weights = Weights(tmp_path / "isohub-home")
    with FileServer() as files:
        for url in (files.add("/a.pth", b"good"), files.add("/b.pth", b"signed") + "?signature=SECRET"):
            found = weights.fetch(url, scope, credentials=Credentials(anonymous=True))
            lock.check_weights(reference, (), url, found.sha256, found.bytes)
        (row,) = read(isohub_here("lock", "--check", "--json"))
        assert (row["weights"], row["weights_not_here"]) == (2, [])
        isohub_here("cache", "rm", "--all")
        done = isohub_here("lock", "--check")
        assert done.returncode == 0
        assert "/b.pth is not here, and its query is not kept" in done.stdout
        assert "SECRET" not in done.stdout + Path("isohub.lock").read_text()
        isohub_here("cache", "rm", "--all")
        files.replace("/a.pth", b"evil")
        (row,) = read(isohub_here("lock", "--check", "--json"), 1)
        assert row["status"] == "differs"
        assert "/a.pth" in row["problem"]


def test_local_references(isohub_here: Run, github: GitHubServer) -> None:
    clone = GitRepo(Path("clone"))
    clone.commit({"hubconf.py": ""})
    rows = read(isohub_here("lock", "./clone", "./clone:main", "--submodules", "--json"))
    assert [row["extras"] for row in rows] == [[], ["submodules"]]
    assert {entry.reference for entry in Lockfile("isohub.lock").entries()} == {"./clone", "git+file:./clone@main"}
    assert isohub_here("lock", "--check").returncode == 0
    Path("clone/hubconf.py").write_text("changed")
    rows = read(isohub_here("lock", "--check", "--json"), 1)
    assert [row["status"] for row in rows] == ["differs", "same"]
    assert isohub_here("lock", "--upgrade").returncode == 0
    assert isohub_here("lock", "--check").returncode == 0
    Path("clone").rename("moved")
    assert [row["status"] for row in read(isohub_here("lock", "--check", "--json"), 1)] == ["failed", "failed"]


def test_what_was_not_validated_is_said(isohub_here: Run, repo: GitRepo) -> None:
    fork = repo.orphan({"hubconf.py": "fork"}, parent=repo.sha())
    assert isohub_here("lock", f"o/r:{fork}").returncode == 1
    done = isohub_here("lock", f"o/r:{fork}", "--skip-validation")
    assert "is not shown to be a commit of its repo" in done.stdout
    assert "validated = false" in Path("isohub.lock").read_text()


@pytest.mark.parametrize(
    "arguments", [[], ["--upgrade", "--check"], ["--upgrade", "--lfs"], ["--check", "--submodules"], ["--json"]]
)
def test_usage(isohub_here: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isohub_here("lock", *arguments).returncode == 2
    assert not Path("isohub.lock").exists()


def test_nothing_is_locked(isohub_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for flag in ("--upgrade", "--check"):
        done = isohub_here("lock", flag)
        assert (done.returncode, done.stdout) == (0, f"0 locked in {tmp_path / 'isohub.lock'}\n")


def test_a_hostile_lockfile(isohub_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("isohub.lock").write_text('version = 1\n\n[[repo]]\nreference = "\x1b[2J"\n')
    for arguments in (["--check"], ["--upgrade"], ["o/r"]):
        done = isohub_here("lock", *arguments)
        assert done.returncode == 1
        assert "cannot be relied on" in done.stderr
        assert all(char == "\n" or char.isprintable() for char in done.stdout + done.stderr)
