"""Values of the standard library and of numpy that have a text or a table of bytes: times, decimals, paths, arrays.

A worker's `Path` arrives as a pure path: it names a file of the worker's, and the caller's file of that name is
another. Arrays of dates, text, bytes and records arrive as they were; arrays of objects have no form.

Refuses to: make a dtype of anything but its own table, an array whose bytes are not as many as its shape says, text
that is no Unicode, a bool that is neither 0 nor 1.
Side: both. Trust: what the ``read_`` functions take in the caller is a worker's.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import pathlib
import re
import sys
import uuid
from typing import Any, Callable, Dict, List, Optional, Tuple

from isohub.errors import ProtocolError, printable
from isohub.wire.protocol import MAX_DIMENSIONS
from isohub.wire.records import EnumRecord

__all__ = [
    "PLAIN_MAPPINGS",
    "array_form",
    "read_array",
    "read_enum",
    "read_standard",
    "remember_enum",
    "standard_form",
]

_LONGEST_TEXT_CHARS = 10_000
_LONGEST_TIME_CHARS = 64
_LONGEST_DECIMAL_CHARS = 1000
#: numpy's names for types of whole bytes; what holds references to objects is not among them.
_SIMPLE = re.compile(
    r"(?:[<>|](?:[iu][1248]|f[248]|c(?:8|16)|b1|[SU][1-9]\d{0,6})|\|V[1-9]\d{0,6}"
    r"|[<>][mM]8(?:\[(?:[1-9]\d{0,5})?(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)\Z"
)
_MOST_FIELDS = 1000
_MOST_LEVELS = 8
_LARGEST_ITEM_BYTES = 1 << 24


#: Mappings of the standard library that do more than hold, and are sent as what they hold.
PLAIN_MAPPINGS = (collections.defaultdict, collections.Counter)


# Times, numbers and paths.


def standard_form(value: Any) -> Optional[List[Any]]:
    """The form of a value of the standard library, or None. Side: worker, which may not pickle."""
    write = _WRITERS.get(type(value))
    return None if write is None else write(value)


def _of_time(name: str) -> Callable[[Any], Optional[List[Any]]]:
    def write(value: Any) -> Optional[List[Any]]:
        # Zones with names and rules, and the second of two equal hours, have no text.
        zone = getattr(value, "tzinfo", None)
        if (zone is not None and type(zone) is not datetime.timezone) or getattr(value, "fold", False):
            return None
        return ["h", name, value.isoformat()]

    return write


def _of_text(name: str, longest: int) -> Callable[[Any], Optional[List[Any]]]:
    def write(value: Any) -> Optional[List[Any]]:
        text = str(value)
        return ["h", name, text] if len(text) <= longest and text.isprintable() else None

    return write


_WRITERS: Dict[type, Callable[[Any], Optional[List[Any]]]] = {
    datetime.datetime: _of_time("datetime"),
    datetime.date: _of_time("date"),
    datetime.time: _of_time("time"),
    datetime.timedelta: lambda value: ["h", "timedelta", f"{value.days} {value.seconds} {value.microseconds}"],
    decimal.Decimal: _of_text("Decimal", _LONGEST_DECIMAL_CHARS),
    fractions.Fraction: _of_text("Fraction", _LONGEST_DECIMAL_CHARS),
    uuid.UUID: _of_text("UUID", _LONGEST_TIME_CHARS),
    pathlib.PosixPath: _of_text("path", _LONGEST_TEXT_CHARS),
    pathlib.PurePosixPath: _of_text("path", _LONGEST_TEXT_CHARS),
}


def _read_timedelta(text: str) -> datetime.timedelta:
    days, seconds, microseconds = map(int, text.split(" "))
    return datetime.timedelta(days, seconds, microseconds)


def _read_decimal(text: str) -> decimal.Decimal:
    # A context of its own: the caller's may raise for what it rounds, and construction is exact.
    return decimal.Decimal(text, decimal.Context(traps=[decimal.InvalidOperation]))


def _read_fraction(text: str) -> fractions.Fraction:
    if not re.match(r"-?\d+(?:/\d+)?\Z", text):  # others are numbers with exponents, which can be of any size
        raise ValueError("no fraction")
    return fractions.Fraction(text)


_TEXTS: Dict[str, Tuple[int, Callable[[str], Any]]] = {
    "datetime": (_LONGEST_TIME_CHARS, datetime.datetime.fromisoformat),
    "date": (_LONGEST_TIME_CHARS, datetime.date.fromisoformat),
    "time": (_LONGEST_TIME_CHARS, datetime.time.fromisoformat),
    "timedelta": (_LONGEST_TIME_CHARS, _read_timedelta),
    "Decimal": (_LONGEST_DECIMAL_CHARS, _read_decimal),
    "Fraction": (_LONGEST_DECIMAL_CHARS, _read_fraction),
    "UUID": (_LONGEST_TIME_CHARS, uuid.UUID),
    "path": (_LONGEST_TEXT_CHARS, pathlib.PurePosixPath),
}


def read_standard(tree: List[Any]) -> Any:
    """A value of the tag ``h``."""
    if len(tree) != 3 or type(tree[1]) is not str or type(tree[2]) is not str or tree[1] not in _TEXTS:
        raise ProtocolError("a standard value that is none")
    longest, read = _TEXTS[tree[1]]
    if len(tree[2]) > longest or not tree[2].isprintable():
        raise ProtocolError(f"a {tree[1]} of a text that is none")
    try:
        return read(tree[2])
    except (ValueError, ArithmeticError, TypeError) as error:
        raise ProtocolError(f"a {tree[1]} of a text that is none: {printable(tree[2][:100])!r}") from error


# Members of enumerations.

# Classes whose members this worker has sent, so that one that comes back is the member again.
_sent: Dict[Tuple[str, str], Any] = {}
_OF_ENUMS = frozenset(
    (
        "__module__", "__doc__", "__dict__", "__weakref__", "__new__", "__reduce_ex__", "__members__", "__qualname__",
        "__firstlineno__", "__static_attributes__", "__annotations__", "__annotate_func__", "__annotations_cache__",
        "__format__", "__str__", "__repr__", "__hash__", "__init__",
    )
)  # fmt: skip


def remember_enum(value: Any) -> Optional[Tuple[str, str]]:
    """The class's name and the member's, if it is a member of an enumeration that only names values. Side: worker."""
    kind: Any = type(value)
    if not issubclass(kind, enum.Enum) or issubclass(kind, enum.Flag):
        return None
    members = kind.__members__
    for name in vars(kind):
        if name not in _OF_ENUMS and name not in members and not name.startswith("_"):
            return None  # it can do something
    if members.get(value.name) is not value:
        return None
    key = kind.__qualname__[:1000], value.name[:1000]
    _sent[key] = value
    return key


def read_enum(class_name: str, name: str, value: Any, sent_here: bool) -> Any:
    """A record of a member; in the worker that sent it, the member."""
    record = EnumRecord(class_name, name, value)
    return _sent.get((class_name, name), record) if sent_here else record


# Arrays of what no tensor holds.


def array_form(encoder: Any, numpy: Any, value: Any) -> Optional[List[Any]]:
    """The form of a numpy array or scalar of dates, text, bytes or records, or None."""
    scalar = isinstance(value, numpy.generic)
    dtype = value.dtype
    described = _described(dtype, 0)
    if described is None or not 0 < dtype.itemsize <= _LARGEST_ITEM_BYTES or len(value.shape) > MAX_DIMENSIONS:
        return None
    data = value.tobytes()
    return ["D", scalar, described, ["Z", *value.shape], encoder.encode(data)]


def _described(dtype: Any, level: int) -> Any:
    """A dtype as JSON: its text, or its size and its fields."""
    if dtype.hasobject or level > _MOST_LEVELS or dtype.metadata:
        return None
    if dtype.names is None:
        return dtype.str if dtype.subdtype is None and _SIMPLE.match(dtype.str) else None
    fields: List[Any] = []
    for name in dtype.names:
        if len(dtype.fields[name]) != 2:
            return None  # a title
        field, offset = dtype.fields[name]
        base, shape = field.subdtype or (field, ())
        inner = _described(base, level + 1)
        if inner is None:
            return None
        fields.append([name, inner, list(shape), offset])
    return [dtype.itemsize, dtype.isalignedstruct, fields]


def read_array(decoder: Any, numpy: Any, tree: List[Any], depth: int) -> Any:
    """An array or a scalar of the tag ``D``.

    Raises:
        ProtocolError: Its dtype is not among those that may cross, or its bytes do not fit its shape.
    """
    import torch

    if len(tree) != 5 or type(tree[1]) is not bool:
        raise ProtocolError("an array that is none")
    shape, data = decoder.decode(tree[3], depth), decoder.decode(tree[4], depth)
    if type(shape) is not torch.Size or type(data) is not bytes or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError("an array that is none")
    count = 1
    for length in shape:
        if not 0 <= length < 1 << 48:
            raise ProtocolError("an array of a size that is none")
        count *= max(length, 1)
    if count >= 1 << 62 or (tree[1] and len(shape)):
        raise ProtocolError("an array of a size that is none")
    try:
        dtype = numpy.dtype(_read_dtype(tree[2], 0, [0]))
        if not 0 < dtype.itemsize <= _LARGEST_ITEM_BYTES or count * dtype.itemsize >= 1 << 62:
            raise ProtocolError("an array of a size that is none")
        if len(data) != (0 if 0 in shape else count * dtype.itemsize):
            raise ProtocolError(f"an array of {len(data)} bytes, which its shape does not take")
        if data:
            array = numpy.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
            _mend(numpy, array)
        else:
            array = numpy.empty(shape, dtype=dtype)
    except (ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise ProtocolError(f"an array that cannot be made: {printable(str(error)[:300])}") from None
    return array[()] if tree[1] else array


def _read_dtype(claimed: Any, level: int, fields_before: List[int]) -> Any:
    """What ``numpy.dtype`` takes, from a table; nothing of the text is looked up."""
    if type(claimed) is str:
        if not _SIMPLE.match(claimed):
            raise ProtocolError(f"an array of {printable(claimed[:40])!r}, which is not among what may cross")
        return claimed
    if type(claimed) is not list or len(claimed) != 3 or level > _MOST_LEVELS:
        raise ProtocolError("an array of a type that is none")
    size, aligned, rows = claimed
    if type(size) is not int or not 0 < size <= _LARGEST_ITEM_BYTES or type(aligned) is not bool:
        raise ProtocolError("an array of a type that is none")
    if type(rows) is not list:
        raise ProtocolError("an array of a type that is none")
    names, formats, offsets = [], [], []
    for row in rows:
        fields_before[0] += 1
        if type(row) is not list or len(row) != 4 or fields_before[0] > _MOST_FIELDS:
            raise ProtocolError("an array of a type that is none")
        name, inner, shape, offset = row
        if type(name) is not str or not 0 < len(name) <= 1000 or type(shape) is not list or len(shape) > 8:
            raise ProtocolError("an array of a type that is none")
        if not all(type(one) is int and 0 <= one < 1 << 24 for one in [*shape, offset]):
            raise ProtocolError("an array of a type that is none")
        read = _read_dtype(inner, level + 1, fields_before)
        names.append(printable(name, newlines=False))
        formats.append((read, tuple(shape)) if shape else read)
        offsets.append(offset)
    import numpy

    return numpy.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size}, align=aligned)


def _mend(numpy: Any, array: Any) -> None:
    """Make bools 0 or 1, and refuse text that is no Unicode, in every field."""
    dtype = array.dtype
    if dtype.names is not None:
        for name in dtype.names:
            _mend(numpy, array[name])
    elif dtype.kind == "b":
        array[...] = array.view(numpy.uint8) != 0
    elif dtype.kind == "U":
        points = numpy.ascontiguousarray(array).view(numpy.dtype("u4").newbyteorder(dtype.byteorder))
        if points.size and int(points.max()) > sys.maxunicode:
            raise ProtocolError("an array of text that is no Unicode")
