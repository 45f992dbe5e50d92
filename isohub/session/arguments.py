"""Arguments outside of the closed set, for a worker: pickled by value where the worker cannot import them.

Side: caller, which is the more trusted one; only this direction pickles.
"""

from __future__ import annotations

import io
import os
import sys
import sysconfig
import types
from typing import Any

import cloudpickle
import torch

from isohub.errors import ValueNotTransferableError

__all__ = ["pickled"]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Notes the tensors that require a gradient."""

    def __init__(self, file: io.BytesIO, found: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._found = found

    def persistent_id(self, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            self._found.append(value)


def pickled(value: Any, differentiable: list[torch.Tensor] | None = None) -> bytes:
    """A value for a worker. The caller is the more trusted side: this direction may pickle.

    Args:
        value: Anything.
        differentiable: Takes the tensors in it that require a gradient.
    """
    own = [
        module for module in _own_modules(value) if module.__name__ not in cloudpickle.list_registry_pickle_by_value()
    ]
    try:
        for module in own:
            cloudpickle.register_pickle_by_value(module)
        if differentiable is None:
            data: bytes = cloudpickle.dumps(value)
        else:
            buffer = io.BytesIO()
            _Pickler(buffer, differentiable).dump(value)
            data = buffer.getvalue()
    except Exception as error:
        raise ValueNotTransferableError(
            f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent to a worker: {error}",
            hint="pass plain values and tensors, or use h.run(fn, ...) and make the object there",
            where=type(value).__name__,
        ) from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)
    return data


def _own_modules(value: Any) -> list[types.ModuleType]:
    """Modules of the caller's own code that a value comes from: a worker cannot import them."""
    name = (
        getattr(value, "__module__", None) if isinstance(value, (type, types.FunctionType)) else type(value).__module__
    )
    module = sys.modules.get(str(name))
    file = getattr(module, "__file__", None)
    if module is None or file is None or name == "__main__":
        return []
    installed = {os.path.realpath(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return [] if any(os.path.realpath(file).startswith(place + os.sep) for place in installed) else [module]
