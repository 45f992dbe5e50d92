"""What a metric may give for a batch, as values and as JSON, bit for bit; and how batches become one value.

Rules:

1. A result is a dict of names to numbers (bool, int, float) and tensors. Anything else is a failure of that batch.
2. Reductions go over batches in their order, whatever order they were computed in.

Side: caller. Trust: names, shapes and values are a worker's. They were checked by `wire`; counts and lengths are here.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["REDUCERS", "Metric", "decoded", "encoded", "metrics_of", "reduced"]

Metric = bool | int | float | torch.Tensor | list[Any]
_MOST_METRICS = 1000
_NAME_LIMIT_CHARS = 200
# A float holds none that is larger, and Python writes none of more than 4,300 digits.
_MOST_BITS = 1024
# Those that a file of results can hold. Complex and quantised ones have no order, so no reduction by most of these.
_DTYPES = {
    str(dtype).partition(".")[2]: dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
}


def metrics_of(claimed: Any) -> dict[str, Any]:
    """A result of the caller's function, checked. Trust: worker.

    Raises:
        TypeError: It is no dict of names to numbers and tensors.
    """
    if not isinstance(claimed, Mapping) or len(claimed) > _MOST_METRICS:
        kind = type(claimed).__name__
        raise TypeError(f"fn gave a {kind}; expected a dict of at most {_MOST_METRICS} names to numbers and tensors")
    found: dict[str, Any] = {}
    for name, value in claimed.items():
        if not isinstance(name, str) or len(name) > _NAME_LIMIT_CHARS:
            raise TypeError(
                f"fn gave a metric by the name {name!r:.100}; expected a str of {_NAME_LIMIT_CHARS} letters"
            )
        found[name] = _metric(name, value)
    return found


def _metric(name: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        dense = value.layout is torch.strided and not value.is_meta and str(value.dtype).partition(".")[2] in _DTYPES
        if not dense:
            raise TypeError(f"fn gave a tensor of {value.dtype}, {value.layout} as {name!r:.100}; expected a dense one")
        value = value.detach().cpu().as_subclass(torch.Tensor)  # a parameter or a subclass is a plain one from here on
        return value.item() if value.ndim == 0 and not value.is_complex() else value
    if type(value) not in (bool, int, float):
        raise TypeError(f"fn gave a {type(value).__name__} as {name!r:.100}; expected a number or a tensor")
    if type(value) is int and value.bit_length() > _MOST_BITS:
        raise TypeError(
            f"fn gave a whole number of {value.bit_length():,} bits as {name!r:.100}; at most {_MOST_BITS:,}"
        )
    return value


def encoded(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON has them."""
    return {name: _encoded(value) for name, value in metrics.items()}


def _encoded(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return {
            "dtype": str(value.dtype).partition(".")[2],
            "shape": list(value.shape),
            "data": base64.b64encode(data).decode("ascii"),
        }
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def decoded(row: Any) -> dict[str, Any]:
    """Metrics from JSON.

    Raises:
        ValueError: They are none.
    """
    if not isinstance(row, dict):
        raise ValueError("metrics that are none")
    return {name: _decoded(value) for name, value in row.items()}


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if "float" in value:
            return float(value["float"])
        try:
            dtype, shape = _DTYPES[value["dtype"]], [int(size) for size in value["shape"]]
            data = bytearray(base64.b64decode(value["data"], validate=True))
            flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
            if flat.numel() != math.prod(shape):
                raise ValueError("a tensor of another size")
            return flat.reshape(shape)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError("a tensor that is none") from error
    if type(value) not in (bool, int, float):
        raise ValueError("a metric that is none")
    return value


# Reducers: values in the order of batches, and what the batches weigh.


def _sum(values: Sequence[Any], weights: Sequence[float]) -> Any:  # noqa: ARG001 - one shape for all
    total = _wide(values[0])
    for value in values[1:]:
        total = total + _wide(value)
    return total


def _mean(values: Sequence[Any], weights: Sequence[float]) -> Any:
    total = sum(weights)
    if total == 0:
        return math.nan
    weighted = _sum([_wide(value) * weight for value, weight in zip(values, weights, strict=True)], weights)
    return weighted / total


def _wide(value: Any) -> Any:
    """A value in which a sum does not overflow or lose more than it must."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            return value.to(torch.float64)
        return value if value.is_complex() else value.to(torch.int64)
    return int(value) if isinstance(value, bool) else value


def _least(values: Sequence[Any], weights: Sequence[float]) -> Any:  # noqa: ARG001
    return _extreme(values, torch.minimum, lambda one, other: other < one)


def _most(values: Sequence[Any], weights: Sequence[float]) -> Any:  # noqa: ARG001
    return _extreme(values, torch.maximum, lambda one, other: other > one)


def _extreme(values: Sequence[Any], tensors: Callable[..., Any], better: Callable[[Any, Any], bool]) -> Any:
    """The extreme; a NaN among the values is the result, as torch has it."""
    found = values[0]
    for value in values[1:]:
        if isinstance(found, torch.Tensor) or isinstance(value, torch.Tensor):
            found = tensors(*(torch.as_tensor(each) for each in (found, value)))
        elif found == found and (value != value or better(found, value)):
            found = value
    return found


def _count(values: Sequence[Any], weights: Sequence[float]) -> int:  # noqa: ARG001
    return len(values)


def _list(values: Sequence[Any], weights: Sequence[float]) -> list[Any]:  # noqa: ARG001
    return list(values)


def _concat(values: Sequence[Any], weights: Sequence[float]) -> torch.Tensor:  # noqa: ARG001
    tensors = [torch.as_tensor(value) for value in values]
    return torch.cat([tensor.reshape(1) if tensor.ndim == 0 else tensor for tensor in tensors])


Reducer = Callable[[Sequence[Any], Sequence[float]], Any]
REDUCERS: dict[str, Reducer] = {
    "mean": _mean,
    "sum": _sum,
    "min": _least,
    "max": _most,
    "count": _count,
    "list": _list,
    "concat": _concat,
}


def reduced(name: str, reducer: str, values: Sequence[Any], weights: Sequence[float]) -> Any:
    """Values of batches, in their order, as one.

    Raises:
        ValueError: They do not go together: tensors of other shapes, or a number among tensors.
    """
    try:
        return REDUCERS[reducer](values, weights)
    except (RuntimeError, TypeError, OverflowError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"{name!r} cannot be reduced by {reducer!r}: {first}\nhint: reducers={{{name!r}: 'list'}} keeps them apart"
        ) from error
