"""isohub.repos.selection: references and printed names, against what is in a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from isohub.repos.credentials import Credentials
from isohub.repos.inventory import Inventory
from isohub.repos.reference import parse
from isohub.repos.selection import commit_name, repo_name, select
from isohub.repos.store import Store
from isohub.repos.weights import Weights
from isohub.repos.weights_url import parse_weights_url
from tests.repos.filled import Filled, fill
from tests.servers.files import FileServer
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer


@pytest.fixture
def filled(tmp_path: Path, github: GitHubServer) -> Filled:
    with FileServer() as files:
        return fill(tmp_path / "isohub-home", github, files, tmp_path / "git")


def commits(filled: Filled, *texts: str) -> set[str]:
    found = select(Inventory(filled.root), texts)
    assert found.missing == []
    return {checkout.commit for checkout in found.checkouts}


def test_everything(filled: Filled) -> None:
    found = select(Inventory(filled.root), None)
    assert (len(found.checkouts), len(found.weights), found.missing) == (3, 3, [])


def test_a_repo_is_all_of_it(filled: Filled) -> None:
    found = select(Inventory(filled.root), ["o/r"])
    assert {checkout.commit for checkout in found.checkouts} == {filled.one.commit, filled.two.commit}
    assert found.scopes == {filled.scope}
    assert {weights.sha256 for weights in found.weights} == {filled.shared.sha256, filled.own.sha256}
    assert select(Inventory(filled.root), ["caller"]).weights[0].sha256 == filled.callers.sha256


def test_what_is_printed_is_understood(filled: Filled) -> None:
    for checkout in Inventory(filled.root).checkouts():
        assert commits(filled, commit_name(checkout)) == {checkout.commit}
        assert commits(filled, f"{'/'.join(checkout.scope)}@{checkout.commit}") == {checkout.commit}
        assert checkout.commit in commits(filled, repo_name(checkout.scope))


def test_a_ref_is_what_it_meant_last(filled: Filled, github: GitHubServer) -> None:
    assert commits(filled, "o/r:main") == commits(filled, "o/r:refs/heads/main") == {filled.two.commit}
    three = github._repos["o/r"].commit({"hubconf.py": "three\n"})
    store = Store(filled.root)
    store.fetch(store.resolve(parse("o/r:main")))
    assert commits(filled, "o/r:main") == {three}
    assert commits(filled, "o/r:v1") == {filled.one.commit}
    assert commits(filled, f"o/r:{filled.two.commit[:6]}") == {filled.two.commit}
    assert commits(filled, "o/r:v1", f"o/r@{filled.two.commit[:4]}") == {filled.one.commit, filled.two.commit}


def test_a_scope_is_its_own_files_alone(filled: Filled) -> None:
    found = select(Inventory(filled.root), ["o/other"])
    assert [file.scope for weights in found.weights for file in weights.files] == [(filled.scope[0], "o", "other")]
    assert found.weights[0].sha256 == filled.shared.sha256


def test_urls_of_weights(filled: Filled) -> None:
    found = select(Inventory(filled.root), [filled.own.url, f"{filled.shared.url}#part"])
    assert [(file.url, file.scope) for weights in found.weights for file in weights.files] == [
        (filled.shared.url, filled.scope), (filled.own.url, filled.scope)
    ]  # fmt: skip
    assert (found.checkouts, found.scopes, found.missing) == ([], set(), [])
    found = select(Inventory(filled.root), [f"{filled.own.url}?signature=SECRET"])
    assert (found.weights, found.missing) == ([], [filled.own.url])


def test_a_query_tells_weights_apart(tmp_path: Path) -> None:
    root, scope = tmp_path / "isohub-home", ("h", "o", "r")
    with FileServer() as files:
        url = files.add("/x.pth", b"one")
        for query in ("?a", "?b"):
            Weights(root).fetch(url + query, scope, credentials=Credentials(anonymous=True))
    inventory = Inventory(root)
    assert [len(each.files) for each in select(inventory, [url]).weights] == [2]
    (one,) = select(inventory, [f"{url}?a"]).weights
    assert [file.key for file in one.files] == [parse_weights_url(f"{url}?a").key]


def test_paths(filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = filled.one.path.parent
    linked = tmp_path / "linked"
    linked.symlink_to(filled.root)
    monkeypatch.chdir(place)
    for text in (str(place), str(filled.one.path), f"{linked}/{place.relative_to(filled.root)}", "./tree"):
        assert commits(filled, text) == {filled.one.commit}
    for path in (filled.own.path, filled.own.path.parent):
        (weights,) = select(Inventory(filled.root), [str(path)]).weights
        assert [file.path for file in weights.files] == [filled.own.path]
    for text in (
        str(filled.root),
        str(place.parent),
        str(filled.one.path / "hubconf.py"),
        "/",
        "~/x",
        "/\0",
        "./\ud800",
    ):
        assert select(Inventory(filled.root), [text]).missing == [text]


def test_local_repos_are_named_by_their_path(tmp_path: Path) -> None:
    clone = GitRepo(tmp_path / "clone")
    commit = clone.commit({"hubconf.py": ""})
    store = Store(tmp_path / "isohub-home")
    reference = parse(f"{clone.path}:main")
    store.fetch(store.resolve(reference))
    (checkout,) = Inventory(store.root).checkouts()
    assert commit_name(checkout) == f"{clone.path}@{commit}"
    assert repo_name(checkout.scope) == f"local/{reference.owner}/clone"
    clone.path.rename(tmp_path / "elsewhere")
    for text in (commit_name(checkout), str(clone.path), f"{repo_name(checkout.scope)}@{commit[:8]}"):
        assert select(Inventory(store.root), [text]).checkouts == [checkout]


def test_what_is_missing_is_said_without_credentials(filled: Filled) -> None:
    texts = ["https://user:hunter2@h/o/r", "https://h/model.pth?token=hunter2"]
    assert "hunter2" not in repr(select(Inventory(filled.root), texts).missing)


@pytest.mark.parametrize(
    "text", ["o/R", "o/r:v9", "r", "o", "o/r@0000", "o/r@abc", "local/o/r", "", "../o/r", "o/r:", "\x1b", "o/r@{}+lfs"]
)
def test_what_is_not_there(filled: Filled, text: str) -> None:
    text = text.format(filled.one.commit)
    found = select(Inventory(filled.root), [text])
    assert (found.missing, found.checkouts, found.weights, found.scopes) == ([text], [], [], set())
