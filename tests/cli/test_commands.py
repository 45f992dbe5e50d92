"""The commands that look: list, help, inspect, fetch, trust, on tiny repos and on a real clone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from isohub.cli.demo import make_repository
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer

Run = Callable[..., subprocess.CompletedProcess[str]]
Hub = Callable[[str], str]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A git repository with the tags v1, v2 and broken."""
    place = tmp_path_factory.mktemp("clones") / "digits"
    return place, make_repository(place)


def test_list(isohub_here: Run, hub: Hub) -> None:
    done = isohub_here("list", hub("good"))
    assert (done.returncode, done.stderr) == (0, "")
    names = done.stdout.split()
    assert {"model", "mlp", "pair", "echo"} <= set(names)
    as_json = json.loads(isohub_here("list", hub("good"), "--json").stdout)
    assert as_json["entrypoints"] == names
    assert as_json["commit"].startswith("tree-")


def test_list_of_a_ref(isohub_process: Run, clone: tuple[Path, dict[str, str]]) -> None:
    place, commits = clone
    found = json.loads(isohub_process("--json", "list", f"./{place.name}:v1", cwd=place.parent).stdout)
    assert found["commit"] == commits["v1"]
    assert found["repo"] == f"digits@{commits['v1'][:7]}"
    assert "model" in found["entrypoints"]


def test_help(isohub_here: Run, hub: Hub) -> None:
    done = isohub_here("help", hub("good"), "model")
    assert done.stdout.startswith("A small convolutional network.\n\nArgs:\n    width: ")


def test_help_of_what_is_not_there(isohub_here: Run, hub: Hub) -> None:
    done = isohub_here("help", hub("good"), "modle")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("hint: did you mean 'model'?\n")


def test_help_without_a_docstring(isohub_here: Run, tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_text("def model():\n    pass\n")
    assert isohub_here("help", str(tmp_path), "model").stdout == "model has no docstring\n"
    assert isohub_here("help", str(tmp_path), "model", "-q").stdout == ""
    assert json.loads(isohub_here("help", str(tmp_path), "model", "--json").stdout)["help"] is None


@pytest.mark.parametrize("form", [[], ["--json"], ["--quiet"]])
@pytest.mark.parametrize(
    "command",
    [["list"], ["inspect"], ["help", "model"], ["run", "named"], ["run", "model", "--input", "ones(1)"], ["fetch"]],
    ids=" ".join,
)
def test_no_escape_of_a_repo_gets_out(isohub_here: Run, hub: Hub, command: list[str], form: list[str]) -> None:
    done = isohub_here(command[0], hub("escapes"), *command[1:], *form)
    assert done.returncode == (1 if "ones(1)" in command else 0)
    text = done.stdout + done.stderr
    assert all(char == "\n" or char.isprintable() for char in text), ascii(text)


def test_workers_words_are_shown_on_request(isohub_process: Run, hub: Hub) -> None:
    quiet, loud = (isohub_process("list", hub("escapes"), *flags) for flags in ([], ["-v"]))
    assert "clipboard on stderr" in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout
    assert all(char == "\n" or char.isprintable() for char in loud.stderr), ascii(loud.stderr)


def test_inspect_runs_nothing(isohub_here: Run, hub: Hub) -> None:
    done = isohub_here("inspect", hub("os_exit"))
    assert done.returncode == 0
    assert "entrypoint" in done.stdout
    found = json.loads(isohub_here("inspect", hub("good"), "--json").stdout)
    assert found["dependencies"] == ["torch"]
    assert found["entrypoints"][-1] == {
        "name": "echo",
        "signature": "(*args, **kwargs)",
        "doc": "What it was called with.",
        "line": 112,
        "kind": "function",
    }
    assert "echo" in isohub_here("inspect", hub("good"), "-q").stdout.split()


def test_inspect_says_what_only_running_tells(isohub_here: Run, tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_text("from models import *\ndependencies = ['torch'] + more()\nnet = make()\n")
    said = isohub_here("inspect", str(tmp_path)).stdout
    assert "there may be more, from: models" in said
    assert "callable or not, only running tells: net" in said
    assert "others that only running tells" in said
    assert "no entrypoint" in said


def test_fetch(isohub_here: Run, clone: tuple[Path, dict[str, str]]) -> None:
    place, commits = clone
    found = json.loads(isohub_here("fetch", f"{place}:v2", "--json").stdout)
    assert found["commit"] == commits["v2"]
    assert found["ref"] == "refs/tags/v2"
    path = Path(found["path"])
    assert (path / "hubconf.py").is_file()
    assert isohub_here("fetch", f"{place}:v2", "--quiet").stdout == f"{path}\n"
    assert f"commit  {commits['v2']}" in isohub_here("fetch", f"{place}:{commits['v2'][:10]}").stdout


def test_fetch_of_a_ref_that_is_not_there(isohub_here: Run, clone: tuple[Path, dict[str, str]]) -> None:
    done = isohub_here("fetch", f"{clone[0]}:v3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "v1" in done.stderr
    assert "v2" in done.stderr


def test_from_a_server(isohub_here: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repo = GitRepo(tmp_path / "git")
    first = repo.commit({"hubconf.py": "def one():\n    'The first.'\n"})
    repo.tag("v1")
    repo.commit({"hubconf.py": "def two():\n    'The second.'\n"})
    with GitHubServer() as server:
        server.add("owner", "repo", repo)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        found = json.loads(isohub_here("list", "owner/repo:v1", "--json").stdout)
        assert (found["commit"], found["entrypoints"]) == (first, ["one"])
        assert isohub_here("help", "owner/repo", "two").stdout == "The second.\n"
        missing = isohub_here("fetch", "owner/nothing")
        assert missing.returncode == 1
        assert missing.stderr.startswith("error: ")


def test_trust(isohub_here: Run, clone: tuple[Path, dict[str, str]]) -> None:
    assert isohub_here("trust", "ls").stdout == "no repo is trusted\n"
    assert isohub_here("trust", "ls", "-q").stdout == ""
    refused = isohub_here("trust", "add", "owner/repo:v1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "expected a full SHA" in refused.stderr
    full = "a" * 40
    assert isohub_here("trust", "add", f"owner/repo:{full}").stdout == f"github.com/owner/repo@{full} is trusted\n"
    assert isohub_here("trust", "ls").stdout == f"github.com/owner/repo@{full}\n"
    assert isohub_here("trust", "rm", f"owner/repo:{full}").returncode == 0
    assert isohub_here("trust", "add", "owner/repo").stdout == "github.com/owner/repo is trusted\n"
    assert isohub_here("trust", "add", str(clone[0])).returncode == 0
    names = json.loads(isohub_here("trust", "ls", "--json").stdout)["trusted"]
    assert len(names) == 2
    assert "github.com/owner/repo" in names
    assert "no longer" in isohub_here("trust", "rm", "owner/repo").stdout
    assert "was not trusted" in isohub_here("trust", "rm", "owner/repo").stdout
    (local,) = isohub_here("trust", "ls", "-q").stdout.splitlines()
    assert local.startswith("local/")
    assert isohub_here("trust", "ls").stdout == f"{local} ({clone[0]})\n"
    assert json.loads(isohub_here("trust", "ls", "--json").stdout)["locations"] == {local: str(clone[0])}
    assert isohub_here("trust", "rm", local).stdout == f"{local} is trusted no longer\n"


def test_trust_is_taken_back_by_the_name_that_is_shown(isohub_here: Run, tmp_path: Path) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    for repo in ("owner/repo", f"owner/one:{'a' * 40}", str(place)):
        added = json.loads(isohub_here("trust", "add", repo, "--json").stdout)
        assert (added["location"] is None) is (repo != str(place))
    assert f"({place}) is trusted" in isohub_here("trust", "add", str(place)).stdout
    place.rmdir()
    names = isohub_here("trust", "ls", "-q").stdout.splitlines()
    assert len(names) == 3
    assert isohub_here("trust", "rm", str(place)).returncode == 0
    for name in names:
        if not name.startswith("local/"):
            assert isohub_here("trust", "rm", name).stdout == f"{name} is trusted no longer\n"
    assert isohub_here("trust", "ls", "-q").stdout == ""
    refused = isohub_here("trust", "rm", str(place))
    assert refused.returncode == 2
    assert "hint: isohub trust ls shows what is trusted" in refused.stderr


def test_a_dry_run_takes_no_trust_back(isohub_here: Run) -> None:
    commit = "a" * 40
    for repo in ("owner/repo", f"owner/repo:{commit}", "owner/other"):
        isohub_here("trust", "add", repo)
    names = ["github.com/owner/repo", f"github.com/owner/repo@{commit}"]
    for option in ("--dry-run", "-n"):
        said = isohub_here("trust", "rm", "owner/repo", option).stdout.splitlines()
        assert said == ["github.com/owner/repo would be trusted no longer", *(f"  {name}" for name in names)]
    found = json.loads(isohub_here("trust", "rm", "owner/repo", "-n", "--json").stdout)
    assert found == {"repo": names[0], "trusted": True, "removed": False, "dry_run": True, "entries": names}
    refused = isohub_here("trust", "rm", f"owner/repo:{commit}", "-n")
    assert refused.returncode == 1
    assert "trusted as a whole" in refused.stderr
    assert len(isohub_here("trust", "ls", "-q").stdout.splitlines()) == 3
    assert "was not trusted" in isohub_here("trust", "rm", "owner/none", "-n").stdout
    found = json.loads(isohub_here("trust", "rm", "owner/repo", "--json").stdout)
    assert (found["removed"], found["trusted"], found["entries"]) == (True, False, names)
    assert isohub_here("trust", "ls", "-q").stdout == "github.com/owner/other\n"


def test_a_damaged_list_trusts_nobody(isohub_here: Run, tmp_path: Path) -> None:
    (tmp_path / "isohub-home").mkdir()
    (tmp_path / "isohub-home" / "trust.json").write_text("{")
    done = isohub_here("trust", "ls")
    assert done.returncode == 1
    assert "nothing is trusted" in done.stderr


def test_several_at_once(isohub_here: Run, clone: tuple[Path, dict[str, str]]) -> None:
    repos = [f"{clone[0]}:main", f"{clone[0]}:nothing", str(clone[0])]
    done = isohub_here("fetch", *repos, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)["repos"]
    assert ["error" in one for one in found] == [False, True, False]
    assert found[1]["error"]["type"] == "RefNotFoundError"
    assert (found[0]["validated"], found[2]["validated"]) == (True, None)
    assert json.loads(done.stderr)["error"]["type"] == "RefNotFoundError"
    done = isohub_here("fetch", repos[0], repos[2], "-q")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [one["path"] for one in (found[0], found[2])]
    human = isohub_here("fetch", repos[0], repos[2]).stdout
    assert human.count("commit  ") == human.count("repo    ") == 2


def test_offline_and_lockfiles(
    isohub_here: Run, clone: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, lock = f"{clone[0]}:main", tmp_path / "isohub.lock"
    assert isohub_here("fetch", "owner/repo", "--offline").returncode == 1
    with monkeypatch.context() as patched:
        patched.setenv("ISOHUB_OFFLINE", "1")
        refused = isohub_here("fetch", "owner/repo")
    assert "isohub fetch owner/repo" in refused.stderr
    frozen = isohub_here("list", repo, "--frozen", "--lockfile", str(lock))
    assert frozen.returncode == 1
    assert "isohub lock" in frozen.stderr
    assert isohub_here("list", repo, "--lockfile", str(lock)).returncode == 0
    assert isohub_here("list", repo, "--frozen", "--lockfile", str(lock)).returncode == 0
    monkeypatch.chdir(tmp_path)
    assert isohub_here("inspect", repo, "--frozen").returncode == 0
