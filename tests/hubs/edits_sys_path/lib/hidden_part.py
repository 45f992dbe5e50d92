"""Found only with lib/ on `sys.path`."""

import torch


def build():
    return torch.nn.Identity()
