"""Messages that differ in the numbers of their tensors alone: written once, and then only filled.

A model is called again and again with values of one form, and answers in one form. The signature of values says all
of them that their message says, but for what the tensors hold; where it is known, so are the message's text and the
places of the tensors in memory.

What has no signature is written at length by `isohub.wire.codec`: what is neither None, a truth value, a number, a
short text, nor a list, tuple or dict of such; and tensors that are not plain ones: contiguous, of the CPU, with memory
of their own.

Side: both, as the sender.
"""

from __future__ import annotations

from typing import Any, ClassVar, List, NamedTuple, Optional, Sequence, Tuple

from isohub.wire.arena import Cargo, storage_of
from isohub.wire.copies import Move
from isohub.wire.known import Known

__all__ = ["Signed", "Template", "Templates", "signed"]

_MOST_PARTS = 64  # of all values of a message together: containers can share theirs many times over
_LONGEST_TEXT_CHARS = 200


class Signed(NamedTuple):
    """Values that have a signature.

    Attributes:
        signature: It; equal for two values only if their messages differ in no more than what tensors hold.
        tensors: In the order of the message's table.
    """

    signature: Any
    tensors: List[Any]


class Template(NamedTuple):
    """A message to fill.

    Attributes:
        body: Its text.
        places: Where the bytes of each tensor begin, and how many they are.
        size_bytes: Of memory that it takes.
        differentiable: Numbers of the tensors that require a gradient.
    """

    body: bytes
    places: Sequence[Tuple[int, int]]
    size_bytes: int
    differentiable: Sequence[int]

    def fill(self, address: int, tensors: Sequence[Any], move: Move) -> None:
        """Copy the tensors to memory of at least `size_bytes`.

        Args:
            address: Of its first byte.
            tensors: Of the same signature.
            move: What copies.
        """
        for (offset, size), tensor in zip(self.places, tensors):
            move(address + offset, tensor.data_ptr(), size)


class Templates:
    """Those of one sender, by signature. One thread at a time."""

    def __init__(self) -> None:
        self._known = Known()

    def get(self, signature: Any) -> Optional[Template]:
        """What is known of a message of that signature."""
        return self._known.get(signature)

    def keep(
        self, signature: Any, values: Optional[Signed], cargo: Cargo, body: bytes, differentiable: Sequence[int]
    ) -> None:
        """Note how a message was written, if it can be filled.

        Args:
            signature: Of the message.
            values: What it holds, signed after it was written: another thread may have changed them meanwhile.
            cargo: Its tensors, laid out.
            body: Its text.
            differentiable: Numbers of the tensors that require a gradient.
        """
        if values is None or values.signature != signature:
            return
        claims = cargo.claims
        sizes = [tensor.numel() * tensor.element_size() for tensor in values.tensors]
        # Rows and storages in the order of the signature, each with its bytes and no more: nothing was added or moved.
        plain = [size for _, size in claims.storages] == sizes and [(row[0], row[2]) for row in claims.tensors] == [
            (number, 0) for number in range(len(sizes))
        ]
        if not plain or claims.devices:
            return
        places = [(offset, size) for offset, size in claims.storages]
        self._known.keep(signature, body, Template(body, places, cargo.size_bytes, differentiable))


def signed(values: Any) -> Optional[Signed]:
    """The signature of values and their tensors, or None where they have none."""
    signing = _Signing()
    tensors = signing.tensors
    try:
        signature = signing.sign(values)
        if len(tensors) > 1 and len({storage_of(tensor).data_ptr() for tensor in tensors}) < len(tensors):
            return None  # aliases must stay so
    except (_Unsigned, RuntimeError):  # torch's word for a tensor without memory
        return None
    return Signed(signature, tensors)


class _Unsigned(Exception):  # noqa: N818 - a signal within this module
    pass


class _Torch:
    """What of torch signing needs, looked up once."""

    def __init__(self) -> None:
        import torch

        self.tensor = torch.Tensor
        self.strided = torch.strided
        names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
        self.dtypes = frozenset(getattr(torch, name) for name in names)
        self.named = hasattr(torch.Tensor, "has_names")


class _Signing:
    """One signature in the making."""

    __slots__ = ("_left", "_torch", "tensors")

    _only: ClassVar[List[_Torch]] = []

    def __init__(self) -> None:
        if not self._only:
            self._only.append(_Torch())
        self._torch = self._only[0]
        self._left = _MOST_PARTS
        self.tensors: List[Any] = []

    def sign(self, value: Any) -> Any:
        """The part of the signature that one value is. What is equal to something of another type has its type beside.

        Raises:
            _Unsigned: It has none, or there are too many.
        """
        self._left -= 1
        kind = type(value)
        if self._left < 0:
            raise _Unsigned
        if kind is self._torch.tensor:
            return self._tensor(value)
        if kind is str:
            if len(value) > _LONGEST_TEXT_CHARS:
                raise _Unsigned
            return value
        if value is None or kind is int or kind is bool:
            return kind, value
        if kind is float:
            return kind, repr(value)  # 0.0 == -0.0
        if kind is tuple or kind is list:
            sign = self.sign
            return (kind, *[sign(item) for item in value])
        if kind is dict:
            parts: List[Any] = [kind]
            for key, item in value.items():
                if type(key) is not str or len(key) > _LONGEST_TEXT_CHARS:
                    raise _Unsigned
                parts.append(key)
                parts.append(self.sign(item))
            return tuple(parts)
        raise _Unsigned

    def _tensor(self, tensor: Any) -> Any:
        torch, dtype = self._torch, tensor.dtype
        if (
            not tensor.is_cpu
            or dtype not in torch.dtypes
            or tensor.layout is not torch.strided
            or tensor.is_nested
            or not tensor.is_contiguous()
            or tensor.is_neg()
            or (torch.named and tensor.has_names())
            or not tensor.data_ptr()
        ):
            raise _Unsigned
        self.tensors.append(tensor)
        # Of a dimension of 1 any stride is contiguous, and kernels look at it (channels_last).
        return dtype, tensor.shape, tensor.stride(), tensor.requires_grad
