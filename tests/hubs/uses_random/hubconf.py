"""Builds its weights from torch's, numpy's and Python's random numbers."""

dependencies = ["torch", "numpy"]

import random

import numpy
import torch


class FromRandom(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.torch = torch.nn.Parameter(torch.randn(4))
        self.numpy = torch.nn.Parameter(torch.from_numpy(numpy.random.standard_normal(4)).float())
        self.random = torch.nn.Parameter(torch.tensor([random.random() for _ in range(4)]))

    def forward(self, x):
        return x * self.torch + self.numpy + self.random

    def noisy(self, x):
        """Draws anew in each call."""
        return x + torch.rand_like(x) + float(numpy.random.rand()) + random.random()


def model():
    """A module of twelve random numbers."""
    return FromRandom()
