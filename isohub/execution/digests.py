"""A digest of what a caller gave: functions, arguments, batches. Equal digests: the same question.

A pickle's bytes differ between runs of one program (by which texts are one object), so this goes by content: of a
function its code, defaults, closure and the globals that it names; of a tensor or an array its dtype, shape and bytes;
of an object its class and what `copy` would build it again from. A module is its name; a builtin likewise.

Side: caller. Trust: the caller's own values.
"""

from __future__ import annotations

import hashlib
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["digest_of"]

_DIGEST_BYTES = 16
_MOST_DEEP = 100
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object, in its repr


def digest_of(value: Any) -> str:
    """32 hex digits."""
    digest = _Digest()
    digest.add(value)
    return digest.hash.hexdigest()


class _Digest:
    """Takes values in order."""

    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        self._open: dict[int, int] = {}  # id of what is being taken: how deep it is
        self._functions: dict[int, int] = {}

    def _mark(self, kind: str, *words: object) -> None:
        text = "\x1f".join(map(str, (kind, *words)))
        self.hash.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))

    def add(self, value: Any) -> None:
        """Take one value."""
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            self._mark(type(value).__name__, repr(value))
        elif isinstance(value, (bytes, bytearray)):
            self._mark("bytes", len(value))
            self.hash.update(value)
        elif isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._mark("array", value.dtype.str, value.shape)
            self.hash.update(np.ascontiguousarray(value).data.cast("B") if value.size else b"")
        elif id(value) in self._open or len(self._open) > _MOST_DEEP:
            self._mark("again", self._open.get(id(value)))
        else:
            self._open[id(value)] = len(self._open)
            try:
                self._structure(value)
            finally:
                del self._open[id(value)]

    def _tensor(self, tensor: torch.Tensor) -> None:
        self._mark("tensor", tensor.dtype, tuple(tensor.shape), tensor.layout)
        if tensor.layout is not torch.strided or tensor.is_quantized:
            self.add(repr(tensor))
            return
        whole = tensor.detach().cpu().contiguous().reshape(-1)
        if whole.numel():
            self.hash.update(whole.view(torch.uint8).numpy().data)

    def _structure(self, value: Any) -> None:
        if isinstance(value, (list, tuple)):
            self._mark(type(value).__name__, len(value))
            for item in value:
                self.add(item)
        elif isinstance(value, Mapping):
            self._mark("mapping", len(value))
            for key, item in value.items():
                self.add(key)
                self.add(item)
        elif isinstance(value, (set, frozenset)):
            self._mark("set", *sorted(digest_of(item) for item in value))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._mark("method", value.__name__)
            self.add(value.__self__)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, types.ModuleType):
            self._mark("module", value.__name__)
        elif isinstance(value, type):
            self._mark("class", value.__module__, value.__qualname__)
            self._methods(value)
        elif isinstance(value, types.BuiltinFunctionType):
            self._mark("builtin", value.__qualname__)
            self.add(value.__self__)
        else:
            self._object(value)

    def _object(self, value: Any) -> None:
        """By its class and by what it would be built again from."""
        kind = type(value)
        self._mark("object", kind.__module__, kind.__qualname__)
        self._methods(kind)
        try:
            parts = value.__reduce_ex__(4)
        except Exception:  # noqa: BLE001 - what cannot be copied is what it shows
            parts = vars(value) if hasattr(value, "__dict__") else _ADDRESS.sub("", repr(value))
        if isinstance(parts, tuple):
            # What makes it is the class's business; an iterator is of the items of a list or a mapping.
            parts = [list(part) if isinstance(part, Iterator) else part for part in parts[1:]]
        self.add(parts)

    def _methods(self, kind: type) -> None:
        """What a class and those that it derives from hold: code, defaults and plain values.

        One of torch's or numpy's is known by its name. Globals of methods are not followed: a batch may be an object of
        a large library's.
        """
        for base in kind.__mro__:
            if not base.__module__.startswith(("torch", "numpy", "builtins")):
                for name, item in sorted(vars(base).items()):
                    within = _unwrapped(item)
                    if isinstance(within, types.FunctionType):
                        self._mark("own", name, type(item).__name__)
                        self._code(within.__code__)
                        self.add(within.__defaults__)
                        self.add(within.__kwdefaults__)
                    elif not name.startswith("__") and isinstance(item, (bool, int, float, complex, str, bytes)):
                        self._mark("own", name)
                        self.add(item)

    def _function(self, function: types.FunctionType) -> None:
        if id(function) in self._functions:
            self._mark("again", self._functions[id(function)])
            return
        self._functions[id(function)] = len(self._functions)
        self._mark("function", function.__qualname__)
        if function.__module__.partition(".")[0] in ("torch", "numpy"):
            return
        self._code(function.__code__)
        self.add(function.__defaults__)
        self.add(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # a name that was not set yet
                self._mark("empty")
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__:
                self._mark("global", name)
                self.add(function.__globals__[name])

    def _code(self, code: types.CodeType) -> None:
        self._mark("code", code.co_argcount, code.co_kwonlyargcount, code.co_flags, *code.co_names, *code.co_varnames)
        self.hash.update(code.co_code)
        for constant in code.co_consts:
            self.add(constant)


def _unwrapped(item: Any) -> Any:
    """The function in what a class holds: of a static method, a property, or what functools made of it."""
    for name in ("__func__", "fget", "func", "__wrapped__"):
        item = getattr(item, name, item)
    return item


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found
