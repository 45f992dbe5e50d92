"""Is no Python: line 8 has no closing bracket."""

dependencies = ["torch"]

import torch


def model(width=8:
    return torch.nn.Linear(width, width)
