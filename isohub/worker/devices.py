"""Where a question's tensors go: to the GPU that the caller says, or to the one that the model is on.

What the caller offers to share of a GPU's memory is mapped if this process can.

Side: worker. Trust: the caller's questions; the model is the repo's.
"""

from __future__ import annotations

import sys
import types
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

from isohub.wire.device_memory import DeviceArena
from isohub.wire.devices import Placing, placing
from isohub.wire.protocol import close_descriptors

__all__ = ["SharedGpus", "mover_to"]


class SharedGpus:
    """What this worker has mapped of the caller's arenas on GPUs, by their names here.

    Attributes:
        outboxes: For answers.
    """

    def __init__(self) -> None:
        self._inboxes: Dict[str, DeviceArena] = {}
        self.outboxes: Dict[str, DeviceArena] = {}
        self._taken: Optional[Tuple[str, DeviceArena, DeviceArena]] = None

    def begin(self) -> None:
        """Use what was taken with the last question from this one on, as the caller does."""
        if self._taken is not None:
            name, inbox, outbox = self._taken
            self._inboxes[name], self.outboxes[name], self._taken = inbox, outbox, None

    def take(self, offer: Mapping[str, Any], descriptors: Sequence[int]) -> Optional[str]:
        """Map what is offered; its name, or None where it cannot be mapped. The descriptors are closed."""
        name, sizes = offer["name"], offer["sizes"]
        number = int(name[5:])
        try:
            inbox = DeviceArena.attach(descriptors[0], number, sizes[0])
        except (OSError, RuntimeError):
            close_descriptors(descriptors[1:])
            return None
        try:
            outbox = DeviceArena.attach(descriptors[1], number, sizes[1])
        except (OSError, RuntimeError):
            return None
        self._taken = str(name), inbox, outbox
        return str(name)

    @property
    def room(self) -> Dict[str, int]:
        """Bytes that an answer may take on each GPU."""
        return {name: arena.size_bytes for name, arena in self.outboxes.items()}

    def placing(self, view: Callable[[int, int], Any]) -> Placing:
        """Places what the caller has on a GPU on that of the same name here.

        Args:
            view: Storages of the inbox in host memory.
        """
        import torch

        return placing(lambda number: torch.device("cuda", number), view, self._inboxes.get)


def mover_to(target: Any) -> Optional[Callable[[Any], Any]]:
    """Moves tensors to the GPU of a module's first parameter or buffer; None where there is nothing to move to.

    Gradients go back the same way.

    Args:
        target: A module, or a method of one.
    """
    torch = sys.modules.get("torch")
    if isinstance(target, types.MethodType):
        target = target.__self__
    if torch is None or not torch.cuda.is_initialized() or not isinstance(target, torch.nn.Module):
        return None
    first = next(target.parameters(), None)
    if first is None:
        first = next(target.buffers(), None)
    if first is None or first.device.type != "cuda":
        return None
    device = first.device
    return lambda tensor: tensor.to(device)
