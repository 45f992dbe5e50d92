"""Where a worker may move its model: read before the repo's code runs, so that a slip costs no build.

Whether the machine has the device only the worker can tell; its own error says so.

Side: caller. Source: ``torch.device``; torch 2.13 takes "meta" for a module and drops its data.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["checked_device"]


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
