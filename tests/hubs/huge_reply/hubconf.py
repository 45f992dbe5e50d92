"""Answers with more bytes than a caller may want."""

dependencies = ["torch"]

import torch


class Expanded(torch.nn.Module):
    def forward(self, gib=10):
        """One element of storage that claims to be `gib` GiB."""
        return torch.zeros(1).expand(gib * 2**30 // 4)


def expanded():
    """A module whose forward returns 10 GiB that take no memory here."""
    return Expanded()


class Real(torch.nn.Module):
    def forward(self, gib=3):
        """`gib` GiB of address space, which sending would turn into memory."""
        return torch.empty(gib * 2**30 // 4)


def model():
    """A module whose forward returns 3 GiB."""
    return Real()


def many(count=1_000_000):
    """A list with a million small values."""
    return list(range(count))


def text(mib=512):
    """One string of 512 MiB."""
    return "x" * (mib * 2**20)
