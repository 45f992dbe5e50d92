"""The grammar of arguments, keywords and inputs. Nothing on the command line is evaluated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isohub.cli.inputs import Input, make_inputs, parse_input, parse_keywords, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1.5", -1.5),
        ("true", True),
        ("null", None),
        ("[1, [2]]", [1, [2]]),
        ('{"a": 1}', {"a": 1}),
        ('"3"', "3"),
        ("resnet", "resnet"),
        ("True", "True"),
        ("", ""),
        ("1_000", "1_000"),
        ("[" * 100_000, "[" * 100_000),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_values_are_json_or_text(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_keywords() -> None:
    assert parse_keywords(["width=4", "name=a=b", "empty="]) == {"width": 4, "name": "a=b", "empty": ""}


@pytest.mark.parametrize("settings", [["width"], ["=4"], ["a b=4"], ["a=1", "a=2"], ["a.b=1"]])
def test_keywords_that_are_none(settings: list[str]) -> None:
    with pytest.raises(click.BadParameter):
        parse_keywords(settings)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("randn(1,3,224,224)", Input("", "randn", shape=(1, 3, 224, 224))),
        (" rand( 2 , 3 ) ", Input("", "rand", shape=(2, 3))),
        ("zeros((2, 3))", Input("", "zeros", shape=(2, 3))),
        ("ones([4])", Input("", "ones", shape=(4,))),
        ("ones(4,)", Input("", "ones", shape=(4,))),
        ("zeros()", Input("", "zeros", shape=())),
        ("zeros(0, 3)", Input("", "zeros", shape=(0, 3))),
        ("randint(10, (2, 3))", Input("", "randint", shape=(2, 3), high=10)),
        ("randint(10, 2, 3)", Input("", "randint", shape=(2, 3), high=10)),
        ("randint(10)", Input("", "randint", shape=(), high=10)),
        ("x=randn(2)", Input("", "randn", name="x", shape=(2,))),
        ("a/b.npy", Input("", "npy", path=Path("a/b.npy"))),
        ("mask=./a=b.npy", Input("", "npy", name="mask", path=Path("a=b.npy"))),
        ("w.safetensors", Input("", "safetensors", path=Path("w.safetensors"))),
    ],
)
def test_inputs(text: str, wanted: Input) -> None:
    parsed = parse_input(text)
    assert parsed == Input(text, wanted.kind, wanted.name, wanted.shape, wanted.high, wanted.path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "randn",
        "randn(2",
        "randn(x)",
        "randn(-1)",
        "randn(1.5)",
        "randn(True)",
        "randn('2')",
        "randn(2**3)",
        "randn(__import__('os').getpid())",
        "randn(1)(2)",
        "randn(((1,),))",
        "randn(9999999999, 9999999999)",
        "randn(" + "1," * 65 + ")",
        "randint(0, (1,))",
        "randint(1.5, (1,))",
        "randint()",
        "randn((1,), 2)",
        "exec(1)",
        "array.pickle",
        "array.npz",
        "x=",
        "2x=randn(1)",
    ],
)
def test_inputs_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter) as raised:
        parse_input(text)
    assert repr(text)[:40] in raised.value.message


@given(st.text())
def test_any_text_is_an_input_or_a_usage_error(text: str) -> None:
    for written in (text, f"randn({text})", f"randint({text})"):
        try:
            parse_input(written)
        except click.BadParameter:
            pass


def test_one_seed_gives_the_same_inputs() -> None:
    texts = ["randn(2,3)", "randint(9, (4,))", "x=rand(2)", "zeros(1)", "y=ones(1)"]
    wanted = [parse_input(text) for text in texts]
    (first, named), (again, named_again), (other, _) = (make_inputs(wanted, seed) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(named["x"], named_again["x"])
    assert not torch.equal(first[0], other[0])
    assert [tensor.dtype for tensor in first] == [torch.float32, torch.int64, torch.float32]
    assert list(named) == ["x", "y"]
    assert not torch.equal(make_inputs(wanted, None)[0][0], make_inputs(wanted, None)[0][0])


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(2, 3))
    (tensor,), _ = make_inputs([parse_input(str(tmp_path / "a.npy"))], None)
    assert torch.equal(tensor, torch.arange(6.0, dtype=torch.float64).reshape(2, 3))


class Evil:
    def __reduce__(self) -> Any:
        return sys.exit, ("a pickle ran",)


def test_npy_with_a_pickle_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(click.BadParameter, match="allow_pickle=False"):
        make_inputs([parse_input(str(tmp_path / "a.npy"))], None)


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"PK\x03\x04"])
def test_npy_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(click.BadParameter, match="a.npy"):
        make_inputs([parse_input(str(tmp_path / "a.npy"))], None)


def test_a_keyword_given_twice() -> None:
    with pytest.raises(click.BadParameter, match="twice"):
        make_inputs([parse_input("x=ones(1)"), parse_input("x=ones(1)")], None)
