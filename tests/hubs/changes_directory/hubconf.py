"""Changes the working directory and the umask when imported and in a call."""

dependencies = ["torch"]

import os

import torch

os.chdir("/")
os.umask(0)


class Moves(torch.nn.Module):
    def forward(self, x):
        os.chdir("/usr")
        return x


def model():
    """A module that changes the directory again in forward."""
    return Moves()


def where():
    """The working directory after import."""
    return os.getcwd()
