"""isohub lock: add, upgrade, check; and what a lockfile makes of later loads."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from isohub.errors import IntegrityError, LockMismatchError
from isohub.repos import http
from isohub.repos.blobs import Stamp
from isohub.repos.credentials import Credentials
from isohub.repos.lockfile import Lockfile
from isohub.repos.records import read_record, write_record
from isohub.repos.reference import parse
from isohub.repos.weights import Weights
from isohub.repos.weights_entry import WeightsEntry
from tests.servers.files import Fault as FileFault
from tests.servers.files import FileServer
from tests.servers.git_repo import GitRepo
from tests.servers.github import Fault, GitHubServer

pytestmark = pytest.mark.usefixtures("loopback_weights")

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


def test_a_lockfile_that_is_not_there(isohub_here: Run, repo: GitRepo, tmp_path: Path) -> None:
    for arguments in (["--upgrade"], ["--check"], ["--check", "o/r"]):
        done = isohub_here("lock", *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"there is no lockfile {tmp_path / 'project' / 'isohub.lock'}" in done.stderr
        assert "hint: isohub lock REPO\n" in done.stderr
    refused = isohub_here("fetch", "o/r", "--lockfile", "other.lock", "--frozen")
    assert "there is no lockfile" in refused.stderr
    assert f"hint: isohub lock o/r --lockfile {tmp_path / 'project' / 'other.lock'}\n" in refused.stderr
    assert isohub_here("lock", "--upgrade", "o/r").returncode == 0  # what is not there yet is added
    assert [row["status"] for row in read(isohub_here("lock", "--check", "--json"))] == ["same"]


def test_nothing_is_locked(isohub_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("isohub.lock").write_text("version = 1\n")
    for flag in ("--upgrade", "--check"):
        done = isohub_here("lock", flag)
        assert (done.returncode, done.stdout) == (0, f"0 locked in {tmp_path / 'isohub.lock'}\n")


def test_a_server_that_is_down_locks_nothing(isohub_here: Run, repo: GitRepo, github: GitHubServer) -> None:
    assert isohub_here("fetch", "o/r:main").returncode == 0
    github.fail("", Fault(status=503))
    down = isohub_here("lock", "o/r:main")
    assert (down.returncode, down.stdout) == (1, "")
    assert not Path("isohub.lock").exists()
    # What it said last counts where that is asked for.
    (row,) = json.loads(isohub_here("lock", "o/r:main", "--offline", "--json").stdout)["entries"]
    assert (row["status"], row["commit"]) == ("added", repo.sha())
    assert isohub_here("lock", "--upgrade").returncode == 1
    github.behave()
    assert isohub_here("lock", "--upgrade").returncode == 0


@pytest.fixture
def weights(repo: GitRepo, tmp_path: Path) -> Iterator[FileServer]:
    with FileServer() as files:
        files.add("/a.pth", b"good")
        files.add("/b.pth", b"signed")
        yield files


_DOWNLOADS = """
import os, tempfile, torch

def model():
    path = os.path.join(tempfile.mkdtemp(), "weights")
    torch.hub.download_url_to_file("{}", path, progress=False)
    with open(path) as stream:
        return stream.read()
"""


def load(url: str, home: Path) -> None:
    """What a load with the lockfile does for a worker that wants a file."""
    lock, reference = Lockfile("isohub.lock"), parse("o/r:main")
    locked = lock.weights(reference, (), url)
    scope = (reference.host, reference.owner, reference.repo)
    try:
        found = Weights(home).fetch(
            url, scope, credentials=Credentials(anonymous=True), sha256=None if locked is None else locked.sha256
        )
    except IntegrityError as error:
        assert locked is not None
        assert error.got is not None
        lock.check_weights(reference, (), url, error.got, locked.bytes)
        raise
    lock.check_weights(reference, (), url, found.sha256, found.bytes)


def pasted(isohub_here: Run, hint: str | None) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split((hint or "").rpartition(": ")[2])
    assert program == "isohub"
    return isohub_here(*arguments)


@pytest.mark.parametrize("cached", ["nothing", "what is locked", "what is new", "what nobody has"])
def test_the_hint_gets_out_of_changed_weights(
    isohub_here: Run, weights: FileServer, tmp_path: Path, cached: str
) -> None:
    home, url = tmp_path / "isohub-home", f"{weights.url}/a.pth"
    isohub_here("lock", "o/r:main")
    load(url, home)
    before = Lockfile("isohub.lock").entries()[0].weights[0]
    if cached != "what is locked":
        isohub_here("cache", "rm", "--all")
    weights.replace("/a.pth", b"between" if cached == "what nobody has" else b"changed")
    if cached.startswith("what n"):
        Path("isohub.lock").rename("kept")
        isohub_here("lock", "o/r:main")
        load(url, home)
        Path("kept").rename("isohub.lock")
        weights.replace("/a.pth", b"changed")
    if cached == "what is locked":
        load(url, home)  # the copy here is the locked one
    else:
        with pytest.raises(LockMismatchError) as raised:
            load(url, home)
        assert raised.value.hint is not None
    done = isohub_here("lock", "--upgrade", "o/r:main") if cached == "what is locked" else pasted(
        isohub_here, raised.value.hint
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    after = Lockfile("isohub.lock").entries()[0].weights[0]
    assert (after.url, after.bytes) == (url, len(b"changed"))
    (line,) = (line for line in done.stdout.splitlines() if url in line)
    assert line.split()[:2] == [url, "updated"]
    assert f"sha256 {before.sha256[:16]} -> {after.sha256[:16]}" in line
    load(url, home)
    assert isohub_here("lock", "--check").returncode == 0


def test_a_load_works_once_the_hint_was_followed(
    isohub_process: Run, isohub_here: Run, repo: GitRepo, weights: FileServer, tmp_path: Path
) -> None:
    url = f"{weights.url}/a.pth"
    repo.commit({"hubconf.py": _DOWNLOADS.format(url)})
    run = ["run", "o/r:main", "model", "--lockfile", "isohub.lock"]
    here = {"cwd": tmp_path / "project", "ISOHUB_HOME": str(tmp_path / "isohub-home")}
    isohub_here("lock", "o/r:main")
    load(url, tmp_path / "isohub-home")
    weights.replace("/a.pth", b"changed")
    isohub_here("cache", "rm", url)
    refused = isohub_process(*run, **here)
    assert refused.returncode == 1
    assert "weights sha256" in refused.stderr
    assert pasted(isohub_here, refused.stderr.strip().splitlines()[-1]).returncode == 0
    assert isohub_process(*run, "--frozen", **here).returncode == 0


def test_upgrade_asks_for_all_weights_again(isohub_here: Run, weights: FileServer, tmp_path: Path) -> None:
    home = tmp_path / "isohub-home"
    signed = f"{weights.url}/b.pth?signature=SECRET"
    isohub_here("lock", "o/r:main")
    for url in (f"{weights.url}/a.pth", signed):
        load(url, home)
    (row,) = read(isohub_here("lock", "--upgrade", "--json"))
    assert (row["status"], row["weights_updated"], row["weights_unlocked"]) == (
        "updated", [], [f"{weights.url}/b.pth"]
    )  # fmt: skip
    load(signed, home)
    weights.replace("/a.pth", b"changed")
    done = isohub_here("lock", "--upgrade")
    assert f"{weights.url}/a.pth  updated" in done.stdout
    assert "/b.pth is locked no longer: the next load with the lockfile locks it anew" in done.stdout
    assert "SECRET" not in done.stdout
    assert [row["status"] for row in read(isohub_here("lock", "--upgrade", "--json"))] == ["unchanged"]


def test_upgrade_of_weights_without_a_network(isohub_here: Run, weights: FileServer, tmp_path: Path) -> None:
    isohub_here("lock", "o/r:main")
    load(f"{weights.url}/a.pth", tmp_path / "isohub-home")
    before = Path("isohub.lock").read_bytes()
    done = isohub_here("lock", "--upgrade", "--offline")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the network may not be used" in done.stderr
    isohub_here("cache", "rm", f"{weights.url}/a.pth")
    weights.fail("", FileFault(status=503))
    done = isohub_here("lock", "--upgrade")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{weights.url}/a.pth" in done.stderr
    assert Path("isohub.lock").read_bytes() == before


def test_weights_of_another_commit_are_locked_no_longer(
    isohub_here: Run, repo: GitRepo, weights: FileServer, tmp_path: Path
) -> None:
    isohub_here("lock", "o/r:main")
    load(f"{weights.url}/a.pth", tmp_path / "isohub-home")
    repo.commit({"hubconf.py": "two\n"})
    done = isohub_here("lock", "--upgrade")
    assert f"{weights.url}/a.pth is locked no longer" in done.stdout
    assert Lockfile("isohub.lock").entries()[0].weights == ()


def test_check_reads_weights_and_believes_no_record(isohub_here: Run, weights: FileServer, tmp_path: Path) -> None:
    home, url = tmp_path / "isohub-home", f"{weights.url}/a.pth"
    isohub_here("lock", "o/r:main")
    load(url, home)
    reference = parse("o/r:main")
    file = Weights(home).lookup(url, (reference.host, reference.owner, reference.repo))
    assert file is not None
    file.path.chmod(0o644)
    file.path.write_bytes(b"evil")
    record = file.path.parent / "entry.json"
    lying = read_record(record, WeightsEntry)
    assert lying is not None
    record.unlink()
    write_record(record, msgspec.structs.replace(lying, stamp=Stamp.of(file.path.lstat())))
    (row,) = read(isohub_here("lock", "--check", "--json"), 1)
    assert row["status"] == "differs"
    assert "isohub lock --upgrade o/r:main" in row["hint"]
    assert "hint: look at what changed" in isohub_here("lock", "--check").stdout


def test_a_hostile_lockfile(isohub_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("isohub.lock").write_text('version = 1\n\n[[repo]]\nreference = "\x1b[2J"\n')
    for arguments in (["--check"], ["--upgrade"], ["o/r"]):
        done = isohub_here("lock", *arguments)
        assert done.returncode == 1
        assert "cannot be relied on" in done.stderr
        assert all(char == "\n" or char.isprintable() for char in done.stdout + done.stderr)
