"""Ends its process at once, without clean-up, in its entrypoint and in a call."""

dependencies = ["torch"]

import os

import torch


def model(code=0):
    """Ends the process while it builds; code 0 must not look like success."""
    os._exit(code)


class Exits(torch.nn.Module):
    def forward(self, x):
        os._exit(7)


def in_call():
    """A module that ends the process in forward."""
    return Exits()
