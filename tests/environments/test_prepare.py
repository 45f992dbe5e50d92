"""isohub.environments.prepare: with a real uv and an index on loopback, and real interpreters that are started."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from isohub import errors
from isohub.environments.environment import Environment
from isohub.environments.interpreters import find_interpreter
from isohub.environments.prepare import prepare
from isohub.environments.runtime import HOST
from isohub.environments.store import EnvironmentStore
from tests.conftest import eventually
from tests.servers.index import PackageIndex, make_wheel

BUILDER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from isohub.environments.environment import Environment
    from isohub.environments.prepare import prepare
    prepared = prepare(Environment("auto", requirements=["alpha"]), Path(sys.argv[1]), None, None)
    print(prepared.runtime.key, prepared.version("alpha"))
""")


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


def test_an_override_stands_for_an_address(index: PackageIndex, root: Path, tmp_path: Path):
    index.wheel("alpha", "1.0")
    index.wheel("beta", "1.0")
    file = tmp_path / "requirements.txt"
    (tmp_path / "pins.txt").write_text("beta<1\n")
    file.write_text("alpha @ git+https://example.org/alpha\nbeta\n-c pins.txt\n")
    with pytest.raises(
        errors.EnvironmentBuildError, match=r"no package index.*requirements.txt:1: alpha \(an address\)"
    ) as caught:
        prepare(Environment("auto", requirements=file), root, None, None)
    assert "overrides=" in caught.value.hint
    prepared = prepare(Environment("auto", requirements=file, overrides=["alpha", "beta"]), root, None, None)
    assert seen_by(prepared, "alpha", "beta") == ["1.0", "1.0"]


def test_a_limit_on_files_is_the_disk_s(index: PackageIndex, root: Path):
    index.wheel("alpha", "1.0", {"alpha.py": "__version__ = '1.0'\n" + "#" * 3_000_000})
    code = BUILDER.replace(
        "import sys", "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=False)
    assert "SourceUnavailableError" in done.stderr, done.stderr
    assert "no room" in done.stderr
    assert left(root) == []


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


def builder(root: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def any_ended(running: list[subprocess.Popen]) -> bool:
    return any(process.poll() is not None for process in running)


def test_sixteen_processes_build_one(index: PackageIndex, root: Path):
    index.wheel("alpha", "1.0")
    with index.closed():
        running = [builder(root) for _ in range(16)]
        assert eventually(lambda: any_ended(running) or any(path.endswith(".whl") for path in index.asked), 60)
        assert not any_ended(running)
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
    index.wheel("beta", "1.0")
    for step in range(4):
        with index.closed():
            process = builder(root)
            if step % 2:
                assert eventually(lambda: any((root / "environments").glob(".staging-*")), 30)
                time.sleep(step * 0.05)
            else:
                assert eventually(lambda: any(path.endswith(".whl") for path in index.asked), 30)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        index.asked.clear()
    assert prepare(asked("alpha"), root, None, None).version("alpha") == "1.0"
    # An orphan of a killed one may still write; who comes after it removes what it leaves.
    assert eventually(lambda: left(root) == [] or bool(prepare(asked("beta"), root, None, None)), 30)


# Environments with an interpreter of their own. The torch here is a name and a version: no worker is started.


def interpreters() -> list[str]:
    """Versions of Python that are here beside this one, else this one."""
    here = ".".join(map(str, sys.version_info[:2]))
    found = []
    for version in ("3.8", "3.9", "3.10", "3.11", "3.12", "3.13"):
        try:
            find_interpreter(version)
        except errors.EnvironmentBuildError:
            continue
        found.append(version)
    return [version for version in found if version != here] or [here]


def test_an_environment_of_its_own(index: PackageIndex, root: Path):
    version = interpreters()[0]
    index.wheel("torch", "1.13.1", requires=["typing-extensions"])
    index.wheel("torch", "2.0.0", requires=["typing-extensions"])
    index.wheel("typing-extensions", "4.0")
    index.wheel("numpy", "1.26.4")
    index.wheel("numpy", "2.1.0")
    wanted = Environment(requirements=["torch<2", "numpy", "alpha; python_version < '3'"], python=version)
    prepared = prepare(wanted, root, None, None)
    # torch of that time knows numpy 1 alone.
    assert [(each.name, each.version) for each in prepared.packages] == [
        ("numpy", "1.26.4"),
        ("torch", "1.13.1"),
        ("typing-extensions", "4.0"),
    ]
    assert prepared.host is None
    assert prepared.version("packaging") is None
    assert seen_by(prepared, "torch", "numpy") == ["1.13.1", "1.26.4"]
    lines = "import sys; print(sys.version_info[:2], sys.prefix, [p for p in sys.path if 'site-packages' in p])"
    done = subprocess.run([prepared.runtime.python, "-I", "-c", lines], capture_output=True, text=True, check=True)
    said = done.stdout
    assert f"({version.replace('.', ', ')})" in said
    assert str(root) in said
    (place,) = re.findall(r"\['(.*)'\]", said)
    assert os.listdir(place) == []  # nothing of the packages runs when it is started
    assert prepare(wanted, root, None, None, offline=True).runtime == prepared.runtime


def test_torch_comes_along_and_is_new_enough(index: PackageIndex, root: Path):
    for name in ("1.12.0", "1.13.0", "2.0.0"):
        index.wheel("torch", name)
    index.wheel("alpha", "1.0")
    version = interpreters()[0]
    prepared = prepare(Environment(requirements=["alpha"], python=version), root, None, None)
    assert prepared.version("torch") == "2.0.0"
    with pytest.raises(errors.EnvironmentBuildError, match=r"torch>=1\.13"):
        prepare(Environment(requirements=["torch<1.13"], python=version), root, None, None)


def test_a_requirements_file_of_the_caller_s(index: PackageIndex, root: Path, tmp_path: Path, monkeypatch):
    index.wheel("alpha", "1.0")
    index.wheel("alpha", "2.0")
    (tmp_path / "wheels").mkdir()
    file, content = make_wheel("beta", "1.0")
    (tmp_path / "wheels" / file).write_bytes(content)
    (tmp_path / "requirements.txt").write_text("--find-links wheels\nalpha<2\nbeta\n")
    prepared = prepare(Environment("auto", requirements=tmp_path / "requirements.txt"), root, None, None)
    assert seen_by(prepared, "alpha", "beta") == ["1.0", "1.0"]


def test_hashes_that_are_asked_for(index: PackageIndex, root: Path, tmp_path: Path):
    sha256 = index.wheel("alpha", "1.0")
    file = tmp_path / "requirements.txt"
    file.write_text(f"alpha==1.0 --hash=sha256:{sha256}\n")
    assert prepare(Environment("auto", requirements=file), root, None, None).version("alpha") == "1.0"
    file.write_text(f"alpha==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(errors.EnvironmentBuildError, match="one of the hashes"):
        prepare(Environment("auto", requirements=file), root, None, None)


def test_hashes_in_constraints(index: PackageIndex, root: Path, tmp_path: Path):
    index.wheel("alpha", "1.0")
    (tmp_path / "pins.txt").write_text(f"alpha==1.0 --hash=sha256:{'0' * 64}\n")
    (tmp_path / "mine.txt").write_text("alpha\n-c pins.txt\n")
    with pytest.raises(errors.EnvironmentBuildError, match=r"pins\.txt:1: no file of alpha 1\.0"):
        prepare(Environment("auto", requirements=tmp_path / "mine.txt"), root, None, None)


def test_no_variable_of_the_caller_s_is_expanded(index: PackageIndex, root: Path):
    with pytest.raises(errors.EnvironmentBuildError, match=r"or a '\$'"):
        prepare(asked("alpha; os_name != '${HOME}'"), root, None, None)


def test_a_damaged_environment_is_built_again(index: PackageIndex, root: Path):
    index.wheel("alpha", "1.0")
    first = prepare(asked("alpha"), root, None, None)
    os.close(first.held)
    place = root / "environments" / first.runtime.key
    place.chmod(0o755)
    (place / "environment.json").chmod(0o644)
    (place / "environment.json").write_text("{}")
    again = prepare(asked("alpha"), root, None, None)
    assert again.runtime == first.runtime
    assert seen_by(again, "alpha") == ["1.0"]
    assert left(root) == []


@pytest.mark.parametrize("file", ["uv.toml", "pyproject.toml"])
def test_what_lies_above_the_store_chooses_nothing(index: PackageIndex, root: Path, tmp_path: Path, monkeypatch, file):
    """A store below /tmp has /tmp above it, where anybody may write."""
    monkeypatch.delenv("UV_NO_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    index.wheel("alpha", "1.0")
    others = tmp_path / "others"
    others.mkdir()
    name, content = make_wheel("alpha", "2.0")
    (others / name).write_bytes(content)
    links = f'find-links = ["{others}"]\n'
    project = '[project]\nname = "x"\nversion = "1"\n[tool.uv]\n'
    (tmp_path / file).write_text(links if file == "uv.toml" else project + links)
    prepared = prepare(asked("alpha"), root, None, None)
    assert [each.version for each in prepared.packages] == ["1.0"]


def test_constraints_of_uv_s(index: PackageIndex, root: Path, tmp_path: Path, monkeypatch):
    index.wheel("alpha", "1.0")
    index.wheel("alpha", "2.0")
    pins = tmp_path / "pins.txt"
    monkeypatch.setenv("UV_CONSTRAINT", str(pins))
    for text, version in (("alpha<2\n", "1.0"), ("alpha>=2\n", "2.0")):
        pins.write_text(text)
        assert [each.version for each in prepare(asked("alpha"), root, None, None).packages] == [version]
