"""What a model gave, taken apart: each leaf with its place, in the order in which it came.

Rules:

1. A place is written as Python writes it: ``output['logits'][0]``, ``output.scores`` for a record.
2. A leaf is a tensor, a value that is compared by equality, or the name of a class for what stayed in its worker.
3. Arrays, numbers and long lists of numbers are tensors here, of a kind of their own.
4. A container has a line of its own, with its kind and its length, so that an empty one that comes or goes is seen.

Side: caller. Trust: names, keys and texts are a worker's, as far as `wire` lets them through; they are escaped here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from isohub.errors import IsohubError, printable

__all__ = ["Leaf", "leaves_by_place", "leaves_of"]

# A shorter list of numbers is easier to read item by item.
_LONG_LIST = 8
_LONGEST_TEXT_CHARS = 200
_KEY_CHARS = 80
# Of one answer. A detector's hundred boxes with their fields are hundreds; each place has figures of its own.
_MOST_PLACES = 20_000


@dataclass(frozen=True)
class Leaf:
    """One place of a value.

    Attributes:
        path: Where it is.
        kind: "tensor", "array", "number", "container", "object", or the name of a plain value's or a long list's type.
        tensor: Of a tensor, an array, a number or a long list of numbers; else None.
        value: What is compared by equality where there is no tensor.
    """

    path: str
    kind: str
    tensor: torch.Tensor | None = None
    value: Any = None

    @property
    def form(self) -> str:
        """Kind, dtype and shape in a few words: ``float32[1, 3]``."""
        if self.tensor is None:
            return self.kind if self.kind != "container" else str(self.value)
        words = f"{str(self.tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, self.tensor.shape))}]"
        words += " without values" if self.tensor.is_meta else ""
        return words if self.kind == "tensor" else f"{self.kind} {words}"

    @property
    def shown(self) -> str:
        """A plain value as text."""
        return printable(_written(self.value), limit_chars=_LONGEST_TEXT_CHARS, newlines=False)


def leaves_of(value: Any, path: str = "output") -> Iterator[Leaf]:
    """The leaves of a value.

    Args:
        value: What a handle's call gave. Trust: worker.
        path: Where it is.
    """
    if isinstance(value, torch.Tensor) and not _is_handle(value):
        yield Leaf(path, "tensor", value.detach())
    elif isinstance(value, np.ndarray):
        yield _array(path, value)
    elif isinstance(value, (bool, np.bool_)) or value is None or isinstance(value, (str, bytes, bytearray)):
        yield Leaf(path, type(value).__name__, value=value)
    elif isinstance(value, (int, float, complex, np.number)):
        yield _number(path, value)
    elif isinstance(value, torch.Size):
        yield Leaf(path, "Size", value=tuple(value))
    elif isinstance(value, Mapping):
        yield from _mapping(path, value)
    elif isinstance(value, (list, tuple)):
        yield from _sequence(path, value)
    elif _is_handle(value):
        yield Leaf(path, "object", value=_class_name(value))
    else:
        yield Leaf(path, printable(type(value).__name__, newlines=False), value=value)


def leaves_by_place(value: Any, path: str = "output") -> dict[str, Leaf]:
    """The leaves of a value, each under a place of its own.

    Args:
        value: What a handle's call gave. Trust: worker.
        path: Where it is.

    Raises:
        IsohubError: There are too many to be compared one by one.
    """
    leaves: dict[str, Leaf] = {}
    for leaf in itertools.islice(leaves_of(value, path), _MOST_PLACES + 1):
        place = leaf.path
        while place in leaves:  # two long keys that are cut to the same
            place += "'"
        leaves[place] = leaf
    if len(leaves) > _MOST_PLACES:
        raise IsohubError(
            f"the answer has more than {_MOST_PLACES:,} places, each of which would be compared by itself",
            hint="compare a method that gives less, or numbers as one tensor",
        )
    return leaves


def _mapping(path: str, value: Mapping[Any, Any]) -> Iterator[Leaf]:
    class_name = getattr(value, "class_name", None)
    yield Leaf(path, "container", value=f"{_name(value)} of {len(value)}")
    for key, item in value.items():
        by_name = class_name is not None and isinstance(key, str) and key.isidentifier()
        shown = printable(key if by_name else _written(key), limit_chars=_KEY_CHARS, newlines=False)
        yield from leaves_of(item, f"{path}.{shown}" if by_name else f"{path}[{shown}]")


def _sequence(path: str, value: list[Any] | tuple[Any, ...]) -> Iterator[Leaf]:
    fields = getattr(value, "_fields", None) if isinstance(value, tuple) else None
    if fields is None and len(value) >= _LONG_LIST:
        for kind, dtype in ((float, torch.float64), (int, torch.int64)):
            if all(type(item) is kind for item in value):
                try:
                    yield Leaf(path, _name(value), torch.tensor(value, dtype=dtype))
                except (RuntimeError, OverflowError, ValueError):
                    break  # a number beyond 64 bits
                return
    yield Leaf(path, "container", value=f"{_name(value)} of {len(value)}")
    for number, item in enumerate(value):
        place = f"[{number}]" if fields is None else f".{printable(str(fields[number]), newlines=False)}"
        yield from leaves_of(item, path + place)


def _array(path: str, value: np.ndarray[Any, Any]) -> Leaf:
    if value.dtype.kind in "biufc":
        try:
            return Leaf(path, "array", torch.from_numpy(np.ascontiguousarray(value)))
        except TypeError:  # a dtype that torch lacks
            pass
    return Leaf(path, "array", value=value)


def _number(path: str, value: Any) -> Leaf:
    plain = value.item() if isinstance(value, np.number) else value
    if isinstance(plain, (float, complex)):
        dtype = torch.complex128 if isinstance(plain, complex) else torch.float64
        return Leaf(path, "number", torch.tensor(plain, dtype=dtype))
    return Leaf(path, "int", value=plain)


def _written(value: Any) -> str:
    """As Python writes it; a whole number of more digits than Python writes, in hexadecimal."""
    try:
        return repr(value)
    except ValueError:
        return hex(value) if isinstance(value, int) else f"{type(value).__name__} with a number of very many digits"


def _name(value: Any) -> str:
    name = getattr(value, "class_name", None)
    return printable(name if isinstance(name, str) else type(value).__name__, limit_chars=_KEY_CHARS, newlines=False)


def _is_handle(value: Any) -> bool:
    return "_isohub" in getattr(value, "__dict__", {})


def _class_name(handle: Any) -> str:
    return str(handle.__dict__["_isohub"].class_name)
