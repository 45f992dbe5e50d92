"""C31: a package that is built from source has no more than its own source and what building it needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from isohub import errors
from isohub.environments.environment import Environment
from isohub.environments.prepare import prepare
from tests.conftest import require_layers
from tests.servers.index import PackageIndex
from tests.servers.sources import add_source

WANTED = Environment("auto", requirements=["alpha"], allow_build=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PackageIndex]:
    for name in [*os.environ]:
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    with PackageIndex() as served:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("UV_NO_CONFIG", "1")
        monkeypatch.setenv("UV_DEFAULT_INDEX", served.url)
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
        yield served


def test_c31_a_build_from_source_sees_and_reaches_nothing(index: PackageIndex, root: Path, tmp_path: Path, monkeypatch):
    require_layers("landlock", "seccomp")
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    root.mkdir()
    (root / "trust.json").write_text("{}")
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    look = f"""
        import os, socket, urllib.request
        said = []
        for act in (
            lambda: open({str(secret)!r}).read(),
            lambda: open({str(tmp_path / "mark")!r}, "w").write("x"),
            lambda: os.environ["MY_TOKEN"],
            lambda: socket.create_connection(("127.0.0.1", {index.url.split(":")[2].split("/")[0]}), 2),
            lambda: open({str(root / "trust.json")!r}).read(),
        ):
            try:
                act()
                said.append("succeeded")
            except (OSError, KeyError) as error:
                said.append(type(error).__name__)
        open(os.path.join(os.environ["TMPDIR"], "own"), "w").write("allowed")
        return said
    """
    add_source(index, "alpha", "1.0", look)
    prepared = prepare(WANTED, root, None, None)
    source = Path(prepared.runtime.packages[0], "alpha.py").read_text()
    assert "succeeded" not in source, source
    assert source.count("Error") == 5
    assert not (tmp_path / "mark").exists()


def test_c31_nothing_is_built_unless_it_is_allowed(index: PackageIndex, root: Path, tmp_path: Path):
    add_source(index, "alpha", "1.0")
    with pytest.raises(errors.EnvironmentBuildError, match="building from source is disabled"):
        prepare(Environment("auto", requirements=["alpha"]), root, None, None)
    require_layers("landlock", "seccomp")
    assert prepare(WANTED, root, None, None).version("alpha") == "1.0"
