"""Storages of a GPU, on their way through shared memory.

1. A tensor of a CUDA device crosses by host memory like any other, with its device's name beside its storage. Which
   device the other side has for it, if any, that side says: a name is a wish, and the data are whole without it.
2. Shared memory that such data pass is page-locked once, where the driver lets us, so that the GPU reads and writes
   it directly. Where it does not, copies are slower and the same.
3. Direct ones lie in an arena on the GPU instead (`device_memory`), where both sides have one.
4. What a GPU has is copied in and out before anyone relies on it.

Side: both. Trust: in the caller, names are a worker's. Source: the CUDA Runtime API, 5.9 ("cudaHostRegister").
"""

from __future__ import annotations

import re
import weakref
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

from isohub.errors import ProtocolError, printable
from isohub.wire.device_memory import DeviceArena

__all__ = ["Placing", "copy_down", "is_carried", "page_lock", "placing", "read_devices", "slices_of"]

_NAME = re.compile(r"cuda:(0|[1-9]\d{0,2})\Z")
#: What is moved at once on the way from a GPU to a file.
_SLICE_BYTES = 32 << 20
#: Locking pages costs some 100 µs, which smaller copies do not win back.
_SMALLEST_LOCKED_BYTES = 1 << 20

#: Makes the bytes, uint8[size], of (device's name, whether direct, offset, size); None for what stays in host memory.
Placing = Callable[[str, bool, int, int], Any]


def is_carried(device: Any) -> bool:
    """Whether the tensors of that device keep it when they cross; those of others arrive on the CPU."""
    return bool(device.type == "cuda")


def read_devices(rows: Sequence[Sequence[Any]], count: int) -> Mapping[int, Tuple[str, bool]]:
    """The devices' names by the number of their storage, and whether it is a direct one.

    Args:
        rows: ``[storage, name, direct]`` each. Trust: in the caller, a worker's.
        count: How many storages there are.

    Raises:
        ProtocolError: A number is not there or comes twice, or a name is none.
    """
    devices: Dict[int, Tuple[str, bool]] = {}
    for row in rows:
        if len(row) != 3 or type(row[2]) is not bool:
            raise ProtocolError("a row of devices that is none")
        if type(row[0]) is not int or not 0 <= row[0] < count or row[0] in devices:
            raise ProtocolError("a device of a storage that is none, or has one")
        if type(row[1]) is not str or not _NAME.match(row[1]):
            raise ProtocolError(f"{printable(str(row[1])[:40])!r} where a GPU's name belongs")
        devices[row[0]] = row[1], row[2]
    return devices


def placing(
    choose: Callable[[int], Any], view: Callable[[int, int], Any], arena_of: Callable[[str], Optional[DeviceArena]]
) -> Placing:
    """Bytes on the device that `choose` has for a name's number, copied from shared memory.

    Args:
        choose: A ``torch.device`` for the other side's number, or None to leave the data on the CPU.
        view: Storages of (offset, size) that are the host memory itself.
        arena_of: The arena on the GPU of that name, or None where there is none.
    """
    import torch

    taken: Dict[str, int] = {}

    def place(name: str, direct: bool, offset: int, size: int) -> Optional[Any]:
        if direct:
            arena = arena_of(name)
            # Those that overlap would multiply what is copied.
            taken[name] = taken.get(name, 0) + size
            if arena is None or max(offset + size, taken[name]) > arena.size_bytes:
                raise ProtocolError(f"a storage at {offset} of {size} bytes in the memory of {name}")
            return arena.copied(offset, size)
        device = choose(int(name[5:]))
        if device is None:
            return None
        host = torch.empty(0, dtype=torch.uint8, device="cpu").set_(view(offset, size))
        return host.to(device)

    return place


def copy_down(source: Any, address: int, size: int) -> None:
    """Copy a GPU's bytes (uint8[size]) to host memory; they are there when this returns."""
    import ctypes

    import torch

    memory = (ctypes.c_char * size).from_address(address)
    torch.frombuffer(memory, dtype=torch.uint8).copy_(source)


def slices_of(source: Any) -> Any:
    """The bytes of a GPU's (uint8[n]), slice by slice: (offset, memoryview) each, valid until the next."""
    import torch

    size = source.numel()
    staging = torch.empty(min(size, _SLICE_BYTES), dtype=torch.uint8, device="cpu", pin_memory=True)
    memory: Any = staging.numpy()
    view = memoryview(memory)
    for offset in range(0, size, _SLICE_BYTES):
        length = min(_SLICE_BYTES, size - offset)
        staging[:length].copy_(source[offset : offset + length])
        yield offset, view[:length]


_locked: Dict[int, Tuple[int, bool]] = {}  # address: size, whether the driver did it


def page_lock(carrier: Any, address: int, size: int) -> bool:
    """Have the driver lock a mapping's pages until it goes; whether they are.

    Args:
        carrier: What keeps the mapping. Its pages are released before it is unmapped.
        address: Where it is.
        size: Its length, bytes.
    """
    import torch

    cuda: Any = torch.cuda
    if size < _SMALLEST_LOCKED_BYTES or not cuda.is_initialized():
        return False
    known = _locked.get(address)
    if known is not None:
        return known[1]
    done = int(cuda.cudart().cudaHostRegister(address, size, 0)) == 0
    _locked[address] = size, done
    # Of finalizers the last one runs first: before the mapping goes.
    weakref.finalize(carrier, _release, address, done).atexit = False
    return done


def _release(address: int, done: bool) -> None:
    import torch

    _locked.pop(address, None)
    if done:
        cuda: Any = torch.cuda
        cuda.cudart().cudaHostUnregister(address)
