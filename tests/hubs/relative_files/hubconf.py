"""Reads its files relative to the working directory and to `__file__`, and writes into the working directory."""

dependencies = ["torch"]

import os

import torch

_HERE = os.path.dirname(__file__)


def model():
    """A module with a size that is read from the checkout by `__file__`."""
    with open(os.path.join(_HERE, "configs", "a.txt")) as stream:
        return torch.nn.Linear(int(stream.read()), 1)


def by_cwd():
    """The same file, relative to the working directory, as many repos read theirs."""
    with open("configs/a.txt") as stream:
        return int(stream.read())


def writes(name="written.txt"):
    """Writes a file in the working directory and reads it back."""
    with open(name, "w") as stream:
        stream.write("written")
    with open(name) as stream:
        return stream.read()


def file():
    """`__file__`, as the repo sees it."""
    return __file__
