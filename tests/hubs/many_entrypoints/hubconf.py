"""Entrypoints of every form that torch.hub lists, and names that it does not."""

dependencies = ["torch"]

import functools
import math
from functools import partial as _partial

import torch
from shapes import Square, circle as round_one
from more import *

VERSION = "1.0"
sizes = [1, 2, 3]


def plain(a, b=2, *args, c, **kwargs):
    """A function with every kind of parameter."""
    return a


async def later(x):
    """A coroutine function."""
    return x


class Net(torch.nn.Module):
    """A class as an entrypoint."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):
        return self.linear(x)


class Instance:
    """Its objects can be called, so that they are entrypoints too."""

    def __call__(self, x=1):
        return x


def _private():
    return None


def _make(size):
    def build():
        """Made by a function."""
        return size

    return build


same = plain
half = _partial(plain, 1)
other_half = functools.partial(plain, c=1)
small = lambda width=1: width  # noqa: E731
made = _make(3)
callable_object = Instance()

if VERSION >= "1":

    def conditional():
        """Defined in an `if`."""

else:

    def never():
        """Defined in the branch that is not taken."""


try:
    from not_there_at_all import fast
except ImportError:

    def fast():
        """The slow one."""
