"""Tensors in shared memory: memfds, and the tables that say what lies where in them.

Two kinds of memory cross:

- An `Arena` is made, sized and sealed against shrinking and growing by the caller before the worker
  sees it, so a mapped page can never vanish (no SIGBUS). The worker may write to it at any time, so
  what it holds is copied out before anyone relies on it.
- A *parcel* is made by the worker and, once it is sent, can be written nowhere. The caller seals it
  against writing; the kernel refuses that (EBUSY) while any writable mapping lives, so the success of
  the seal proves that nothing can change it any more. Then it is mapped private: no copy, and what
  the caller writes stays the caller's own.

`Cargo` is what one message carries: it lays tensors and bytes out, keeps aliases (tensors of one
storage share one entry) and writes them. `isohub.wire.tables` reads them again.

Refuses to: believe a size, map what is not sealed.
Side: both; each function says which. Source: memfd_create(2), fcntl(2) F_ADD_SEALS, mmap(2).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Protocol, Sequence, Tuple

from isohub.errors import ProtocolError
from isohub.wire.copies import Move
from isohub.wire.device_memory import DeviceArena
from isohub.wire.devices import copy_down, is_carried, page_lock, slices_of
from isohub.wire.pages import PRIVATE, SHARED, allocate, map_array, unmap

__all__ = [
    "ALIGNMENT",
    "LARGEST_KEPT_BYTES",
    "SMALLEST_DIRECT_BYTES",
    "SMALLEST_REUSED_BYTES",
    "Arena",
    "Cargo",
    "Claims",
    "aligned",
    "dtype_named",
    "dtype_names",
    "make_parcel",
    "new_parcel",
    "open_parcel",
    "reusable",
    "storage_of",
]

#: torch allocates CPU memory at 64 bytes (c10/core/alignment.h, gAlignment); one cache line.
ALIGNMENT = 64

#: Below this, malloc's own reuse is as good; above, its mappings come fresh from the kernel each time (mallopt(3),
#: M_MMAP_THRESHOLD).
SMALLEST_REUSED_BYTES = 128 << 10
# Sizes are rounded up to this, so that answers of nearly one size share their memory.
_REUSED_STEP_BYTES = 128 << 10
#: What is kept for reuse, in one process.
_LARGEST_REUSED_BYTES = 128 << 20

#: An inbox larger than this is let go, by both sides, after the question that needed it.
LARGEST_KEPT_BYTES = 256 << 20

# linux/fcntl.h; the fcntl module has them from Python 3.9 on.
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_WRITE = 1, 2, 4, 8
_ARENA_SEALS = _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW
_PARCEL_SEALS = _ARENA_SEALS | _F_SEAL_WRITE
# memfd_create(2); os.memfd_create is there from Python 3.8 on.
_MEMFD_FLAGS = 0x0001 | 0x0002  # MFD_CLOEXEC | MFD_ALLOW_SEALING

#: Every dtype that may cross, and its size in bytes. A worker's other names are refused; so are quantised types.
_DTYPE_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex128": 16, "complex64": 8, "complex32": 4,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip

_dtypes: Dict[str, Tuple[Any, int]] = {}

#: Smaller ones are as fast by host memory: two waits for a GPU's stream take 100 µs (docs/decisions/0023).
SMALLEST_DIRECT_BYTES = 4 << 20

# One view that covers less than this share of its storage is sent as a contiguous copy instead.
_SPARSE_VIEW_RATIO = 2


def dtype_named(name: str) -> Optional[Tuple[Any, int]]:
    """The torch dtype of that name and its size in bytes, or None. Trust: the name may be a worker's."""
    known = _dtypes.get(name)
    if known is None and name in _DTYPE_SIZES:
        import torch

        dtype = getattr(torch, name, None)
        if dtype is not None:
            known = _dtypes[name] = dtype, _DTYPE_SIZES[name]
    return known


def dtype_names() -> List[str]:
    """Names of the dtypes that may cross and that this process's torch has."""
    return [name for name in _DTYPE_SIZES if dtype_named(name) is not None]


def storage_of(tensor: Any) -> Any:
    """A tensor's untyped storage, by the name that its torch has for it."""
    try:
        return tensor.untyped_storage()
    except AttributeError:
        return tensor._storage()  # torch 1.13


class Arena:
    """A shared mapping that can neither shrink nor grow.

    Attributes:
        descriptor: The memfd. Owned by this object.
        size_bytes: Its length.
        carrier: The mapping as a ctypes array. A tensor that views the arena holds a reference to it,
            which is how a worker knows whether a model kept an input.
        address: Where it is mapped.
    """

    __slots__ = ("address", "carrier", "descriptor", "size_bytes")

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.carrier = map_array(descriptor, size_bytes, SHARED)
        self.descriptor = descriptor
        self.size_bytes = size_bytes
        self.address = ctypes.addressof(self.carrier)

    @classmethod
    def create(cls, size_bytes: int) -> Arena:
        """Make, size and seal a new arena. Side: caller.

        Raises:
            OSError: No memory, or no descriptor left (ENOMEM, EMFILE).
        """
        size_bytes = -(-max(size_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = os.memfd_create("isohub-arena", _MEMFD_FLAGS)
        try:
            os.ftruncate(descriptor, size_bytes)
            fcntl.fcntl(descriptor, _F_ADD_SEALS, _ARENA_SEALS)
            return cls(descriptor, size_bytes)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, descriptor: int) -> Arena:
        """Map an arena that the caller sent. Side: worker."""
        return cls(descriptor, os.fstat(descriptor).st_size)

    def lock_pages(self) -> bool:
        """Let a GPU of this process read and write it directly; whether it does."""
        return page_lock(self.carrier, self.address, self.size_bytes)

    def close(self) -> None:
        """Close the descriptor and let the mapping go once nothing views it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            self.address = 0
            del self.carrier


class Claims(NamedTuple):
    """The tables of one message, as plain lists. Trust: in the caller, a worker's claims.

    Attributes:
        storages: ``[offset_bytes, size_bytes]`` of each storage in the shared memory.
        tensors: ``[storage, dtype, offset_elements, shape, strides]`` of each tensor.
        devices: ``[storage, name, direct]`` of each storage that is a GPU's; a direct one lies in that GPU's arena.
    """

    storages: Sequence[Sequence[int]]
    tensors: Sequence[Sequence[Any]]
    devices: Sequence[Sequence[Any]] = ()


class Backing(Protocol):
    """Shared memory in which some of what is to be sent may lie already. Side: worker."""

    @property
    def size_bytes(self) -> int:
        """Where what lies in it ends, a multiple of the page."""

    def place(self, storage: Any, start: int, size_bytes: int) -> Optional[int]:
        """Where these bytes of a storage of the CPU lie in it, or None: they are to be copied."""


class Cargo:
    """The tensors and bytes of one message, laid out for one copy. Side: both, as the sender."""

    __slots__ = (
        "_blobs", "_copied_from", "_device_sources", "_direct_sources", "_groups", "_sources", "_tensors", "claims",
        "device_bytes", "size_bytes",
    )  # fmt: skip

    def __init__(self) -> None:
        self._tensors: List[Any] = []
        self._groups: Dict[int, List[int]] = {}
        self._blobs: List[bytes] = []
        self._sources: List[Tuple[int, int, int]] = []  # address, offset, size
        self._device_sources: List[Tuple[Any, int]] = []  # bytes, offset
        self._direct_sources: List[Tuple[str, Any, int]] = []  # device's name, bytes, offset
        self._copied_from = 0  # of the shared memory; what is before lies there already
        self.device_bytes: Dict[str, int] = {}  # what could go direct, by the name of a GPU
        self.claims = Claims((), ())
        self.size_bytes = 0

    def add_tensor(self, tensor: Any) -> int:
        """Take a dense tensor of the CPU or CUDA without conjugate or negative bit; returns its number in the table."""
        number = len(self._tensors)
        self._tensors.append(tensor)
        address = storage_of(tensor).data_ptr()
        self._groups.setdefault(address if address else -1 - number, []).append(number)
        return number

    def add_bytes(self, blob: bytes) -> int:
        """Take bytes; returns their number in the table of storages, where blobs come first."""
        self._blobs.append(blob)
        return len(self._blobs) - 1

    def lay_out(self, room: Optional[Mapping[str, int]] = None, backing: Optional[Backing] = None) -> None:
        """Fix the tables: after this nothing is added, and `claims`, `size_bytes` and `device_bytes` hold.

        Args:
            room: Bytes of the arena on each GPU, by its name. What does not fit goes by host memory.
            backing: The memory that all this goes in, where some of it may lie in it; else it is empty.
        """
        groups = [(members, *self._span(members)) for members in self._groups.values()]
        places: List[Optional[int]] = [None] * len(groups)
        if backing is not None:
            for index, (members, start, end) in enumerate(groups):
                first = self._tensors[members[0]]
                if end > start and not is_carried(first.device):
                    places[index] = backing.place(storage_of(first), start, end - start)
            self._copied_from = backing.size_bytes
        storages: List[List[int]] = []
        rows: List[Any] = [None] * len(self._tensors)
        devices: List[Any] = []
        offset = self._copied_from
        for blob in self._blobs:
            storages.append([offset, len(blob)])
            offset += aligned(len(blob))
        for (members, start, end), place in zip(groups, places):
            first = self._tensors[members[0]]
            address = storage_of(first).data_ptr() + start if end > start else 0
            number, size = len(storages), end - start
            for member in members:
                tensor = self._tensors[member]
                shift = start // tensor.element_size() if tensor.numel() else tensor.storage_offset()
                dtype = str(tensor.dtype)[6:]
                rows[member] = [
                    number,
                    dtype,
                    tensor.storage_offset() - shift,
                    list(tensor.shape),
                    list(tensor.stride()),
                ]
            if place is not None:
                storages.append([place, size])
                continue
            if is_carried(first.device):
                name, held = str(first.device), _bytes_of(first, start, end)
                used, direct = self.device_bytes.get(name, 0), False
                if size >= SMALLEST_DIRECT_BYTES:
                    self.device_bytes[name] = used + aligned(size)
                    direct = room is not None and self.device_bytes[name] <= room.get(name, 0)
                devices.append([number, name, direct])
                if direct:
                    storages.append([used, size])
                    self._direct_sources.append((name, held, used))
                    continue
                self._device_sources.append((held, offset))
            else:
                self._sources.append((address, offset, size))
            storages.append([offset, size])
            offset += aligned(size)
        self.claims = Claims(storages, rows, devices)
        self.size_bytes = offset

    @property
    def direct_bytes(self) -> int:
        """What goes by arenas on GPUs."""
        return sum(held.numel() for _, held, _ in self._direct_sources)

    def _span(self, members: List[int]) -> Tuple[int, int]:
        """First and last byte, within their storage, that these tensors touch."""
        if len(members) == 1:
            tensor = self._tensors[members[0]]
            size = tensor.numel() * tensor.element_size()
            start, end = _extent(tensor)
            if end - start > _SPARSE_VIEW_RATIO * size + ALIGNMENT:
                tensor = self._tensors[members[0]] = tensor.contiguous()
                start, end = _extent(tensor)
        else:
            extents = [_extent(self._tensors[member]) for member in members if self._tensors[member].numel()]
            if not extents:
                return 0, 0
            start, end = min(low for low, _ in extents), max(high for _, high in extents)
        # Rounded down so that every view keeps its alignment and its offset stays a whole element.
        return start // ALIGNMENT * ALIGNMENT, end

    def write_to(self, address: int, move: Move) -> None:
        """Copy everything to mapped memory of at least `size_bytes`.

        Args:
            address: Of its first byte.
            move: What copies.
        """
        for blob, (offset, size) in zip(self._blobs, self.claims.storages):
            ctypes.memmove(address + offset, blob, size)
        for source, offset, size in self._sources:
            if size:
                move(address + offset, source, size)
        for held, offset in self._device_sources:
            if held.numel():
                copy_down(held, address + offset, held.numel())

    def write_devices(self, arenas: Mapping[str, DeviceArena]) -> None:
        """Copy what goes direct to the arenas on the GPUs; it is there when this returns.

        Args:
            arenas: By the names of this side's devices; those that `lay_out` had room in.
        """
        for name, held, offset in self._direct_sources:
            arenas[name].write(held, offset)
        for name in {name for name, _, _ in self._direct_sources}:
            arenas[name].wait()

    def write_file(self, descriptor: int) -> None:
        """Give a file its length, and copy to it what does not lie there, by ``pwrite``, so that it need not be mapped.

        A mapping with huge pages is not faster: what it saves in faults goes into zeroing what is then copied over.

        Raises:
            OSError: The memory is exhausted (ENOSPC, EFBIG).
        """
        os.ftruncate(descriptor, self.size_bytes)
        for blob, (offset, _) in zip(self._blobs, self.claims.storages):
            _write_whole(descriptor, memoryview(blob), offset)
        for source, offset, size in self._sources:
            if size:
                _write_whole(descriptor, memoryview((ctypes.c_char * size).from_address(source)).cast("B"), offset)
        for held, offset in self._device_sources:
            for place, data in slices_of(held):
                _write_whole(descriptor, data, offset + place)


def aligned(size: int) -> int:
    """What a storage of that size takes in shared memory, bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bytes_of(tensor: Any, start: int, end: int) -> Any:
    """Those bytes of a tensor's storage, as uint8[end - start] on its device."""
    import torch

    held = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return held.set_(storage_of(tensor), start, (end - start,), (1,))


def _extent(tensor: Any) -> Tuple[int, int]:
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    start = tensor.storage_offset() * tensor.element_size()
    return start, start + (last + 1) * tensor.element_size()


def _write_whole(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset += written


def new_parcel() -> int:
    """A memfd of no length yet. Side: worker.

    Raises:
        OSError: No descriptor is left.
    """
    return os.memfd_create("isohub-parcel", _MEMFD_FLAGS)


def make_parcel(cargo: Cargo) -> int:
    """A memfd that holds the cargo and is mapped nowhere. Side: worker.

    Returns:
        A descriptor; the receiver seals it.

    Raises:
        OSError: The memory is exhausted.
    """
    descriptor = new_parcel()
    try:
        cargo.write_file(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_parcel(descriptor: int, limit_bytes: int) -> Optional[Any]:
    """Seal, check and map what a worker sent. Side: caller.

    Args:
        descriptor: Anything at all. Trust: worker. It stays the caller's to close.
        limit_bytes: The longest parcel to accept.

    Returns:
        A private, writable mapping of the whole parcel as a ctypes array, or None for an empty one. It holds
        no descriptor, and goes with the last tensor that views it.

    Raises:
        ProtocolError: It is no memfd, cannot be sealed (something can still write to it), or is longer
            than allowed.
    """
    # Seals first: the kernel has them for memory alone, and says so without asking anybody. Even fstat would wait
    # for the server of a FUSE file.
    try:
        fcntl.fcntl(descriptor, _F_ADD_SEALS, _PARCEL_SEALS)
        seals = fcntl.fcntl(descriptor, _F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(f"a parcel that cannot be sealed against writing: {error.strerror}") from error
    # The exact bits: a file of /dev/shm answers F_SEAL_SEAL, and later kernels may add others.
    if seals & _PARCEL_SEALS != _PARCEL_SEALS:
        raise ProtocolError(f"a parcel whose seals are {seals:#x}; expected {_PARCEL_SEALS:#x}")
    # hugetlb alone has blocks that are no page; where its pages run out, a write of ours would be a SIGBUS.
    if os.fstatvfs(descriptor).f_bsize != mmap.PAGESIZE:
        raise ProtocolError("a parcel of huge pages")
    size_bytes = os.fstat(descriptor).st_size  # only now can it no longer change
    if size_bytes > limit_bytes:
        raise ProtocolError(f"a parcel of {size_bytes} bytes; at most {limit_bytes} may come")
    if size_bytes == 0:
        return None
    try:
        return map_array(descriptor, size_bytes, PRIVATE)
    except OSError as error:  # a descriptor that is not open for reading, or no address space
        raise ProtocolError(f"a parcel of {size_bytes} bytes that cannot be mapped: {error.strerror}") from error


class Reusable:
    """Private memory of large answers, used again once no tensor holds it.

    Fresh pages are what a large answer costs: the kernel zeroes each on its first touch, which takes three times
    as long as the copy. An anonymous private mapping is the caller's own; no worker ever sees it.
    """

    def __init__(self) -> None:
        self._free: Dict[int, List[int]] = {}  # size: addresses
        self._free_bytes = 0

    def take(self, size_bytes: int) -> Any:
        """Memory of at least this size as a ctypes array. It comes back by itself with its last reference."""
        size_bytes = -(-size_bytes // _REUSED_STEP_BYTES) * _REUSED_STEP_BYTES
        free = self._free.get(size_bytes)
        try:
            address = free.pop() if free else None
        except IndexError:  # another thread took it
            address = None
        if address is None:
            address = allocate(size_bytes)
        else:
            self._free_bytes -= size_bytes
        carrier = (ctypes.c_char * size_bytes).from_address(address)
        weakref.finalize(carrier, self._give_back, address, size_bytes).atexit = False
        return carrier

    def _give_back(self, address: int, size_bytes: int) -> None:
        # Runs at any moment, in any thread: list and dict operations that are atomic, and no lock. Two threads
        # at once may keep a little more or less than the limit.
        if self._free_bytes + size_bytes > _LARGEST_REUSED_BYTES:
            unmap(address, size_bytes)
            return
        self._free_bytes += size_bytes
        self._free.setdefault(size_bytes, []).append(address)


#: Of this process.
reusable = Reusable()
