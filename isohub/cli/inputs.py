"""What stands on the command line, as values: arguments, keywords and model inputs.

    randn(1,3,224,224)  rand(...)  zeros(...)  ones(...)     float32 of that shape
    randint(1000, (1,16))                                     int64 below 1000
    picture.npy                                               an array, never a pickle
    inputs.safetensors                                        one tensor, or a dict of them
    name=...                                                  any of these as a keyword

Nothing is evaluated: a shape is read by `ast.literal_eval` and must be whole numbers. Side: caller.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    import torch

__all__ = ["Input", "make_inputs", "parse_input", "parse_keywords", "parse_value"]

_FILLED = re.compile(r"(?P<kind>randn|rand|zeros|ones|randint)\s*\((?P<inside>[^()]*(?:\([^()]*\))?[^()]*)\)")
_NAMED = re.compile(r"(?P<name>[^\W\d]\w*)=(?P<rest>.+)", re.DOTALL)
_FORMS = "randn(1,3,224,224), rand(...), zeros(...), ones(...), randint(1000, (1,16)), a .npy or a .safetensors file"
_MAX_DIMENSIONS = 64  # torch's own limit
# A terabyte: beyond it a typing error is likelier than a wish.
_MAX_ELEMENTS = 1 << 38

Kind = Literal["randn", "rand", "zeros", "ones", "randint", "npy", "safetensors"]


@dataclass(frozen=True)
class Input:
    """One ``--input``, parsed; nothing was read or made.

    Attributes:
        text: What was written.
        kind: How it is to be made.
        name: Keyword that it is passed under; None for a positional input.
        shape: Of what is filled.
        high: One above the largest number of `randint`.
        path: Of what is read.
    """

    text: str
    kind: Kind
    name: str | None = None
    shape: tuple[int, ...] = ()
    high: int = 0
    path: Path | None = None


def parse_value(text: str) -> Any:
    """An argument: what JSON makes of it, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parse_keywords(settings: Sequence[str]) -> dict[str, Any]:
    """``--set key=value`` as keywords.

    Raises:
        click.BadParameter: There is no ``=``, no key, or a key twice.
    """
    keywords: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{setting!r}: expected name=value", param_hint="--set")
        if key in keywords:
            raise click.BadParameter(f"{key!r} is given twice", param_hint="--set")
        keywords[key] = parse_value(value)
    return keywords


def parse_input(text: str) -> Input:
    """One ``--input``.

    Raises:
        click.BadParameter: It is none of the forms.
    """
    name, body = None, text.strip()
    if named := _NAMED.fullmatch(body):
        name, body = named["name"], named["rest"].strip()
    if filled := _FILLED.fullmatch(body):
        return _filled(text, name, filled["kind"], filled["inside"])
    for kind in ("npy", "safetensors"):
        if body.endswith(f".{kind}"):
            return Input(text, kind, name, path=Path(body).expanduser())
    raise _bad(text, f"expected {_FORMS}")


def make_inputs(inputs: Sequence[Input], seed: int | None) -> tuple[list[Any], dict[str, Any]]:
    """The inputs themselves, CPU tensors; random ones from one generator in the order of the inputs.

    Args:
        inputs: Parsed.
        seed: Of the generator; None takes new entropy.

    Returns:
        Positional inputs and keywords.

    Raises:
        click.BadParameter: A file cannot be read, or there is not enough memory.
    """
    import torch

    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for item in inputs:
        try:
            value = _make(item, generator)
        except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
            raise _bad(item.text, f"{type(error).__name__}: {error}") from error
        if item.name is None:
            args.append(value)
        elif item.name in kwargs:
            raise _bad(item.text, f"the keyword {item.name!r} is given twice")
        else:
            kwargs[item.name] = value
    return args, kwargs


def _make(item: Input, generator: torch.Generator) -> Any:
    import torch

    if item.path is not None:
        return _read_npy(item.path) if item.kind == "npy" else _read_safetensors(item.path)
    if item.kind == "zeros":
        return torch.zeros(item.shape)
    if item.kind == "ones":
        return torch.ones(item.shape)
    if item.kind == "rand":
        return torch.rand(item.shape, generator=generator)
    if item.kind == "randint":
        return torch.randint(item.high, item.shape, generator=generator)
    return torch.randn(item.shape, generator=generator)


def _read_npy(path: Path) -> torch.Tensor:
    import torch
    from numpy.lib import format as npy

    with path.open("rb") as stream:
        array = npy.read_array(stream, allow_pickle=False)  # one array, no archive
    return torch.from_numpy(array)


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError("safetensors is not installed: python -m pip install safetensors") from error
    tensors: dict[str, torch.Tensor] = load_file(path)
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


def _filled(text: str, name: str | None, kind: str, inside: str) -> Input:
    try:
        numbers: Any = ast.literal_eval(f"({inside.strip().rstrip(',')},)") if inside.strip() else ()
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise _bad(text, "expected whole numbers within the brackets") from None
    high = 0
    if kind == "randint":
        if not numbers or not _whole(numbers[0]) or not 0 < numbers[0] < 1 << 63:
            raise _bad(text, "expected randint(high, shape) with a positive high")
        high, *numbers = numbers
    if len(numbers) == 1 and isinstance(numbers[0], (tuple, list)):
        numbers = numbers[0]
    shape = tuple(numbers)
    if not all(_whole(size) and size >= 0 for size in shape) or len(shape) > _MAX_DIMENSIONS:
        raise _bad(text, "expected a shape of whole numbers")
    if math.prod(shape) > _MAX_ELEMENTS:
        raise _bad(text, f"{math.prod(shape)} numbers are more than {_MAX_ELEMENTS}")
    return Input(text, kind, name, shape=shape, high=high)  # type: ignore[arg-type]  # the pattern names kinds


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad(text: str, why: str) -> click.BadParameter:
    return click.BadParameter(f"{text!r}: {why}", param_hint="--input")
