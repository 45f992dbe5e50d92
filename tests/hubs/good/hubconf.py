"""A well-behaved repo: models, helpers and values of every kind that an entrypoint may return.

`models` and `utils` are names that other repos use for their own modules too.
"""

dependencies = ["torch"]

import torch
from models import (
    Buffered,
    Cnn,
    DictOutput,
    Mlp,
    NamedTupleOutput,
    Plus,
    Talkative,
    TiedWeights,
)
from utils import Counter, Helper, denormalize, normalize


def model(width=8, pretrained=False):
    """A small convolutional network.

    Args:
        width: Channels of the first layer.
        pretrained: Fill the weights by a formula instead of at random.

    Input float32[N, 3, H, W], output float32[N, 4].
    """
    net = Cnn(width)
    if pretrained:
        net.fill()
    return net.eval()


def mlp(sizes=(4, 8, 2)):
    """A multi-layer perceptron with the given sizes."""
    return Mlp(sizes)


def with_buffers():
    """A module with persistent and non-persistent buffers, an integer one and an empty one."""
    return Buffered()


def tied_weights():
    """A language model whose embedding and output layer share one parameter."""
    return TiedWeights()


def plus(value=1.0):
    """Adds a number: input and output may be large, the arithmetic is cheap."""
    return Plus(value)


def pair():
    """A model and its helpers, the form that silero-vad returns: (model, (function, function, class))."""
    return Cnn(4).eval(), (normalize, denormalize, Helper)


def as_dict():
    """Modules and values by name."""
    return {"encoder": Mlp((4, 3)), "decoder": Mlp((3, 4)), "labels": ["cat", "dog"], "scale": 0.5}


def as_list():
    """An ensemble: a list of modules."""
    return [Mlp((4, 2)), Mlp((4, 2)), Mlp((4, 2))]


def counter(start=0):
    """An object with state, methods and attributes, that is no module."""
    return Counter(start)


def returns_none():
    """None, as some hubconfs do after printing something."""
    return None


def returns_number():
    """A plain float."""
    return 0.25


def returns_tensor():
    """A plain tensor, float32[2, 3]."""
    return torch.arange(6.0).reshape(2, 3)


def returns_function():
    """A function."""
    return normalize


def namedtuple_output():
    """A module whose output is a namedtuple of tensors."""
    return NamedTupleOutput()


def dict_output():
    """A module whose output is a nested dict of tensors, lists and numbers."""
    return DictOutput()


def talkative():
    """A module with further methods, keyword arguments and properties."""
    return Talkative()


def echo(*args, **kwargs):
    """What it was called with."""
    return {"args": args, "kwargs": kwargs}
