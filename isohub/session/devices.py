"""Devices of a worker: where it may move its model, which GPUs it sees, and which of the caller's those are.

1. A device is read before the repo's code runs, so that a slip costs no build. Whether the machine has it only the
   worker can tell; its own error says so.
2. A worker that sees some of the caller's GPUs numbers them from 0, as ``CUDA_VISIBLE_DEVICES`` does: a choice, and no
   wall between GPUs.
3. The answer to a question with tensors of the caller's GPUs comes to the GPUs that it is on; any other to the CPU.

Side: caller. Source: ``torch.device``; torch 2.13 takes "meta" for a module and drops its data; CUDA's
``CUDA_VISIBLE_DEVICES``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isohub.errors import PolicyError
from isohub.sandbox.policy import Sandbox

__all__ = ["Gpus", "checked_device", "gpu_variables"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpus:
    """Which of the caller's GPUs a worker sees.

    Attributes:
        numbers: The caller's, in the worker's order; None for all, in the caller's order.
    """

    numbers: tuple[int, ...] | None

    @classmethod
    def of(cls, policy: Sandbox | str) -> Gpus:
        """Those of a policy."""
        if isinstance(policy, str) or policy.gpu is True:
            return cls(None)
        return cls(() if policy.gpu is False else policy.gpus)

    def named_there(self, rows: Sequence[Sequence[Any]]) -> list[tuple[int, str]]:
        """Rows of ``[storage, name]`` as the worker names its devices, without those that it does not see."""
        named = []
        for storage, name in rows:
            number = int(name[5:])
            if self.numbers is None:
                named.append((storage, name))
            elif number in self.numbers:
                named.append((storage, f"cuda:{self.numbers.index(number)}"))
        return named

    def here(self, claimed_number: int) -> torch.device | None:
        """The caller's device for a number of the worker's, or None without one. Trust: worker."""
        if self.numbers is None:
            number = claimed_number
        elif claimed_number < len(self.numbers):
            number = self.numbers[claimed_number]
        else:
            return None
        return torch.device("cuda", number) if number < torch.cuda.device_count() else None


def gpu_variables(policy: Sandbox) -> dict[str, str]:
    """What a worker that sees some of the GPUs has in its environment for it.

    Raises:
        PolicyError: The caller's own choice has fewer.
    """
    if isinstance(policy.gpu, bool):
        return {}
    own = os.environ.get(_VISIBLE)
    if own is None:
        return {_VISIBLE: ",".join(map(str, policy.gpus))}
    seen = [name.strip() for name in own.split(",") if name.strip()]
    missing = [number for number in policy.gpus if number >= len(seen)]
    if missing:
        raise PolicyError(
            f"gpu={policy.gpu!r}, and {_VISIBLE}={own!r} leaves {len(seen)} to this process",
            hint=f"isohub.Sandbox(gpu=...) numbers them from 0 within {_VISIBLE}, as torch does",
        )
    return {_VISIBLE: ",".join(seen[number] for number in policy.gpus)}


def checked_device(device: Any) -> Any:
    """What `load` was given as ``device``, if it names a device with memory; None stays None.

    Raises:
        ValueError: It names none, or "meta", where a model has no data and could answer nothing.
    """
    if device is None or (isinstance(device, int) and not isinstance(device, bool)):
        return device  # a number is an accelerator's, of which this process may have none
    try:
        named = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} names no device: {str(error).splitlines()[0]}") from error
    if named.type == "meta":
        raise ValueError(
            f"device={device!r} would drop the model's data, and it could answer nothing\n"
            "hint: load it on the CPU; h.run(lambda module: module.to('meta')) drops the data afterwards"
        )
    return device
