"""Calls sys.exit in its entrypoint and in a call."""

dependencies = ["torch"]

import sys

import torch


def model(code=3):
    """Exits while it builds."""
    sys.exit(code)


class Exits(torch.nn.Module):
    def forward(self, x):
        sys.exit("a message instead of a code")


def in_call():
    """A module that exits in forward."""
    return Exits()
