"""Forms of tensors, arrays and standard values: exact both ways, and made of checked parts only."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import fractions
import pathlib
import uuid
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isohub.errors import ProtocolError
from isohub.wire.codec import Decoder
from isohub.wire.records import EnumRecord
from tests.wire.test_codec import refuse, travel


def quietly(make):
    """torch warns of sparse and quantised tensors when the first is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def dense(seed, *shape):
    made = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return made * (made > 0.5)


SPARSE = {
    "coo": lambda: dense(0, 4, 5).to_sparse(),
    "coo uncoalesced": lambda: torch.sparse_coo_tensor([[2, 0, 2]], [1.0, 2.0, 3.0], (4,)),
    "coo hybrid": lambda: dense(1, 3, 4, 2).to_sparse(2),
    "coo empty": lambda: torch.sparse_coo_tensor(size=(3, 0, 2)),
    "coo without dimensions": lambda: torch.sparse_coo_tensor(torch.zeros(0, 1, dtype=torch.int64), [5.0], ()),
    "coo complex": lambda: dense(2, 3, 3).to(torch.complex64).to_sparse(),
    "coo bfloat16": lambda: dense(2, 3, 3).bfloat16().to_sparse(),
    "csr": lambda: dense(3, 4, 6).to_sparse_csr(),
    "csr of int32": lambda: torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32), torch.ones(2), (2, 2)
    ),
    "csr batched": lambda: torch.stack([torch.eye(3), torch.eye(3)]).to_sparse_csr(),
    "csc": lambda: dense(3, 4, 6).to_sparse_csc(),
    "bsr": lambda: dense(4, 4, 6).to_sparse_bsr((2, 3)),
    "bsc": lambda: dense(4, 4, 6).to_sparse_bsc((2, 3)),
    "csr empty": lambda: torch.zeros(3, 4).to_sparse_csr(),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_tensors_come_out_as_they_went_in(kind):
    sent = quietly(SPARSE[kind])
    got = travel(sent)
    assert (got.layout, got.dtype, got.shape) == (sent.layout, sent.dtype, sent.shape)
    if sent.layout is torch.sparse_coo:
        assert got.is_coalesced() == sent.is_coalesced()
        assert torch.equal(got._indices(), sent._indices())
        assert torch.equal(got._values(), sent._values())
    assert torch.equal(got.to_dense(), sent.to_dense())


QUANTISED = {
    "qint8": lambda: torch.quantize_per_tensor(torch.rand(2, 3), 0.1, -3, torch.qint8),
    "quint8": lambda: torch.quantize_per_tensor(torch.rand(2, 3), 0.01, 255, torch.quint8),
    "qint32": lambda: torch.quantize_per_tensor(torch.rand(2, 3), 1e-5, 7, torch.qint32),
    "empty": lambda: torch.quantize_per_tensor(torch.rand(0, 3), 0.1, 0, torch.qint8),
    "channels": lambda: torch.quantize_per_channel(
        torch.rand(2, 3), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1, 0, 2]), 1, torch.quint8
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_tensors_come_out_as_they_went_in(kind):
    sent = quietly(QUANTISED[kind])
    got = travel(sent)
    assert (got.dtype, got.shape, got.qscheme()) == (sent.dtype, sent.shape, sent.qscheme())
    assert torch.equal(got.int_repr(), sent.int_repr())
    assert torch.equal(got.dequantize(), sent.dequantize())


def test_quantised_tensors_without_a_form_go_to_other():
    kept = []
    floats = quietly(
        lambda: torch.quantize_per_channel(torch.rand(2, 3), torch.rand(2) + 1, torch.rand(2), 0, torch.quint8)
    )
    travel(floats, other=lambda value: kept.append(value) or ["e"])
    assert len(kept) == 1


def test_meta_tensors_come_out_as_they_went_in():
    for sent in (torch.empty(2, 3, device="meta").t(), torch.empty(1 << 40, device="meta", dtype=torch.float8_e5m2)):
        got = travel(sent)
        assert got.is_meta
        assert (got.shape, got.stride(), got.dtype) == (sent.shape, sent.stride(), sent.dtype)


ARRAYS = [
    np.array(["2020-01-02", "NaT"], "M8[ns]"), np.array([1, 2], ">m8[10s]"), np.datetime64("2020", "Y"),
    np.timedelta64(3, "h"), np.array(["a", "grün", "\U0001f600"]), np.array([b"a", b"bc"]), np.array([["a"], ["b"]])[::-1].T,
    np.zeros((0, 3), "U4"), np.array([(1, 2.5, b"x"), (3, 4.5, b"y")], dtype="i4,>f8,S3"),
    np.zeros(2, np.dtype([("a", "u1"), ("b", [("c", "<f8", (2, 3)), ("d", "?")])], align=True)),
    np.array([(1, 2)], dtype=[("x", "f2"), ("y", "c8")])[0],
    np.zeros(3, np.dtype({"names": ["b", "a"], "formats": ["<i2", "<f4"], "offsets": [12, 2], "itemsize": 20})),
]  # fmt: skip


@pytest.mark.parametrize("sent", ARRAYS, ids=lambda sent: str(sent.dtype)[:40])
def test_arrays_that_no_tensor_holds_come_out_as_they_went_in(sent):
    got = travel(sent)
    assert type(got) is type(sent)
    assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
    assert got.dtype.isalignedstruct == sent.dtype.isalignedstruct
    assert repr(got) == repr(sent)
    assert np.asarray(got).flags.writeable


@given(
    st.lists(st.sampled_from(["f2", "<f4", ">f8", "?", "i1", ">u2", "<i8", "c16", "U3", "S2", "M8[us]"]), min_size=1, max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 255),
)  # fmt: skip
def test_any_record_array_comes_out_as_it_went_in(formats, shape, fill):
    dtype = np.dtype([(f"f{number}", one) for number, one in enumerate(formats)])
    sent = np.zeros(shape, dtype)
    for name in dtype.names:
        if dtype[name].kind not in "?bUS":
            sent.view()[name] = np.frombuffer(bytes([fill]) * dtype[name].itemsize, dtype[name])[0]
    got = travel(sent)
    assert (got.dtype, got.shape, got.tobytes()) == (sent.dtype, sent.shape, sent.tobytes())


class Kind(enum.Enum):
    CAT = 1
    DOG = (2, "dog")


class Able(enum.Enum):
    CAT = 1

    def meow(self):
        return self


STANDARD = [
    dt.datetime(2020, 1, 2, 3, 4, 5, 6), dt.datetime(1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=-3))),
    dt.date.max, dt.time(1, 2), dt.timedelta(-1, 2, 3), decimal.Decimal("1.500"), decimal.Decimal("-Infinity"),
    decimal.Decimal("sNaN12"), fractions.Fraction(-3, 7), uuid.UUID(int=5), pathlib.PurePosixPath("a/../b c"),
]  # fmt: skip


@pytest.mark.parametrize("sent", STANDARD, ids=repr)
def test_standard_values_come_out_as_they_went_in(sent):
    got = travel(sent)
    assert type(got) is type(sent)
    assert str(got) == str(sent)


def test_a_path_of_a_workers_is_pure_here():
    got = travel(pathlib.Path("/etc/passwd"))
    assert type(got) is pathlib.PurePosixPath
    assert str(got) == "/etc/passwd"


def test_standard_values_without_a_text_go_to_other():
    import zoneinfo

    kept = []
    zoned = dt.datetime(2020, 1, 2, tzinfo=zoneinfo.ZoneInfo("UTC"))
    folded = dt.datetime(2020, 1, 2, fold=1)
    for sent in (zoned, folded, fractions.Fraction(10**2000), pathlib.Path("a\nb"), Able.CAT):
        travel(sent, other=lambda value: kept.append(value) or ["e"])
    assert kept == [zoned, folded, fractions.Fraction(10**2000), pathlib.Path("a\nb"), Able.CAT]


def test_members_of_enumerations_are_records():
    cat, dog = travel([Kind.CAT, Kind.DOG])
    assert (cat.class_name, cat.name, cat.value) == ("Kind", "CAT", 1)
    assert dog.value == (2, "dog")
    assert cat == travel(Kind.CAT)
    assert cat != dog
    assert {cat: 1}[travel(Kind.CAT)] == 1
    assert repr(cat) == "<Kind.CAT: 1>"
    with pytest.raises(AttributeError):
        cat.value = 2


def test_a_member_that_comes_back_to_its_worker_is_the_member():
    travel(Kind.CAT)
    record = EnumRecord("Kind", "CAT", 1)
    assert Decoder([], [], refuse, unpickle=bytes).decode(["E", "Kind", "CAT", 1]) is Kind.CAT
    assert Decoder([], [], refuse).decode(["E", "Kind", "CAT", 1]) == record
    assert Decoder([], [], refuse, unpickle=bytes).decode(["E", "Other", "CAT", 1]) == EnumRecord("Other", "CAT", 1)


# What is no form.

INDICES, VALUES = torch.tensor([[0, 2]]), torch.ones(2)
STRETCHED = torch.zeros(1, 1, dtype=torch.int64).expand(1, 1 << 40)
CROW, COL = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
NUMBERS, SCALES, ZEROS = torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)  # fmt: skip
TABLE = [
    INDICES, VALUES, STRETCHED, torch.ones(1).expand(1 << 40), CROW, COL, NUMBERS, SCALES, ZEROS,
    torch.tensor([[0, 3]]), torch.tensor([[0, -1]]), torch.tensor([0, 5, 2]), torch.tensor([0, 9]), torch.tensor([1.0, 0.0], dtype=torch.float64),
    torch.tensor([1.0, float("nan")], dtype=torch.float64), torch.tensor([0, 300]), INDICES.to(torch.int32), torch.zeros(4)[::2],
]  # fmt: skip
IX, V, SI, SV, CR, CO, N, S, Z, OVER, UNDER, CRBAD, COBAD, S0, SNAN, ZBIG, I32, GAP = (["T", number] for number in range(len(TABLE)))  # fmt: skip
THREE = ["Z", 3]


@pytest.mark.parametrize(
    "tree",
    [
        ["K"], ["K", 1], ["K", "coo"], ["K", "coo", THREE, OVER, V, False], ["K", "coo", THREE, UNDER, V, False],
        ["K", "coo", THREE, SI, SV, False], ["K", "coo", ["Z", 3, 4], IX, V, False], ["K", "coo", ["l", 3], IX, V, False],
        ["K", "coo", ["Z", 1 << 62], IX, V, False], ["K", "coo", ["Z", -3], IX, V, False], ["K", "coo", THREE, I32, V, False],
        ["K", "coo", THREE, IX, GAP, False], ["K", "coo", THREE, IX, V, 1], ["K", "coo", THREE, IX, IX, "x"], ["K", "coo", THREE, 1, V, True],
        ["K", "csr", ["Z", 2, 2], CRBAD, CO, V], ["K", "csr", ["Z", 2, 2], CR, COBAD, V], ["K", "csr", ["Z", 3, 2], CR, CO, V],
        ["K", "csr", ["Z", 2, 2], CR, I32, V], ["K", "csr", ["Z", 2, 2], SI, CO, V], ["K", "csr", ["Z", 2, 2], CR, CO, SV],
        ["K", "strided", ["Z", 2, 2], CR, CO, V], ["K", "_coo", THREE, IX, V, False], ["K", "meta", "float32", ["Z", 2], ["Z"]],
        ["K", "meta", "qint8", ["Z", 2], ["Z", 1]], ["K", "meta", "float32", ["Z", 1 << 61, 1 << 61], ["Z", 1, 1]],
        ["K", "meta", "float32", ["Z", 2], ["Z", -1]], ["K", "meta", "float32", ["Z", 1 << 31], ["Z", 1 << 40]],
        ["Q", "qint8", N, 0.0, 0], ["Q", "qint8", N, ["f", "nan"], 0], ["Q", "qint8", N, -1.0, 0], ["Q", "qint8", N, 1, 0],
        ["Q", "qint8", N, 1.0, 128], ["Q", "qint8", N, 1.0, -129], ["Q", "qint8", N, 1.0, 0.0], ["Q", "quint8", N, 1.0, 0], ["Q", "qint8", V, 1.0, 0],
        ["Q", "int8", N, 1.0, 0], ["Q", "quint4x2", N, 1.0, 0], ["Q", "qint8", N, S, Z, 1], ["Q", "qint8", N, S, Z, 2], ["Q", "qint8", N, S, Z, -1],
        ["Q", "qint8", N, S0, Z, 0], ["Q", "qint8", N, SNAN, Z, 0], ["Q", "qint8", N, S, ZBIG, 0], ["Q", "qint8", N, V, Z, 0], ["Q", "qint8", N, S, Z, True],
        ["D", False, "O", ["Z", 1], ["b", 0]], ["D", False, "|O8", ["Z", 1], ["b", 0]], ["D", False, "<f4", ["Z", 3], ["b", 0]],
        ["D", False, "<f8", ["Z", 1 << 61], ["b", 0]], ["D", False, "<f8", ["Z", 0, 1 << 50], ["b", 1]], ["D", True, "<f8", ["Z", 1], ["b", 0]],
        ["D", False, "<U2", ["Z", 1], ["b", 0]], ["D", False, "<f8,O", ["Z", 1], ["b", 0]], ["D", False, "<M8[x]", ["Z", 1], ["b", 0]],
        ["D", False, [8, False, [["a", "|O", [], 0]]], ["Z", 1], ["b", 0]], ["D", False, [8, False, [["a", "<f8", [], 4]]], ["Z", 1], ["b", 0]],
        ["D", False, [8, False, [["a", "<f4", [], 0], ["a", "<f4", [], 4]]], ["Z", 1], ["b", 0]], ["D", False, [8, False, 5], ["Z", 1], ["b", 0]],
        ["D", False, [8, False, [["a", "<f8", [1 << 23, 1 << 23], 0]]], ["Z", 1], ["b", 0]], ["D", False, [0, False, []], ["Z", 1], ["b", 1]],
        ["D", False, "<f8", ["l", 1], ["b", 0]], ["D", False, "<f8", ["Z", 1], "text"], ["D", 1, "<f8", ["Z", 1], ["b", 0]],
        ["h", "datetime", "yesterday"], ["h", "datetime", "2020-01-02" + "0" * 100], ["h", "Decimal", "1" * 2000], ["h", "Fraction", "1e999999999"],
        ["h", "Fraction", "1/0"], ["h", "os.system", "ls"], ["h", "path", "\x1b[2J"], ["h", "timedelta", "1 2"], ["h", "timedelta", "9999999999 1 1"], ["h", "UUID", "x"],
        ["m", "O"], ["m", "O", "x"], ["m", "O", [1]], ["m", "O", [], 1, 2], ["E", "Kind", "CAT"], ["E", 1, "CAT", 2], ["E", "x" * 2000, "CAT", 2], ["I", "L", 1, 8, ["b", 0], None, ["d"]],
    ],
    ids=lambda tree: str(tree)[:60],
)  # fmt: skip
def test_trees_that_are_no_forms(tree):
    storages = [
        torch.full((8,), 255, dtype=torch.uint8).untyped_storage(),
        torch.zeros(0, dtype=torch.uint8).untyped_storage(),
    ]
    with pytest.raises(ProtocolError):
        Decoder(storages, TABLE, refuse).decode(tree)


def test_the_same_forms_without_the_lie_are_taken():
    storages = [torch.full((8,), 255, dtype=torch.uint8).untyped_storage()]
    for tree in (
        ["K", "coo", THREE, IX, V, True], ["K", "csr", ["Z", 2, 2], CR, CO, V], ["Q", "qint8", N, 1.0, 127],
        ["Q", "qint8", N, S, Z, 0], ["D", False, "<f8", ["Z", 1], ["b", 0]], ["D", True, "<i8", ["Z"], ["b", 0]],
        ["D", False, [8, False, [["a", "|b1", [], 4]]], ["Z", 1], ["b", 0]],
    ):  # fmt: skip
        made = Decoder(storages, TABLE, refuse).decode(tree)
        assert made is not None
    assert made["a"].view(np.uint8).tolist() == [1]
