"""What a comparison asks of a worker: seeded answers, times of calls, the tree of modules, and a state in parts.

Rules:

1. The generators are seeded before each answer, so that a call that is made twice draws the same numbers.
2. What is timed is the call alone: neither the way here nor the encoding of what it gives, which is thrown away.
3. A state is read in the parts that are asked for: nobody has to hold the whole.

Side: worker. Trust: what runs is the repo's, and so is every text and number that comes of it.
"""

from __future__ import annotations

import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

from isohub.worker.hubconf import seed_everything

__all__ = ["Measurements"]

_MAX_TEXT_CHARS = 1000

_StateRow = Tuple[str, Optional[str], List[int], int, int]


class Measurements:
    """Those operations of a `Server`."""

    def do_answer(
        self, target: Any, seed: Optional[int], name: str, args: Sequence[Any], kwargs: Dict[str, Any]
    ) -> Any:
        """What a call gives, with the generators where they were at the call before."""
        if seed is not None:
            seed_everything(seed)
        return _callable(target, name)(*args, **kwargs)

    def do_time(
        self, target: Any, seed: Optional[int], name: str, args: Sequence[Any], kwargs: Dict[str, Any], calls: int
    ) -> float:
        """Seconds that so many calls take, one after another."""
        if seed is not None:
            seed_everything(seed)
        function = _callable(target, name)
        _wait_for_devices()
        started = time.perf_counter()
        for _ in range(calls):
            function(*args, **kwargs)
        _wait_for_devices()
        return time.perf_counter() - started

    def do_threads(self, target: Any) -> int:  # noqa: ARG002 - every operation of an object's is given it
        """How many threads an operator of torch's may use here."""
        import torch

        return torch.get_num_threads()

    def do_structure(self, target: Any) -> List[Tuple[str, str, str, int]]:
        """Each module's name, class, own description, and how many numbers its own parameters have."""
        return [
            (name, _class_name(module), _described(module), sum(item.numel() for item in module.parameters(False)))
            for name, module in target.named_modules()
        ]

    def do_state_index(self, target: Any) -> List[_StateRow]:
        """Each entry's name, dtype (None for what is no tensor), shape, bytes, and the number of its memory."""
        import torch

        memories: Dict[Any, int] = {}
        rows: List[_StateRow] = []
        for name, value in target.state_dict().items():
            if not isinstance(value, torch.Tensor):
                rows.append((name, None, [], 0, -1))
                continue
            key: Any = object()
            if value.layout is torch.strided and value.device.type != "meta" and value.numel():
                key = value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
            size = value.numel() * value.element_size()
            rows.append((name, str(value.dtype), list(value.shape), size, memories.setdefault(key, len(memories))))
        return rows

    def do_state_part(self, target: Any, names: List[str]) -> Dict[str, Any]:
        """Those entries of the state."""
        state = target.state_dict()
        return {name: _plain(state[name]) for name in names}


def _callable(target: Any, name: str) -> Any:
    return getattr(target, name) if name else target


def _plain(value: Any) -> Any:
    import torch

    return value.detach() if isinstance(value, torch.Tensor) else value


def _class_name(module: Any) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"[:_MAX_TEXT_CHARS]


def _described(module: Any) -> str:
    try:
        return str(module.extra_repr())[:_MAX_TEXT_CHARS]
    except Exception:
        return ""


def _wait_for_devices() -> None:
    import torch

    cuda: Any = torch.cuda
    if cuda.is_available() and cuda.is_initialized():
        cuda.synchronize()
