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

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from isohub.wire.arena import Cargo, storage_of
from isohub.wire.copies import Move

__all__ = ["Signed", "Template", "Templates", "signed"]

# Calls of one model have few forms. Long messages are worth no memory: what they hold takes longer than their text.
_MOST, _LONGEST_BYTES = 64, 4096
_MOST_PARTS = 64
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
        self._known: Dict[Any, Template] = {}

    def get(self, signature: Any) -> Optional[Template]:
        """What is known of a message of that signature."""
        return self._known.get(signature)

    def keep(self, values: Signed, cargo: Cargo, body: bytes, differentiable: Sequence[int]) -> None:
        """Note how a message was written, if it can be filled.

        Args:
            values: What it holds.
            cargo: Its tensors, laid out.
            body: Its text.
            differentiable: Numbers of the tensors that require a gradient.
        """
        claims = cargo.claims
        sizes = [tensor.numel() * tensor.element_size() for tensor in values.tensors]
        # Rows and storages in the order of the signature, each with its bytes and no more: nothing was added or moved.
        plain = [size for _, size in claims.storages] == sizes and [(row[0], row[2]) for row in claims.tensors] == [
            (number, 0) for number in range(len(sizes))
        ]
        if not plain or claims.devices or len(body) > _LONGEST_BYTES:
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        places = [(offset, size) for offset, size in claims.storages]
        self._known[values.signature] = Template(body, places, cargo.size_bytes, differentiable)


def signed(values: Any) -> Optional[Signed]:
    """The signature of values and their tensors, or None where they have none."""
    tensors: List[Any] = []
    try:
        signature = _sign(values, tensors, _Signer.get())
        if len(tensors) > 1 and len({storage_of(tensor).data_ptr() for tensor in tensors}) < len(tensors):
            return None  # aliases must stay so
    except (_Unsigned, RuntimeError):  # torch's word for a tensor without memory
        return None
    return Signed(signature, tensors)


class _Unsigned(Exception):  # noqa: N818 - a signal within this module
    pass


class _Signer:
    """What of torch signing needs, looked up once."""

    _only: Optional[_Signer] = None

    def __init__(self) -> None:
        import torch

        self.tensor = torch.Tensor
        self.strided = torch.strided
        names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
        self.dtypes = frozenset(getattr(torch, name) for name in names)
        self.named = hasattr(torch.Tensor, "has_names")

    @classmethod
    def get(cls) -> _Signer:
        """The one of this process."""
        if cls._only is None:
            cls._only = cls()
        return cls._only


def _sign(value: Any, tensors: List[Any], signer: _Signer) -> Any:
    kind = type(value)
    if kind is signer.tensor:
        dtype = value.dtype
        if (
            not value.is_cpu
            or dtype not in signer.dtypes
            or value.layout is not signer.strided
            or value.is_nested
            or not value.is_contiguous()
            or value.is_neg()
            or (signer.named and value.has_names())
            or not value.data_ptr()
            or len(tensors) >= _MOST_PARTS
        ):
            raise _Unsigned
        tensors.append(value)
        # The type stands beside what is equal to something of another type.
        return dtype, value.shape, value.requires_grad
    if kind is str:
        if len(value) > _LONGEST_TEXT_CHARS:
            raise _Unsigned
        return value
    if value is None or kind is int or kind is bool:
        return kind, value
    if kind is float:
        return kind, repr(value)  # 0.0 == -0.0
    if kind is tuple or kind is list:
        if len(value) > _MOST_PARTS:
            raise _Unsigned
        return (kind, *[_sign(item, tensors, signer) for item in value])
    if kind is dict:
        if len(value) > _MOST_PARTS:
            raise _Unsigned
        parts: List[Any] = [kind]
        for key, item in value.items():
            if type(key) is not str:
                raise _Unsigned
            parts.append(key)
            parts.append(_sign(item, tensors, signer))
        return tuple(parts)
    raise _Unsigned
