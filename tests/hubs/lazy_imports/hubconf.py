"""Imports its own modules only when a model is called."""

dependencies = ["torch"]

import torch


class Lazy(torch.nn.Module):
    def forward(self, x):
        from late import double  # torch.hub has taken the checkout off sys.path by now

        return double(x)

    def resources(self):
        import inner.part

        return inner.part.NAME


def model():
    """A module that imports in forward."""
    return Lazy()
