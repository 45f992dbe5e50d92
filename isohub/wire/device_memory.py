"""Memory of a GPU that a caller and its worker both map, as arenas are in host memory.

1. The caller makes it, and sends a descriptor for it; it never maps what a worker made. So a worker's end, or what it
   frees, takes nothing from under the caller.
2. The worker may write to it at any time: what it holds is copied on the GPU before anyone relies on it.
3. Not CUDA's older IPC handles: those name a process of the host, and give the whole block that an address lies in.

Side: both. Source: CUDA Driver API, 6.14 "Virtual Memory Management" (CUDA 11.3 and later); structures of cuda.h.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from typing import Any

__all__ = ["DeviceArena"]

_POSIX_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Properties(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", _Flags),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


@functools.lru_cache(maxsize=None)
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *args: Any) -> None:
    result = getattr(_driver(), name)(*args)
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise OSError(f"{name}: {(text.value or b'').decode()} ({result})")


class _Mapping:
    """Mapped memory of a GPU, which a tensor is made over; it goes with the last reference."""

    def __init__(self, handle: Any, number: int, size_bytes: int) -> None:
        address, size = ctypes.c_uint64(), ctypes.c_size_t(size_bytes)
        zero = ctypes.c_size_t(0)
        _call("cuMemAddressReserve", ctypes.byref(address), size, zero, ctypes.c_uint64(0), ctypes.c_uint64(0))
        try:
            _call("cuMemMap", address, size, zero, handle, ctypes.c_uint64(0))
            try:
                access = _Access(_Location(_DEVICE, number), _READ_WRITE)
                _call("cuMemSetAccess", address, size, ctypes.byref(access), ctypes.c_size_t(1))
            except OSError:
                _call("cuMemUnmap", address, size)
                raise
        except OSError:
            _call("cuMemAddressFree", address, size)
            raise
        weakref.finalize(self, _unmap, address, size).atexit = False
        self.__cuda_array_interface__ = {
            "data": (address.value, False), "shape": (size_bytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def _unmap(address: Any, size: Any) -> None:
    _driver().cuMemUnmap(address, size)
    _driver().cuMemAddressFree(address, size)


class DeviceArena:
    """Memory of one GPU that two processes map.

    Attributes:
        bytes: All of it, as uint8[size_bytes] on the GPU.
        descriptor: What the other process gets; -1 where it was attached. Owned by this object.
        size_bytes: Its length.
    """

    def __init__(self, handle: Any, number: int, size_bytes: int, descriptor: int) -> None:
        import torch

        device = torch.device("cuda", number)
        self.bytes = torch.as_tensor(_Mapping(handle, number, size_bytes), device=device)
        self.descriptor = descriptor
        self.size_bytes = size_bytes

    @classmethod
    def create(cls, number: int, size_bytes: int) -> DeviceArena:
        """Make one of at least this size on a GPU that this process uses. Side: caller.

        Raises:
            OSError: The GPU has no room, or its driver no such memory.
        """
        properties = _Properties(type=_PINNED, handle_types=_POSIX_DESCRIPTOR, location=_Location(_DEVICE, number))
        step, handle, descriptor = ctypes.c_size_t(), ctypes.c_uint64(), ctypes.c_int(-1)
        _call("cuMemGetAllocationGranularity", ctypes.byref(step), ctypes.byref(properties), 0)
        size_bytes = -(-size_bytes // step.value) * step.value
        _call(
            "cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(size_bytes), ctypes.byref(properties),
            ctypes.c_uint64(0),
        )  # fmt: skip
        try:
            _call(
                "cuMemExportToShareableHandle", ctypes.byref(descriptor), handle, _POSIX_DESCRIPTOR, ctypes.c_uint64(0)
            )
            os.set_inheritable(descriptor.value, False)
            return cls(handle, number, size_bytes, descriptor.value)
        except BaseException:
            if descriptor.value >= 0:
                os.close(descriptor.value)
            raise
        finally:
            _call("cuMemRelease", handle)  # its mapping, and the descriptor, keep the memory

    @classmethod
    def attach(cls, descriptor: int, number: int, size_bytes: int) -> DeviceArena:
        """Map what the caller sent; the descriptor is closed. Side: worker.

        Raises:
            OSError: It is of another GPU, or the driver cannot map it here.
        """
        import torch

        cuda: Any = torch.cuda
        handle = ctypes.c_uint64()
        try:
            cuda.init()
            shared = ctypes.c_void_p(descriptor)
            _call("cuMemImportFromShareableHandle", ctypes.byref(handle), shared, _POSIX_DESCRIPTOR)
        finally:
            os.close(descriptor)
        try:
            return cls(handle, number, size_bytes, -1)
        finally:
            _call("cuMemRelease", handle)

    def write(self, source: Any, offset: int) -> None:
        """Begin to copy bytes (uint8[n], of this GPU) to a place in it."""
        self.bytes[offset : offset + source.numel()].copy_(source)

    def copied(self, offset: int, size: int) -> Any:
        """What lies there, as uint8[size] of this process's own; the copy is done when this returns."""
        own = self.bytes[offset : offset + size].clone()
        self.wait()
        return own

    def wait(self) -> None:
        """Return when what this thread has begun on this GPU is done: the other process knows nothing of streams."""
        import torch

        cuda: Any = torch.cuda
        cuda.current_stream(self.bytes.device).synchronize()

    def close(self) -> None:
        """Close the descriptor and let the mapping go."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        del self.bytes
