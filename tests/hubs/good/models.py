"""Small modules, each with one trait that a handle must carry."""

from collections import namedtuple

import torch
from torch import nn

Detection = namedtuple("Detection", ["boxes", "scores"])


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


class Cnn(nn.Module):
    """Convolutions, batch norm and a linear head in submodules."""

    def __init__(self, width=8, classes=4):
        super().__init__()
        self.width = width
        self.features = nn.Sequential(Block(3, width), nn.MaxPool2d(2), Block(width, 2 * width))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3)))

    @torch.no_grad()
    def fill(self):
        """Weights by a formula, the same in every process."""
        for number, parameter in enumerate(self.parameters()):
            steps = torch.arange(parameter.numel(), dtype=parameter.dtype)
            parameter.copy_(torch.sin(steps * 0.37 + number).reshape(parameter.shape) * 0.2)


class Mlp(nn.Sequential):
    def __init__(self, sizes):
        layers = []
        for inputs, outputs in zip(sizes[:-1], sizes[1:]):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        super().__init__(*layers[:-1])


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.tensor([0.5, 0.25, 0.125]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.full((2,), 7.0), persistent=False)
        self.register_buffer("nothing", torch.empty(0, 4))

    def forward(self, x):
        self.calls += 1
        return (x - self.mean) * self.weight


class TiedWeights(nn.Module):
    def __init__(self, tokens=11, width=6):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.output = nn.Linear(width, tokens, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        return self.output(self.embedding(tokens))


class Plus(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))

    def forward(self, x):
        return x + self.value


class NamedTupleOutput(nn.Module):
    def forward(self, x):
        return Detection(boxes=x * 2, scores=x.sum(dim=-1))


class DictOutput(nn.Module):
    def forward(self, x):
        return {"logits": x + 1, "inner": {"list": [x, (x * 2, 3)], "none": None}, 7: "seven"}


class Talkative(nn.Module):
    """Methods beside `forward`, keyword-only arguments, and a property."""

    classes = ("cat", "dog")

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.threshold = 0.5

    @property
    def size(self):
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, x, *, scale=1.0, return_features=False):
        y = self.linear(x) * scale
        return (y, x) if return_features else y

    def predict(self, x, threshold=None):
        limit = self.threshold if threshold is None else threshold
        return torch.sigmoid(self.linear(x)) > limit

    def set_threshold(self, value):
        self.threshold = float(value)
        return self
