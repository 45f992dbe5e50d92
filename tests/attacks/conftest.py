"""Workers to attack from, one after another with less around them, and one without any confinement for controls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import isohub
from isohub.session import spawn
from tests.attacks import acts
from tests.conftest import HUBS, require_layers, spare_of
from tests.lacking import start_without


@dataclass
class Jail:
    """A session, and a worker in it that does what it is told.

    Attributes:
        name: What holds it.
        session: Whose workers are so.
        handle: To one of them, of the repo `good`.
        home: Where the session keeps what it fetched.
        namespaced: Whether it has namespaces.
    """

    name: str
    session: isohub.Session
    handle: isohub.RemoteModule
    home: Path
    namespaced: bool = field(init=False)

    def __post_init__(self) -> None:
        self.namespaced = "namespaces" in self.handle.confinement.active

    def attempt(self, act, *args) -> str:
        """`acts.attempt` in the worker."""
        return str(self.handle.run(acts.attempt, act, *args))

    def attempts(self, act, arguments) -> list[str]:
        """The same with each of several arguments, at once."""
        return list(self.handle.run(acts.attempts, act, [*arguments]))


#: All that there is; Landlock and the filter alone; and those on a kernel with the oldest Landlock. Each in a worker
#: that was forked for its request, or that was forked ahead.
KINDS = {
    "whole": (),
    "whole, a spare": (),
    "no namespaces, a spare": ("namespaces",),
    "no namespaces, Landlock 1": ("namespaces",),
}


@pytest.fixture(scope="session", params=KINDS)
def jail(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jail]:
    """A worker of an untrusted repo, with the default policy."""
    kind = request.param
    require_layers("landlock", "seccomp", *(["namespaces"] if "whole" in kind else []))
    place = tmp_path_factory.mktemp("jail")
    with isohub.Session(place / "home", timeout_s=60) as opened:
        with pytest.MonkeyPatch.context() as patch:
            if KINDS[kind]:
                old = 1 if "Landlock 1" in kind else None
                patch.setattr(spawn, "START", start_without(place, *KINDS[kind], landlock_abi=old))
            handle = opened.load(str(HUBS / "good"), "mlp")  # starts what makes all of this session's workers
        if "a spare" in kind:
            spare = spare_of(opened)
            handle.close()
            handle = opened.load(str(HUBS / "good"), "mlp")
            assert handle.stats().pid == spare
        with handle:
            made = Jail(kind, opened, handle, place / "home")
            assert made.namespaced == ("whole" in kind)
            yield made


@pytest.fixture(scope="session")
def free(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jail]:
    """A worker of a trusted repo without confinement: the control."""
    home = tmp_path_factory.mktemp("free")
    with isohub.Session(home, timeout_s=60, sandbox="none") as opened:
        with opened.load(str(HUBS / "good"), "mlp", trust_repo=True) as handle:
            yield Jail("none", opened, handle, home)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[isohub.Session]:
    """A session with all that there is."""
    require_layers("landlock", "seccomp", "namespaces")
    with isohub.Session(tmp_path_factory.mktemp("whole"), timeout_s=60) as opened:
        yield opened
