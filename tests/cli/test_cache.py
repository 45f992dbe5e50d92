"""isohub cache: ls, rm, prune, verify, dir."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isohub.cli.units import show_age, show_size
from isohub.repos import http
from isohub.repos.disk import hold
from isohub.repos.reference import parse
from isohub.repos.store import Store
from tests.repos.filled import Filled, fill
from tests.servers.files import FileServer
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def filled(isohub_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Filled]:
    monkeypatch.setattr(http, "BACKOFF_S", 0.001)
    with GitHubServer() as github, FileServer() as files:
        for name, value in github.environment.items():
            monkeypatch.setenv(name, value)
        yield fill(tmp_path / "isohub-home", github, files, tmp_path / "git")


def read(done: subprocess.CompletedProcess[str], status: int = 0) -> dict:
    assert (done.returncode, done.stderr) == (status, "")
    return json.loads(done.stdout)


def names(isohub_here: Run) -> list[str]:
    return isohub_here("cache", "ls", "--checkouts", "-q").stdout.split()


def test_an_empty_cache(isohub_here: Run, tmp_path: Path) -> None:
    assert isohub_here("cache", "ls").stdout == f"nothing in {tmp_path / 'isohub-home'}\n"
    assert isohub_here("cache", "ls", "-q").stdout == ""
    for command in (["rm", "--all"], ["prune"], ["prune", "--max-size", "0B"]):
        done = isohub_here("cache", *command)
        assert (done.returncode, done.stdout) == (0, f"0 B freed in {tmp_path / 'isohub-home'}\n")
    assert isohub_here("cache", "verify").returncode == 0
    assert not (tmp_path / "isohub-home").exists()


def test_ls(isohub_here: Run, filled: Filled) -> None:
    lines = isohub_here("cache", "ls").stdout.splitlines()
    assert lines[0].split() == ["repo", "commit", "refs", "files", "size", "used"]
    assert any(line.split()[:4] == ["o/r", filled.one.commit[:10], "v1", "4"] for line in lines)
    assert any(line.split()[:3] == ["o/other", filled.other.commit[:10], "HEAD"] for line in lines)
    assert any("/b/model.pth" in line and "same file" in line for line in lines)
    assert lines[-1].endswith(f" in {filled.root}")
    found = read(isohub_here("cache", "ls", "--json"))
    assert len(found["checkouts"]) == 3
    assert found["bytes"] == sum(each["bytes"] for each in found["checkouts"] + found["weights"])
    (own,) = (each for each in found["weights"] if each["sha256"] == filled.own.sha256)
    assert own["files"][0]["path"] == str(filled.own.path)
    assert set(names(isohub_here)) == {
        f"o/r@{filled.one.commit}", f"o/r@{filled.two.commit}", f"o/other@{filled.other.commit}"
    }  # fmt: skip
    assert str(filled.own.path) in isohub_here("cache", "ls", "--weights", "-q").stdout.split()
    assert read(isohub_here("cache", "ls", "--weights", "--json"))["checkouts"] == []


def test_ls_of_a_repo(isohub_here: Run, filled: Filled) -> None:
    found = read(isohub_here("cache", "ls", "o/r", "--json"))
    assert {each["commit"] for each in found["checkouts"]} == {filled.one.commit, filled.two.commit}
    assert len(found["weights"]) == 2
    found = read(isohub_here("cache", "ls", "o/r:v1", "--json"))
    assert [each["commit"] for each in found["checkouts"]] == [filled.one.commit]
    done = isohub_here("cache", "ls", "o/nothing")
    assert (done.returncode, done.stdout) == (1, "o/nothing is not in the cache\n")
    assert read(isohub_here("cache", "ls", "o/nothing", "--json"), 1)["missing"] == ["o/nothing"]


@pytest.mark.parametrize("form", ["o/r:v1", "o/r@{}", "o/r:{}", "{}", "url", "stored"])
def test_rm_of_one_checkout(isohub_here: Run, filled: Filled, form: str) -> None:
    commit, (host, owner, repo) = filled.one.commit, filled.scope
    text = form.format(commit[:9])
    if form == "{}":
        text = f"o/r@{commit}"  # as ls prints it
    elif form == "url":
        text = f"http://{host}/o/r@{commit}"
    elif form == "stored":
        text = f"{host}/{owner}/{repo}@{commit}"
    plan = read(isohub_here("cache", "rm", text, "--dry-run", "--json"))
    assert filled.one.path.exists()
    done = read(isohub_here("cache", "rm", text, "--json"))
    assert done == {**plan, "dry_run": False}
    assert [each["path"] for each in done["removed"]] == [str(filled.one.path.parent)]
    assert not filled.one.path.exists()
    assert len(names(isohub_here)) == 2
    assert read(isohub_here("cache", "rm", text, "--json"), 1)["missing"] == [text]


def test_rm_of_repos(isohub_here: Run, filled: Filled) -> None:
    done = isohub_here("cache", "rm", "o/r", "o/nothing", "-q")
    assert done.returncode == 1
    assert set(map(Path, done.stdout.split())) >= {filled.one.path.parent, filled.two.path.parent}
    assert names(isohub_here) == [f"o/other@{filled.other.commit}"]
    assert not filled.own.path.exists()
    done = isohub_here("cache", "rm", "o/other")
    assert "freed in" in done.stdout
    assert "asked for" in done.stdout
    assert names(isohub_here) == []
    assert read(isohub_here("cache", "ls", "--json"))["weights"][0]["files"][0]["scope"] == ["caller", "", ""]


def test_rm_of_a_clone_that_is_gone(isohub_here: Run, tmp_path: Path) -> None:
    clone = GitRepo(tmp_path / "clone")
    clone.commit({"hubconf.py": ""})
    store = Store(tmp_path / "isohub-home")
    text = f"{clone.path}:main"
    store.fetch(store.resolve(parse(text)))
    assert str(clone.path) in isohub_here("cache", "ls").stdout
    assert read(isohub_here("cache", "rm", text, "-n", "--json"))["removed"]
    clone.path.rename(tmp_path / "elsewhere")
    assert len(read(isohub_here("cache", "rm", str(clone.path), "--json"))["removed"]) == 1
    assert names(isohub_here) == []


def test_rm_usage(isohub_here: Run) -> None:
    assert isohub_here("cache", "rm").returncode == 2
    assert isohub_here("cache", "rm", "o/r", "--all").returncode == 2
    for command in (["rm", ""], ["rm", "o/r", ""], ["ls", ""]):
        done = isohub_here("cache", *command)
        assert done.returncode == 2
        assert "REPO is an empty text" in done.stderr


def test_weights_by_url_and_by_what_ls_prints(isohub_here: Run, filled: Filled) -> None:
    found = read(isohub_here("cache", "ls", filled.shared.url, "--json"))
    (shared,) = found["weights"]
    assert [(each["url"], each["name"]) for each in shared["files"]] == [(filled.shared.url, "o/r")]
    assert found["checkouts"] == []
    done = isohub_here("cache", "rm", filled.shared.url)
    assert done.returncode == 0
    assert "blob" not in done.stdout
    assert filled.shared.url in done.stdout
    assert not filled.shared.path.exists()
    for text in isohub_here("cache", "ls", "-q").stdout.splitlines():
        (removed,) = read(isohub_here("cache", "rm", text, "--json"))["removed"]
        assert removed["what"] == ("weights" if text.startswith("/") else "checkout")
    assert isohub_here("cache", "ls").stdout == f"nothing in {filled.root}\n"


def test_a_scope_lists_its_own_files_alone(isohub_here: Run, filled: Filled) -> None:
    for scope in ("caller", "o/r", "o/other"):
        names = {
            each["name"]
            for weights in read(isohub_here("cache", "ls", scope, "--json"))["weights"]
            for each in weights["files"]
        }
        assert names == {scope}
    assert "/a/model.pth" not in isohub_here("cache", "ls", "o/other").stdout


def test_one_name_for_a_repo_and_one_form_of_time(isohub_here: Run, filled: Filled) -> None:
    listed = read(isohub_here("cache", "ls", "--json"))
    removed = read(isohub_here("cache", "rm", "--all", "--dry-run", "--json"))["removed"]
    assert {each["name"] for each in removed if each["what"] == "checkout"} == set(names(isohub_here))
    assert {each["name"] for each in listed["checkouts"]} == set(names(isohub_here))
    assert {each["what"] for each in removed} == {"checkout", "weights"}
    for each in [*listed["checkouts"], *listed["weights"]]:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", each["used"])


def test_the_damaged_file_is_named_and_how_to_mend_it(isohub_here: Run, filled: Filled) -> None:
    path = filled.one.path / "models" / "net.py"
    path.chmod(0o644)
    path.write_text("evil")
    path.chmod(0o444)
    done = isohub_here("cache", "verify")
    assert f"changed after the checkout was made, so likely: {path}\n" in done.stdout
    assert done.stdout.endswith(
        "hint: isohub cache verify --repair removes what is damaged, and the next load brings it again\n"
    )
    damages = read(isohub_here("cache", "verify", "--json"), 1)["damages"]
    assert {each["path"]: each["likely"] for each in damages} == {str(filled.one.path): [str(path)]}


def test_what_is_in_use_is_said(isohub_here: Run, filled: Filled) -> None:
    descriptor = hold(filled.one.path.parent)
    assert descriptor is not None
    try:
        assert "in use" in isohub_here("cache", "ls").stdout
        for command in (["rm", "o/r"], ["rm", "--all"], ["prune", "--max-size", "0B"]):
            done = isohub_here("cache", *command)
            assert done.returncode == 1
            assert f"o/r@{filled.one.commit}  in use" in done.stdout
        (kept,) = read(isohub_here("cache", "rm", "o/r:v1", "--json"), 1)["kept"]
        assert (kept["path"], kept["reason"]) == (str(filled.one.path.parent), "in use")
    finally:
        os.close(descriptor)
    assert isohub_here("cache", "rm", "o/r").returncode == 0


def test_prune(isohub_here: Run, filled: Filled) -> None:
    os.utime(filled.one.path.parent, (0, 0))
    plan = read(isohub_here("cache", "prune", "--older-than", "30d", "--dry-run", "--json"))
    done = read(isohub_here("cache", "prune", "--older-than", "30d", "--json"))
    assert done == {**plan, "dry_run": False}
    assert [(each["name"], each["why"]) for each in done["removed"]] == [(f"o/r@{filled.one.commit}", "old")]
    assert read(isohub_here("cache", "prune", "--max-size", "1TB", "--json"))["removed"] == []
    (filled.two.path.parent.parent / ".staging-1").mkdir()
    assert "left by a write that ended early" in isohub_here("cache", "prune").stdout
    assert isohub_here("cache", "prune", "--max-size", "0").returncode == 0
    assert read(isohub_here("cache", "ls", "--json"))["bytes"] == 0


@pytest.mark.parametrize(
    "size", ["", "5", "GB", "5 Gb/s", "-5GB", "5,5GB", "1e9B", "5GBB", "inf", "\u0665GB", "5XB", "0x5GB"]
)
def test_sizes_that_are_none(isohub_here: Run, size: str) -> None:
    done = isohub_here("cache", "prune", f"--max-size={size}")
    assert done.returncode == 2
    assert "expected a size such as 5GB, 500MB or 1.5GiB" in done.stderr


@pytest.mark.parametrize("age", ["", "30", "3m", "d", "-1d", "1y", "1 d d", "nan"])
def test_ages_that_are_none(isohub_here: Run, age: str) -> None:
    done = isohub_here("cache", "prune", f"--older-than={age}")
    assert done.returncode == 2
    assert "expected an age such as 30d, 12h, 90min or 2w" in done.stderr


@pytest.mark.parametrize("size", ["5GB", "0B", "0", "0.0", "1.5GiB", "500 MB", "10kb", "1TiB"])
@pytest.mark.parametrize("age", ["30d", "12h", "90min", "2w", "1.5d", "10s", "0"])
def test_sizes_and_ages(isohub_here: Run, size: str, age: str) -> None:
    assert isohub_here("cache", "prune", "--max-size", size, "--older-than", age, "-n").returncode == 0


def test_shown_sizes_and_ages() -> None:
    assert [show_size(count) for count in (0, 1, 999, 1000, 12_345, 5 * 10**9, 10**15)] == [
        "0 B", "1 B", "999 B", "1.0 kB", "12 kB", "5.0 GB", "1000 TB"
    ]  # fmt: skip
    assert [show_age(seconds) for seconds in (-5, 0, 59, 60, 7200, 86400 * 30)] == [
        "now", "now", "now", "1 min", "2 h", "30 d"
    ]  # fmt: skip


def test_verify(isohub_here: Run, filled: Filled) -> None:
    assert isohub_here("cache", "verify").stdout == f"all of {filled.root} is as it was written\n"
    assert read(isohub_here("cache", "verify", "--json"))["damages"] == []
    path = filled.one.path / "hubconf.py"
    path.chmod(0o644)
    path.write_text("One\n")
    path.chmod(0o444)
    done = isohub_here("cache", "verify")
    assert done.returncode == 1
    assert str(filled.one.path) in done.stdout
    (damage,) = read(isohub_here("cache", "verify", "--json"), 1)["damages"]
    assert (damage["what"], damage["path"], damage["expected"]) == ("content", str(filled.one.path), filled.one.tree)
    assert isohub_here("cache", "verify", "-q").stdout == f"{filled.one.path}\n"
    plan = read(isohub_here("cache", "verify", "--repair", "--dry-run", "--json"), 1)
    assert path.exists()
    done = isohub_here("cache", "verify", "--repair")
    assert done.returncode == 0
    assert f"o/r@{filled.one.commit}" in done.stdout
    assert [each["path"] for each in plan["removed"]] == [str(filled.one.path.parent)]
    assert isohub_here("cache", "verify").returncode == 0
    assert isohub_here("cache", "verify", "--dry-run").returncode == 2


def test_a_damaged_trusted_list_is_the_user_s_to_mend(isohub_here: Run, filled: Filled) -> None:
    (filled.root / "trust.json").write_text("{")
    done = isohub_here("cache", "verify", "--repair")
    assert done.returncode == 1
    assert "only its user can mend it" in done.stdout
    assert (filled.root / "trust.json").read_text() == "{"


@pytest.mark.parametrize(
    "command", [["ls"], ["verify"], ["rm", "--all", "-n"], ["prune", "-n"], ["rm", "\x1b[2J/\x07"]]
)
@pytest.mark.parametrize("form", [[], ["--json"], ["-q"]])
def test_hostile_names_are_escaped(isohub_here: Run, filled: Filled, command: list[str], form: list[str]) -> None:
    (filled.one.path.parent.parent / ".staging-\x1b[2J\x07").mkdir()
    (filled.one.path.parent.parent / "\x1b]52;c;x\x07").mkdir()
    (filled.root / "weights" / "urls" / "\u202e").mkdir()
    done = isohub_here("cache", *command, *form)
    assert all(char == "\n" or char.isprintable() for char in done.stdout + done.stderr)


def test_a_cache_that_is_a_file(isohub_here: Run, tmp_path: Path) -> None:
    (tmp_path / "isohub-home").write_text("")
    done = isohub_here("cache", "verify")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the store at ")
    assert "hint: " in done.stderr
