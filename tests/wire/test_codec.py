"""The closed set of values: what goes in comes out, and nothing else does."""

from __future__ import annotations

import ctypes
import json
import math
from collections import OrderedDict

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isohub.errors import ProtocolError
from isohub.wire.arena import Arena, Cargo
from isohub.wire.codec import TAGS, Decoder, Encoder, TooLargeToEncode
from isohub.wire.protocol import MAX_DEPTH, MAX_NODES
from isohub.wire.records import MappingRecord, TupleRecord
from isohub.wire.tables import Copying, Viewing, unload


def refuse(value):
    raise AssertionError(f"outside of the closed set: {value!r}")


def travel(value, other=refuse, remote=refuse):
    """A value's whole way: encoded, written as JSON, read as the caller reads it, decoded."""
    cargo = Cargo()
    tree = Encoder(cargo, other).encode(value)
    cargo.lay_out()
    tree = msgspec.json.decode(json.dumps(tree, allow_nan=False).encode())
    arena = Arena.create(cargo.size_bytes)
    cargo.write_to(arena.address, ctypes.memmove)
    claims = msgspec.json.decode(json.dumps(cargo.claims).encode())
    storages, tensors = unload(type(cargo.claims)(*claims), arena.size_bytes, Copying(arena.address))
    arena.close()
    return Decoder(storages, tensors, remote).decode(tree)


def same(a, b):
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    return a == b


text = st.text(st.characters(exclude_categories=()), max_size=20)
hashable = st.none() | st.booleans() | st.integers() | text | st.binary(max_size=10) | st.tuples(st.integers(), text)
scalars = (
    hashable
    | st.floats()
    | st.complex_numbers()
    | st.just(Ellipsis)
    | st.builds(slice, st.integers(), st.none(), st.integers())
    | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9))
    | st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.device("cpu"), torch.device("cuda", 3)])
    | st.lists(st.integers(0, 1 << 40), max_size=4).map(torch.Size)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4).map(OrderedDict)
        | st.sets(hashable, max_size=4)
        | st.frozensets(hashable, max_size=4)
    ),
    max_leaves=20,
)


@given(values)
def test_values_come_out_as_they_went_in(value):
    assert same(travel(value), value)


json_trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
    | st.sampled_from(sorted(TAGS)),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(text, inner, max_size=3)
        | st.tuples(st.sampled_from(sorted(TAGS)), inner).map(list)
        | st.tuples(st.sampled_from(sorted(TAGS)), inner, inner).map(list)
        | st.tuples(st.sampled_from(sorted(TAGS)), inner, inner, inner).map(list)
    ),
    max_leaves=25,
)


@settings(max_examples=500)
@given(json_trees)
def test_any_json_gives_a_value_or_a_protocol_error(tree):
    storages = [torch.zeros(8, dtype=torch.uint8).untyped_storage()]

    def remote(claimed):
        raise ProtocolError("no references here")

    try:
        Decoder(storages, [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)], remote).decode(tree)
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "tree",
    [
        {}, [], [[]], [1], [None], ["?"], ["pickle"], ["T"], ["T", -1], ["T", 5], ["T", 0.0], ["T", True], ["T", 0, 0],
        ["b", 9], ["d", 1], ["d", ["l"], 1], ["s", ["d"]], ["z", ["l"]], ["c", 1, 2], ["f", "1.0"], ["f", "infinity"],
        ["i", "0x10"], ["i", "g"], ["i", "f" * 70_000], ["i", "1_0"], ["u", "zz"], ["x", 1], ["g", 1, 2, 0], ["g", 1.0, 2, 3],
        ["g", True, 2, 3], ["Z", 1.5], ["Z", ["i", "f" * 40]], ["y", "qint8"], ["y", "load"], ["y", "__class__"], ["v", "cpu; rm"],
        ["v", "x" * 100], ["v", "nosuch:1"], ["A", 1], ["n", "object", 1], ["n", "int8", "1"], ["n", "int8", 1000], ["n", "uint8", -1],
        ["n", "int8", 1.5], ["n", "int8", ["f", "nan"]], ["n", "float16", 7e4], ["n", "float32", 1e300], ["n", "bool", 2],
        ["n", "complex64", ["c", 0.0, 1e300]], ["n", "float32", 0.1], ["n", "uint64", -1], ["n", "int64", ["c", 1.0, 0.0]],
        ["R", "P", ["x"], 1, 2], ["R", 1, [], 2], ["R", "P", [1], 1], ["M"], ["M", "C", 1, 2], ["M", "C", "k"], ["M", "x" * 2000],
        ["S", 0], ["p", 0], ["e", 1, ["nope"]] if False else ["p"],
    ],
    ids=str,
)  # fmt: skip
def test_trees_that_are_no_values(tree):
    storages = [torch.tensor([255], dtype=torch.uint8).untyped_storage()]
    with pytest.raises(ProtocolError):
        Decoder(storages, [torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)], refuse).decode(tree)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "complex64", "complex128"])
def test_numpy_scalars_come_out_as_they_went_in(kind):
    most = np.finfo(kind).max
    for number in (0, 1, -1, 0.1, most, -most, np.inf, -np.inf, np.nan):
        out = travel(np.dtype(kind).type(number))
        assert out.dtype.name == kind
        assert repr(out) == repr(np.dtype(kind).type(number))
    for name in ("int8", "uint64", "int64", "bool"):
        least = np.dtype(name).type(0 if name == "bool" else np.iinfo(name).min)
        assert travel(least) == least


def test_depth_is_bounded_both_ways():
    tree = ["l"]
    for _ in range(MAX_DEPTH + 1):
        tree = ["l", tree]
    with pytest.raises(ProtocolError, match="deeper"):
        Decoder([], [], refuse).decode(tree)
    value = []
    for _ in range(MAX_DEPTH - 2):
        value = [value]
    assert travel(value) == value
    kept = []
    travel([value, [value]], other=lambda v: kept.append(v) or ["e"])
    assert kept


def test_the_number_of_values_is_bounded_both_ways():
    with pytest.raises(TooLargeToEncode):
        Encoder(Cargo(), refuse).encode([0] * (MAX_NODES + 1))
    with pytest.raises(ProtocolError, match="parts"):
        Decoder([], [], refuse).decode(["l", *[["e"]] * (MAX_NODES + 1)])


def test_a_container_within_itself_goes_to_other():
    loop = [1]
    loop.append(loop)
    assert travel(loop, other=lambda value: ["e"]) == [1, Ellipsis]


def test_a_pickle_is_read_where_it_may_be_and_nowhere_else():
    storage = torch.tensor([1, 2], dtype=torch.uint8).untyped_storage()
    assert Decoder([storage], [], refuse, unpickle=bytes.hex).decode(["p", 0]) == "0102"
    with pytest.raises(ProtocolError, match="a pickle from a worker"):
        Decoder([storage], [], refuse).decode(["p", 0])


def test_names_of_classes_are_text_and_escaped():
    record = Decoder([], [], refuse).decode(["M", "\x1b[31mEvil", "a", 1])
    assert isinstance(record, MappingRecord)
    assert record.class_name == "\\x1b[31mEvil"
    pair = Decoder([], [], refuse).decode(["R", "os.system", ["__class__", "x"], 1, 2])
    assert type(pair) is TupleRecord
    assert pair.x == 2
    assert pair.__class__ is TupleRecord


def test_what_no_table_holds_goes_to_other():
    seen = []
    travel(
        [object(), np.array([None]), np.array([(None, 1)], dtype="O,i4"), np.longdouble(1), torch.strided],
        other=lambda v: seen.append(v) or ["e"],
    )
    assert len(seen) == 5


def test_subclasses_of_plain_values_are_sent_plainly():
    class Number(int):
        pass

    class Text(str):
        def __str__(self):
            raise AssertionError("not asked")

    class Many(list):
        pass

    assert travel([Number(3), Text("a"), np.float32(0.5), np.bool_(True)]) == [3, "a", 0.5, True]
    assert travel(Many([1]), other=lambda value: ["e"]) is Ellipsis


def test_inputs_may_be_seen_in_place():
    cargo = Cargo()
    tree = Encoder(cargo, refuse).encode(torch.arange(5))
    cargo.lay_out()
    arena = Arena.create(cargo.size_bytes)
    cargo.write_to(arena.address, ctypes.memmove)
    storages, tensors = unload(cargo.claims, arena.size_bytes, Viewing(arena.carrier))
    seen = Decoder(storages, tensors, refuse).decode(tree)
    assert seen.data_ptr() == arena.address
    del seen, storages, tensors
    arena.close()
