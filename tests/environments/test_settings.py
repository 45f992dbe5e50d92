"""isohub.environments.settings: pip's and uv's own settings, in their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from isohub.environments.declared import Indexes
from isohub.environments.settings import package_settings
from isohub.errors import EnvironmentBuildError


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home with no settings yet."""
    for name in ("XDG_CONFIG_HOME", "PIP_CONFIG_FILE", "UV_NO_CONFIG", "SSL_CERT_FILE", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "xdg"))
    return tmp_path


def pip_conf(home: Path, text: str, place: str = ".config/pip/pip.conf") -> None:
    path = home / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_pip_s_files_in_their_order(home: Path, monkeypatch):
    (home / "links").mkdir()
    pip_conf(home, "[global]\nindex-url = https://a.example/simple\ntimeout = 7\n", "xdg/pip/pip.conf")
    pip_conf(
        home,
        f"[global]\nindex-url = https://b.example/simple\nextra-index-url =\n    https://c.example\n    https://d.example\n"
        f"find-links = {home / 'links'} /nowhere\ntrusted-host = b.example\n[install]\nno-index = false\n",
    )
    settings = package_settings()
    assert settings.variables["UV_DEFAULT_INDEX"] == "https://b.example/simple"
    assert settings.variables["UV_INDEX"] == "https://c.example https://d.example"
    assert settings.variables["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert settings.variables["UV_HTTP_TIMEOUT"] == "7"
    assert settings.variables["UV_INSECURE_HOST"] == "b.example"
    assert settings.find_links == (str(home / "links"),)
    assert settings.remarks == ("find-links: /nowhere is not there",)
    monkeypatch.setenv("PIP_INDEX_URL", "https://e.example/simple")
    assert package_settings().variables["UV_DEFAULT_INDEX"] == "https://e.example/simple"


def test_uv_s_own_win(home: Path, monkeypatch):
    pip_conf(home, "[global]\nindex-url = https://a.example/simple\nextra-index-url = https://c.example\n")
    monkeypatch.setenv("UV_INDEX_URL", "https://u.example")
    settings = package_settings()
    assert "UV_DEFAULT_INDEX" not in settings.variables
    assert "UV_INDEX" not in settings.variables
    assert settings.variables["UV_INDEX_URL"] == "https://u.example"
    monkeypatch.delenv("UV_INDEX_URL")
    pip_conf(home, '[[index]]\nurl = "https://t.example"\n', ".config/uv/uv.toml")
    settings = package_settings()
    assert "UV_DEFAULT_INDEX" not in settings.variables
    assert "t.example" in "".join(settings.identity)


def test_a_requirements_file_of_the_caller_s(home: Path):
    settings = package_settings(Indexes(default="https://f.example", extra=("https://g.example",), no_index=True))
    assert settings.variables["UV_DEFAULT_INDEX"] == "https://f.example"
    assert settings.variables["UV_INDEX"] == "https://g.example"
    assert "--no-index" in settings.arguments


def test_credentials_stay_where_they_belong(home: Path, monkeypatch):
    pip_conf(
        home, "[global]\nindex-url = https://me:s3cret%21@a.example/simple\nfind-links = https://u:other@b.example/x\n"
    )
    settings = package_settings()
    assert "s3cret" in settings.variables["UV_DEFAULT_INDEX"]
    assert "s3cret" not in repr((settings.arguments, settings.identity))
    words, variables = settings.linked("/stubs")
    assert words == ()
    assert variables["UV_FIND_LINKS"] == "/stubs,https://u:other@b.example/x"
    assert settings.shown("no s3cret! and s3cret%21 at https://me:x@a.example\x1b[2J") == (
        "no **** and **** at https://****@a.example\\x1b[2J"
    )
    other = home / "elsewhere"
    pip_conf(
        home, "[global]\nindex-url = https://you:changed@a.example/simple\nfind-links = https://u:else@b.example/x\n"
    )
    assert package_settings().identity == settings.identity
    assert not other.exists()


def test_what_would_lead_uv_elsewhere_is_left_out(home: Path, monkeypatch):
    for name in ("VIRTUAL_ENV", "PYTHONPATH", "UV_PYTHON", "UV_SYSTEM_PYTHON", "CONDA_PREFIX", "UV_NO_BINARY"):
        monkeypatch.setenv(name, "x")
    assert not {"VIRTUAL_ENV", "PYTHONPATH", "UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_NO_BINARY"} & set(
        package_settings().variables
    )


def test_constraints(home: Path, monkeypatch):
    file = home / "pins.txt"
    monkeypatch.setenv("PIP_CONSTRAINT", str(file))
    with pytest.raises(EnvironmentBuildError, match="is no file"):
        package_settings()
    file.write_text("numpy<3\n")
    settings = package_settings()
    assert settings.constraints == (str(file),)
    assert "numpy<3\n" in settings.identity


def test_a_file_that_cannot_be_read(home: Path):
    pip_conf(home, "no section\n")
    with pytest.raises(EnvironmentBuildError, match="pip's configuration"):
        package_settings()


def test_paths_are_from_where_the_caller_stands(home: Path, monkeypatch):
    (home / "wheels").mkdir()
    (home / "pins.txt").write_text("numpy<3\n")
    monkeypatch.chdir(home)
    monkeypatch.setenv("PIP_FIND_LINKS", "./wheels")
    monkeypatch.setenv("UV_CACHE_DIR", "cache")
    monkeypatch.setenv("UV_CONSTRAINT", "pins.txt")
    settings = package_settings()
    assert settings.find_links == (str(home / "wheels"),)
    assert settings.variables["UV_CACHE_DIR"] == str(home / "cache")
    # Read here: with it in its environment uv installs nothing by hashes, and the file is part of the question.
    assert "UV_CONSTRAINT" not in settings.variables
    assert settings.constraints == (str(home / "pins.txt"),)
    assert "numpy<3\n" in settings.identity


def test_a_quote_in_a_password(home: Path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "https://user:pa'ss@host.test/files/")
    settings = package_settings()
    words, variables = settings.linked()
    assert words == ()
    assert "pa'ss" in variables["UV_FIND_LINKS"]
    assert "pa'ss" not in repr(settings.identity)
    assert "pa'ss" not in settings.shown("error: https://user:pa'ss@host.test/files/ and pa'ss")
