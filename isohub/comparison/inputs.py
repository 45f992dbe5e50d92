"""What models are called with: values, specifications of tensors, files, or a data set of them.

    randn(1,3,224,224)  rand(...)  zeros(...)  ones(...)     float32 of that shape
    randint(1000, (1,16))                                     int64 below 1000
    picture.npy                                               an array, never a pickle
    inputs.safetensors                                        one tensor, or a dict of them
    inputs.pt  inputs.pth                                     what torch.save wrote: tensors and plain values alone
    name=...                                                  any of these as a keyword

Nothing is evaluated: a shape is read by `ast.literal_eval` and must be whole numbers. Side: caller. Trust: the caller's
own texts and files; no file can run code.
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

__all__ = ["Call", "Input", "calls_of", "make_inputs", "parse_input"]

_FILLED = re.compile(r"(?P<kind>randn|rand|zeros|ones|randint)\s*\((?P<inside>[^()]*(?:\([^()]*\))?[^()]*)\)")
_NAMED = re.compile(r"(?P<name>[^\W\d]\w*)=(?P<rest>.+)", re.DOTALL)
_FORMS = (
    "randn(1,3,224,224), rand(...), zeros(...), ones(...), randint(1000, (1,16)), or a file: .npy, .safetensors, "
    ".pt, .pth"
)
_MAX_DIMENSIONS = 64  # torch's own limit
# A terabyte: beyond it a typing error is likelier than a wish.
_MAX_ELEMENTS = 1 << 38

Kind = Literal["randn", "rand", "zeros", "ones", "randint", "npy", "safetensors", "pt"]
_FILES: dict[str, Kind] = {".npy": "npy", ".safetensors": "safetensors", ".pt": "pt", ".pth": "pt"}


@dataclass(frozen=True)
class Input:
    """One specification, parsed; nothing was read or made.

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


@dataclass(frozen=True)
class Call:
    """What one call is made with.

    Attributes:
        args: Positional arguments.
        kwargs: Keywords.
        text: How it was written, if it was.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


def calls_of(inputs: Any, seed: int | None) -> Iterator[Call]:
    """The calls that inputs stand for.

    Args:
        inputs: A tuple is positional arguments, a dict with names is keywords, a text or a path is a specification, a
            list of texts several of them. A tensor, an array, a list or any other plain value is one argument. Anything
            else that can be iterated, or has a length and items, is a data set: each of its items is one of these.
        seed: Of random inputs; None takes new entropy.

    Raises:
        ValueError: A specification is none, or its file cannot be read.
    """
    if _is_data_set(inputs):
        items = iter(inputs) if isinstance(inputs, Iterable) else (inputs[number] for number in range(len(inputs)))
        for item in items:
            yield _call(item, seed)
    else:
        yield _call(inputs, seed)


def _is_data_set(inputs: Any) -> bool:
    plain = (str, bytes, bytearray, os.PathLike, list, tuple, Mapping, set, frozenset, Call)
    if inputs is None or isinstance(inputs, plain) or hasattr(inputs, "__array__"):
        return False
    return isinstance(inputs, Iterable) or (hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"))


def _call(item: Any, seed: int | None) -> Call:
    if isinstance(item, Call):
        return item
    texts = [item] if isinstance(item, (str, os.PathLike)) else item
    if isinstance(texts, list) and texts and all(isinstance(text, (str, os.PathLike)) for text in texts):
        written = [os.fspath(text) for text in texts]
        args, kwargs = make_inputs([parse_input(text) for text in written], seed)
        return Call(tuple(args), kwargs, ", ".join(written))
    if isinstance(item, tuple) and not hasattr(item, "_fields"):
        return Call(item)
    if isinstance(item, Mapping) and item and all(isinstance(key, str) and key.isidentifier() for key in item):
        return Call((), dict(item))
    return Call((item,))


def parse_input(text: str) -> Input:
    """One specification.

    Raises:
        ValueError: It is none of the forms.
    """
    name, body = None, text.strip()
    if named := _NAMED.fullmatch(body):
        name, body = named["name"], named["rest"].strip()
    if filled := _FILLED.fullmatch(body):
        return _filled(text, name, filled["kind"], filled["inside"])
    for ending, kind in _FILES.items():
        if body.endswith(ending):
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
        ValueError: A file cannot be read, or there is not enough memory.
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
        except Exception as error:
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
        readers = {"npy": _read_npy, "safetensors": _read_safetensors, "pt": _read_pt}
        return readers[item.kind](item.path)
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
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(path)
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


def _read_pt(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - the caller's file, tensors and plain values alone


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


def _bad(text: str, why: str) -> ValueError:
    return ValueError(f"{text!r}: {why}")
