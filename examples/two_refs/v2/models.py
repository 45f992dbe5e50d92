"""The network of release v2: batch normalisation, and bilinear upsampling in place of transposed convolutions."""

import torch
from torch import nn


def block(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Net(nn.Module):
    def __init__(self, classes, width=10, depth=2):
        super().__init__()
        sizes = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(block(a, b) for a, b in zip([1, *sizes[:-1]], sizes))
        self.merge = nn.ModuleList(block(a + b, a) for a, b in zip(sizes[:-1], sizes[1:]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        kept = []
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        x = kept.pop()
        for merge in reversed(self.merge):
            x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = merge(torch.cat([kept.pop(), x], dim=1))
        return self.head(x)
