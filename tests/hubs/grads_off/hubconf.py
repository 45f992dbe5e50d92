"""Switches gradients off for its whole process when imported, as silero-vad v3.1 does."""

dependencies = ["torch"]

import torch

torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_printoptions(precision=2)
torch.set_num_threads(1)


def model():
    """A linear layer; its parameters are float64, since the default dtype was changed."""
    return torch.nn.Linear(3, 2)


def grad_enabled():
    """Whether gradients are on now."""
    return torch.is_grad_enabled()
