"""A store with a bit of everything: checkouts of two repos, weights of two scopes and the caller's, a placed file, trust."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isohub.repos.blobs import hash_file
from isohub.repos.credentials import Credentials
from isohub.repos.pins import Checkout
from isohub.repos.placing import Origin, place, workspace
from isohub.repos.reference import parse
from isohub.repos.store import Store
from isohub.repos.trust import Trust
from isohub.repos.weights import CALLER, Weights
from isohub.repos.weights_entry import WeightsFile
from tests.servers.files import FileServer
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer

__all__ = ["Filled", "fill"]


@dataclass
class Filled:
    """What is in it.

    Attributes:
        root: Its directory.
        one: Checkout of ``o/r:v1``.
        two: Of ``o/r:main``.
        other: Of ``o/other``.
        shared: Weights of o/r, whose content o/other has as well, under another URL.
        own: Weights that o/r alone has.
        callers: Weights of the caller's.
    """

    root: Path
    one: Checkout
    two: Checkout
    other: Checkout
    shared: WeightsFile
    own: WeightsFile
    callers: WeightsFile

    @property
    def scope(self) -> tuple[str, str, str]:
        return self.shared.scope


def fill(root: Path, github: GitHubServer, files: FileServer, repos: Path) -> Filled:
    """Make it.

    Args:
        root: Where.
        github: Serves o/r and o/other from here on.
        files: Serves the weights from here on.
        repos: Where the repositories may be made.
    """
    repo = github.add("o", "r", GitRepo(repos / "r"))
    repo.commit({"hubconf.py": "one\n", "models/net.py": "net\n", "run.sh": "#!/bin/sh\n"})
    (repo.path / "run.sh").chmod(0o755)
    (repo.path / "link").symlink_to("hubconf.py")
    repo.commit()
    repo.tag("v1")
    repo.commit({"hubconf.py": "two\n" * 3000})
    other = github.add("o", "other", GitRepo(repos / "other"))
    other.commit({"hubconf.py": "other\n"})

    store, weights = Store(root), Weights(root)
    one, two, third = (store.fetch(store.resolve(parse(text))) for text in ("o/r:v1", "o/r:main", "o/other"))
    scope, other_scope = ((each.reference.host, each.reference.owner, each.reference.repo) for each in (one, third))
    content = b"shared" * 3000
    urls = [
        files.add("/a/model.pth", content),
        files.add("/b/model.pth", content),
        files.add("/a/own.pth", b"own" * 5000),
        files.add("/a/callers.pth", b"callers"),
    ]
    found = [
        weights.fetch(url, whose, credentials=Credentials(anonymous=True))
        for url, whose in zip(urls, (scope, other_scope, scope, CALLER), strict=True)
    ]
    Trust(root).add(*scope, one.commit)
    directory = root / "checkpoints"
    directory.mkdir()
    with workspace(directory) as space:
        (space / "part").write_bytes(b"placed" * 50)
        place(space / "part", directory / "placed.pth", Origin("0" * 64, urls[0], hash_file(space / "part")[0]))
    return Filled(root, one, two, third, found[0], found[2], found[3])
