"""Devices of a worker: where it may move its model, which GPUs it sees, and which of the caller's those are.

1. A device is read before the repo's code runs, so that a slip costs no build. Whether the machine has it only the
   worker can tell; its own error says so.
2. A worker that sees some of the caller's GPUs numbers them from 0, as ``CUDA_VISIBLE_DEVICES`` does: a choice, and no
   wall between GPUs.
3. The answer to a question with tensors of the caller's GPUs comes to the GPUs that it is on; any other to the CPU.
4. The first such question goes by host memory, and offers the worker arenas on the GPU. What it takes is used from the
   next question on, by both, for what fits; what it cannot map never is.

Side: caller. Trust: what a worker takes is one of the names that it was offered; the rest is checked by the wire.
Source: ``torch.device``; torch 2.13 takes "meta" for a module and drops its data; CUDA's ``CUDA_VISIBLE_DEVICES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isohub.errors import ProtocolError
from isohub.sandbox.policy import Sandbox
from isohub.wire.arena import SMALLEST_DIRECT_BYTES, Cargo, aligned
from isohub.wire.device_memory import DeviceArena
from isohub.wire.devices import Placing, placing
from isohub.wire.tables import Viewing

__all__ = ["Gpus", "Traffic", "checked_device"]

#: Of a GPU's memory, for one worker and one direction; larger messages go by host memory.
_LARGEST_ARENA_BYTES = 256 << 20
_SMALLEST_ARENA_BYTES = 8 << 20


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

    def there(self, name: str) -> str | None:
        """The worker's name for a device of the caller's, or None if it does not see it."""
        number = int(name[5:])
        if self.numbers is None:
            return name
        return f"cuda:{self.numbers.index(number)}" if number in self.numbers else None

    def here(self, claimed_number: int) -> torch.device | None:
        """The caller's device for a number of the worker's, or None without one. Trust: worker."""
        if self.numbers is None:
            number = claimed_number
        elif claimed_number < len(self.numbers):
            number = self.numbers[claimed_number]
        else:
            return None
        return torch.device("cuda", number) if number < torch.cuda.device_count() else None


class _Pair:
    """The arenas on one GPU: what goes, and what comes."""

    def __init__(self, name: str, there: str, sizes: Sequence[int]) -> None:
        """Make them.

        Args:
            name: Of the device, the caller's.
            there: The worker's name for it.
            sizes: Bytes of each.

        Raises:
            OSError: The GPU has no room, or its driver no such memory.
        """
        number = int(name[5:])
        self.name, self.there = name, there
        self.inbox = DeviceArena.create(number, sizes[0])
        try:
            self.outbox = DeviceArena.create(number, sizes[1])
        except OSError:
            self.inbox.close()
            raise

    def close(self) -> None:
        self.inbox.close()
        self.outbox.close()


class Traffic:
    """The GPUs' part of one worker's questions and answers.

    Attributes:
        follows: Whether the open question has tensors of the caller's GPUs, so that its answer comes to them.
    """

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self.follows = False
        self._pairs: dict[str, _Pair] = {}  # by the worker's name
        self._needs: dict[str, list[int]] = {}  # by the caller's name: the most bytes that went, that came
        self._offered: _Pair | None = None  # with the open question
        self._taken: _Pair | None = None  # with the last one: used from the next on
        self._without: set[str] = set()  # the caller's names of those that have none

    def withdraw(self) -> None:
        """Begin a question without tensors of a GPU, until `lay_out` says otherwise."""
        self.follows = False
        if self._offered is not None:  # of a question that was not sent
            self._offered.close()
            self._offered = None

    def lay_out(self, cargo: Cargo) -> list[tuple[int, str, bool]]:
        """Lay a question's cargo out; returns the rows of its ``devices``."""
        self.withdraw()
        if self._taken is not None:
            before = self._pairs.get(self._taken.there)
            self._pairs[self._taken.there], self._taken = self._taken, None
            if before is not None:
                before.close()
        cargo.lay_out({pair.name: pair.inbox.size_bytes for pair in self._pairs.values()})
        named = [(row[0], self._gpus.there(row[1]), row[2]) for row in cargo.claims.devices]
        rows = [(storage, there, direct) for storage, there, direct in named if there is not None]
        self.follows = bool(rows)
        for name, size_bytes in cargo.device_bytes.items():
            if self._gpus.there(name) is not None:
                self._need(name, 0, size_bytes)
        return rows

    def write(self, cargo: Cargo) -> None:
        """Put what goes direct in place."""
        cargo.write_devices({pair.name: pair.inbox for pair in self._pairs.values()})

    def offer(self) -> dict[str, Any] | None:
        """What the open question says of arenas that the worker does not have yet, if any."""
        for name, needs in self._needs.items():
            there = self._gpus.there(name)
            if there is None or name in self._without:
                continue
            sizes = [max(need, _SMALLEST_ARENA_BYTES) for need in needs]
            pair = self._pairs.get(there)
            if pair is not None and pair.inbox.size_bytes >= sizes[0] and pair.outbox.size_bytes >= sizes[1]:
                continue
            if pair is not None:
                sizes = [max(sizes[0], pair.inbox.size_bytes), max(sizes[1], pair.outbox.size_bytes)]
            try:
                self._offered = _Pair(name, there, sizes)
            except OSError:  # no room there: as long as that is so, by host memory
                self._without.add(name)
                continue
            return {"name": there, "sizes": [self._offered.inbox.size_bytes, self._offered.outbox.size_bytes]}
        return None

    @property
    def descriptors(self) -> list[int]:
        """Those of the offer, which go with the question."""
        return [] if self._offered is None else [self._offered.inbox.descriptor, self._offered.outbox.descriptor]

    def answered(self, claimed_taken: str | None) -> None:
        """Use what the worker has taken of the offer, and drop the rest.

        Args:
            claimed_taken: The worker's name of the GPU. Trust: worker.

        Raises:
            ProtocolError: It was not offered.
        """
        offered, self._offered = self._offered, None
        if claimed_taken is not None and (offered is None or claimed_taken != offered.there):
            if offered is not None:
                offered.close()
            raise ProtocolError("arenas were taken that nobody offered")
        if offered is None:
            return
        if claimed_taken is None:
            self._without.add(offered.name)
            offered.close()
            return
        self._taken = offered

    def placing(self, claimed_devices: Sequence[Sequence[Any]], memory: Any) -> Placing | None:
        """How an answer's storages come to the caller's GPUs; None where they stay on the CPU.

        Args:
            claimed_devices: The answer's rows. Trust: worker.
            memory: The answer's host memory, as `Viewing` takes it.
        """
        if not claimed_devices or not self.follows:
            return None

        def arena_of(name: str) -> DeviceArena | None:
            pair = self._pairs.get(name)
            return None if pair is None else pair.outbox

        place = placing(self._gpus.here, Viewing(memory), arena_of)
        totals: dict[str, int] = {}

        def noted(name: str, direct: bool, offset: int, size: int) -> Any:
            device = self._gpus.here(int(name[5:]))
            if device is not None and size >= SMALLEST_DIRECT_BYTES:
                totals[name] = totals.get(name, 0) + aligned(size)
                self._need(str(device), 1, totals[name])
            return place(name, direct, offset, size)

        return noted

    def close(self) -> None:
        """Let all of it go."""
        for pair in (*self._pairs.values(), self._offered, self._taken):
            if pair is not None:
                pair.close()
        self._pairs.clear()
        self._offered = self._taken = None

    def _need(self, name: str, way: int, size_bytes: int) -> None:
        needs = self._needs.setdefault(name, [0, 0])
        if size_bytes <= _LARGEST_ARENA_BYTES:
            needs[way] = max(needs[way], size_bytes)


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
