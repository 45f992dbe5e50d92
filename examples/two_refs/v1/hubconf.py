"""Digit segmentation, release v1: a small U-Net."""

dependencies = ["torch"]

from models import Net
from utils import fill, labels


def model(pretrained=True):
    """The network of release v1, float32[N, 1, H, W] to float32[N, 3, H, W]; H and W divisible by 4."""
    net = Net(classes=len(labels()), width=8)
    if pretrained:
        fill(net, seed=1)
    return net.eval()
