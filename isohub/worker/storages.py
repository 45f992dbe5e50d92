"""Checkpoints that were saved on a GPU, read where there is none: their storages come to the CPU.

torch raises there unless the repo passed ``map_location``, and repos written on a machine with a GPU do not. A
repo that passes it gets what it asked for, and where there is a GPU nothing changes.

Side: worker. Source: ``torch.serialization.register_package`` (torch 1.0 and later; priority 20 is torch's own
for CUDA).
"""

from __future__ import annotations

from typing import Any

__all__ = ["install"]

_BEFORE_CUDA = 15


def install() -> None:
    """Register with torch, for the life of this process."""
    import torch

    torch.serialization.register_package(_BEFORE_CUDA, lambda _: None, _to_cpu)


def _to_cpu(storage: Any, location: str) -> Any:
    import torch

    return storage if location.startswith("cuda") and not torch.cuda.is_available() else None
