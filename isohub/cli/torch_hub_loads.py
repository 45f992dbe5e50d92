"""What torch.hub gives for directories that one process loads in turn, as JSON on stdout.

`demo` starts a process of its own with this file's text: ``python -c TEXT DIRECTORY...``. So it uses nothing
but the standard library and torch. `demo` also imports `measured`, so that both sides measure alike.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["ENTRYPOINT", "example_input", "main", "measured"]

ENTRYPOINT = "model"


def example_input() -> Any:
    """The demo's input, float32[1, 1, 16, 16], the same numbers on every machine."""
    import torch

    return torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)


def measured(parameters: int, state: Mapping[str, Any], output: Any) -> dict[str, Any]:
    """A model in figures. Two that are equal here are equal to the bit: names, dtypes, shapes and values.

    Args:
        parameters: How many numbers its parameters hold.
        state: Its state dict, CPU tensors.
        output: A CPU tensor.
    """
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name}\0{_digest(tensor)}\n".encode())
    return {
        "parameters": parameters,
        "tensors": len(state),
        "state": digest.hexdigest(),
        "shape": list(output.shape),
        "mean_abs": output.abs().mean().item(),
        "output": _digest(output),
    }


def _digest(tensor: Any) -> str:
    tensor = tensor.detach().contiguous()
    size = tensor.numel() * tensor.element_size()
    head = f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
    return hashlib.sha256(head + (ctypes.string_at(tensor.data_ptr(), size) if size else b"")).hexdigest()


def main(directories: list[str]) -> None:
    """Load each directory's model, call it, and print a list of figures; an error is its text."""
    import torch

    found: list[dict[str, Any]] = []
    with torch.no_grad():
        for directory in directories:
            try:
                load: Any = torch.hub.load
                model = load(directory, ENTRYPOINT, source="local")
                parameters = sum(parameter.numel() for parameter in model.parameters())
                found.append(measured(parameters, model.state_dict(), model(example_input())))
            except Exception as error:  # noqa: BLE001 - whatever torch.hub makes of a second repo is the finding
                found.append({"error": f"{type(error).__name__}: {error}"})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
