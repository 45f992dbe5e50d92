"""The caller's state of torch for the time of one question: gradient modes, autocast, default dtype and more.

What the caller did not send is left as the repo has it. All is as before when the question is answered.

Side: worker. Trust: the caller's. Source: torch.amp (torch 1.10 and later).
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, ContextManager, Dict, Iterator

__all__ = ["entered"]


_NOTHING: ContextManager[None] = contextlib.nullcontext()


def entered(question: Dict[str, Any]) -> ContextManager[None]:
    """The caller's modes, as far as the repo has not switched gradients off itself."""
    if question["grad"] and not question["inference"] and "modes" not in question:
        return _NOTHING
    return _entered(question)


@contextlib.contextmanager
def _entered(question: Dict[str, Any]) -> Iterator[None]:
    import torch

    modes = question.get("modes")
    with contextlib.ExitStack() as stack:
        if question["inference"]:
            stack.enter_context(torch.inference_mode())
        elif not question["grad"]:
            stack.enter_context(torch.no_grad())
        if modes:
            _enter(modes, stack)
        yield


def _enter(modes: Dict[str, Any], stack: contextlib.ExitStack) -> None:
    import torch

    if "default_dtype" in modes:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(getattr(torch, modes["default_dtype"]))
    if "deterministic" in modes:
        stack.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=modes["deterministic"])
    if "matmul_precision" in modes:
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision(modes["matmul_precision"])
    for device_type, dtype, cache in modes.get("autocast", ()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where there is no such device here, it changes nothing
            autocast = torch.autocast(device_type, dtype=getattr(torch, dtype), cache_enabled=cache)
        if device_type == "cpu" and not autocast._enabled:
            raise TypeError(
                f"the caller has torch.autocast('cpu', dtype=torch.{dtype}) on, and this worker's torch "
                f"{torch.__version__} has none for that dtype; torch.bfloat16 is in every version"
            )
        stack.enter_context(autocast)
