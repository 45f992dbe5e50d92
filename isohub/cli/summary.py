"""What a model gave, in figures: a tree for JSON and lines for people.

Tensors become dtype, shape, mean, standard deviation, least, greatest and the number of NaNs, which are
left out of the other four. Complex tensors are measured by their absolute values. Side: caller.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["lines", "summarise"]

# Numbers that are converted to float64 at once: 32 MB.
_CHUNK_ELEMENTS = 1 << 22
_SHOWN_ITEMS = 50
_SHOWN_CHARS = 300

Summary = dict[str, Any]


def summarise(value: Any) -> Summary:
    """The tree of a value.

    Args:
        value: Anything that a handle's call gives.

    Returns:
        Dicts, lists, strings and numbers; every dict has ``kind``.
    """
    import torch

    from isohub import RemoteModule, RemoteObject
    from isohub.session.link import remote_of

    if isinstance(value, RemoteModule):
        remote = remote_of(value)
        class_name = remote.class_name if remote is not None else "?"
        count = sum(parameter.numel() for parameter in value.parameters())
        return {"kind": "module", "class": class_name, "parameters": count}
    if isinstance(value, RemoteObject):
        remote = remote_of(value)
        return {"kind": "object", "class": remote.class_name if remote is not None else "?"}
    if isinstance(value, torch.Tensor):
        return {"kind": "tensor", **_measured(value)}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return {"kind": "array", **_measured(torch.from_numpy(value))}
    if numpy is not None and isinstance(value, numpy.generic):
        return {"kind": type(value).__name__, "value": _scalar(value.item())}
    if isinstance(value, Mapping):
        entries = [{"key": _key(key), "value": summarise(item)} for key, item in value.items()]
        return {"kind": getattr(value, "class_name", type(value).__name__), "entries": entries}
    if isinstance(value, tuple) and hasattr(value, "class_name"):
        names = getattr(value, "_fields", ())
        entries = [{"key": key, "value": summarise(item)} for key, item in zip(names, value, strict=True)]
        return {"kind": value.class_name, "entries": entries}
    if isinstance(value, (list, tuple, set, frozenset)) and not isinstance(value, torch.Size):
        return {"kind": type(value).__name__, "items": [summarise(item) for item in value]}
    return {"kind": type(value).__name__, "value": _scalar(value)}


def lines(summary: Summary, label: str = "", depth: int = 0) -> Iterator[str]:
    """The tree as indented lines."""
    start = "  " * depth + (f"{label}: " if label else "")
    if "shape" in summary:
        yield start + _tensor_words(summary)
    elif "items" in summary or "entries" in summary:
        inner = [(str(number), item) for number, item in enumerate(summary.get("items", []))]
        inner += [(str(entry["key"]), entry["value"]) for entry in summary.get("entries", [])]
        yield f"{start}{summary['kind']} of {len(inner)}"
        for key, item in inner[:_SHOWN_ITEMS]:
            yield from lines(item, key, depth + 1)
        if len(inner) > _SHOWN_ITEMS:
            yield "  " * (depth + 1) + f"... and {len(inner) - _SHOWN_ITEMS} more"
    elif "class" in summary:
        count = f", {summary['parameters']:,} parameters" if "parameters" in summary else ""
        yield f"{start}{summary['kind']} {summary['class']}{count}"
    else:
        text = str(summary["value"])
        cut = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
        yield f"{start}{summary['kind']} {cut}" if summary["kind"] != "NoneType" else f"{start}None"


def _tensor_words(summary: Summary) -> str:
    shape = ", ".join(map(str, summary["shape"]))
    words = f"{summary['dtype']}[{shape}]"
    if summary["kind"] == "array":
        words = f"numpy {words}"
    for name in ("mean", "std", "min", "max"):
        if summary[name] is not None:
            words += f"  {name} {summary[name]:.6g}"
    return words + (f"  NaN {summary['nan']}" if summary["nan"] else "")


def _measured(tensor: Any) -> Summary:
    """Two passes in float64, a chunk at a time: exact enough for any size, and small in memory."""
    import torch

    flat = tensor.detach().reshape(-1)
    total, count, nan = 0.0, 0, 0
    least, greatest = math.inf, -math.inf
    for chunk in _chunks(flat):
        kept = chunk[~torch.isnan(chunk)]
        nan += chunk.numel() - kept.numel()
        if kept.numel():
            total += kept.sum().item()
            count += kept.numel()
            least, greatest = min(least, kept.min().item()), max(greatest, kept.max().item())
    mean = total / count if count else None
    spread = None
    if mean is not None and math.isfinite(mean) and count > 1:
        squares = 0.0
        for chunk in _chunks(flat):
            kept = chunk[~torch.isnan(chunk)]
            squares += ((kept - mean) ** 2).sum().item()
        spread = math.sqrt(squares / (count - 1))
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "mean": mean,
        "std": spread,
        "min": least if count else None,
        "max": greatest if count else None,
        "nan": nan,
    }


def _chunks(flat: Any) -> Iterator[Any]:
    import torch

    for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
        part = flat[start : start + _CHUNK_ELEMENTS]
        yield (part.abs() if part.is_complex() else part).to(torch.float64)


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 64 else hex(value)
    return f"{len(value)} bytes" if isinstance(value, (bytes, bytearray)) else str(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else repr(key)
