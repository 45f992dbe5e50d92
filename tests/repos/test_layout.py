from __future__ import annotations

from pathlib import Path

import pytest

from isohub.errors import SourceUnavailableError
from isohub.repos.layout import checkout_dir, get_dir, repo_dir, set_dir, weights_dir
from isohub.repos.pins import Pin
from isohub.repos.reference import parse


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("ISOHUB_HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    assert get_dir() == str(tmp_path / "ISOHUB_HOME")
    monkeypatch.setenv("ISOHUB_HOME", "")
    assert get_dir() == str(tmp_path / "TORCH_HOME" / "isohub")
    monkeypatch.delenv("TORCH_HOME")
    assert get_dir() == str(tmp_path / "XDG_CACHE_HOME" / "isohub")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert get_dir() == str(tmp_path / "home" / ".cache" / "isohub")
    monkeypatch.setenv("ISOHUB_HOME", "~/x")
    assert get_dir() == str(tmp_path / "home" / "x")
    set_dir("~/chosen")
    try:
        assert get_dir() == str(tmp_path / "home" / "chosen")
    finally:
        set_dir(None)
    assert get_dir() == str(tmp_path / "home" / "x")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOHUB_HOME", "~nobody-has-this-name/x")
    with pytest.raises(SourceUnavailableError, match="no home directory"):
        get_dir()


def test_extras_are_other_checkouts(tmp_path: Path) -> None:
    reference = parse("o/r:v1")
    plain = checkout_dir(tmp_path, Pin(reference, "c" * 40))
    assert plain == repo_dir(tmp_path, reference) / ("c" * 40)
    rich = checkout_dir(tmp_path, Pin(reference, "c" * 40, extras=("lfs", "submodules")))
    assert rich == plain.with_name("c" * 40 + "+lfs+submodules")


def test_scopes_do_not_meet(tmp_path: Path) -> None:
    scopes = [
        ("h", "a", "b_c"),
        ("h", "a_b", "c"),
        ("h", "a/b", "c"),
        ("h", "a", "b/c"),
        ("h", "", "abc"),
        ("h", "%", "c"),
    ]
    assert len({weights_dir(tmp_path, scope) for scope in scopes}) == len(scopes)
    assert all(weights_dir(tmp_path, scope).is_relative_to(tmp_path / "weights" / "urls") for scope in scopes)
