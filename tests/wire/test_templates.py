"""Messages that are filled instead of written."""

from __future__ import annotations

import ctypes
import json
from functools import partial

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isohub.wire.arena import Arena, Cargo
from isohub.wire.codec import Encoder
from isohub.wire.templates import Templates, signed


def written(values):
    """The long way: text, cargo, and which tensors require a gradient."""
    cargo = Cargo()
    encoder = Encoder(cargo, lambda value: pytest.fail(f"{value} is outside"), exact=True)
    tree = encoder.encode(values)
    cargo.lay_out()
    return msgspec.json.encode([tree, cargo.claims[:2]]), cargo, [row for row, _ in encoder.differentiable]


def alone(value):
    """The same, each tensor at the beginning of memory of its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: alone(item) for key, item in value.items()}
    return type(value)(map(alone, value)) if isinstance(value, (list, tuple)) else value


def memory(fill, size_bytes):
    arena = Arena.create(max(size_bytes, 1))
    fill(arena.address, ctypes.memmove)
    data = ctypes.string_at(arena.address, size_bytes)
    arena.close()
    return data


def fill(template, tensors, address, move):
    template.fill(address, tensors, move)


dtypes = st.sampled_from(
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8]
)
shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw):
    shape, dtype = draw(shapes), draw(dtypes)
    tensor = torch.randint(0, 100, shape).to(dtype)
    kind = draw(st.integers(0, 5))
    if kind == 0 and tensor.dim() > 1:
        tensor = tensor.transpose(0, 1)
    elif kind == 1:
        tensor = torch.cat([tensor.reshape(-1), tensor.reshape(-1)])[tensor.numel() :].reshape(shape)
    elif kind == 2 and tensor.dtype is torch.float32:
        tensor = tensor.requires_grad_()
    return tensor


values = st.recursive(
    tensors() | st.none() | st.booleans() | st.integers(-3, 3) | st.floats(width=16) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(values, values)
def test_what_has_one_signature_has_one_text_and_is_filled_as_it_is_written(first, second):
    templates = Templates()
    for value in (first, second, first):
        known = signed(value)
        if known is None:
            continue
        template = templates.get(known.signature)
        if template is not None:
            # A slice that begins within a storage is filled from its own first byte.
            body, cargo, differentiable = written(alone(value))
            assert template.body == body
            assert template.size_bytes == cargo.size_bytes
            assert list(template.differentiable) == differentiable
            filled = memory(partial(fill, template, known.tensors), cargo.size_bytes)
            assert filled == memory(cargo.write_to, cargo.size_bytes)
        body, cargo, differentiable = written(value)
        templates.keep(known.signature, signed(value), cargo, body, differentiable)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (True, 1),
        (1, 1.0),
        (0.0, -0.0),
        ((1,), [1]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (torch.ones(2), torch.ones(2, requires_grad=True)),
        (torch.ones(2), torch.ones(1, 2)),
        (torch.ones(2, 1, 3, 3), torch.ones(2, 1, 3, 3).to(memory_format=torch.channels_last)),
        (torch.ones(2), torch.ones(2, dtype=torch.int32)),
        (torch.ones(2), (torch.ones(2),)),
        ("torch.float32", torch.float32),
        (None, 0),
        (("a", "b"), ("ab",)),
    ],
    ids=str,
)
def test_what_differs_is_signed_differently(one, other):
    first, second = signed(one), signed(other)
    assert first is not None
    assert second is None or first.signature != second.signature


class _Own(dict):
    pass


WHOLE = torch.ones(4)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3).expand(2, 3),
        torch.ones(2, 3).t(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.empty(0),
        torch.nn.Parameter(torch.ones(1)),
        torch._neg_view(torch.ones(2)),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        [torch.ones(1)] * 2,
        (WHOLE, WHOLE[:1]),
        "x" * 300,
        list(range(100)),
        [torch.ones(1) for _ in range(65)],
        {1: 2},
        _Own(),
        object(),
        b"x",
        1j,
        {1, 2},
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_what_is_not_plain_has_no_signature(value):
    assert signed(value) is None
    assert signed([value]) is None


def test_what_was_changed_while_it_was_written_is_not_kept():
    templates, value = Templates(), {"scale": 1}
    before = signed(value)
    value["scale"] = 2  # by another thread
    body, cargo, _ = written(value)
    templates.keep(before.signature, signed(value), cargo, body, [])
    assert templates.get(before.signature) is None


def test_containers_that_share_their_parts_or_hold_themselves_end():
    wide = ["x"]
    for _ in range(60):
        wide = [wide, wide]
    assert signed(wide) is None
    round_about = []
    round_about.append(round_about)
    assert signed(round_about) is None


def test_the_texts_that_are_kept_are_few_and_short():
    templates = Templates()
    for number in range(200):
        known = signed(number)
        body, cargo, _ = written(number)
        templates.keep(known.signature, known, cargo, body, [])
    kept = [number for number in range(200) if templates.get(signed(number).signature) is not None]
    assert 0 < len(kept) <= 64
    assert json.loads(templates.get(signed(kept[-1]).signature).body)[0] == kept[-1]
    long = ["x" * 199] * 60
    body, cargo, _ = written(long)
    templates.keep(signed(long).signature, signed(long), cargo, body, [])
    assert templates.get(signed(long).signature) is None
