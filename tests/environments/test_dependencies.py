"""isohub.environments.dependencies: entries of `dependencies`, and the error that names all missing ones."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isohub.environments.dependencies import Dependency, missing_error, parse_dependencies, unmet


@pytest.mark.parametrize(
    ("text", "import_name", "requirement"),
    [
        ("torch", "torch", "torch"),
        (" torch ", "torch", "torch"),
        ("timm.models", "timm", "timm"),
        ("cv2", "cv2", "opencv-python"),
        ("PIL.Image", "PIL", "Pillow"),
        ("yaml", "yaml", "PyYAML"),
        ("sklearn.metrics", "sklearn", "scikit-learn"),
        ("skimage", "skimage", "scikit-image"),
        ("google.protobuf", "google", "protobuf"),
        ("ruamel.yaml", "ruamel", "ruamel.yaml"),
        ("Pillow", "PIL", "Pillow"),
        ("PyYAML", "yaml", "PyYAML"),
        ("os", "os", None),
        ("json.decoder", "json", None),
        ("numpy>=1.0", "numpy", "numpy>=1.0"),
        ("numpy >=1.0, <3", "numpy", "numpy<3,>=1.0"),
        ("scikit-learn", "sklearn", "scikit-learn"),
        ("opencv-python-headless==4.5", "cv2", "opencv-python-headless==4.5"),
        ("cv2>=4", "cv2", "opencv-python>=4"),
        ("pytorch-lightning~=2.0", "pytorch_lightning", "pytorch-lightning~=2.0"),
        ("hydra-core[extra]>=1", "hydra", "hydra-core[extra]>=1"),
        ("thing; python_version >= '3'", "thing", "thing"),
        ("thing @ https://example.org/thing.whl", "thing", None),
        ("\uff4eumpy", "\uff4eumpy", None),
        ("", None, None),
        ("   ", None, None),
        ("two words", None, None),
        ("--index-url=https://example.org", None, None),
        ("-r requirements.txt", None, None),
        ("$(reboot)", None, None),
        ("a;b", None, None),
        (".", None, None),
        ("a..b", "a", "a..b"),
        ("../evil", None, None),
    ],
)
def test_entries(text, import_name, requirement):
    assert parse_dependencies([text]) == (Dependency(text, import_name, requirement),)


def test_repetitions_and_markers_that_do_not_hold_are_left_out():
    entries = ["torch", "dataclasses; python_version < '3.7'", "torch", "numpy"]
    assert [dependency.text for dependency in parse_dependencies(entries)] == ["torch", "numpy"]


def test_all_missing_ones_are_named_at_once_with_the_pip_line():
    missing = parse_dependencies(["cv2", "PIL", "thing>=1.0,!=1.5", "$(reboot)"])
    error = missing_error(missing, "org/repo:main", "c" * 40)
    assert error.missing == ("cv2", "PIL", "thing>=1.0,!=1.5", "$(reboot)")
    for part in ("org/repo:main", "c" * 40, "cv2", "PIL", "thing>=1.0", "$(reboot)"):
        assert part in error.message
    assert error.command == "python -m pip install opencv-python Pillow 'thing!=1.5,>=1.0'"
    assert error.hint == f"{error.command}; or load it with environment='auto', which brings what the repo asks for"


def test_nothing_to_install_gives_no_pip_line():
    error = missing_error(parse_dependencies(["", "--pre"]), "org/repo", "c" * 40)
    assert error.hint is None
    assert "'--pre'" in error.message


def test_a_direct_url_is_named_and_not_recommended():
    error = missing_error(parse_dependencies(["thing @ https://example.org/x.whl"]), "org/repo", "c" * 40)
    assert error.hint is None
    assert "https://example.org/x.whl" in error.message


def test_escapes_in_an_entry_do_not_reach_a_terminal():
    error = missing_error(parse_dependencies(["\x1b[2Jevil\u202e"]), "org/repo", "c" * 40)
    assert "\x1b" not in str(error)
    assert "\u202e" not in str(error)


@given(
    st.lists(st.one_of(st.text(max_size=20), st.from_regex(r"[a-zA-Z0-9._\-]{1,8}[<>=!~;\[@ ]{0,3}.{0,6}")), max_size=4)
)
def test_any_text_is_parsed_and_every_requirement_is_one_word_that_is_no_option(texts):
    dependencies = parse_dependencies(texts)
    for dependency in dependencies:
        if dependency.import_name is not None:
            assert dependency.import_name.isidentifier()
        else:
            assert dependency.requirement is None
    error = missing_error(dependencies, "org/repo", "c" * 40)
    if error.command is not None:
        words = shlex.split(error.command)
        assert words[:4] == ["python", "-m", "pip", "install"]
        assert not any(word.startswith("-") for word in words[4:])
    unmet(dependencies, ())


def test_what_is_installed_is_not_missing():
    present = parse_dependencies(["torch", "numpy>=1.0", "os", "packaging.version", "pytest", "packaging>=1"])
    assert unmet(present, ()) == ()


def test_what_is_not_installed_or_too_old_is_missing():
    wanted = parse_dependencies(["torch", "no_such_thing", "numpy>=999", "no_such.inner", ""])
    assert [str(dependency) for dependency in unmet(wanted, ["no_such_thing", "no_such"])] == [
        "no_such_thing",
        "numpy>=999",
        "no_such.inner",
        "",
    ]
    error = missing_error(unmet(wanted, ["no_such_thing", "no_such"]), "org/repo", "c" * 40)
    assert "numpy (have " in error.message
    assert ", want >=999)" in error.message
