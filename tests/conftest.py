"""What every test has: a cache of its own, the tiny repos, and one session for tests that harm no session.

``ISOHUB_EXPECT=landlock,seccomp,namespaces`` names the layers of confinement that this machine is known to have: a test
that lacks one of these fails; without the variable it is skipped, with the reason. ``python3.9`` in it says the same of
an interpreter of that version, or 3.8, and of the package index.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import isohub
from isohub.environments.runtime import Runtime

HUBS = Path(__file__).parent / "hubs"
#: Variables of the developer's that would change what is tested.
SETTINGS = (
    "CURL_CA_BUNDLE", "GH_ENTERPRISE_TOKEN", "GH_HOST", "GH_TOKEN", "GITHUB_API_URL", "GITHUB_ENTERPRISE_TOKEN",
    "GITHUB_SERVER_URL", "GITHUB_TOKEN", "GITLAB_HOST", "GITLAB_TOKEN", "GIT_CONFIG_COUNT", "GIT_CONFIG_PARAMETERS",
    "GIT_DIR", "GIT_SSH_COMMAND", "ISOHUB_DOWNLOAD_HOSTS", "ISOHUB_OFFLINE", "NETRC", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "TORCH_HOME",
    *(f"{kind}_PROXY" for kind in ("ALL", "HTTP", "HTTPS", "NO")), *(f"{kind}_proxy" for kind in ("all", "http", "https", "no")),
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOHUB_HOME", str(tmp_path_factory.mktemp("isohub-home")))
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        # git's credential helpers are asked when a server refuses: not the developer's.
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        patch.setenv("NETRC", os.devnull)
        yield


@pytest.fixture(scope="session", autouse=True)
def _interrupts_interrupt() -> Iterator[None]:
    """Where SIGINT is ignored (``make test &`` in a script), Ctrl-C could not be tested, here and in children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def loopback_weights() -> Iterator[None]:
    """Workers of these tests may have downloads from servers on loopback, which are nobody's by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOHUB_DOWNLOAD_HOSTS", "127.0.0.1:*")
        yield


@pytest.fixture(scope="session")
def hub() -> Callable[[str], str]:
    """Path of a tiny repo by the name of its behaviour."""

    def path(name: str) -> str:
        assert (HUBS / name).is_dir(), name
        return str(HUBS / name)

    return path


@pytest.fixture(scope="session")
def session() -> Iterator[isohub.Session]:
    """One session for many tests: a zygote takes a second to start."""
    with isohub.Session(timeout_s=60) as opened:
        yield opened


@functools.lru_cache(maxsize=1)
def layers_here() -> dict[str, str]:
    """The layers of confinement that this machine lacks, each with the reason."""
    found = isohub.doctor()
    lacking = {name: found.details.get(name) or found.fault or "not applied" for name in found.missing}
    if found.fault is not None:
        lacking.update(dict.fromkeys(("landlock", "seccomp", "namespaces"), found.fault))
    return lacking


def require_layers(*layers: str) -> None:
    """Skip the test that asks where this machine lacks a layer; fail it where ``ISOHUB_EXPECT`` names that layer."""
    expected = os.environ.get("ISOHUB_EXPECT", "").replace(",", " ").split()
    unknown = set(expected) - {"landlock", "seccomp", "namespaces", "python3.9"}
    if unknown:
        raise pytest.UsageError(f"ISOHUB_EXPECT names {', '.join(sorted(unknown))}")
    for layer in layers:
        reason = layers_here().get(layer)
        if reason is not None and layer in expected:
            pytest.fail(f"this machine has no {layer}, and ISOHUB_EXPECT says that it has: {reason}")
        if reason is not None:
            pytest.skip(f"this machine has no {layer}: {reason}")


@contextlib.contextmanager
def all_on(runtime: Runtime) -> Iterator[None]:
    """Loads within the block are of this runtime, as if it had been built for them; for sessions on "auto"."""
    from isohub.environments import prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "prepare", lambda *_, **__: prepare.Prepared(runtime, "a test's"))
        yield


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def eventually(check: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Whether this becomes true; asks again until then."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.005)
    return check()


def companions(pid: int) -> set[int]:
    """The processes of a worker's pid namespace, itself included, by their numbers here."""
    namespace = os.readlink(f"/proc/{pid}/ns/pid")
    found = set()
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.readlink(f"/proc/{name}/ns/pid") == namespace:
                found.add(int(name))
        except OSError:
            pass  # it has ended
    return found


def zygote_of(session: isohub.Session, *, confined: bool = True) -> psutil.Process:
    """The process whose forks the session's workers are: of those on the host's packages."""
    first = psutil.Process(session._pool.warm(confined=confined).pid)
    # What stands around it was started with another last argument, and an init is a fork of that; parents come first.
    below = [one for one in first.children(recursive=True) if not gone(one.pid)]
    return next((one for one in below if "".join(one.cmdline()[-1:]).isdigit()), first)


def spares_of(session: isohub.Session, *, confined: bool = True) -> list[int]:
    """The forks of that which are nobody's worker."""
    workers = {worker.pid for worker in session._pool.workers()}
    forks = (one.pid for one in zygote_of(session, confined=confined).children())
    return [pid for pid in forks if pid not in workers and not gone(pid)]


def spare_of(session: isohub.Session, *, confined: bool = True) -> int:
    """The one that waits, once it does."""
    assert eventually(lambda: len(spares_of(session, confined=confined)) == 1)
    (pid,) = spares_of(session, confined=confined)
    assert eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_SLEEPING)
    return pid


def gone(pid: int) -> bool:
    """Whether no process of that number lives. A zombie has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# Notes which process imports it, and tries what a worker must not do.
_TELLTALE = """
import os
imported_by = os.getpid()
try:
    with open({target!r}, "a") as file:
        file.write("{name} ran outside\\n")
except OSError:
    pass
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A directory that stands for what was installed."""
    directory = tmp_path / "packages"
    directory.mkdir()
    return directory


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file of the caller's; what is in it was written by what was not confined."""
    file = tmp_path / "outside"
    file.write_text("")
    return file


def telltale(packages: Path, outside: Path, name: str, text: str = "") -> None:
    """Put a module into `packages` that writes to `outside` where it is imported unconfined."""
    (packages / name).parent.mkdir(exist_ok=True)
    (packages / name).write_text(_TELLTALE.format(target=str(outside), name=name) + text)
