"""Fixtures for `isohub.repos`: an empty store, no tokens, no waiting between tries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isohub.repos import http
from isohub.repos.store import Store
from tests.conftest import SETTINGS
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the developer's own settings, tokens or stores."""
    for name in (*SETTINGS, "XDG_CACHE_HOME", "GIT_CONFIG_GLOBAL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("ISOHUB_HOME", str(tmp_path / "isohub-home"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(http, "BACKOFF_S", 0.001)


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHubServer]:
    """A GitHub server on loopback that this process takes for GitHub."""
    with GitHubServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def git_repo(tmp_path: Path) -> Callable[..., GitRepo]:
    """Makes repositories: ``git_repo("name")``."""

    def make(name: str = "repo", **options: str) -> GitRepo:
        return GitRepo(tmp_path / "git" / name, **options)

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "isohub-home")
