"""Where a question's tensors go: to the GPU that the caller says, or to the one that the model is on.

Side: worker. Trust: the caller's questions; the model is the repo's.
"""

from __future__ import annotations

import sys
from typing import Any, Callable, Optional

from isohub.wire.devices import Placing, placing

__all__ = ["mover_to", "own_gpus"]


def own_gpus(view: Callable[[int, int], Any]) -> Placing:
    """Places what the caller has on a GPU on that of the same name here.

    Args:
        view: Storages of the inbox.
    """
    import torch

    return placing(lambda number: torch.device("cuda", number), view)


def mover_to(target: Any) -> Optional[Callable[[Any], Any]]:
    """Moves tensors to the GPU of a module's first parameter or buffer; None where there is nothing to move to.

    Gradients go back the same way.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or not isinstance(target, torch.nn.Module):
        return None
    first = next(target.parameters(), None)
    if first is None:
        first = next(target.buffers(), None)
    if first is None or first.device.type != "cuda":
        return None
    device = first.device
    return lambda tensor: tensor.to(device)
