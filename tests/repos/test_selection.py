"""isohub.repos.selection: references and printed names, against what is in a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from isohub.repos.inventory import Inventory
from isohub.repos.reference import parse
from isohub.repos.selection import commit_name, repo_name, select
from isohub.repos.store import Store
from tests.repos.filled import Filled, fill
from tests.servers.files import FileServer
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


@pytest.mark.parametrize(
    "text", ["o/R", "o/r:v9", "r", "o", "o/r@0000", "o/r@abc", "local/o/r", "", "../o/r", "o/r:", "\x1b", "o/r@{}+lfs"]
)
def test_what_is_not_there(filled: Filled, text: str) -> None:
    text = text.format(filled.one.commit)
    found = select(Inventory(filled.root), [text])
    assert (found.missing, found.checkouts, found.weights, found.scopes) == ([text], [], [], set())
