"""What of torch's own state a call carries to the worker, and takes along into a thread.

Only what differs from torch's defaults is sent: a call stays cheap, and what the repo has set for itself stays
where the caller has set nothing.

Side: caller. Source: torch.amp, torch.set_default_dtype, torch.use_deterministic_algorithms and
torch.set_float32_matmul_precision (torch 2.6 and later).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["carried", "held"]

#: Types of devices that autocast has a state of its own for, and that a worker can have.
_DEVICE_TYPES = ("cpu", "cuda")


def carried() -> dict[str, Any]:
    """The state of this thread and process that is not torch's default, as the wire takes it."""
    modes: dict[str, Any] = {}
    for device_type in _DEVICE_TYPES:
        if torch.is_autocast_enabled(device_type):
            dtype = str(torch.get_autocast_dtype(device_type))[6:]
            modes.setdefault("autocast", []).append([device_type, dtype, torch.is_autocast_cache_enabled()])
    default = torch.get_default_dtype()
    if default is not torch.float32:
        modes["default_dtype"] = str(default)[6:]
    if torch.are_deterministic_algorithms_enabled():
        modes["deterministic"] = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        modes["matmul_precision"] = precision
    return modes


def held() -> Callable[[], AbstractContextManager[None]]:
    """The gradient modes and autocast of this thread, as a block for another one; it can be entered once or often."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in _DEVICE_TYPES if torch.is_autocast_enabled(kind)]
    cached = torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode() if inference else _grad(grad))
            for kind, dtype in autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))
            yield

    return entered


@contextlib.contextmanager
def _grad(enabled: bool) -> Iterator[None]:
    with torch.set_grad_enabled(enabled):
        yield
