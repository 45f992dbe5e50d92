from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from isohub.errors import LockMismatchError, OfflineError, SourceUnavailableError
from isohub.repos.catalog import Catalog, Wanted, is_offline
from isohub.repos.disk import remove_tree
from isohub.repos.lockfile import Lockfile
from isohub.repos.reference import parse
from isohub.repos.store import Store
from tests.servers.git_repo import GitRepo
from tests.servers.github import Fault, GitHubServer


@pytest.fixture
def repo(github: GitHubServer, git_repo: Callable[..., GitRepo]) -> GitRepo:
    made = github.add("o", "r", git_repo("r"))
    made.commit({"hubconf.py": "one\n"}, "one")
    made.tag("v1")
    made.commit({"hubconf.py": "two\n"}, "two")
    return made


@pytest.mark.parametrize(
    ("value", "offline"),
    [
        ("", False),
        ("0", False),
        ("no", False),
        ("False", False),
        ("off", False),
        ("1", True),
        ("yes", True),
        ("?", True),
    ],
)
def test_what_the_variable_may_say(monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
    monkeypatch.setenv("ISOHUB_OFFLINE", value)
    assert is_offline(None) is offline
    assert is_offline(True) is True
    assert is_offline(False) is False
    monkeypatch.delenv("ISOHUB_OFFLINE")
    assert is_offline(None) is False


def test_a_lock_names_the_commit_whatever_the_branch_does(
    github: GitHubServer, repo: GitRepo, store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "isohub.lock"
    first = Catalog(store.root, lockfile=Lockfile(path)).checkout(Wanted("o/r:main"))
    repo.commit({"hubconf.py": "three\n"})
    again = Catalog(store.root, lockfile=Lockfile(path))
    assert again.checkout(Wanted("o/r:main")).commit == first.commit
    assert again.checkout(Wanted("o/r:main", force_reload=True)).commit == first.commit
    elsewhere = Catalog(tmp_path / "elsewhere", lockfile=Lockfile(path, frozen=True))
    assert elsewhere.checkout(Wanted("o/r:main")).commit == first.commit
    assert (elsewhere.checkout(Wanted("o/r:main")).path / "hubconf.py").read_text() == "two\n"
    github.forget()
    assert Catalog(tmp_path / "elsewhere", lockfile=Lockfile(path), offline=True).checkout(Wanted("o/r:main"))
    assert github.count() == 0


def test_a_frozen_lock_takes_nothing_new(github: GitHubServer, repo: GitRepo, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "isohub.lock"
    Catalog(store.root, lockfile=Lockfile(path)).checkout(Wanted("o/r:main"))
    before = path.read_text()
    frozen = Catalog(store.root, lockfile=Lockfile(path, frozen=True))
    other = store.fetch(store.resolve(parse("o/r:v1")))
    for wanted in (Wanted("o/r:v1"), Wanted("o/r:main", submodules=True), Wanted(other)):
        with pytest.raises(LockMismatchError, match=r"o/r"):
            frozen.checkout(wanted)
    assert path.read_text() == before


def test_a_tree_that_is_another_stops(github: GitHubServer, repo: GitRepo, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "isohub.lock"
    checkout = Catalog(store.root, lockfile=Lockfile(path)).checkout(Wanted("o/r:main"))
    flipped = checkout.path / "hubconf.py"
    flipped.chmod(0o644)
    flipped.write_text("twO\n")
    with pytest.raises(LockMismatchError, match=checkout.tree) as caught:
        Catalog(store.root, lockfile=Lockfile(path)).checkout(Wanted("o/r:main"))
    assert caught.value.what == "tree"
    again = Catalog(store.root, lockfile=Lockfile(path)).checkout(Wanted("o/r:main", force_reload=True))
    assert (again.path, again.tree, again.pin.validated) == (checkout.path, checkout.tree, True)
    path.write_text(path.read_text().replace(checkout.tree, "0" * 64))
    with pytest.raises(LockMismatchError, match="0" * 64):
        Catalog(store.root, lockfile=Lockfile(path)).checkout(Wanted("o/r:main"))


def test_a_locked_directory_is_held_to_its_content(store: Store, tmp_path: Path) -> None:
    path, place = tmp_path / "isohub.lock", tmp_path / "hub"
    place.mkdir()
    (place / "hubconf.py").write_text("1\n")
    first = Catalog(store.root, lockfile=Lockfile(path)).checkout(Wanted(place))
    assert first.path == place
    (place / "hubconf.py").write_text("22\n")
    with pytest.raises(LockMismatchError, match=first.commit):
        Catalog(store.root, lockfile=Lockfile(path)).checkout(Wanted(place))


def test_a_checkout_stands_for_its_commit(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    catalog = Catalog(store.root)
    checkout = catalog.checkout(Wanted("o/r:main"))
    repo.commit({"hubconf.py": "three\n"})
    github.forget()
    assert catalog.checkout(Wanted(checkout)) == checkout
    assert github.count() == 0
    remove_tree(checkout.path.parent)
    assert catalog.checkout(Wanted(checkout)) == checkout
    assert github.count("/info/refs") == 0
    remove_tree(checkout.path.parent)
    with pytest.raises(OfflineError):
        Catalog(store.root, offline=True).checkout(Wanted(checkout))


def test_what_is_removed_meanwhile_is_brought_again(
    github: GitHubServer, repo: GitRepo, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = Catalog(store.root)
    real, removed = catalog.store.hold, []

    def hold(checkout):  # type: ignore[no-untyped-def]
        if len(removed) < 2:
            remove_tree(checkout.path.parent)
            removed.append(checkout)
        return real(checkout)

    monkeypatch.setattr(catalog.store, "hold", hold)
    checkout, descriptor = catalog.hold(Wanted("o/r:main"))
    assert checkout.path.is_dir()
    assert descriptor is not None
    os.close(descriptor)
    assert github.count("/archive/") == 3
    monkeypatch.setattr(catalog.store, "hold", lambda checkout: (_ for _ in ()).throw(FileNotFoundError()))
    with pytest.raises(SourceUnavailableError, match="removed"):
        catalog.hold(Wanted("o/r:main"))


def test_extras_come_from_the_session_or_the_call(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    """A checkout that lacks nothing serves them too: there is nothing else to bring."""
    plain = Catalog(store.root).checkout(Wanted("o/r:main"))
    rich = Catalog(store.root, submodules=True, lfs=True)
    assert rich.checkout(Wanted("o/r:main")).pin.extras == ("lfs", "submodules")
    assert rich.checkout(Wanted("o/r:main")).path == plain.path
    assert rich.checkout(Wanted("o/r:main", lfs=False)).pin.extras == ("submodules",)
    assert github.count("/archive/") == 1
    github.fail("/info/refs", Fault(status=503))
    assert rich.checkout(Wanted("o/r:main", verbose=False)).commit == plain.commit
