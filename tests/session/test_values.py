"""Values on their whole way: from the caller to a real worker and back, dtype, shape and stride included."""

from __future__ import annotations

import datetime as dt
import decimal
import fractions
import pathlib
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import isohub
from tests.wire.test_forms import QUANTISED, SPARSE, quietly

common = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def handle(session, hub):
    with session.load(hub("good"), "mlp") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def echo(handle):
    """A function that runs in a worker and gives back what it is given."""
    return lambda value: handle.run(lambda module, given: given, value)


@pytest.fixture(scope="module")
def zoo(session, tmp_path_factory):
    """A repo whose values are of its own classes."""
    root = tmp_path_factory.mktemp("zoo")
    (root / "hubconf.py").write_text(
        textwrap.dedent(
            """
            import collections, dataclasses, datetime as dt, decimal, enum, fractions, pathlib, typing
            import numpy as np
            import torch

            class Kind(enum.Enum):
                CAT = 1
                DOG = "dog"

            @dataclasses.dataclass
            class Box:
                corner: tuple
                kind: Kind = Kind.CAT
                scores: typing.Any = None

            @dataclasses.dataclass
            class Track:
                box: Box
                def area(self):
                    return 12

            class Output(collections.OrderedDict):
                def __getattr__(self, name):
                    return self[name]

            Pair = collections.namedtuple("Pair", "a b")

            class Marked(torch.Tensor):
                pass

            class Zoo(torch.nn.Module):
                def box(self):
                    return Box((1, 2), Kind.DOG, torch.ones(2))
                def track(self):
                    return Track(Box((3, 4)))
                def kind(self, back=None):
                    return back is Kind.DOG, Kind.DOG
                def pairs(self):
                    return [Pair(1, Box((0, 0))), Pair(torch.zeros(1), {"k": Kind.CAT})]
                def plain(self):
                    return (dt.datetime(2020, 1, 2, 3), decimal.Decimal("1.10"), fractions.Fraction(1, 3),
                            pathlib.Path("/data/x"), collections.Counter("aab"), collections.defaultdict(list, a=[1]),
                            np.bytes_(b"a\\0"), np.str_("s"), np.datetime64("2020-01-02"))
                def marked(self):
                    return torch.ones(2).as_subclass(Marked)
                def packed(self):
                    return torch.nn.utils.rnn.pack_sequence([torch.ones(2, 3), torch.ones(1, 3)])
                def objects(self):
                    return np.array([None, self], dtype=object)
                def nested(self):
                    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

            def zoo():
                return Zoo()
            """
        )
    )
    with session.load(str(root), "zoo") as loaded:
        yield loaded


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.complex32,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip


def bits(tensor):
    return bytes(tensor.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).tolist())


@st.composite
def tensors(draw):
    """Tensors of every dtype: of no element and no dimension, transposed, stepped, and stretched."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = int(np.prod(shape, dtype=int))
    size = torch.empty(0, dtype=torch.uint8).view(dtype).element_size()
    raw = torch.tensor(list(draw(st.binary(min_size=count * size, max_size=count * size))), dtype=torch.uint8)
    tensor = (raw > 127).reshape(shape) if dtype is torch.bool else raw.view(dtype).reshape(shape)
    for change in draw(st.lists(st.sampled_from(["t", "step", "stretch", "shift"]), max_size=2)):
        if change == "t" and tensor.dim() > 1:
            tensor = tensor.transpose(0, -1)
        elif change == "step" and tensor.dim():
            tensor = tensor[..., ::2]
        elif change == "stretch":
            tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
        elif change == "shift" and tensor.dim() and tensor.shape[0] > 1:
            tensor = tensor[1:]
    return tensor


@common
@given(tensors())
def test_any_tensor_comes_back_as_it_was(echo, sent):
    back = echo(sent)
    assert type(back) is torch.Tensor
    assert (back.dtype, back.shape) == (sent.dtype, sent.shape)
    if sent.numel() * sent.element_size() * 2 >= sent.untyped_storage().nbytes():
        assert back.stride() == sent.stride()
    assert bits(back) == bits(sent)


@common
@given(st.integers(0, 8), st.integers(1, 8), st.integers(0, 8), st.integers(1, 8))
def test_tensors_that_share_memory_still_do(echo, start, length, second, other):
    base = torch.arange(16)
    sent = [base[start : start + length], base[second : second + other], base]
    first, overlapping, whole = echo(sent)
    whole[start] = 100
    assert first[0] == 100
    assert torch.equal(overlapping, whole[second : second + other])
    assert base[start] == start


@pytest.mark.parametrize("kind", [*SPARSE, *QUANTISED])
def test_sparse_and_quantised_tensors_come_back_as_they_were(echo, kind):
    sent = quietly({**SPARSE, **QUANTISED}[kind])
    back, again = echo([sent, (sent, 1)])
    for got in (back, again[0]):
        assert (got.layout, got.dtype, got.shape) == (sent.layout, sent.dtype, sent.shape)
        assert torch.equal(got.dequantize() if got.is_quantized else got.to_dense(), sent.dequantize() if sent.is_quantized else sent.to_dense())  # fmt: skip


def test_meta_tensors_come_back_as_they_were(echo):
    back = echo(torch.empty(2, 3, dtype=torch.float16, device="meta"))
    assert (back.is_meta, back.shape, back.dtype) == (True, (2, 3), torch.float16)


def test_what_a_subclass_is_is_said_once(zoo, echo, caplog):
    class Own(torch.Tensor):
        pass

    for _ in range(2):
        assert type(echo(torch.ones(2).as_subclass(Own))) is torch.Tensor
        assert type(echo(torch.nn.Parameter(torch.ones(2)))) is torch.Tensor
    told = [record.getMessage() for record in caplog.records if record.name == "isohub.values"]
    assert len(told) == 1
    assert "Own" in told[0]
    assert torch.equal(zoo.marked(), torch.ones(2))


def test_dataclasses_enumerations_and_named_tuples(zoo):
    box = zoo.box()
    assert (box.class_name, box.corner, box["corner"]) == ("Box", (1, 2), (1, 2))
    assert (box.kind.class_name, box.kind.name, box.kind.value) == ("Kind", "DOG", "dog")
    assert torch.equal(box.scores, torch.ones(2))
    track = zoo.track()  # it can do something
    assert isinstance(track, isohub.RemoteObject)
    assert (track.area(), track.box.corner) == (12, (3, 4))
    (one, two), (_, named) = zoo.pairs()
    assert (one, two.corner, named["k"].name) == (1, (0, 0), "CAT")


def test_a_member_that_is_passed_back_is_the_member(zoo):
    _, dog = zoo.kind()
    assert zoo.kind(dog) == (True, dog)


def test_standard_values_are_plain(zoo):
    values = zoo.plain()
    assert values == (
        dt.datetime(2020, 1, 2, 3), decimal.Decimal("1.10"), fractions.Fraction(1, 3),
        pathlib.PurePosixPath("/data/x"), {"a": 2, "b": 1}, {"a": [1]}, b"a\0", "s", np.datetime64("2020-01-02"),
    )  # fmt: skip
    assert [type(value) for value in values[4:7]] == [dict, dict, bytes]


def test_standard_values_are_taken_by_what_they_are(handle):
    sent = [pathlib.Path("/x"), dt.datetime(2020, 1, 1), decimal.Decimal("2"), fractions.Fraction(1, 2)]
    assert handle.run(lambda module, given: [type(one).__name__ for one in given], sent) == [
        "PosixPath", "datetime", "Decimal", "Fraction",
    ]  # fmt: skip


def test_what_has_no_form_stays_where_it_is(zoo, echo):
    packed, objects, nested = zoo.packed(), zoo.objects(), zoo.nested()
    for remote in (packed, objects, nested):
        assert isinstance(remote, isohub.RemoteObject)
    assert packed.batch_sizes.tolist() == [2, 1]
    assert objects.shape == (2,)
    assert objects[0] is None
    assert objects[1] is zoo
    assert [part.tolist() for part in nested.unbind()] == [[1, 1], [1, 1, 1]]


def test_arrays_of_dates_text_and_records_come_back(echo):
    sent = [
        np.array(["2020-01-02"], "M8[D]"), np.array(["a", "bc"]), np.array([(1, 2.0)], dtype="i4,f8"),
        np.float16(1.5), np.array([True, False]), np.array([1j], "c8"),
    ]  # fmt: skip
    for got, was in zip(echo(sent), sent, strict=True):
        assert type(got) is type(was)
        assert got.dtype == was.dtype
        assert np.array_equal(got, was)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "I;16", "F", "CMYK"])
def test_an_image_is_an_image_in_the_worker_and_an_array_here(echo, handle, mode):
    image = Image.new("RGB", (5, 3), (10, 20, 200))
    image.putpixel((1, 1), (250, 5, 5))
    image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    image.info["dpi"] = (72, 72)
    seen = handle.run(
        lambda module, given: (type(given).__name__, given.mode, given.size, given.info["dpi"], given.tobytes(), given.convert("RGBA").tobytes() if given.mode != "I;16" else b""),
        image,
    )  # fmt: skip
    colours = image.convert("RGBA").tobytes() if mode != "I;16" else b""
    assert seen == ("Image", mode, (5, 3), (72, 72), image.tobytes(), colours)
    back = echo(image)
    assert (back.class_name, back.mode, back.size) == ("Image", mode, (5, 3))
    assert np.array_equal(back.array, np.asarray(image))
