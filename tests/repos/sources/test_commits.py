"""The history between two commits, of a clone and over HTTP, with and without servers that leave files out."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import isohub
from isohub.errors import OfflineError, SourceUnavailableError
from isohub.repos.reference import parse
from isohub.repos.sources import commits as module
from isohub.repos.sources.commits import commits_between
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer


@pytest.fixture
def repo(git_repo: Callable[..., GitRepo]) -> GitRepo:
    """Thirty commits, with a branch that is merged, and a tag of the first."""
    made = git_repo("clone")
    made.commit({"hubconf.py": "0\n", "large.bin": b"x" * 1000}, "first")
    made.tag("start", annotated=True)
    for number in range(1, 20):
        made.commit({"hubconf.py": f"{number}\n"}, f"change {number}\n\nwith words")
    made.branch("side", "HEAD~5")
    for number in range(8):
        made.commit({"side.py": f"{number}\n"}, f"side {number}")
    made.checkout("main")
    made.git("merge", "--quiet", "--no-edit", "side")
    made.commit({"hubconf.py": "last\n"}, "last")
    return made


def between(repo: GitRepo, good: str, bad: str) -> set[str]:
    return set(repo.git("rev-list", f"{good}..{bad}").split())


def check(repo: GitRepo, text: str) -> None:
    good, bad = repo.sha("start^{commit}"), repo.sha("main")
    found = commits_between(parse(text), good, bad)
    assert between(repo, good, bad) <= set(found)
    for sha in between(repo, good, bad):
        said = repo.git("log", "-1", "--format=%P%x00%an <%ae>%x00%ad%x00%B", "--date=format:%Y-%m-%d %H:%M:%S", sha)
        parents, author, date, message = said.split("\0")
        assert found[sha].parents == tuple(parents.split())
        assert found[sha].author == author
        assert found[sha].date.startswith(date)
        assert found[sha].message.strip() == message.strip()
        assert found[sha].subject == message.splitlines()[0]


def test_of_a_clone(repo: GitRepo) -> None:
    check(repo, f"{repo.path}:main")
    check(repo, str(repo.path))


@pytest.mark.parametrize("filters", ["true", "false"])
@pytest.mark.parametrize("form", ["git", "github"])
def test_of_a_server(github: GitHubServer, repo: GitRepo, filters: str, form: str) -> None:
    repo.git("config", "uploadpack.allowFilter", filters)
    repo.git("config", "uploadpack.allowReachableSHA1InWant", filters)
    github.add("group", "clone", repo)
    check(repo, f"git+{github.url}/group/clone.git" if form == "git" else "group/clone")


def test_more_is_asked_for_until_the_way_is_whole(
    github: GitHubServer, repo: GitRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    github.add("group", "clone", repo)
    monkeypatch.setattr(module, "_DEPTHS", (2, 12, None))
    monkeypatch.setattr(module, "_DEPTHS_WITH_FILES", (2, 12, None))
    github.forget()
    check(repo, "group/clone")
    assert github.count("git-upload-pack") >= 3
    # What is near is found with the first.
    github.forget()
    near = repo.sha("main~1")
    assert set(commits_between(parse("group/clone"), near, repo.sha("main"))) >= between(repo, near, "main")
    assert github.count("git-upload-pack") < 3


def test_a_shallow_clone_says_what_it_lacks(repo: GitRepo, tmp_path: Path) -> None:
    shallow = tmp_path / "shallow"
    subprocess.run(["git", "clone", "--quiet", "--depth=3", f"file://{repo.path}", shallow], check=True)
    with pytest.raises(SourceUnavailableError, match="lacks a part of the history") as caught:
        commits_between(parse(str(shallow)), repo.sha("start^{commit}"), repo.sha("main"))
    assert "--unshallow" in str(caught.value)
    near = repo.sha("main~1")
    assert commits_between(parse(str(shallow)), near, repo.sha("main"))


def test_nothing_is_asked_offline(repo: GitRepo, github: GitHubServer) -> None:
    github.add("group", "clone", repo)
    good, bad = repo.sha("start^{commit}"), repo.sha("main")
    with isohub.Session(offline=True) as session:
        github.forget()
        with pytest.raises(OfflineError, match="history"):
            session.history("group/clone", good, bad)
        assert github.count() == 0
        assert bad in session.history(str(repo.path), good, bad)


def test_a_date_that_is_none(repo: GitRepo) -> None:
    raw = (
        f"tree {repo.tree()}\nparent {repo.sha()}\nauthor \x1b <> 999999999999999 +0000\ncommitter C <c> 1 +0000\n\nx\n"
    )
    sha = repo.git("hash-object", "-t", "commit", "-w", "--stdin", "--literally", stdin=raw.encode())
    found = commits_between(parse(str(repo.path)), repo.sha(), sha)
    assert found[sha].date == ""
    assert found[sha].author == "\x1b <>"
