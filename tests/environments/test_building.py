"""isohub.environments.building: source distributions whose code tries things, built by the real confined process."""

from __future__ import annotations

import contextlib
import gzip
import subprocess
import sys
import tarfile
from pathlib import Path

import psutil
import pytest

from isohub import errors
from isohub.environments import sdists
from isohub.environments.building import sourceless
from isohub.environments.environment import Environment
from isohub.environments.prepare import prepare
from tests.conftest import eventually, gone, require_layers
from tests.environments.test_prepare import BUILDER, asked, left, seen_by
from tests.servers.index import PackageIndex
from tests.servers.sources import add_source


@pytest.fixture(autouse=True)
def _confined() -> None:
    require_layers("landlock", "seccomp")


def test_source_is_built_and_installed_by_its_hash(index: PackageIndex, root: Path):
    add_source(index, "alpha", "1.0")
    prepared = prepare(asked("alpha", allow_build=True), root, None, None)
    assert seen_by(prepared, "alpha") == ["1.0"]
    again = prepare(asked("alpha", allow_build=True), root, None, None, offline=True)
    assert again.runtime == prepared.runtime
    assert left(root) == []


def test_what_a_source_asks_for_is_resolved_too(index: PackageIndex, root: Path):
    add_source(index, "alpha", "1.0", more="Requires-Dist: beta\\n")
    index.wheel("beta", "3.0")
    prepared = prepare(asked("alpha", allow_build=True), root, None, None)
    assert [(each.name, each.version) for each in prepared.packages] == [("alpha", "1.0"), ("beta", "3.0")]


def test_a_build_that_fails_says_why_and_leaves_nothing(index: PackageIndex, root: Path):
    add_source(index, "alpha", "1.0", "raise RuntimeError('no compiler \\x1b[31m')")
    with pytest.raises(errors.EnvironmentBuildError, match="no compiler") as caught:
        prepare(asked("alpha", allow_build=True), root, None, None)
    assert "building alpha 1.0 from source failed" in caught.value.message
    assert "\x1b" not in str(caught.value)
    assert left(root) == []


@pytest.mark.parametrize(
    "look",
    [
        "import os; os._exit(0)",
        "import tinybuild; tinybuild.zipfile.ZipFile.close = lambda self: None; return ''",
    ],
)
def test_a_build_that_gives_nothing(index: PackageIndex, root: Path, look: str):
    add_source(index, "alpha", "1.0", look)
    with pytest.raises(errors.EnvironmentBuildError):
        prepare(asked("alpha", allow_build=True), root, None, None)
    assert left(root) == []


def test_a_wheel_of_another_name_is_refused(index: PackageIndex, root: Path):
    add_source(index, "torch", "9.9")
    index.sdist(
        "alpha",
        "1.0",
        {
            "pyproject.toml": '[build-system]\nrequires = ["tinybuild"]\nbuild-backend = "tinybuild"\nbackend-path = ["."]\n',
            "alpha_build.py": "def look(): return ''",
        },
    )
    with pytest.raises(errors.EnvironmentBuildError, match="torch-9.9"):
        prepare(asked("alpha", allow_build=True), root, None, None)


def test_what_is_not_asked_for_is_not_built(index: PackageIndex, root: Path):
    add_source(index, "alpha", "1.0")
    index.wheel("alpha", "0.9")
    assert prepare(asked("alpha", allow_build=True), root, None, None).version("alpha") == "0.9"
    with pytest.raises(errors.EnvironmentBuildError):
        prepare(Environment("auto", requirements=["alpha>1"], allow_build=True), root, None, None)


def test_names_in_what_uv_says():
    said = "Because alpha-x==1.0 has no usable wheels and only ... hint: Wheels are required for `Beta_y` because"
    assert sourceless(said) == ["beta-y", "alpha-x"]
    assert sourceless("nothing") == []


@pytest.mark.parametrize("late", [False, True])
def test_a_build_ends_with_its_caller(index: PackageIndex, root: Path, late: bool):
    add_source(index, "alpha", "1.0", "import os, time; os.setpriority(os.PRIO_PROCESS, 0, 7); time.sleep(100)")
    code = BUILDER.replace('requirements=["alpha"]', 'requirements=["alpha"], allow_build=True')
    caller = subprocess.Popen([sys.executable, "-c", code, str(root)], stderr=subprocess.PIPE)

    def builds() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if "build" in words and any(word.startswith(f"{root}/") for word in words):
                    found.append(process)
        return found

    # Two: also when the second one is not confined yet, or is only a look at what the machine gives.
    assert eventually(lambda: len(builds()) > 1 or caller.poll() is not None, 60)
    if late:
        assert eventually(lambda: any(each.nice() == 7 for each in builds()), 60)
    assert caller.poll() is None
    caller.kill()
    caller.communicate()
    assert eventually(lambda: all(gone(each.pid) for each in builds()))


def test_what_lies_beside_a_local_source_is_not_read(index: PackageIndex, root: Path, tmp_path: Path, monkeypatch):
    add_source(
        index,
        "alpha",
        "1.0",
        f"""
        import os
        found = []
        for place in ({str(tmp_path / "links")!r}, {str(tmp_path)!r}):
            try:
                found += os.listdir(place)
            except OSError:
                pass
        return "secret.txt" in found
    """,
    )
    links = tmp_path / "links"
    links.mkdir()
    (links / "secret.txt").write_text("mine")
    index.move("alpha", links)
    monkeypatch.setenv("UV_FIND_LINKS", str(links))
    prepared = prepare(asked("alpha", allow_build=True), root, None, None)
    module = Path(prepared.runtime.packages[0]) / "alpha.py"
    assert "note = False" in module.read_text()


def test_an_archive_that_only_exhausts_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sdists, "_UNPACKED_BYTES", 4 << 20)
    path = tmp_path / "alpha-1.0.tar.gz"
    head = tarfile.TarInfo("alpha-1.0/x")
    head.size = 1 << 30
    path.write_bytes(gzip.compress(head.tobuf() + bytes(8 << 20)))
    with pytest.raises(errors.EnvironmentBuildError, match="unpacks to more than"):
        sdists.read_build_system(sdists.Sdist("alpha", "1.0", path, ""))
