"""The tables of a message, read: every claimed number is checked before a tensor exists.

Reading and building are two steps, since calls of one model say the same of their tensors again and again: what a
table says is checked once for each text, how much memory there is for each message.

Refuses to: build a tensor past the end of its storage, copy a storage more often than there is memory.
Side: both. Trust: in the caller, tables are a worker's.
"""

from __future__ import annotations

import ctypes
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from isohub.errors import ProtocolError
from isohub.wire.arena import ALIGNMENT, SMALLEST_REUSED_BYTES, Claims, dtype_named, reusable, storage_of
from isohub.wire.copies import Move
from isohub.wire.devices import Placing, read_devices
from isohub.wire.protocol import MAX_DIMENSIONS, MAX_TENSORS

__all__ = ["Copying", "Source", "Tables", "Viewing", "read_tables", "unload"]

# How much of bool tensors is looked at in one message, in sizes of its memory; honest ones hardly overlap.
_BOOL_LOOKS = 4
_BOOL_STEP_BYTES = 1 << 20
_TO_BOOL = bytes([0] + [1] * 255)
# Dtypes that torch makes of bytes without a look at them, or a warning.
_PLAIN = frozenset(
    ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "complex64", "complex128")
)


class _Row(NamedTuple):
    """One tensor, checked against its storage."""

    storage: int
    dtype: Any
    offset: int
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]
    elements: int
    plain: bool  # a contiguous one that fills a storage of its own


def _shaped(flat: Any, row: _Row) -> Any:
    """The same elements in the row's shape. Not what autograd calls a view: nobody knows a base of it."""
    return flat if len(row.shape) == 1 else flat.view(row.shape).data


class Viewing:
    """Storages that are the memory itself.

    Args:
        memory: An arena's `carrier`, a parcel's mapping, or bytes.
    """

    __slots__ = ("_memory", "_torch")

    def __init__(self, memory: Any) -> None:
        import torch

        self._torch = torch
        self._memory = memory

    def __call__(self, offset: int, size: int) -> Any:
        """The untyped storage of these bytes."""
        torch = self._torch
        if size == 0:
            return storage_of(torch.empty(0, dtype=torch.uint8, device="cpu"))
        return storage_of(torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=offset))

    def tensor(self, row: _Row, storage: Tuple[int, int]) -> Any:
        """A plain row's tensor, which has its storage for itself."""
        flat = self._torch.frombuffer(self._memory, dtype=row.dtype, count=row.elements, offset=storage[0])
        return _shaped(flat, row)


class Copying:
    """Storages that are copies of mapped memory, and share nothing with it.

    Args:
        address: Of its first byte.
        move: What copies.
    """

    __slots__ = ("_address", "_move", "_torch")

    def __init__(self, address: int, move: Move = ctypes.memmove) -> None:
        import torch

        self._torch = torch
        self._address = address
        self._move = move

    def __call__(self, offset: int, size: int) -> Any:
        """The untyped storage of these bytes."""
        torch = self._torch
        if size >= SMALLEST_REUSED_BYTES:
            own = storage_of(torch.frombuffer(reusable.take(size), dtype=torch.uint8, count=size))
        else:
            own = storage_of(torch.empty(size, dtype=torch.uint8, device="cpu"))
        if size:
            self._move(own.data_ptr(), self._address + offset, size)
        return own

    def tensor(self, row: _Row, storage: Tuple[int, int]) -> Any:
        """A plain row's tensor, which has its storage for itself."""
        offset, size = storage
        if size >= SMALLEST_REUSED_BYTES:
            memory = reusable.take(size)
            own = _shaped(self._torch.frombuffer(memory, dtype=row.dtype, count=row.elements), row)
        else:
            own = self._torch.empty(row.shape, dtype=row.dtype, device="cpu")
        self._move(own.data_ptr(), self._address + offset, size)
        return own


#: Where storages are made of.
Source = Union[Viewing, Copying]


class Tables(NamedTuple):
    """What a message says of its memory, checked but for how much of that there is.

    Attributes:
        storages: Offset and size of each.
        rows: The tensors.
        devices: The GPU's name of a storage by its number, and whether it lies there.
        end_bytes: Where the last storage in the message's memory ends.
        total_bytes: Of all of them.
        bool_bytes: How much of them is looked at for bool tensors.
    """

    storages: Sequence[Tuple[int, int]]
    rows: Sequence[_Row]
    devices: Dict[int, Tuple[str, bool]]
    end_bytes: int
    total_bytes: int
    bool_bytes: int

    def build(self, size_bytes: int, source: Source, place: Optional[Placing] = None) -> Tuple[List[Any], List[Any]]:
        """The storages and tensors.

        Args:
            size_bytes: How much memory there is.
            source: Makes storages of it.
            place: Makes those of GPUs, where they are wanted there (`devices.placing`).

        Returns:
            Untyped storages, and strided tensors over them with their aliases kept.

        Raises:
            ProtocolError: There is less memory than the tables say, or none that is shared on a GPU.
        """
        if self.end_bytes > size_bytes or self.total_bytes > size_bytes:  # those that overlap would multiply copies
            raise ProtocolError(
                f"storages up to {self.end_bytes} and of {self.total_bytes} bytes in {size_bytes} bytes of memory"
            )
        if self.bool_bytes > _BOOL_LOOKS * size_bytes + ALIGNMENT:
            raise ProtocolError("bool tensors that overlap many times over")
        if len(self.rows) == len(self.storages) == 1 and self.rows[0].plain and not self.devices:
            tensor = source.tensor(self.rows[0], self.storages[0])
            return [storage_of(tensor)], [tensor]
        storages: List[Any] = [None] * len(self.storages)
        tensors: List[Any] = [None] * len(self.rows)
        for number, row in enumerate(self.rows):
            if row.plain and row.storage not in self.devices:
                tensors[number] = tensor = source.tensor(row, self.storages[row.storage])
                storages[row.storage] = storage_of(tensor)
        for number, (offset, size) in enumerate(self.storages):
            if storages[number] is None:
                storages[number] = self._storage(number, offset, size, source, place)
        for number, row in enumerate(self.rows):
            if tensors[number] is None:
                tensors[number] = _tensor(row, storages[row.storage], on_gpu=bool(self.devices))
        return storages, tensors

    def _storage(self, number: int, offset: int, size: int, source: Source, place: Optional[Placing]) -> Any:
        name, direct = self.devices.get(number, ("", False))
        if direct and place is None:
            raise ProtocolError("a storage in the memory of a GPU that nobody shares")
        placed = place(name, direct, offset, size) if place is not None and name else None
        return source(offset, size) if placed is None else storage_of(placed)


def _tensor(row: _Row, storage: Any, *, on_gpu: bool) -> Any:
    import torch

    dtype, device = row.dtype, storage.device if on_gpu else torch.device("cpu")
    if dtype is torch.complex32:  # made directly it warns, which is an exception where warnings are errors
        tensor = torch.empty(0, dtype=torch.uint8, device=device).view(dtype)
    else:
        tensor = torch.empty(0, dtype=dtype, device=device)
    # set_ is the one call that makes a tensor of any strides over a given storage.
    tensor.set_(storage, row.offset, row.shape, row.strides)
    if dtype is not torch.bool:
        return tensor
    if device.type != "cpu":
        return tensor.view(torch.uint8).ne(0)  # other bytes than 0 and 1 are none: `_of_bools`
    return _of_bools(tensor, *_bytes_touched(row, 1))


def unload(
    claims: Claims, size_bytes: int, source: Source, place: Optional[Placing] = None
) -> Tuple[List[Any], List[Any]]:
    """Read tables and build what they describe: `read_tables` and `Tables.build`."""
    return read_tables(claims).build(size_bytes, source, place)


def read_tables(claims: Claims) -> Tables:
    """The tables, each number checked.

    Args:
        claims: Trust: in the caller, a worker's.

    Raises:
        ProtocolError: A number does not fit: out of bounds, negative, of a wrong type, an unknown dtype.
    """
    if len(claims.tensors) > MAX_TENSORS or len(claims.storages) > MAX_TENSORS:
        raise ProtocolError(f"{len(claims.tensors)} tensors in one message; at most {MAX_TENSORS} may come")
    devices = dict(read_devices(claims.devices, len(claims.storages))) if claims.devices else {}
    storages: List[Tuple[int, int]] = []
    end_bytes = total_bytes = 0
    for number, placed_at in enumerate(claims.storages):
        offset, size = _whole_numbers(placed_at, 2)
        storages.append((offset, size))
        if number in devices and devices[number][1]:
            continue
        if offset % ALIGNMENT:
            raise ProtocolError(f"a storage at {offset}, which is no multiple of {ALIGNMENT}")
        end_bytes = max(end_bytes, offset + size)
        total_bytes += size
    shared = _several(claims.tensors)
    rows: List[_Row] = []
    bool_bytes = 0
    for claimed_row in claims.tensors:
        row = _read_row(claimed_row, storages, shared)
        rows.append(row)
        if claimed_row[1] == "bool" and not devices.get(row.storage, ("", False))[1]:
            start, end = _bytes_touched(row, 1)
            bool_bytes += end - start
    return Tables(storages, rows, devices, end_bytes, total_bytes, bool_bytes)


def _several(claimed_rows: Sequence[Sequence[Any]]) -> Dict[Any, int]:
    """How many tensors there are to a storage, as the rows have it."""
    counts: Dict[Any, int] = {}
    for row in claimed_rows:
        if len(row) != 5 or type(row[0]) is not int:
            raise ProtocolError("a row of the tensor table that is none")
        counts[row[0]] = counts.get(row[0], 0) + 1
    return counts


def _read_row(claimed_row: Sequence[Any], storages: Sequence[Tuple[int, int]], shared: Dict[Any, int]) -> _Row:
    claimed_dtype, claimed_shape, claimed_strides = claimed_row[1], claimed_row[3], claimed_row[4]
    if not isinstance(claimed_dtype, str) or not isinstance(claimed_shape, list):
        raise ProtocolError("a row of the tensor table that is none")
    if not isinstance(claimed_strides, list):
        raise ProtocolError("a row of the tensor table that is none")
    if len(claimed_shape) != len(claimed_strides) or len(claimed_shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"a tensor of {len(claimed_shape)} dimensions and {len(claimed_strides)} strides")
    number, offset = _whole_numbers((claimed_row[0], claimed_row[2]), 2)
    shape = _whole_numbers(claimed_shape, len(claimed_shape))
    strides = _whole_numbers(claimed_strides, len(claimed_strides))
    known = dtype_named(claimed_dtype)
    if known is None:
        raise ProtocolError(f"a tensor of dtype {claimed_dtype[:40]!r}, which is not among those that may cross")
    if number >= len(storages):
        raise ProtocolError(f"a tensor in storage {number} of {len(storages)}")
    dtype, itemsize = known
    size = storages[number][1]
    count = _check_extent(shape, strides, offset, itemsize, size)
    plain = (
        count > 0
        and offset == 0
        and count * itemsize == size
        and shared[number] == 1
        and claimed_dtype in _PLAIN
        and strides == _contiguous(shape)
    )
    return _Row(number, dtype, offset, tuple(shape), tuple(strides), count, plain)


def _contiguous(shape: Sequence[int]) -> List[int]:
    """The strides that torch gives a new tensor of that shape."""
    strides, step = [0] * len(shape), 1
    for place in range(len(shape) - 1, -1, -1):
        strides[place] = step
        step *= max(shape[place], 1)
    return strides


def _whole_numbers(values: Sequence[Any], count: int) -> List[int]:
    if len(values) != count:
        raise ProtocolError(f"{len(values)} numbers where {count} belong")
    for value in values:
        # bool is an int; 2**62 keeps every product below within what torch's int64 holds
        if type(value) is not int or not 0 <= value < 1 << 62:
            raise ProtocolError(f"{str(value)[:40]!r} where a size or an offset belongs")
    return list(values)


def _check_extent(shape: List[int], strides: List[int], offset: int, itemsize: int, available_bytes: int) -> int:
    """Whether a tensor lies within its storage; returns its elements."""
    elements, last = itemsize, offset
    for size, stride in zip(shape, strides):
        elements *= max(size, 1)
        last += (size - 1) * stride
        if elements >= 1 << 62:  # torch counts elements and bytes in int64
            raise ProtocolError(f"a tensor of shape {shape}")
    if 0 not in shape and (last + 1) * itemsize > available_bytes:
        raise ProtocolError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} needs {(last + 1) * itemsize} bytes "
            f"of a storage of {available_bytes}"
        )
    if 0 in shape and offset * itemsize > available_bytes:
        raise ProtocolError(f"an empty tensor at offset {offset} of a storage of {available_bytes} bytes")
    return 0 if 0 in shape else elements // itemsize


def _bytes_touched(row: _Row, itemsize: int) -> Tuple[int, int]:
    """The first and the last byte of a tensor within its storage."""
    if row.elements == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(row.shape, row.strides))
    return row.offset * itemsize, (row.offset + last + 1) * itemsize


def _of_bools(tensor: Any, start: int, end: int) -> Any:
    """The tensor, or a copy of it whose bytes are bools.

    torch's kernels take it that a bool is 0 or 1; other bytes make counts and writes disagree. An honest worker can
    send them too: ``torch.empty(3, dtype=torch.bool)`` holds whatever was there, and so does a view of uint8 as bool.
    The storage itself is left alone, since tensors of other dtypes may share it.
    """
    import torch

    address = storage_of(tensor).data_ptr()
    for place in range(start, end, _BOOL_STEP_BYTES):
        if ctypes.string_at(address + place, min(_BOOL_STEP_BYTES, end - place)).translate(None, b"\x00\x01"):
            break
    else:
        return tensor
    data = bytearray(ctypes.string_at(address + start, end - start).translate(_TO_BOOL))
    own = storage_of(torch.frombuffer(data, dtype=torch.uint8))
    return torch.empty(0, dtype=torch.bool, device="cpu").set_(
        own, tensor.storage_offset() - start, tensor.shape, tensor.stride()
    )
