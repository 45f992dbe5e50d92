"""Replaces functions of torch and of the standard library for the whole process."""

dependencies = ["torch"]

import pickle

import torch


def _replaced(*args, **kwargs):
    return "replaced by replaces_torch_load"


torch.load = _replaced
torch.save = _replaced
torch.nn.Module.state_dict = _replaced
torch.nn.functional.relu = _replaced
pickle.loads = _replaced


def model():
    """A module whose state_dict is no state dict."""
    return torch.nn.Linear(2, 2)


def load():
    """What torch.load gives now."""
    return torch.load("anything")
