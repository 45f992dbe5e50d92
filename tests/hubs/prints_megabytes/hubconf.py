"""Writes megabytes to stdout and stderr, when imported, when called, and past Python's own streams."""

dependencies = ["torch"]

import os
import sys

import torch

_LINE = "x" * 99

for _ in range(40_000):
    print(_LINE)


def _flood(megabytes):
    block = ("y" * 1023 + "\n").encode()
    for _ in range(1024 * megabytes):
        os.write(1, block)
        os.write(2, block)


def model(megabytes=4):
    """Floods both descriptors, then returns a module."""
    _flood(megabytes)
    sys.stderr.write("the last line of stderr\n")
    return Loud()


class Loud(torch.nn.Module):
    def forward(self, x):
        print("z" * 1_000_000)  # one line without an end for a long while
        return x
