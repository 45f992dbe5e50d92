"""Imports well; its entrypoints, or what they return, raise."""

dependencies = ["torch"]

import torch


def model(reason="no weights for this size"):
    """Raises ValueError when it is called."""
    raise ValueError(reason)


def chained():
    """Raises an error that has a cause."""
    try:
        {}["absent"]
    except KeyError as error:
        raise RuntimeError("could not build") from error


class Fails(torch.nn.Module):
    def forward(self, x):
        return x @ torch.zeros(x.shape[-1] + 1, 2)


def in_call():
    """A module whose forward raises torch's own error about shapes."""
    return Fails()


def interrupts():
    """Raises KeyboardInterrupt, which must not reach the caller as one."""
    raise KeyboardInterrupt


def stops():
    """Raises StopIteration, which would end a loop of the caller's in silence."""
    raise StopIteration
