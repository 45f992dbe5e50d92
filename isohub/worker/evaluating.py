"""The caller's metric in a worker: a function that was sent once, and what it is called with for each batch.

Rules:

1. Each batch begins with generators of its own seed, so that its result does not depend on which batches this worker
   had before.
2. Threads are bounded here: several workers share the machine's cores.

Side: worker. Trust: the function is the caller's; what it calls is the repo's.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator, Optional

from isohub.worker.hubconf import seed_everything

__all__ = ["Evaluator"]


class Evaluator:
    """Calls ``function(built, batch)``.

    Args:
        built: What the entrypoint gave.
        function: The caller's.
        seed: With the batch's number, what each batch is seeded with; None leaves the generators alone.
        threads: How many threads an operator of torch's may take; None leaves that alone.
        training: False puts every module into evaluation mode; None leaves the mode alone.
    """

    def __init__(
        self,
        built: Any,
        function: Callable[..., Any],
        seed: Optional[int],
        threads: Optional[int],
        training: Optional[bool],
    ) -> None:
        import torch

        self._built = built
        self._function = function
        self._seed = seed
        if threads is not None:
            torch.set_num_threads(threads)
        if training is not None:
            for module in _modules(built, torch.nn.Module):
                module.train(training)

    def __call__(self, number: int, batch: Any) -> Any:
        """What the function gives for a batch."""
        if self._seed is not None:
            seed_everything((self._seed + number) % (1 << 63))
        return self._function(self._built, batch)


def _modules(built: Any, kind: type) -> Iterator[Any]:
    if isinstance(built, kind):
        yield built
    elif isinstance(built, (list, tuple)):
        for item in built:
            yield from _modules(item, kind)
    elif isinstance(built, dict):
        for item in built.values():
            yield from _modules(item, kind)
