"""Forms of values beyond the plain ones: tensors that are not strided, numpy's other arrays, standard values, images.

Rules:

1. A form is built of checked parts only: its parts are values of the closed set, in the tables, before it is made.
2. Parts that are looked at number by number (indices, scales) are contiguous, so that looking takes no longer than
   the memory that was sent is large.
3. What a sender cannot give exactly has no form: it goes to the side's own function for other values.

Refuses to: make a sparse tensor whose indices lie outside of it, a quantised one whose parameters no kernel takes, an
array of objects, an image of what came from a worker.
Side: both. Trust: what the ``read_`` functions take in the caller is a worker's.
Source: torch 2.13 (aten/src/ATen/SparseCsrTensorUtils.h, quantized/Quantizer.cpp), numpy 2.4 (numpy.lib.format).
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from typing import Any, List, Optional

from isohub.errors import ProtocolError, printable
from isohub.wire.arena import dtype_named, storage_of
from isohub.wire.protocol import MAX_DIMENSIONS

__all__ = ["image_form", "read_image", "read_tensor", "tensor_form"]

#: Compressed layouts, and what their methods of the two kinds of indices are called.
_COMPRESSED = {
    "csr": ("crow_indices", "col_indices"),
    "csc": ("ccol_indices", "row_indices"),
    "bsr": ("crow_indices", "col_indices"),
    "bsc": ("ccol_indices", "row_indices"),
}
#: Quantised dtypes, the dtype of their numbers, and the bounds of a zero point.
_QUANTISED = {"qint8": ("int8", 7), "quint8": ("uint8", 8), "qint32": ("int32", 31)}
_LARGEST_MODE_CHARS = 16
_LONGEST_SIDE = 1 << 31


# Tensors.


def tensor_form(encoder: Any, tensor: Any) -> Optional[List[Any]]:
    """The form of a tensor that is no strided one with memory, or None where there is none."""
    import torch

    tensor = tensor.detach()
    if tensor.is_nested:
        return None
    if tensor.is_meta:
        if tensor.layout is not torch.strided or tensor.is_quantized or not encoder.may_cross(str(tensor.dtype)[6:]):
            return None
        return ["K", "meta", str(tensor.dtype)[6:], ["Z", *tensor.shape], ["Z", *tensor.stride()]]
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    if tensor.is_quantized:
        return _quantised(encoder, tensor)
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
        kind, rest = "coo", [tensor.is_coalesced()]
    else:
        kind, rest = str(tensor.layout).rpartition("_")[2], []
        if kind not in _COMPRESSED or str(tensor.layout) != f"torch.sparse_{kind}":
            return None
        parts = [getattr(tensor, name)() for name in (*_COMPRESSED[kind], "values")]
    if dtype_named(str(tensor.dtype)[6:]) is None:
        return None
    return ["K", kind, ["Z", *tensor.shape], *(encoder.encode(part.contiguous()) for part in parts), *rest]


def _quantised(encoder: Any, tensor: Any) -> Optional[List[Any]]:
    import torch

    name = str(tensor.dtype)[6:]
    if name not in _QUANTISED:
        return None
    numbers = tensor.int_repr()
    if tensor.qscheme() is torch.per_tensor_affine:
        scale, zero_point = tensor.q_scale(), tensor.q_zero_point()
        if not _is_scale(scale) or not _is_zero_point(name, zero_point):
            return None
        return ["Q", name, encoder.encode(numbers), encoder.encode(scale), zero_point]
    if tensor.qscheme() is not torch.per_channel_affine:
        return None
    scales = tensor.q_per_channel_scales().to(torch.float64).contiguous()
    zero_points = tensor.q_per_channel_zero_points().to(torch.int64).contiguous()
    if not all(map(_is_scale, scales.tolist())) or not all(_is_zero_point(name, one) for one in zero_points.tolist()):
        return None
    parts = [encoder.encode(part) for part in (numbers, scales, zero_points)]
    return ["Q", name, *parts, tensor.q_per_channel_axis()]


def read_tensor(decoder: Any, tree: List[Any], depth: int) -> Any:
    """A tensor of the tags ``K`` and ``Q``.

    Raises:
        ProtocolError: A part is missing, of a wrong type, or does not fit the others.
    """
    try:
        with warnings.catch_warnings():
            # torch warns of each of these kinds once, which is an exception where warnings are errors.
            warnings.simplefilter("ignore")
            return (_read_quantised if tree[0] == "Q" else _read_sparse)(decoder, tree, depth)
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise ProtocolError(f"a tensor of parts that do not fit: {printable(str(error)[:300])}") from None


def _read_quantised(decoder: Any, tree: List[Any], depth: int) -> Any:
    import torch

    if len(tree) not in (5, 6) or type(tree[1]) is not str or tree[1] not in _QUANTISED:
        raise ProtocolError("a quantised tensor that is none")
    name, parts = tree[1], [decoder.decode(part, depth) for part in tree[2:]]
    numbers = _strided(parts[0], (_QUANTISED[name][0],))
    if len(tree) == 5:
        scale, zero_point = parts[1:]
        if type(scale) is not float or not _is_scale(scale) or not _is_zero_point(name, zero_point):
            raise ProtocolError("a quantised tensor with a scale or a zero point that is none")
        return torch._make_per_tensor_quantized_tensor(numbers, scale, zero_point)
    scales = _contiguous(parts[1], ("float64",), 1)
    zero_points = _contiguous(parts[2], ("int64",), 1)
    axis = parts[3]
    if type(axis) is not int or not 0 <= axis < numbers.dim():
        raise ProtocolError("a quantised tensor without the axis of its channels")
    if not len(scales) == len(zero_points) == numbers.shape[axis]:
        raise ProtocolError("a quantised tensor with other than one scale and one zero point a channel")
    if not all(map(_is_scale, scales.tolist())) or not all(_is_zero_point(name, one) for one in zero_points.tolist()):
        raise ProtocolError("a quantised tensor with a scale or a zero point that is none")
    return torch._make_per_channel_quantized_tensor(numbers, scales, zero_points, axis)


def _is_scale(scale: float) -> bool:
    return math.isfinite(scale) and scale > 0


def _is_zero_point(name: str, zero_point: Any) -> bool:
    if type(zero_point) is not int:
        return False
    bits = _QUANTISED[name][1]
    return 0 <= zero_point < 1 << bits if name == "quint8" else -(1 << bits) <= zero_point < 1 << bits


def _read_sparse(decoder: Any, tree: List[Any], depth: int) -> Any:
    import torch

    if len(tree) < 2 or type(tree[1]) is not str:
        raise ProtocolError("a sparse tensor without its layout")
    parts = [decoder.decode(part, depth) for part in tree[2:]]
    if tree[1] == "meta":
        return _read_meta(parts)
    if len(parts) != 4:
        raise ProtocolError(f"a sparse tensor of {len(parts)} parts")
    size = _size(parts[0])
    if tree[1] == "coo":
        return _read_coo(size, *parts[1:])
    if tree[1] not in _COMPRESSED:
        raise ProtocolError(f"a tensor of the layout {printable(tree[1][:40])!r}")
    compressed = _contiguous(parts[1], ("int64", "int32"))
    plain = _contiguous(parts[2], ("int64", "int32"))
    values = _contiguous(parts[3])
    if compressed.dtype != plain.dtype:
        raise ProtocolError("a sparse tensor with indices of two types")
    layout = getattr(torch, f"sparse_{tree[1]}")
    make = torch.sparse_compressed_tensor
    if not _checks_on_demand():
        return make(compressed, plain, values, size, layout=layout, device=values.device)
    return make(compressed, plain, values, size, layout=layout, device=values.device, check_invariants=True)


@functools.lru_cache(maxsize=1)
def _checks_on_demand() -> bool:
    """Whether torch takes these keywords (2.1 and later). A worker may lack them; what comes there is the caller's."""
    import torch

    try:
        indices, values = torch.empty((1, 0), dtype=torch.int64, device="cpu"), torch.empty(0, device="cpu")
        torch.sparse_coo_tensor(indices, values, (1,), device="cpu", is_coalesced=True, check_invariants=True)
    except TypeError:
        return False
    return True


def _read_coo(size: List[int], indices: Any, values: Any, coalesced: Any) -> Any:
    import torch

    _contiguous(indices, ("int64",), 2)
    _contiguous(values)
    sparse, count = indices.shape
    if values.dim() < 1 or values.shape[0] != count or len(size) != sparse + values.dim() - 1:
        raise ProtocolError("a sparse tensor whose indices, values and size differ")
    if list(values.shape[1:]) != size[sparse:] or type(coalesced) is not bool:
        raise ProtocolError("a sparse tensor whose indices, values and size differ")
    if count:
        for row, limit in zip(indices, size):
            if int(row.min()) < 0 or int(row.max()) >= limit:
                raise ProtocolError("a sparse tensor with an index outside of it")
    if not _checks_on_demand():
        return torch.sparse_coo_tensor(indices, values, size, device=values.device)._coalesced_(coalesced)
    return torch.sparse_coo_tensor(
        indices, values, size, device=values.device, is_coalesced=coalesced, check_invariants=True
    )


def _read_meta(parts: List[Any]) -> Any:
    import torch

    if len(parts) != 3 or type(parts[0]) is not str or dtype_named(parts[0]) is None:
        raise ProtocolError("a meta tensor that is none")
    known = dtype_named(parts[0])
    assert known is not None
    size, strides = _size(parts[1]), _size(parts[2], bounded=False)
    last = sum((max(length, 1) - 1) * stride for length, stride in zip(size, strides))
    if len(size) != len(strides) or (last + 1) * known[1] >= 1 << 62:
        raise ProtocolError("a meta tensor that is none")
    if known[0] is torch.complex32:  # made directly it warns
        return torch.empty_strided(size, strides, dtype=torch.float16, device="meta").to(torch.complex32)
    return torch.empty_strided(size, strides, dtype=known[0], device="meta")


def _size(value: Any, bounded: bool = True) -> List[int]:
    import torch

    if type(value) is not torch.Size or len(value) > MAX_DIMENSIONS:
        raise ProtocolError("a tensor without its size")
    elements = 16  # the bytes of the largest
    for length in value:
        elements *= max(length, 1)
        if not 0 <= length < 1 << 62 or (bounded and elements >= 1 << 62):
            raise ProtocolError("a tensor of a size that is none")
    return list(value)


def _strided(value: Any, names: Any = None) -> Any:
    import torch

    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise ProtocolError("a part of a tensor that is no plain one")
    if names is not None and str(value.dtype)[6:] not in names:
        raise ProtocolError(f"a part of a tensor of {value.dtype}; expected one of {list(names)}")
    if value.numel() * value.element_size() > storage_of(value).nbytes():
        raise ProtocolError("a part of a tensor that is larger than its memory")
    return value


def _contiguous(value: Any, names: Any = None, dimensions: Optional[int] = None) -> Any:
    _strided(value, names)
    if not value.is_contiguous() or (dimensions is not None and value.dim() != dimensions):
        raise ProtocolError("a part of a tensor of a wrong form")
    return value


# Images: from a caller to a worker, which rebuilds them; from a worker as a record of an array.


def image_form(encoder: Any, value: Any, rebuilt: bool) -> Optional[List[Any]]:
    """The form of a PIL image, or None if it is none.

    Args:
        encoder: Encodes its parts.
        value: Anything.
        rebuilt: Whether the receiver makes an image of it.
    """
    pil = sys.modules.get("PIL.Image")
    if pil is None or not isinstance(value, pil.Image):
        return None
    value.load()
    if not rebuilt:
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return None
        parts = ["mode", value.mode, "size", ["t", *value.size], "array", encoder.encode(numpy.asarray(value))]
        return ["M", "Image", *parts]
    palette = value.palette.getdata() if value.mode in ("P", "PA") and value.palette is not None else None
    info = {name: what for name, what in value.info.items() if type(name) is str and _is_plain(what)}
    parts = [value.tobytes(), None if palette is None else (palette[0], bytes(palette[1])), info]
    return ["I", value.mode, *value.size, *map(encoder.encode, parts)]


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return len(value) < 20 and all(map(_is_plain, value))
    return type(value) in (int, float, str, bytes, bool, type(None))


def read_image(decoder: Any, tree: List[Any], depth: int) -> Any:
    """An image of the caller's. Side: worker; the caller's decoder refuses the tag before this.

    Raises:
        ImportError: PIL is not installed here.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("an argument is a PIL image, and Pillow is not installed where this repo runs") from error
    mode, width, height = tree[1:4]
    data, palette, info = (decoder.decode(part, depth) for part in tree[4:])
    image = Image.frombytes(mode, (width, height), data) if width and height else Image.new(mode, (width, height))
    if palette is not None:
        image.putpalette(palette[1], palette[0])
        if image.mode != mode:
            image = image.convert(mode)
    image.info.update(info)
    return image
