"""isohub.environments.prepare: with a real uv and an index on loopback, and real interpreters that are started."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from isohub import errors
from isohub.environments.environment import Environment
from isohub.environments.prepare import prepare
from isohub.environments.runtime import HOST
from isohub.environments.store import EnvironmentStore
from tests.conftest import eventually
from tests.servers.index import PackageIndex

OWN = "auto"


def asked(*requirements: str, **more) -> Environment:
    return Environment("auto", requirements=requirements, **more)


def seen_by(prepared, *names: str) -> list[str]:
    """Versions of modules as an interpreter sees them that is started on it."""
    lines = f"import json, sys; sys.path[:0] = {list(prepared.runtime.packages)!r}\n"
    lines += f"print(json.dumps([__import__(name).__version__ for name in {names!r}]))"
    done = subprocess.run([prepared.runtime.python, "-I", "-c", lines], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def left(root: Path) -> list[str]:
    """What builds have left behind."""
    directory = root / "environments"
    return sorted(path.name for path in directory.iterdir() if path.name.startswith(".")) if directory.exists() else []


def test_what_the_host_meets_is_the_host(index: PackageIndex, root: Path):
    prepared = prepare(asked("numpy>=1", "torch", "nothing; python_version < '3'"), root, None, None)
    assert prepared.runtime is HOST
    assert prepared.version("numpy") is not None
    assert index.asked == []
    assert not root.exists()


def test_only_what_differs_is_installed(index: PackageIndex, root: Path):
    index.wheel("alpha", "1.0", requires=["beta>=2", "packaging", "torch>=1", "numpy"])
    index.wheel("beta", "2.0")
    index.wheel("beta", "1.0")
    prepared = prepare(asked("alpha"), root, None, None)
    assert [(each.name, each.version) for each in prepared.packages] == [("alpha", "1.0"), ("beta", "2.0")]
    assert prepared.runtime.python == sys.executable
    assert seen_by(prepared, "alpha", "beta") == ["1.0", "2.0"]
    assert prepared.version("Alpha") == "1.0"
    assert prepared.version("torch") == prepare(Environment("host"), root, None, None).version("torch")
    (place,) = prepared.runtime.packages
    assert not any(
        os.stat(os.path.join(directory, name)).st_mode & 0o222
        for directory, _, names in os.walk(place)
        for name in names
    )
    assert any(name.endswith(".pyc") for _, _, names in os.walk(place) for name in names)


def test_it_is_built_once_and_needs_neither_uv_nor_a_network_again(index: PackageIndex, root: Path, monkeypatch):
    index.wheel("alpha", "1.0")
    first = prepare(asked("alpha"), root, None, None)
    count = len(index.asked)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("isohub.environments.uv._packaged", lambda: None)
    second = prepare(asked("alpha"), root, None, None, offline=True)
    assert second.runtime == first.runtime
    assert len(index.asked) == count
    with pytest.raises(errors.EnvironmentBuildError, match="uv is not installed") as caught:
        prepare(asked("beta"), root, None, None)
    assert "pip install" in caught.value.hint
    with pytest.raises(errors.OfflineError, match="the network may not be used") as offline:
        prepare(asked("beta"), root, None, None, offline=True)
    assert "isohub env build --environment auto --with beta" in offline.value.hint


def test_the_same_packages_are_one_environment(index: PackageIndex, root: Path):
    index.wheel("alpha", "1.0")
    keys = {prepare(asked(text), root, None, None).runtime.key for text in ("alpha", "alpha==1.0", "Alpha>=0.5")}
    assert len(keys) == 1
    index.wheel("alpha", "2.0")
    assert prepare(asked("alpha"), root, None, None).runtime.key in keys  # as it was resolved
    assert prepare(asked("alpha"), root, None, None, refresh=True).version("alpha") == "2.0"


def test_another_version_of_what_the_host_has(index: PackageIndex, root: Path):
    index.wheel("iniconfig", "0.5")
    prepared = prepare(asked("iniconfig<1"), root, None, None)
    assert prepared.version("iniconfig") == "0.5"
    assert seen_by(prepared, "iniconfig") == ["0.5"]


def test_torch_stays_the_host_s(index: PackageIndex, root: Path):
    with pytest.raises(errors.EnvironmentBuildError, match="torch==1.13.1, and the host has 2") as caught:
        prepare(asked("torch==1.13.1"), root, None, None)
    assert "Environment(python=" in caught.value.hint
    index.wheel("needy", "1.0", requires=["torch<2"])
    with pytest.raises(errors.EnvironmentBuildError, match="torch<2"):
        prepare(asked("needy"), root, None, None)
    prepared = prepare(asked("needy", "torch==1.13.1", overrides=["torch"]), root, None, None)
    assert [each.name for each in prepared.packages] == ["needy"]


def test_what_nothing_meets_is_explained_and_leaves_nothing(index: PackageIndex, root: Path):
    index.wheel("alpha", "1.0", requires=["beta<1"])
    index.wheel("beta", "2.0")
    with pytest.raises(errors.EnvironmentBuildError, match=r"only beta.*is available|beta<1") as caught:
        prepare(asked("alpha"), root, None, None)
    assert "unsatisfiable" in caught.value.stderr_tail
    assert left(root) == []


def test_a_file_that_is_not_what_the_index_says(index: PackageIndex, root: Path):
    index.wheel("alpha", "1.0")
    prepare(asked("alpha"), root, None, None)
    store = EnvironmentStore(root)
    (key,) = [path.name for path in store.directory.iterdir() if len(path.name) == 40]
    # Resolved, and then another file under that name.
    subprocess.run(["chmod", "-R", "u+w", store.directory / key], check=True)
    subprocess.run(["rm", "-rf", store.directory / key, os.environ["UV_CACHE_DIR"]], check=True)
    index.wheel("alpha", "1.0", {"alpha.py": "__version__ = 'evil'\n"})
    with pytest.raises(errors.EnvironmentBuildError, match="installing 1 package"):
        prepare(asked("alpha"), root, None, None)
    assert left(root) == []


def test_source_alone_is_not_taken(index: PackageIndex, root: Path, tmp_path: Path):
    mark = tmp_path / "ran"
    index.sdist("alpha", "1.0", {"setup.py": f"open({str(mark)!r}, 'w')\n"})
    with pytest.raises(errors.EnvironmentBuildError) as caught:
        prepare(asked("alpha"), root, None, None)
    assert "allow_build=True" in caught.value.hint
    assert not mark.exists()


def test_credentials_reach_the_index_and_nothing_else(index: PackageIndex, root: Path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    index.login = "me:s3cret-word"
    index.wheel("alpha", "1.0")
    address = index.url.replace("://", "://me:s3cret-word@")
    monkeypatch.delenv("UV_DEFAULT_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", address)
    assert prepare(asked("alpha"), root, None, None).version("alpha") == "1.0"
    with pytest.raises(errors.IsohubError) as caught:
        prepare(asked("beta"), root, None, None)
    index.login = "me:changed-word"
    with pytest.raises(errors.IsohubError) as refused:
        prepare(asked("gamma"), root, None, None)
    written = "".join(path.read_text("utf-8", "replace") for path in root.rglob("*.json"))
    for text in (
        str(caught.value),
        repr(caught.value.fields),
        str(refused.value),
        repr(refused.value.fields),
        caplog.text,
        written,
    ):
        assert "s3cret" not in text


def test_an_index_that_does_not_answer(root: Path, index: PackageIndex, monkeypatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(errors.SourceUnavailableError, match="did not answer") as caught:
        prepare(asked("alpha"), root, None, None)
    assert caught.value.passing is True


def test_a_disk_that_refuses(index: PackageIndex, root: Path):
    root.mkdir()
    (root / "environments").write_text("no directory")
    index.wheel("alpha", "1.0")
    with pytest.raises(errors.SourceUnavailableError, match="cannot be used"):
        prepare(asked("alpha"), root, None, None)


BUILDER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from isohub.environments.environment import Environment
    from isohub.environments.prepare import prepare
    prepared = prepare(Environment("auto", requirements=["alpha"]), Path(sys.argv[1]), None, None)
    print(prepared.runtime.key, prepared.version("alpha"))
""")


def builder(root: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sixteen_processes_build_one(index: PackageIndex, root: Path):
    index.wheel("alpha", "1.0")
    with index.closed():
        running = [builder(root) for _ in range(16)]
        assert eventually(lambda: any(path.endswith(".whl") for path in index.asked), 60)
    ended = [(*process.communicate(timeout=100), process.returncode) for process in running]
    assert {code for *_, code in ended} == {0}, ended
    assert len({out for out, *_ in ended}) == 1
    built = [path for path in (root / "environments").iterdir() if len(path.name) == 40]
    assert len(built) == 1
    assert left(root) == []
    # One uv asks whether there are ranges, for the metadata, and for the file; nobody else asked.
    assert sum(path.endswith(".whl") for path in index.asked) <= 3


def test_a_build_that_was_killed_is_begun_again(index: PackageIndex, root: Path):
    index.wheel("alpha", "1.0")
    for step in range(4):
        with index.closed():
            process = builder(root)
            if step % 2:
                eventually(lambda: any((root / "environments").glob(".staging-*")), 30)
                time.sleep(step * 0.05)
            else:
                eventually(lambda: any(path.endswith(".whl") for path in index.asked), 30)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        index.asked.clear()
    assert prepare(asked("alpha"), root, None, None).version("alpha") == "1.0"
    assert eventually(lambda: prepare(asked("alpha"), root, None, None).version("alpha") == "1.0")
