"""Returns values nested more deeply than any model does."""

dependencies = ["torch"]

import torch


def _nested(depth, wrap):
    value = 1
    for _ in range(depth):
        value = wrap(value)
    return value


def lists(depth=100_000):
    """A list in a list in a list."""
    return _nested(depth, lambda value: [value])


def dicts(depth=100_000):
    """A dict in a dict in a dict."""
    return _nested(depth, lambda value: {"k": value})


def wide_and_shared(depth=64):
    """Two references to one list at each level: 64 objects in memory, 2**64 if written out."""
    return _nested(depth, lambda value: [value, value])


class Deep(torch.nn.Module):
    def __init__(self, depth):
        super().__init__()
        inner = torch.nn.Identity() if depth == 0 else Deep(depth - 1)
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def model(depth=50):
    """A module inside a module, fifty times."""
    return Deep(depth)
