"""Small models, each with a trait by which a handle could be told from the model itself."""

dependencies = ["torch"]

from collections import OrderedDict
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn


class ConvNorm(nn.Module):
    """Batch norm: another function in train and in eval, and buffers that change."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))


class Recurrent(nn.Module):
    """A state that is a tuple, in and out."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x, state=None):
        return self.lstm(x, state)


class Tied(nn.Module):
    """Ints in; the embedding's weight is the output layer's too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.out = nn.Linear(3, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids):
        return self.out(self.embedding(ids))


class Several(nn.Module):
    """Several outputs: one that needs no gradient, an int, one that is there twice, and the input itself."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(3, 2)
        self.right = nn.Linear(3, 2)

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        return left, [right, right], {"best": left.argmax(dim=-1), "plain": left.detach(), "input": x}


class Buffered(nn.Module):
    """Buffers: persistent, not persistent, an int, and one that counts."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("mean", torch.tensor([0.5, 0.25, 0.125]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x):
        self.calls += 1
        return (x - self.mean) * self.scale * self.frozen


@dataclass
class Scored:
    logits: torch.Tensor
    loss: Optional[torch.Tensor] = None


class Output(OrderedDict):
    """A mapping of a class of the repo's."""


class Outputs(nn.Module):
    """A dataclass, a dict or a mapping of a class, as asked."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, form="dict"):
        logits = self.linear(x)
        made = {"dict": dict, "mapping": Output, "dataclass": Scored}[form]
        return made(logits=logits, loss=logits.pow(2).mean())


class Changes(nn.Module):
    """Changes its input in place, which is an error where that is a leaf that requires a gradient."""

    def forward(self, x):
        x.mul_(2)
        return x * x


class Raises(nn.Module):
    """Raises what it is asked for, and torch's own complaint for a wrong shape."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, kind=None):
        if kind is not None:
            raise {"key": KeyError, "value": ValueError, "index": IndexError}[kind](f"no {kind}")
        return self.linear(x)


class Forces(nn.Module):
    """A model that differentiates itself: forces are the gradient of an energy by positions."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, positions):
        energy = torch.tanh(self.linear(positions)).sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=True)
        return energy, -gradient


class Remembers(nn.Module):
    """Keeps its last input, graph and all, and adds it to the next."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.last = None

    def forward(self, x):
        out = self.linear(x if self.last is None else x + self.last)
        self.last = out
        return out


class Holder:
    """No value of the wire's: it stays in the worker."""

    def __init__(self, tensor):
        self.tensor = tensor

    def read(self):
        return self.tensor


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return Holder(self.linear(x))


class Pair(nn.Module):
    """Takes an object of a class of the caller's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, pair):
        return self.linear(pair.x)


def _seeded(made):
    torch.manual_seed(0)
    return made()


def conv_norm():
    return _seeded(ConvNorm)


def dropout():
    return _seeded(lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)))


def recurrent():
    return _seeded(Recurrent)


def tied():
    return _seeded(Tied)


def several():
    return _seeded(Several)


def buffered():
    return _seeded(Buffered)


def outputs():
    return _seeded(Outputs)


def changes():
    return _seeded(Changes)


def raises():
    return _seeded(Raises)


def forces():
    return _seeded(Forces)


def remembers():
    return _seeded(Remembers)


def holds():
    return _seeded(Holds)


def pair():
    return _seeded(Pair)


def smooth():
    return _seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())


def module_list():
    return _seeded(lambda: nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)]))


def module_dict():
    return _seeded(lambda: nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 2)}))
