"""Values as JSON, from a closed set; everything else is somebody else's decision.

The set: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, OrderedDict, set,
frozenset, slice, range, Ellipsis, torch.Tensor, Size, dtype and device, numpy arrays and scalars, named
tuples, dict subclasses with string keys, dataclasses and enumerations without methods (the last four as
records), and what `forms` and `standard` have a form for.

JSON's own null, booleans, numbers and strings stand for themselves. All else is ``[tag, ...]``, one tag
from `TAGS`. Tensors and bytes are numbers in the tables of `arena.Cargo`. What is outside of the set goes
to a function that the side gives: a worker registers the object and sends a reference, the caller
pickles it or refuses.

Refuses to: import, look up or call anything by a name that was sent; build what it has not counted.
Side: both. Trust: what `Decoder` reads in the caller is a worker's.
"""

from __future__ import annotations

import ctypes
import logging
import math
import re
import sys
from collections import OrderedDict
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Set, Tuple

from isohub.errors import ProtocolError, printable
from isohub.wire.arena import Cargo, dtype_named, storage_of
from isohub.wire.devices import is_carried
from isohub.wire.forms import image_form, read_image, read_tensor, tensor_form
from isohub.wire.protocol import MAX_DEPTH, MAX_NODES
from isohub.wire.records import EnumRecord, MappingRecord, TupleRecord
from isohub.wire.standard import (
    PLAIN_MAPPINGS,
    array_form,
    read_array,
    read_enum,
    read_standard,
    remember_enum,
    standard_form,
)

__all__ = ["TAGS", "Decoder", "Encoder", "LackedDtype", "TooLargeToEncode"]

#: tag: what it stands for, and what follows it. `docs/wire.md` is held against this table.
TAGS: Dict[str, str] = {
    "l": "list: items",
    "t": "tuple: items",
    "d": "dict: key, value, key, value ...",
    "o": "OrderedDict: key, value ...",
    "s": "set: items",
    "z": "frozenset: items",
    "c": "complex: real, imaginary",
    "f": "float that JSON lacks: 'nan', 'inf' or '-inf'",
    "i": "int beyond 64 bits: hexadecimal text",
    "S": "long str: number of a storage of UTF-8",
    "u": "str with lone surrogates: hexadecimal UTF-8 (surrogatepass)",
    "b": "bytes: number of a storage",
    "B": "bytearray: number of a storage",
    "x": "slice: start, stop, step",
    "g": "range: start, stop, step",
    "e": "Ellipsis",
    "T": "torch.Tensor: number in the tensor table",
    "Z": "torch.Size: ints",
    "y": "torch.dtype: name",
    "v": "torch.device: text",
    "A": "numpy.ndarray: number in the tensor table",
    "n": "numpy scalar: dtype's name, value",
    "K": "torch.Tensor that is sparse or meta: layout, and what `wire.md` says of each",
    "Q": "quantised torch.Tensor: dtype's name, numbers, scale, zero point; or numbers, scales, zero points, axis",
    "D": "numpy array that is no tensor (dates, text, bytes, records): whether a scalar, dtype, Size, bytes",
    "h": "standard value: 'datetime', 'date', 'time', 'timedelta', 'Decimal', 'Fraction', 'UUID' or 'path', text",
    "E": "member of an enumeration: class name, member's name, value",
    "I": "PIL image, from the caller to a worker only: mode, width, height, bytes, palette, info",
    "R": "named tuple: class name, [field names], values",
    "M": "mapping with a class's name: class name, key, value ...",
    "m": "mapping with a class's name and fields that are None: class name, [field names], key, value ...",
    "r": "object that lives in the worker: what the side makes of it",
    "p": "pickle, from the caller to a worker only: number of a storage",
}

_NUMPY_SCALARS = frozenset(
    (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64", "complex64", "complex128",
    )
)  # fmt: skip
_DEVICE = re.compile(r"[a-z]{1,16}(:\d{1,4})?\Z")
_INT64 = 1 << 63
#: A name of a class or field is text for people; real ones are short.
_MAX_NAME_CHARS = 1000
#: An int of 65,536 hex digits is far beyond what any model returns.
_MAX_INT_DIGITS = 65_536

#: Longer strings travel as bytes: JSON would escape them, and a frame has its limit.
_LONGEST_INLINE_CHARS = 1 << 14

#: Keys of one container that may share a hash. Ints hash to themselves modulo 2**61 - 1, so a sender could choose
#: thousands that collide, and each would be compared with all before it.
_MAX_EQUAL_HASHES = 64

Other = Callable[[Any], Any]


class TooLargeToEncode(Exception):  # noqa: N818 - a signal between Encoder and its owner, never shown
    """More than `MAX_NODES` values in one message."""


class LackedDtype(Exception):  # noqa: N818 - a signal between Encoder and its owner, never shown
    """A value is of a dtype that the other side's torch lacks; `args` has its name."""


class Encoder:
    """Turns one message's values into JSON and cargo. Side: both, as the sender.

    Args:
        cargo: Takes the tensors and bytes.
        other: Encodes what is outside of the closed set; returns a whole ``[tag, ...]``.
        exact: Whether subclasses and dataclasses go to `other` too: a side that may pickle keeps what they are.
        lacking: Names of dtypes that the other side's torch does not have.
    """

    def __init__(self, cargo: Cargo, other: Other, exact: bool = False, lacking: FrozenSet[str] = frozenset()) -> None:
        import torch

        self._torch = torch
        self._cargo = cargo
        self._other = other
        self._exact = exact
        self._lacking = lacking
        self._named = hasattr(torch.Tensor, "has_names")  # torch 2.13 has dropped them
        # Until torch 2.0 by the name that now stands for more.
        self._plainly = getattr(torch._C, "DisableTorchFunctionSubclass", None) or torch._C.DisableTorchFunction
        self._open: Set[int] = set()
        self._nodes = 0
        #: Tensors that require a gradient, and their numbers in the table.
        self.differentiable: List[Tuple[int, Any]] = []
        if not _WRITERS:
            _WRITERS.update(_writers(torch))

    def encode(self, value: Any) -> Any:
        """One value as JSON.

        Raises:
            TooLargeToEncode: It holds more than `MAX_NODES` values.
            LackedDtype: A dtype in it is not known where it goes to.
        """
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise TooLargeToEncode
        known = _WRITERS.get(type(value))
        return known(self, value) if known is not None else self._derived(value)

    def _derived(self, value: Any) -> Any:
        """Values whose type is not one of the table's own, nearest meaning first."""
        kind = type(value)
        if issubclass(kind, self._torch.Tensor):
            return self._tensor(value)
        if kind is EnumRecord:
            return self._container(value, lambda: ["E", value.class_name, value.name, self.encode(value.value)])
        image = image_form(self, value, self._exact)
        if image is not None:
            return image
        if self._exact and not issubclass(kind, (TupleRecord, MappingRecord)) and kind.__module__ != "numpy":
            return self._other(value)
        if kind is self._torch.nn.utils.rnn.PackedSequence:  # a named tuple that recurrent layers ask for by its class
            return self._other(value)
        if issubclass(kind, tuple):
            names = _field_names(value)
            if names is not None:
                return self._container(value, lambda: ["R", _class_name(value), names, *map(self.encode, tuple(value))])
            return self._items("t", value)
        if issubclass(kind, dict):
            if kind in PLAIN_MAPPINGS:
                return self._pairs(["d"], value)
            if not isinstance(value, MappingRecord) and not _is_plain_mapping(kind):
                return self._other(value)
            if all(type(key) is str for key in value):
                absent = _absent(value)
                if absent:
                    return self._pairs(["m", _class_name(value), absent], value)
                return self._pairs(["M", _class_name(value)], value)
            return self._pairs(["d"], value)
        if _is_plain_dataclass(kind):
            fields = {name: getattr(value, name) for name in kind.__dataclass_fields__ if hasattr(value, name)}
            return self._container(value, lambda: self._flat(["M", _class_name(value)], fields))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            if kind is numpy.ndarray:
                return self._array(numpy, value)
            if issubclass(kind, numpy.generic) and value.dtype.name in _NUMPY_SCALARS:
                return ["n", value.dtype.name, self.encode(value.item())]
            if issubclass(kind, numpy.bytes_):
                return self.encode(bytes(value))
            if issubclass(kind, numpy.generic) and not issubclass(kind, str):
                form = array_form(self, numpy, value)
                return self._other(value) if form is None else form
        if not self._exact:
            form = standard_form(value)
            if form is not None:
                return form
            member = remember_enum(value)
            if member is not None:
                return self._container(value, lambda: ["E", *member, self.encode(value.value)])
        if issubclass(kind, int):
            return _encode_int(int(value))
        if issubclass(kind, float):
            return _encode_float(float(value))
        if issubclass(kind, str):
            return self._str(str.__str__(value))
        return self._other(value)

    def _str(self, value: str) -> Any:
        if len(value) <= _LONGEST_INLINE_CHARS:
            return _encode_str(value)
        try:
            return ["S", self._cargo.add_bytes(value.encode())]
        except UnicodeEncodeError:
            return _encode_str(value)

    def _items(self, tag: str, values: Sequence[Any]) -> Any:
        return self._container(values, lambda: [tag, *map(self.encode, values)])

    def _pairs(self, head: List[Any], mapping: Mapping[Any, Any]) -> Any:
        return self._container(mapping, lambda: self._flat(head, mapping))

    def _flat(self, head: List[Any], mapping: Mapping[Any, Any]) -> List[Any]:
        for key, value in mapping.items():
            head.append(self.encode(key))
            head.append(self.encode(value))
        return head

    def _container(self, value: Any, encode: Callable[[], Any]) -> Any:
        # A container inside itself, or deeper than the wire takes, is no plain value.
        if id(value) in self._open or len(self._open) >= MAX_DEPTH - 1:
            return self._other(value)
        self._open.add(id(value))
        try:
            return encode()
        finally:
            self._open.discard(id(value))

    def _tensor(self, tensor: Any) -> Any:
        torch = self._torch
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            _say_plain(type(tensor))
            with self._plainly():  # the subclass's own code has no say in its numbers
                return self._plain_tensor(tensor)
        return self._plain_tensor(tensor)

    def _plain_tensor(self, tensor: Any) -> Any:
        torch = self._torch
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            # A form has no place for a gradient, and one must not be lost in silence.
            kept = _is_subclass_with_parts(tensor) or (tensor.requires_grad and not tensor.is_meta)
            form = None if kept else tensor_form(self, tensor)
            return self._other(tensor) if form is None else form
        if not self.may_cross(str(tensor.dtype)[6:]) or _is_wrapper(tensor):
            return self._other(tensor)
        source = tensor
        if type(tensor) is not torch.Tensor or tensor.requires_grad:
            tensor = tensor.detach().as_subclass(torch.Tensor)
        if tensor.device.type != "cpu" and not is_carried(tensor.device):
            tensor = tensor.cpu()
        if self._named and tensor.has_names():
            _say_plain("names of dimensions")
            tensor = tensor.rename(None)
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        number = self._cargo.add_tensor(tensor)
        if source.requires_grad:
            self.differentiable.append((number, source))
        return ["T", number]

    def _array(self, numpy: Any, array: Any) -> Any:
        name = array.dtype.name
        if name not in _NUMPY_SCALARS or name in self._lacking or dtype_named(name) is None:
            form = array_form(self, numpy, array)
            return self._other(array) if form is None else form
        if not array.flags.writeable or not array.dtype.isnative or any(stride < 0 for stride in array.strides):
            array = numpy.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        try:
            tensor = self._torch.from_numpy(array)
        except (TypeError, ValueError):  # strides that are no whole number of elements
            tensor = self._torch.from_numpy(numpy.array(array, order="C"))
        return ["A", self._cargo.add_tensor(tensor)]

    def _dtype(self, dtype: Any) -> Any:
        name = str(dtype)[6:]
        return ["y", name] if self.may_cross(name) else self._other(dtype)

    def may_cross(self, name: str) -> bool:
        """Whether a dtype is one of those that may cross, and is in this torch.

        Raises:
            LackedDtype: The other side's torch does not have it.
        """
        if name in self._lacking:
            raise LackedDtype(name)
        return dtype_named(name) is not None


# How each exact type is written; filled with the first encoder, since torch is imported late.
_WRITERS: Dict[type, Callable[[Encoder, Any], Any]] = {}


def _writers(torch: Any) -> Dict[type, Callable[[Encoder, Any], Any]]:
    return {
        type(None): lambda self, value: value,
        bool: lambda self, value: value,
        int: lambda self, value: _encode_int(value),
        float: lambda self, value: _encode_float(value),
        str: Encoder._str,
        complex: lambda self, value: ["c", _encode_float(value.real), _encode_float(value.imag)],
        type(Ellipsis): lambda self, value: ["e"],
        bytes: lambda self, value: ["b", self._cargo.add_bytes(value)],
        bytearray: lambda self, value: ["B", self._cargo.add_bytes(bytes(value))],
        list: lambda self, value: self._items("l", value),
        tuple: lambda self, value: self._items("t", value),
        set: lambda self, value: self._items("s", value),
        frozenset: lambda self, value: self._items("z", value),
        dict: lambda self, value: self._pairs(["d"], value),
        OrderedDict: lambda self, value: self._pairs(["o"], value),
        slice: lambda self, value: self._items("x", (value.start, value.stop, value.step)),
        range: lambda self, value: self._items("g", (value.start, value.stop, value.step)),
        torch.Tensor: Encoder._tensor,
        torch.nn.Parameter: Encoder._tensor,
        torch.Size: lambda self, value: self._items("Z", value),
        torch.dtype: Encoder._dtype,
        torch.device: lambda self, value: ["v", str(value)],
    }


class Decoder:
    """Turns one message's JSON back into values. Side: both, as the receiver.

    Args:
        storages: What `tables.unload` gave.
        tensors: Likewise.
        remote: Makes what an ``["r", ...]`` stands for, from what follows the tag. It checks that itself.
        unpickle: Reads a caller's pickle; given by a worker only. Without it the tag is refused.
        move: Puts each tensor where it belongs; given by a worker only.
    """

    def __init__(
        self,
        storages: Sequence[Any],
        tensors: Sequence[Any],
        remote: Callable[[List[Any]], Any],
        unpickle: Optional[Callable[[bytes], Any]] = None,
        move: Optional[Callable[[Any], Any]] = None,
    ) -> None:
        self._storages = storages
        self._tensors = tensors
        self._remote = remote
        self._unpickle = unpickle
        self._move = move
        self._moved: Dict[Any, Any] = {}  # by place: a tensor that is given twice stays one
        self._nodes = 0
        self._read: Set[int] = set()  # storages that were read as bytes

    def decode(self, tree: Any, depth: int = 0) -> Any:
        """One value.

        Args:
            tree: What a JSON decoder gave. Trust: in the caller, a worker's.
            depth: How many containers are around it.

        Raises:
            ProtocolError: It is no value of the closed set.
        """
        self._nodes += 1
        kind = type(tree)
        if kind is not list:
            if tree is None or kind is bool or kind is int or kind is float or kind is str:
                return tree
            raise ProtocolError(f"a JSON {kind.__name__} where a value belongs")
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise ProtocolError(f"a value deeper than {MAX_DEPTH} or with more than {MAX_NODES} parts")
        if not tree or type(tree[0]) is not str:
            raise ProtocolError("a value without a tag")
        read = _READERS.get(tree[0])
        if read is None:
            raise ProtocolError(f"a value with the tag {printable(tree[0][:20])!r}; expected one of {sorted(TAGS)}")
        return read(self, tree, depth + 1)

    def _items(self, tree: List[Any], depth: int, start: int = 1) -> List[Any]:
        decode = self.decode
        return [decode(item, depth) for item in tree[start:]]

    def _pairs(self, tree: List[Any], depth: int, start: int = 1) -> List[Tuple[Any, Any]]:
        if (len(tree) - start) % 2:
            raise ProtocolError("a mapping with a key and no value")
        values = self._items(tree, depth, start)
        _check_keys(values[::2])
        return list(zip(values[::2], values[1::2]))

    def _numbered(self, tree: List[Any], table: Sequence[Any]) -> Any:
        number = _only(tree, int)
        if not 0 <= number < len(table):
            raise ProtocolError(f"number {number} in a table of {len(table)}")
        return table[number]

    def _tensor(self, tree: List[Any], _depth: int) -> Any:
        tensor = self._numbered(tree, self._tensors)
        if self._move is None:
            return tensor
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else tree[1]
        if place not in self._moved:
            self._moved[place] = self._move(tensor)
        return self._moved[place]

    def _bytes(self, tree: List[Any]) -> bytes:
        storage = self._numbered(tree, self._storages)
        if tree[1] in self._read:  # an encoder gives each its own; one that is read often would multiply memory
            raise ProtocolError("bytes that are read twice")
        self._read.add(tree[1])
        if storage.device.type != "cpu":
            raise ProtocolError("bytes on a GPU")
        return _storage_bytes(storage)

    def _set(self, tree: List[Any], depth: int) -> List[Any]:
        items = self._items(tree, depth)
        _check_keys(items)
        return items

    def _three(self, tree: List[Any], depth: int) -> List[Any]:
        values = self._items(tree, depth)
        if len(values) != 3:
            raise ProtocolError(f"{len(values)} numbers in a slice or range")
        return values

    def _range(self, tree: List[Any], depth: int) -> range:
        values = self._three(tree, depth)
        if not all(type(value) is int for value in values) or values[2] == 0:
            raise ProtocolError("a range of what is no number")
        return range(*values)

    def _complex(self, tree: List[Any], depth: int) -> complex:
        values = self._items(tree, depth)
        if len(values) != 2 or not all(type(value) is float for value in values):
            raise ProtocolError("a complex number without two floats")
        return complex(*values)

    def _size(self, tree: List[Any], depth: int) -> Any:
        import torch

        values = self._items(tree, depth)
        if not all(type(value) is int and -_INT64 <= value < _INT64 for value in values):
            raise ProtocolError("a Size of what is no size")
        return torch.Size(values)

    def _device(self, tree: List[Any]) -> Any:
        import torch

        text = _only(tree, str)
        if not _DEVICE.match(text):
            raise ProtocolError(f"{printable(text[:40])!r} where a device belongs")
        try:
            return torch.device(text)
        except RuntimeError as error:
            raise ProtocolError(f"a device {text!r} that this torch does not know") from error

    def _dtype(self, tree: List[Any]) -> Any:
        name = _only(tree, str)
        known = dtype_named(name)
        if known is None:
            raise ProtocolError(f"a dtype {printable(name[:40])!r}, which is not among those that may cross")
        return known[0]

    def _numpy(self) -> Any:
        try:
            import numpy
        except ImportError as error:
            if self._unpickle is None:
                raise ProtocolError("a numpy value, and numpy is not installed here") from error
            raise ImportError(
                "an argument is a numpy value, and numpy is not installed where this repo runs"
            ) from error
        return numpy

    def _array(self, tree: List[Any]) -> Any:
        self._numpy()
        tensor = self._numbered(tree, self._tensors)
        try:
            return tensor.numpy()
        except TypeError as error:
            raise ProtocolError(f"a numpy array of {tensor.dtype}") from error

    def _numpy_scalar(self, tree: List[Any], depth: int) -> Any:
        if len(tree) != 3 or type(tree[1]) is not str or tree[1] not in _NUMPY_SCALARS:
            raise ProtocolError("a numpy scalar of an unknown type")
        value = self.decode(tree[2], depth)
        if type(value) not in (bool, int, float, complex):
            raise ProtocolError("a numpy scalar that is no number")
        numpy = self._numpy()
        dtype = numpy.dtype(tree[1])
        try:
            held = dtype.kind not in "iu" or numpy.iinfo(dtype).min <= value <= numpy.iinfo(dtype).max
            with numpy.errstate(all="ignore"):  # a warning is an exception where warnings are errors
                scalar = dtype.type(value if held else 0)
        except (TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"a numpy {tree[1]} that does not hold its value") from error
        if not held or (scalar.item() != value and value == value):  # an honest one came from `item()`
            raise ProtocolError(f"a numpy {tree[1]} that does not hold its value")
        return scalar

    def _named_tuple(self, tree: List[Any], depth: int) -> TupleRecord:
        if len(tree) < 3 or type(tree[2]) is not list or len(tree[2]) != len(tree) - 3:
            raise ProtocolError("a named tuple whose names and values differ in number")
        return TupleRecord(_name(tree[1]), [_name(name) for name in tree[2]], self._items(tree, depth, 3))

    def _mapping(self, tree: List[Any], depth: int) -> MappingRecord:
        if len(tree) < 2:
            raise ProtocolError("a mapping without its class's name")
        pairs = self._pairs(tree, depth, 2)
        if not all(type(key) is str for key, _ in pairs):
            raise ProtocolError("a mapping record with a key that is no string")
        return MappingRecord(_name(tree[1]), pairs)

    def _model_output(self, tree: List[Any], depth: int) -> MappingRecord:
        if len(tree) < 3 or type(tree[2]) is not list:
            raise ProtocolError("a mapping without its class's name and fields")
        record = self._mapping([tree[0], tree[1], *tree[3:]], depth)
        return MappingRecord(record.class_name, list(record.items()), [_name(name) for name in tree[2]])

    def _other_array(self, tree: List[Any], depth: int) -> Any:
        return read_array(self, self._numpy(), tree, depth)

    def _enum(self, tree: List[Any], depth: int) -> Any:
        if len(tree) != 4:
            raise ProtocolError("a member of an enumeration that is none")
        value = self.decode(tree[3], depth)
        return read_enum(_name(tree[1]), _name(tree[2]), value, self._unpickle is not None)

    def _image(self, tree: List[Any], depth: int) -> Any:
        if self._unpickle is None:
            raise ProtocolError("an image from a worker")
        return read_image(self, tree, depth)

    def _pickle(self, tree: List[Any]) -> Any:
        if self._unpickle is None:
            raise ProtocolError("a pickle from a worker")
        return self._unpickle(self._bytes(tree))


_READERS: Dict[str, Callable[[Decoder, List[Any], int], Any]] = {
    "l": lambda self, tree, depth: self._items(tree, depth),
    "t": lambda self, tree, depth: tuple(self._items(tree, depth)),
    "d": lambda self, tree, depth: dict(self._pairs(tree, depth)),
    "o": lambda self, tree, depth: OrderedDict(self._pairs(tree, depth)),
    "s": lambda self, tree, depth: set(self._set(tree, depth)),
    "z": lambda self, tree, depth: frozenset(self._set(tree, depth)),
    "c": Decoder._complex,
    "f": lambda self, tree, depth: _read_float(tree),
    "i": lambda self, tree, depth: _read_int(tree),
    "S": lambda self, tree, depth: _read_utf8(self._bytes(tree)),
    "u": lambda self, tree, depth: _read_str(tree),
    "b": lambda self, tree, depth: self._bytes(tree),
    "B": lambda self, tree, depth: bytearray(self._bytes(tree)),
    "x": lambda self, tree, depth: slice(*self._three(tree, depth)),
    "g": Decoder._range,
    "e": lambda self, tree, depth: Ellipsis,
    "T": Decoder._tensor,
    "Z": Decoder._size,
    "y": lambda self, tree, depth: self._dtype(tree),
    "v": lambda self, tree, depth: self._device(tree),
    "A": lambda self, tree, depth: self._array(tree),
    "n": Decoder._numpy_scalar,
    "K": read_tensor,
    "Q": read_tensor,
    "D": Decoder._other_array,
    "h": lambda self, tree, depth: read_standard(tree),
    "E": Decoder._enum,
    "I": Decoder._image,
    "R": Decoder._named_tuple,
    "M": Decoder._mapping,
    "m": Decoder._model_output,
    "r": lambda self, tree, depth: self._remote(tree[1:]),
    "p": lambda self, tree, depth: self._pickle(tree),
}
assert set(_READERS) == set(TAGS)


def _encode_int(value: int) -> Any:
    return value if -_INT64 <= value < _INT64 else ["i", f"{value:x}"]


def _encode_float(value: float) -> Any:
    return value if math.isfinite(value) else ["f", repr(value)]


def _encode_str(value: str) -> Any:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return ["u", value.encode("utf-8", "surrogatepass").hex()]
    return value


def _only(tree: List[Any], kind: type) -> Any:
    if len(tree) != 2 or type(tree[1]) is not kind:
        raise ProtocolError(f"a value {printable(tree[0])!r} without its one {kind.__name__}")
    return tree[1]


def _read_float(tree: List[Any]) -> float:
    text = _only(tree, str)
    if text not in ("nan", "inf", "-inf"):
        raise ProtocolError(f"{printable(text[:40])!r} where a float that JSON lacks belongs")
    return float(text)


def _read_int(tree: List[Any]) -> int:
    text = _only(tree, str)
    if len(text) > _MAX_INT_DIGITS or not re.match(r"-?[0-9a-f]+\Z", text):
        raise ProtocolError("an int that is no hexadecimal number")
    return int(text, 16)


def _read_str(tree: List[Any]) -> str:
    try:
        return bytes.fromhex(_only(tree, str)).decode("utf-8", "surrogatepass")
    except ValueError as error:
        raise ProtocolError("a string that is no UTF-8") from error


def _read_utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("a string that is no UTF-8") from error


def _name(claimed_name: Any) -> str:
    if type(claimed_name) is not str or len(claimed_name) > _MAX_NAME_CHARS:
        raise ProtocolError("a name of a class or a field that is no short string")
    return printable(claimed_name, newlines=False)


def _check_keys(keys: Sequence[Any]) -> None:
    """Refuse what cannot be a key, and keys that were chosen to collide. Strings' hashes nobody can choose."""
    counts: Dict[int, int] = {}
    for key in keys:
        if type(key) is str:
            continue
        try:
            hashed = hash(key)
        except TypeError as error:
            raise ProtocolError(f"a {type(key).__name__} as a key or in a set") from error
        counts[hashed] = count = counts.get(hashed, 0) + 1
        if count > _MAX_EQUAL_HASHES:
            raise ProtocolError(f"more than {_MAX_EQUAL_HASHES} keys of one hash")


def _storage_bytes(storage: Any) -> bytes:
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""


def _class_name(value: Any) -> str:
    name = value.class_name if isinstance(value, (TupleRecord, MappingRecord)) else type(value).__name__
    return name.encode("utf-8", "replace").decode("utf-8")[:_MAX_NAME_CHARS]


def _field_names(value: Any) -> Optional[List[str]]:
    """Names of a named tuple's or a structseq's (torch.return_types) fields, else None."""
    names = value._fields if isinstance(value, TupleRecord) else getattr(type(value), "_fields", None)
    if names is None and getattr(type(value), "n_fields", None) == len(value):
        names = getattr(type(value), "__match_args__", None)
    if isinstance(names, tuple) and len(names) == len(value) and all(type(name) is str for name in names):
        return list(names)
    return None


# What `dataclasses.dataclass` and the class statement put into a class by themselves.
_GENERATED = frozenset(
    (
        "__annotations__", "__annotate__", "__annotations_cache__", "__dataclass_fields__", "__dataclass_params__",
        "__delattr__", "__dict__", "__doc__", "__eq__", "__firstlineno__", "__ge__", "__getstate__", "__gt__",
        "__hash__", "__init__", "__le__", "__lt__", "__match_args__", "__module__", "__post_init__", "__replace__",
        "__repr__", "__setattr__", "__setstate__", "__slots__", "__static_attributes__", "__weakref__",
    )
)  # fmt: skip
# Beyond a dict's own: what the model outputs of the transformers library add, and `MappingRecord` has too.
_LIBRARIES = ("transformers.", "diffusers.")
_OF_MODEL_OUTPUTS = frozenset({"to_tuple", "__init_subclass__", "__reduce__", "__class_getitem__", "__orig_bases__"})


def _is_plain_dataclass(kind: type) -> bool:
    """A dataclass that only holds values: what it can *do* would be lost by sending its fields."""
    fields = getattr(kind, "__dataclass_fields__", None)
    if fields is None:
        return False
    names = (name for base in kind.__mro__[:-1] for name in vars(base))
    return all(name in _GENERATED or name in fields for name in names)


def _absent(value: Any) -> List[str]:
    """Names of a model output's fields that are None, and so no keys."""
    if isinstance(value, MappingRecord):
        return list(value.absent)
    fields = getattr(type(value), "__dataclass_fields__", ())
    return [name for name in fields if name not in value and getattr(value, name, 0) is None]


def _is_plain_mapping(kind: type) -> bool:
    """A dict subclass that does no more than a dict does."""
    # Those of the libraries have methods for the names of their older versions, which `MappingRecord` knows too.
    if any(
        base.__name__ in ("ModelOutput", "BaseOutput") and base.__module__.startswith(_LIBRARIES)
        for base in kind.__mro__
    ):
        return True
    fields = getattr(kind, "__dataclass_fields__", {})
    own = [base for base in kind.__mro__ if base not in (dict, OrderedDict, object)]
    names = {name for base in own for name in vars(base)} - _GENERATED - _OF_MODEL_OUTPUTS - set(fields)
    return all(name in vars(dict) or name in vars(OrderedDict) for name in names)


_log = logging.getLogger("isohub.values")
_said: Set[str] = set()
_MOST_SAID = 100


def _say_plain(what: Any) -> None:
    """Say once that a tensor travels without this. In a worker it goes to stderr, and so to the caller's log."""
    name = what if isinstance(what, str) else f"the class {what.__module__}.{what.__qualname__}"
    if name not in _said and len(_said) < _MOST_SAID:
        _said.add(name)
        _log.warning("a tensor travels as a plain torch.Tensor, without %s", printable(name, newlines=False))


def _is_subclass_with_parts(tensor: Any) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def _is_wrapper(tensor: Any) -> bool:
    """A subclass that holds its numbers elsewhere (torchao, DTensor, functorch)."""
    return _is_subclass_with_parts(tensor) or (
        tensor.numel() > 0 and tensor.device.type == "cpu" and not _has_memory(tensor)
    )


def _has_memory(tensor: Any) -> bool:
    try:
        return bool(storage_of(tensor).data_ptr())
    except RuntimeError:
        return False
