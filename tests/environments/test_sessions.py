"""Environments in sessions: two versions of a package side by side in real workers, lockfiles, offline, in use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import isohub
from isohub import errors
from isohub.environments.inventory import leftovers, named, plan_prune, plan_removal, stored
from isohub.repos.removal import carry_out
from tests.servers.git_repo import GitRepo
from tests.servers.index import PackageIndex

#: Its two versions cannot be imported into one process: both define one operator of torch's.
PACKAGE = """
import torch
__version__ = {version!r}
library = torch.library.Library("collider", "DEF")
library.define("scale(Tensor x) -> Tensor")
library.impl("scale", lambda x: x * {factor}, "CPU")
"""
HUBCONF = """
dependencies = ["torch", "collider"]

def model():
    "A scale by the collider's version."
    import collider, torch
    class Scale(torch.nn.Module):
        def forward(self, x):
            return torch.ops.collider.scale(x)
    return Scale()

def version():
    import collider
    return collider.__version__
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An index with two versions, a repo with two refs that each want one, and settings that lead there."""
    directory = tmp_path_factory.mktemp("environments")
    with PackageIndex() as index:
        (directory / "index").write_text(index.url)
        repo = GitRepo(directory / "repo")
        for number in (1, 2):
            files = {"collider/__init__.py": PACKAGE.format(version=f"{number}.0", factor=number)}
            index.wheel("collider", f"{number}.0", files)
            repo.commit({"hubconf.py": HUBCONF, "requirements.txt": f"collider=={number}.0\n"}, f"v{number}")
            repo.git("tag", f"v{number}")
        yield directory


@pytest.fixture(autouse=True)
def _to_the_index(_own_settings: None, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test's own settings lead to the module's index."""
    monkeypatch.setenv("UV_DEFAULT_INDEX", (place / "index").read_text())
    monkeypatch.setenv("UV_CACHE_DIR", str(place / "uv-cache"))


@pytest.fixture(scope="module")
def opened(place: Path) -> Iterator[isohub.Session]:
    with isohub.Session(place / "store", environment="auto", timeout_s=60) as session:
        yield session


def test_two_refs_each_on_its_own_version(place: Path, opened: isohub.Session):
    import torch

    x = torch.ones(2)
    models = [opened.load(f"{place / 'repo'}:v{number}", "model") for number in (1, 2)]
    assert [float(model(x).sum()) for model in models] == [2.0, 4.0]
    assert float(models[0](x).sum()) == 2.0
    assert [opened.load(f"{place / 'repo'}:v{number}", "version") for number in (1, 2)] == ["1.0", "2.0"]
    keys = {info.environment for info in opened.workers()}
    assert len(keys) == 2
    assert "host" not in keys


def test_without_an_environment_it_says_what_is_missing(place: Path, session: isohub.Session):
    with pytest.raises(errors.MissingDependenciesError, match="not installed: collider") as caught:
        session.load(f"{place / 'repo'}:v1", "model")
    assert caught.value.command == "python -m pip install collider"
    assert "environment='auto'" in caught.value.hint


def test_list_help_and_the_caller_s_own_requirements(place: Path, opened: isohub.Session):
    repo = f"{place / 'repo'}:v1"
    with isohub.Session(place / "store", timeout_s=60) as session:
        assert session.list(repo, environment="auto") == ["model", "version"]
        assert session.help(repo, "model", environment="auto") == "A scale by the collider's version."
        other = isohub.Environment("auto", requirements=["collider>1"])
        assert session.load(repo, "version", environment=other) == "2.0"
        nothing = isohub.Environment("auto", requirements=["numpy"])
        with pytest.raises(errors.MissingDependenciesError, match="not in its environment") as caught:
            session.load(repo, "version", environment=nothing)
        assert "requirements=" in caught.value.hint


def test_offline_once_it_is_built(place: Path, opened: isohub.Session, tmp_path: Path):
    repo = f"{place / 'repo'}:v1"
    opened.prepare(repo)
    with isohub.Session(place / "store", environment="auto", offline=True, timeout_s=60) as session:
        assert session.load(repo, "version") == "1.0"
    with isohub.Session(tmp_path / "other", environment="auto", offline=True) as session:
        with pytest.raises(errors.OfflineError, match="the network may not be used") as caught:
            session.load(repo, "version")
        assert f"isohub env build git+file://{place / 'repo'}@v1 --environment auto" in caught.value.hint


def test_a_lockfile_binds_the_packages(place: Path, tmp_path: Path):
    repo, lock = f"{place / 'repo'}:v1", tmp_path / "isohub.lock"
    wide = isohub.Environment("auto", requirements=["collider"], overrides=["collider<2"])
    loose = isohub.Environment("auto", requirements=["collider>=1"])
    with isohub.Session(tmp_path / "one", lockfile=lock) as session:
        assert session.prepare(repo, wide).version("collider") == "1.0"
        assert session.prepare(repo, loose).version("collider") == "2.0"
    text = lock.read_text()
    assert text.count("[[repo.environment]]") == 2
    assert 'name = "auto; with collider>=1"' in text
    assert 'version = "2.0"' in text
    # What the index has now is not asked: the set is the locked one, in a store that has nothing yet.
    older = re.sub(
        r'version = "2.0"\nsha256 = \[\n +"[0-9a-f]{64}"',
        re.search(r'version = "1.0"\nsha256 = \[\n +"[0-9a-f]{64}"', text)[0],
        text,
    )
    lock.write_text(older)
    with isohub.Session(tmp_path / "two", lockfile=lock, frozen=True) as session:
        assert session.prepare(repo, loose).version("collider") == "1.0"
        with pytest.raises(errors.LockMismatchError, match="is not locked") as caught:
            session.prepare(repo, "auto")
        assert caught.value.what == "environment"
    # The index has another file under that version: nothing is installed.
    lock.write_text(re.sub(r'"[0-9a-f]{64}",', f'"{"0" * 64}",', older))
    with isohub.Session(tmp_path / "three", lockfile=lock) as session:
        with pytest.raises(errors.LockMismatchError, match="Hash mismatch") as caught:
            session.prepare(repo, wide)
    assert "isohub lock --upgrade" in caught.value.hint


def test_a_file_that_the_caller_s_includes_has_changed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repo, lock = f"{place / 'repo'}:v1", tmp_path / "isohub.lock"
    (tmp_path / "mine.txt").write_text("-r base.txt\n")
    own = isohub.Environment(requirements=tmp_path / "mine.txt")
    with PackageIndex() as index:
        monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
        index.wheel("torch", "2.6.0")
        for version in ("1.0", "2.0"):
            index.wheel("alpha", version)
        for number, text in enumerate(("alpha==1.0\n", "alpha==2.0\n")):
            (tmp_path / "base.txt").write_text(text)
            with isohub.Session(tmp_path / "store", lockfile=lock) as session:
                if number == 0:
                    assert session.prepare(repo, own).version("alpha") == "1.0"
                    continue
                with pytest.raises(errors.LockMismatchError, match=r"do not meet: alpha==2\.0"):
                    session.prepare(repo, own)


def test_what_locked_packages_need_is_there_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repo, lock = f"{place / 'repo'}:v1", tmp_path / "isohub.lock"
    wanted = isohub.Environment("auto", requirements=["alpha"])
    with PackageIndex() as index:
        monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
        index.wheel("alpha", "1.0", requires=["beta>=1", "gamma; extra == 'more'", "old; python_version < '3'"])
        index.wheel("beta", "1.0")
        for name in ("one", "two"):
            with isohub.Session(tmp_path / name, lockfile=lock) as session:
                assert session.prepare(repo, wanted).version("beta") == "1.0"
        # As where the other host had it, which this one has not.
        text = lock.read_text()
        lock.write_text(re.sub(r'\[\[repo\.environment\.package\]\]\nname = "beta"[^]]+\]\n', "", text))
        assert "beta" in text
        assert "beta" not in lock.read_text()
        with isohub.Session(tmp_path / "one", lockfile=lock) as session:
            with pytest.raises(errors.LockMismatchError, match="what its packages need: beta>=1"):
                session.prepare(repo, wanted)


def test_another_python_than_the_locked_one(place: Path, tmp_path: Path):
    repo, lock = f"{place / 'repo'}:v1", tmp_path / "isohub.lock"
    with isohub.Session(tmp_path / "store", lockfile=lock) as session:
        session.prepare(repo, "auto")
    lock.write_text(re.sub(r'python = "3\.\d+"', 'python = "3.2"', lock.read_text()))
    with isohub.Session(tmp_path / "store", lockfile=lock, environment="auto") as session:
        with pytest.raises(errors.LockMismatchError, match=r"expected Python 3\.2") as caught:
            session.load(repo, "version")
    assert caught.value.what == "environment"


def test_what_a_session_uses_stays(place: Path, tmp_path: Path):
    root = tmp_path / "store"
    with isohub.Session(root) as session:
        prepared = session.prepare(f"{place / 'repo'}:v1", "auto")
        (one,) = stored(root)
        assert one.record.key == prepared.runtime.key
        assert one.in_use
        assert one.name == f"{prepared.runtime.key[:10]} {one.record.made_for}"
        plan = plan_removal([one])
        assert [(kept.what, kept.reason) for kept in plan.kept] == [("environment", "in use")]
        assert plan_prune([one], [], max_bytes=0).removals == ()
    (one,) = stored(root)
    assert not one.in_use
    assert named([one], [one.record.key[:6], "nothing", one.record.made_for]) == ([one], ["nothing"])
    (root / "environments" / ".staging-dead").mkdir()
    done = carry_out(root, plan_prune([one], leftovers(root), older_than_s=0))
    assert sorted(removal.what for removal in done.removals) == ["environment", "staging"]
    assert stored(root) == []
    assert leftovers(root) == []
    with isohub.Session(root) as session:
        assert session.prepare(f"{place / 'repo'}:v1", "auto").runtime == prepared.runtime


def directory(tmp_path: Path, **files: str) -> str:
    """A repo that is a directory as it stands."""
    place = tmp_path / "here"
    place.mkdir()
    for name, text in files.items():
        (place / name.replace("__", ".")).write_text(text)
    return str(place)


def test_what_a_repo_may_not_ask_for(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    evil = "--index-url http://127.0.0.1:9/simple\ncollider==1.0\n"
    repo = directory(tmp_path, hubconf__py=HUBCONF, requirements__txt=evil, setup__py="raise SystemExit(1)\n")
    with isohub.Session(tmp_path / "store", environment="auto") as session:
        assert session.prepare(repo).version("collider") == "1.0"
        assert "package indexes are yours to choose" in caplog.text
        for text, match in (
            ("collider @ git+https://example.org/x\n", "is not installed on a repo's word"),
            ("-r ../../outside.txt\n", "leads out of the checkout"),
            ("collider==7\n", "unsatisfiable"),
            ("torch==1.13.1\n", "needs another torch than the host's"),
        ):
            Path(repo, "requirements.txt").write_text(text)
            Path(repo, "hubconf.py").write_text("raise SystemExit('hubconf ran')\n")
            with pytest.raises(errors.EnvironmentBuildError, match=match):
                session.load(repo, "model")


def test_a_repo_that_a_project_file_describes(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    text = '[project]\nname = "x"\nversion = "1"\nrequires-python = "<3"\ndependencies = ["collider<2"]\n'
    repo = directory(tmp_path, hubconf__py=HUBCONF, pyproject__toml=text)
    with isohub.Session(tmp_path / "store", environment="auto", timeout_s=60) as session:
        assert session.load(repo, "version") == "1.0"
    assert "the project is for Python <3, and runs on" in caplog.text


def test_a_session_s_words(place: Path):
    with pytest.raises(errors.EnvironmentBuildError, match="expected 'host', 'auto'"):
        isohub.Session(environment="conda")
    with isohub.Session() as session:
        assert session.environment == isohub.Environment("host")
        with pytest.raises(ValueError, match="asked of a repo"):
            session.prepare(None, "auto")


def test_the_command_line(place: Path, tmp_path: Path, isohub_here: Callable):
    import json

    repo = f"{place / 'repo'}:v1"
    done = isohub_here("env", "build", repo, "--json")
    built = json.loads(done.stdout)
    assert [each["name"] for each in built["packages"]] == ["collider"]
    key = built["key"]
    assert isohub_here("env", "ls", "-q").stdout.split() == [key]
    assert "over the host" in isohub_here("env", "ls").stdout
    assert "collider  1.0" in isohub_here("env", "show", key[:8]).stdout
    none = isohub_here("env", "show", "nothing")
    assert none.returncode == 1
    assert "hint: isohub env ls" in none.stdout
    assert isohub_here("env", "build").returncode == 2
    assert isohub_here("env", "build", "--with", "numpy").stdout.startswith("host  ")
    assert isohub_here("list", repo, "--override", "x").returncode == 2
    assert isohub_here("list", repo, "--environment", "auto", "--python", "3.9").returncode == 2
    assert isohub_here("env", "rm", "-n", key).stdout.endswith(f"would be freed in {tmp_path / 'isohub-home'}\n")
    assert isohub_here("env", "prune", "--max-size", "0B").returncode == 0
    assert isohub_here("env", "ls", "-q").stdout == ""
    assert isohub_here("env", "rm", key).returncode == 1
    assert isohub_here("env", "rm", "--all").returncode == 0
    assert not (tmp_path / "isohub-home" / "environments" / "resolutions").exists()


@pytest.fixture
def isohub_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    """As the command line's own tests have it."""
    import subprocess

    from isohub.cli.main import main

    monkeypatch.setenv("ISOHUB_HOME", str(tmp_path / "isohub-home"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        code = ended.value.code
        return subprocess.CompletedProcess(arguments, code if isinstance(code, int) else 1, captured.out, captured.err)

    return run
