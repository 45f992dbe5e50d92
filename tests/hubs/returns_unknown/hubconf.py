"""Returns objects that no codec knows, with methods, attributes and the usual protocols."""

dependencies = ["torch"]

import threading

import torch


class Pipeline:
    """No module, no value: reachable only where it lives."""

    version = (1, 2)

    def __init__(self):
        self.name = "pipeline"
        self.net = torch.nn.Linear(3, 2)
        self.lock = threading.Lock()  # cannot be pickled
        self.options = {"scale": 2.0}

    def run(self, x, scale=1.0):
        """float32[N, 3] to float32[N, 2]."""
        return self.net(x) * scale

    def part(self):
        """Another object that no codec knows."""
        return Part(self)

    def __call__(self, x):
        return self.run(x)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return index * 10

    def __iter__(self):
        return iter([1, 2, 3])

    def __enter__(self):
        self.name = "entered"
        return self

    def __exit__(self, *error):
        self.name = "left"


class Part:
    def __init__(self, owner):
        self.owner = owner

    def describe(self):
        return f"part of {self.owner.name}"


def model():
    """A Pipeline."""
    return Pipeline()


def generator():
    """A generator of tensors."""
    return (torch.full((2,), float(number)) for number in range(3))


def nested():
    """A list that holds a value, a module and an unknown object."""
    return [1, torch.nn.Identity(), {"part": Pipeline()}]


def cyclic():
    """A list that contains itself."""
    found = []
    found.append(found)
    return found
