"""Gradients do not cross the wire; a backward pass that would need them to says so.

Without this, an input that requires a gradient would get one that lacks the model's part, in silence.

Side: caller. Source: torch.autograd.Function (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from isohub.wire.records import MappingRecord, TupleRecord

__all__ = ["severed"]


class _Severed(torch.autograd.Function):
    """The identity, with a backward that is an error."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, name: str, *inputs: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - autograd looks at them
        ctx.name = name
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004 - there is nothing to give back
        raise RuntimeError(
            f"gradients do not cross to the worker of {ctx.name}\n"
            "hint: run the backward pass there with h.run(fn, ...), or call the model under torch.no_grad()"
        )


def severed(answer: Any, arguments: Iterable[Any], name: str) -> Any:
    """The answer, its floating tensors tied to those inputs that require gradients.

    Args:
        answer: What a call gave: tensors and plain containers of them, which stay of their types.
        arguments: What the call was given.
        name: Whose worker, for the error.
    """
    if not torch.is_grad_enabled():
        return answer
    inputs = [tensor for tensor in _tensors(arguments) if tensor.requires_grad]
    return _tied(answer, name, inputs) if inputs else answer


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _tied(value: Any, name: str, inputs: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        differentiable = value.is_floating_point() or value.is_complex()
        return _Severed.apply(value, name, *inputs) if differentiable else value  # type: ignore[no-untyped-call]
    if isinstance(value, TupleRecord):
        return TupleRecord(value.class_name, value._fields, [_tied(item, name, inputs) for item in value])
    if isinstance(value, MappingRecord):
        return MappingRecord(value.class_name, [(key, _tied(item, name, inputs)) for key, item in value.items()])
    if type(value) in (list, tuple):
        return type(value)(_tied(item, name, inputs) for item in value)
    if isinstance(value, dict):
        return type(value)((key, _tied(item, name, inputs)) for key, item in value.items())
    return value
