"""isohub.Environment: what a caller may want, and what a mistake says."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import isohub
from isohub import errors
from isohub.environments.environment import Environment, checked_environment


def test_forms(tmp_path: Path):
    file = tmp_path / "requirements.txt"
    file.write_text("timm\n")
    assert isohub.Environment is Environment
    assert Environment("host").is_host
    assert Environment("auto", requirements=["timm ==0.6.13"]).requirements == ("timm==0.6.13",)
    assert Environment(python="3.9").name == "python 3.9"
    assert Environment(requirements=file).requirements == str(file)
    name = Environment(requirements=file).name
    file.write_text("einops\n")
    assert name.startswith("python this; file requirements.txt sha256 ")
    assert Environment(requirements=file).name != name
    assert Environment("auto") == Environment("auto", extras=())
    assert len({Environment("auto"), Environment("auto")}) == 1
    assert pickle.loads(pickle.dumps(Environment("auto", extras=["a"]))) == Environment("auto", extras=["a"])
    with pytest.raises(AttributeError):
        Environment("auto").python = "3.9"


@pytest.mark.parametrize(
    ("base", "fields", "match"),
    [
        ("conda", {}, "expected 'host', 'auto'"),
        (None, {}, "wants nothing"),
        ("host", {"python": "3.9"}, "as it stands"),
        ("auto", {"python": "3.9"}, "over this interpreter"),
        (None, {"python": "2.7"}, "expected a version"),
        (None, {"python": "3.7"}, "older than workers run on"),
        (None, {"python": "3"}, "expected a version"),
        (None, {"python": "python3"}, "expected a version"),
        (None, {"python": "/no/such/python"}, "is no file"),
        (None, {"python": "--help"}, "expected a version"),
        (None, {"requirements": "timm==0.6"}, "is no file"),
        ("auto", {"requirements": ["--index-url=https://example.org"]}, "is no requirement"),
        ("auto", {"requirements": ["a @ https://example.org/a.whl"]}, "names an address"),
        ("auto", {"requirements": ["../evil"]}, "is no requirement"),
        ("auto", {"overrides": ["-r x"]}, "is no requirement"),
        ("auto", {"requirements": ["torch===\x1b[2J"]}, "invisible characters"),
        ("auto", {"extras": ["a b"]}, "expected names"),
        ("auto", {"extras": ["a"], "requirements": ["b"]}, "instead"),
        ("auto", {"allow_build": "yes"}, "expected True or False"),
    ],
)
def test_mistakes(base, fields, match):
    with pytest.raises(ValueError, match=match):
        Environment(base, **fields)


@pytest.mark.parametrize(
    "fields", [{"requirements": [1]}, {"overrides": "torch"}, {"extras": "a"}, {"requirements": 3}]
)
def test_wrong_types(fields):
    with pytest.raises(TypeError):
        Environment("auto", **fields)


def test_names_are_one_line_and_short():
    assert Environment("auto", overrides=["torch"]).name == "auto; override torch"
    long = Environment("auto", requirements=[f"package{number}" for number in range(100)])
    assert len(long.name) < 300
    assert long.name != Environment("auto", requirements=[f"package{number}" for number in range(101)]).name


def test_words_stand_for_environments():
    assert checked_environment(None) is None
    assert checked_environment("auto") == Environment("auto")
    with pytest.raises(errors.EnvironmentBuildError, match="expected 'host', 'auto'"):
        checked_environment("conda")
    with pytest.raises(errors.EnvironmentBuildError):
        checked_environment(["timm"])
