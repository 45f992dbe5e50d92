"""Tools of torch that look through a module as it runs, which cannot look through a process: each is told so.

A call that they watch would look to them like a constant, like nothing, or like numbers without a derivative, and what
they find would be wrong in silence.

Side: caller. Source: torch.jit.trace, torch.export, torch.func, torch.autograd.forward_ad and
torch.utils._python_dispatch (torch 2.6 and later).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

__all__ = ["refuse_if_watched", "unseen_by_dynamo"]

_dynamo: Any = torch._C._dynamo.eval_frame
# Under these modes no tensor has numbers, so neither arguments nor answers can be copied.
_SYMBOLIC = frozenset({"FakeTensorMode", "ProxyTorchDispatchMode", "FunctionalTensorMode"})
_CALLS = frozenset({"call", "run"})
_WITHIN = "h.run(fn, ...) runs it in the worker, around the live module"
F = TypeVar("F", bound=Callable[..., Any])


def refuse_if_watched(op: str, args: tuple[Any, ...], worker_name: str) -> None:
    """Raise where torch is watching what no question to a worker shows.

    Args:
        op: Name of the operation, as `Link.ask` takes it.
        args: Its arguments.
        worker_name: For the error.

    Raises:
        NotImplementedError: It is.
    """
    if torch._C._len_torch_dispatch_stack():
        modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        names = [type(mode).__name__ for mode in modes]
        if op in _CALLS or not _SYMBOLIC.isdisjoint(names):
            _refuse(
                names[-1], worker_name, f"{_WITHIN}; h.export(args) exports there, load(..., compile=True) compiles"
            )
    if op not in _CALLS:
        return
    if torch._C._get_tracing_state() is not None:
        _refuse("torch.jit.trace", worker_name, "h.torchscript(example_inputs) traces in the worker")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        _refuse("a transform of torch.func or torch.vmap", worker_name, _WITHIN)
    if torch.autograd.forward_ad._current_level >= 0 and any(map(_has_tangent, _tensors(args))):
        _refuse("forward-mode differentiation", worker_name, f"{_WITHIN}; backward passes do cross")


def unseen_by_dynamo(function: F) -> F:
    """Mark a function as one that torch.compile calls as it is, with nothing within looked at.

    What ``torch.compiler.disable`` does, less its import of the compiler.
    """
    if hasattr(_dynamo, "set_code_exec_strategy"):
        skip = _dynamo._FrameAction.SKIP
        _dynamo.set_code_exec_strategy(function.__code__, _dynamo._FrameExecStrategy(skip, skip))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def _refuse(what: str, worker_name: str, hint: str) -> None:
    raise NotImplementedError(f"{what} cannot see into the worker of {worker_name}\nhint: {hint}")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _has_tangent(tensor: torch.Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
