"""Labels of the data set, and weights that need no download."""

import torch


def labels():
    return ["background", "stroke", "edge", "noise"]


@torch.no_grad()
def fill(net, seed):
    """The published weights: numbers from a seeded generator, scaled by fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2.0 / fan_in) ** 0.5)
