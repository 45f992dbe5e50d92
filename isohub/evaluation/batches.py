"""What an evaluation goes over: batches in an order, each with a weight, held no longer than they are needed.

Rules:

1. A list or tuple is in memory already: any lane may take any batch of it. Everything else is read once, in its order,
   in the thread that asked, and no further ahead than the lanes need.
2. Each item is a batch; with `batch_size` so many items are one, as torch's DataLoader collates them. A map-style
   ``Dataset`` holds examples: there it is 1 unless given.
3. A batch weighs what `weight` says: a function of the batch, the name of a metric, or else the first dimension of the
   first tensor or array in it; 1 where there is none.

Side: caller. Trust: the caller's own data.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from isohub.checking import checked_count

__all__ = ["Batches", "Weight", "batches_of", "size_of"]

Weight = str | Callable[[Any], float] | None
_SUFFIXES = (".npy", ".safetensors", ".pt", ".pth")


class Batches:
    """The batches of one evaluation.

    Attributes:
        kind: What the data is, for its identity.
        count: How many batches; None for a stream of unknown length.
        listed: All of them, where they are in memory already; else None.
        indexed: Whether any one can be read without those before it.
    """

    def __init__(
        self,
        kind: str,
        count: int | None,
        listed: Sequence[Any] | None,
        read: Callable[[int], Any] | None,
        stream: Iterable[Any] | None,
    ) -> None:
        self.kind = kind
        self.count = count
        self.listed = listed
        self._read = read
        self._stream = stream
        self._iterator: Iterator[Any] | None = None

    @property
    def indexed(self) -> bool:
        """See the class."""
        return self._read is not None

    def first(self) -> Any:
        """The first batch of what is indexed, for its digest; None if there is none."""
        return self._read(0) if self._read is not None and self.count else None

    def begin(self) -> None:
        """Start what reads: a loader's processes are forked before there are threads here."""
        if self._stream is not None:
            self._iterator = iter(self._stream)

    def each(self, skipped: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
        """Number and batch, in order; of what is indexed, those that are skipped are not read."""
        if self._read is None:
            assert self._iterator is not None
            yield from enumerate(self._iterator)
            return
        for number in range(self.count or 0):
            if not skipped(number):
                yield number, self._read(number)


def batches_of(data: Any, batch_size: int | None) -> Batches:
    """The batches of what a caller gave as data.

    Args:
        data: A list or tuple; a ``Dataset`` or ``DataLoader`` of torch's; any other sequence or iterable; or a path or
            a glob of ``.npy``, ``.safetensors`` and ``.pt`` files, each of which is an item, sorted by name.
        batch_size: How many items are one batch.

    Raises:
        TypeError, ValueError, FileNotFoundError: It is none of these.
    """
    batch_size = checked_count("batch_size", batch_size)
    if isinstance(data, (str, os.PathLike)):
        files = _files(data)
        return _indexed(f"files {', '.join(map(os.path.basename, files))}", files, batch_size, _read_file)
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise ValueError("batch_size= is for items; a DataLoader makes batches of its own")
        # What an IterableDataset says of its length is a guess, by torch's own words.
        count = None if isinstance(data.dataset, IterableDataset) else len(data)
        return Batches("DataLoader", count, None, None, data)
    if isinstance(data, (torch.Tensor, np.ndarray)):
        raise TypeError(
            f"data is one {type(data).__name__}; expected batches\nhint: data=[x] for one, or x.split(32) for many"
        )
    if isinstance(data, (Mapping, set, frozenset, bytes)):
        raise TypeError(f"data is a {type(data).__name__}; expected batches in an order")
    if isinstance(data, (list, tuple)) and batch_size is None:
        return Batches(type(data).__name__, len(data), data, data.__getitem__, None)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return _indexed(type(data).__name__, data, batch_size or 1, None)
    if isinstance(data, Sequence):
        return _indexed(type(data).__name__, data, batch_size, None)
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data is a {type(data).__name__}; expected a list, a Dataset, a DataLoader, an iterable or a path"
        )
    stream = data if batch_size is None else _chunks(data, batch_size)
    return Batches("stream", None, None, None, stream)


def _indexed(kind: str, items: Any, batch_size: int | None, convert: Callable[[Any], Any] | None) -> Batches:
    count = len(items)

    def item(number: int) -> Any:
        return items[number] if convert is None else convert(items[number])

    def read(number: int) -> Any:
        if batch_size is None:
            return item(number)
        start = number * batch_size
        return default_collate([item(place) for place in range(start, min(start + batch_size, count))])

    kind = kind if batch_size is None else f"{kind} by {batch_size}"
    return Batches(kind, count if batch_size is None else math.ceil(count / batch_size), None, read, None)


def _chunks(items: Iterable[Any], size: int) -> Iterator[Any]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield default_collate(chunk)


def _files(data: str | os.PathLike[str]) -> list[str]:
    pattern = os.fspath(Path(data).expanduser())
    if Path(pattern).is_dir():
        found = [str(path) for path in sorted(Path(pattern).iterdir()) if path.suffix in _SUFFIXES]
    else:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - text
    odd = [name for name in found if not name.endswith(_SUFFIXES)]
    if odd:
        raise ValueError(f"{odd[0]} cannot be read as a batch; expected {', '.join(_SUFFIXES)}")
    if not found:
        raise FileNotFoundError(
            f"no file is {pattern}; expected a file, a directory or a glob of {', '.join(_SUFFIXES)}"
        )
    return found


def _read_file(path: str) -> Any:
    """One file's values. None of the formats runs anything that the file holds."""
    if path.endswith(".npy"):
        return torch.from_numpy(np.load(path, allow_pickle=False))
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        tensors = load_file(path)
        return next(iter(tensors.values())) if len(tensors) == 1 else tensors
    return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - the caller's file, tensors alone


def size_of(batch: Any) -> float:
    """How many examples a batch seems to hold."""
    left = [batch]
    while left:
        item = left.pop(0)
        if isinstance(item, (torch.Tensor, np.ndarray)):
            return float(item.shape[0]) if item.ndim else 1.0
        if isinstance(item, Mapping):
            left[:0] = item.values()
        elif isinstance(item, (list, tuple)):
            left[:0] = item
    return 1.0
