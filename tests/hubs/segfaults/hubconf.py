"""Reads address 0, in its entrypoint and in a call."""

dependencies = ["torch"]

import ctypes

import torch


def model():
    """Segmentation fault while it builds."""
    ctypes.string_at(0)


class Segfaults(torch.nn.Module):
    def forward(self, x):
        ctypes.string_at(0)


def in_call():
    """A module that faults in forward."""
    return Segfaults()
