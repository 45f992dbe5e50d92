"""The repos that are loaded, written to a temporary directory by the run itself."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_clock_hub", "write_hub"]

_HUBCONF = '''\
dependencies = ["torch"]

import torch
from network import Classifier, Convolutions, Linears, Twice


def twice():
    """x * 2: cheap, so that what a call costs is not the model's."""
    return Twice()


def convolutions(megabytes):
    """A network of that size, in layers of half a megabyte, with torch's own initial values."""
    return Convolutions(megabytes).eval()


def classifier():
    """A small network for pictures of 32 by 32, with initial values of seed 0."""
    torch.manual_seed(0)
    return Classifier().eval()


def linears(megabytes):
    """A network of that size, in layers of at most 64 MB, with torch's own initial values."""
    return Linears(megabytes).eval()
'''

_NETWORK = """\
import time

import torch
from torch import nn


class Twice(nn.Module):
    def forward(self, x):
        return x * 2


class Convolutions(nn.Sequential):
    CHANNELS = 120  # 120 * 120 * 9 * 4 bytes: 518 kB a layer

    def __init__(self, megabytes):
        layers = max(1, round(megabytes * 1e6 / (self.CHANNELS**2 * 9 * 4)))
        super().__init__(*(nn.Conv2d(self.CHANNELS, self.CHANNELS, 3, padding=1) for _ in range(layers)))


class Classifier(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


class Linears(nn.Sequential):
    def __init__(self, megabytes):
        width = 4096 if megabytes >= 64 else 1024
        layers = max(1, round(megabytes * (1 << 20) / (width * width * 4)))
        super().__init__(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        self.register_buffer("built_at", torch.tensor(time.monotonic(), dtype=torch.float64))
"""


def write_hub(directory: Path) -> Path:
    """Write the repo; returns its directory."""
    directory.mkdir(parents=True)
    (directory / "hubconf.py").write_text(_HUBCONF)
    (directory / "network.py").write_text(_NETWORK)
    return directory


_CLOCK = '''\
import time

FIRST_LINE = time.monotonic()


def first_line():
    """When the first line above ran, by CLOCK_MONOTONIC."""
    return FIRST_LINE
'''


def write_clock_hub(directory: Path) -> Path:
    """Write a repo that says when it began; returns its directory."""
    directory.mkdir(parents=True)
    (directory / "hubconf.py").write_text(_CLOCK)
    return directory
