"""One input of bytes, spoken to the caller's own code as a worker would speak it.

The code under test is the caller's: `Worker.ask` with its `Channel`, `read_reply`, `Conversation`, arenas,
parcels and `Decoder`, and `Link` above it. Only the process is missing: the far end of the socket is held here.

An input is a preface of four bytes and what goes over the wire:

| byte | what it says |
|---|---|
| 0 | how the caller asks: `STARTING`, `PARCEL`, `BUILD`, `INPUT` (which is recorded for a backward pass), `SMALL`, and `DRIP` or `FRAMES` for how it is sent |
| 1 | descriptors: how many (low five bits; 31 stands for 200), and from which of `KINDS` on (high three) |
| 2 | with which piece they are sent |
| 3 | what the shared memory holds |

What may come of it is a value, an error of the repo's as text, or a `ProtocolError`; at the end of the bytes
`WorkerDiedError`. All else that is raised, a descriptor that is left open, a tensor outside of its memory, or a
text that would act on a terminal is a finding.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import datetime as dt
import decimal
import fractions
import itertools
import os
import pathlib
import select
import socket
import struct
import time
import uuid
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from isohub.errors import EntrypointNotFoundError, ProtocolError, RemoteError, WorkerDiedError, printable
from isohub.repos.pins import Checkout, Pin
from isohub.repos.reference import parse
from isohub.session.handles import RemoteModule, RemoteObject, make_handle
from isohub.session.link import Link
from isohub.session.replies import Ready
from isohub.session.supervisor import Worker
from isohub.session.watchdog import Watchdog
from isohub.wire.channel import ChannelClosed
from isohub.wire.protocol import HEADER, Event
from isohub.wire.records import EnumRecord, MappingRecord, TupleRecord
from tests.attacks.liar import PLACEMENT

STARTING, PARCEL, BUILD, INPUT, SMALL, DRIP, FRAMES, CLOSE = (1 << bit for bit in range(8))
#: What a descriptor may be of; the first three are memory that could be a parcel.
KINDS = ("memory", "long", "mapped", "unsealable", "empty", "pipe", "directory", "device")
PREFACE = 4
_PATIENCE_S = 2.0
_PAGE = 4096
_MOST_QUESTIONS = 12
_MOST_PIECES = 400
_LONGEST_PIECE = 1 << 15
_LONGEST_ERROR_CHARS = 22_000  # printable's own limit, and a sentence around it
_CHECKOUT = Checkout(Pin(parse("org/fuzz"), "0" * 40), path=None, tree="")  # type: ignore[arg-type]


class Finding(AssertionError):
    """Something came of an input that may not."""


class _Silent:
    """The output of a worker that prints nothing."""

    def drain(self) -> None:
        pass

    def tail(self) -> str:
        return ""


class _Idle:
    """A pool and a background thread that have nothing to do."""

    def __init__(self) -> None:
        self.background = self

    def hold(self, worker: Worker) -> None:
        pass

    def drop(self, worker: Worker) -> None:
        pass

    def defer(self, work: Any) -> None:
        pass

    def forget(self, output: Any) -> None:
        pass


class Fed(Worker):
    """A worker whose bytes are an input's: each wait of the caller's brings the next piece."""

    def __init__(self, data: bytes) -> None:
        ours, self.far = socket.socketpair()
        status, far_status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        far_status.close()
        silent: Any = (_Silent(), _Silent())
        nothing: Any = _Idle()
        super().__init__("org/fuzz@0000000", "0" * 40, ours, status, silent, nothing, PLACEMENT, Watchdog())
        self._poll.register(ours.fileno(), select.POLLIN)
        self.far.setblocking(False)
        self.heard = 0
        self.how, count, self._late, self._fill = data[:PREFACE]
        self._count, self._kind = (200 if count & 31 == 31 else count & 31), count >> 5
        self._pieces = _pieces(data[PREFACE:], self.how)
        self._mapped: list[Any] = []

    def _hear_frame(self) -> Any:
        self.heard += 1
        return super()._hear_frame()

    def _wait(self, event: int) -> None:
        if event == select.POLLIN:
            self._speak()
        super()._wait(event)

    def _speak(self) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            if self.how & CLOSE:
                self.far.close()
            else:
                self.far.shutdown(socket.SHUT_WR)
            return
        outbox = self._mailbox._outbox
        if outbox is not None:
            ctypes.memset(outbox.address, self._fill, _PAGE)
        rights = []
        descriptors: list[int] = []
        if self._late == 0 and self._count:
            few = [self._descriptor((self._kind + place) % len(KINDS)) for place in range(min(self._count, len(KINDS)))]
            descriptors = few
            many = (few * self._count)[: self._count]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", many))]
        self._late -= 1
        try:
            self.far.sendmsg([piece], rights)
        except BlockingIOError:
            pass  # the caller reads before it waits again
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _descriptor(self, number: int) -> int:
        kind = KINDS[number]
        if kind == "pipe":
            read, write = os.pipe()
            os.close(write)
            return read
        if kind == "directory":
            return os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        if kind == "device":
            return os.open("/dev/zero", os.O_RDWR)
        made = os.memfd_create("fuzz", 0 if kind == "unsealable" else os.MFD_ALLOW_SEALING)
        if kind != "empty":
            os.pwrite(made, bytes([self._fill]) * 512, 0)
            os.ftruncate(made, 1 << 40 if kind == "long" else _PAGE)
        if kind == "mapped":
            import mmap

            self._mapped.append(mmap.mmap(made, _PAGE))
        return made

    def end(self) -> None:
        """Let go of everything."""
        self.close()
        self.far.close()
        for mapped in self._mapped:
            mapped.close()


def one_input(data: bytes) -> Counter[str]:
    """Speak one input to the caller's code.

    Returns:
        What came of it, counted; the sum without ``closed`` is how many frames were read.

    Raises:
        Finding: An exception that should have been a `ProtocolError`, or damage.
    """
    data = data[:PREFACE].ljust(PREFACE, b"\0") + data[PREFACE:]
    before = _descriptors()
    worker = Fed(data)
    came: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as a caller may have it: a warning is raised too
        try:
            _converse(worker, came)
        except Finding:
            raise
        except BaseException as error:
            raise Finding(f"{type(error).__name__} came out of a worker's bytes: {str(error)[:500]}") from error
        finally:
            worker.end()
    # Other threads of the process may open and close some of their own meanwhile.
    patience = time.monotonic() + _PATIENCE_S
    while (left := _descriptors()) > before:
        if time.monotonic() > patience:
            raise Finding(f"{left} descriptors are open; before there were {before}")
        time.sleep(0.005)
    return +came


def _converse(worker: Fed, came: Counter[str]) -> None:
    try:
        if worker.how & STARTING:
            _greet(worker)
            came["ready"] += 1
        else:
            worker._conversation.hear(Event.READY, 0)
    except ProtocolError as error:
        came["ProtocolError"] += 1
        _check_error(error)
        return
    except ChannelClosed:
        came["closed"] += 1
        return
    idle: Any = _Idle()
    limit = 64 if worker.how & SMALL else 1 << 20
    link = Link(worker, idle, _CHECKOUT, idle, make_handle, None, limit)
    arguments = [torch.zeros(4, requires_grad=True)] if worker.how & INPUT else []
    for _ in range(_MOST_QUESTIONS):
        heard = worker.heard
        try:
            answer = link.ask(
                "build" if worker.how & BUILD else "run",
                "name",
                *arguments,
                phase="fuzzed",
                parcel=bool(worker.how & PARCEL),
                record=bool(worker.how & INPUT),
            )
            _differentiate(answer, arguments)
        except ProtocolError as error:
            came["want"] += max(worker.heard - heard - 1, 0)
            came["ProtocolError"] += 1
            _check_error(error)
            return
        except WorkerDiedError:
            came["want"] += max(worker.heard - heard - 1, 0)
            came["closed"] += 1
            return
        except (RemoteError, EntrypointNotFoundError) as error:
            came["want"] += worker.heard - heard - 1
            came["fault"] += 1
            _check_error(error)
        else:
            came["want"] += worker.heard - heard - 1
            came["value"] += 1
            _check_value(answer)


def _differentiate(answer: Any, arguments: list[torch.Tensor]) -> None:
    """Ask for a backward pass, where the worker says that there can be one."""
    left, tied = [answer], []
    while left:
        item = left.pop()
        if isinstance(item, (list, tuple)):
            left.extend(item)
        elif isinstance(item, torch.Tensor) and item.requires_grad and item.numel() < 1 << 16:
            tied.append(item)
    if tied:
        torch.autograd.backward(tied, [torch.ones_like(item) for item in tied])
    for argument in arguments:
        if argument.grad is not None:
            _check_memory(argument.grad)
            argument.grad = None


def _greet(worker: Fed) -> None:
    """What `Worker.greet` does once there is a process."""
    reply, descriptors = worker._hear_frame()
    worker._take_listener(descriptors)
    if not isinstance(reply, Ready):
        raise Finding(f"{type(reply).__name__} was taken for a greeting")


def _pieces(stream: bytes, how: int) -> Iterator[bytes]:
    if how & DRIP:
        slow = min(len(stream), _MOST_PIECES)
        cuts = [*range(slow), *range(slow, len(stream), _LONGEST_PIECE), len(stream)]
    elif how & FRAMES:
        cuts = [*frame_starts(stream), len(stream)]
    else:
        cuts = [0, len(stream)]
    for start, end in itertools.pairwise(cuts):
        for place in range(start, end, _LONGEST_PIECE):
            yield stream[place : min(end, place + _LONGEST_PIECE)]


def frame_starts(stream: bytes) -> Iterator[int]:
    """Where frames begin, by what their headers claim."""
    place = 0
    while place < len(stream):
        yield place
        if len(stream) - place < HEADER.size:
            return
        place += HEADER.size + HEADER.unpack_from(stream, place)[3]


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _check_error(error: BaseException) -> None:
    if not isinstance(error, Exception) or isinstance(error, (StopIteration, StopAsyncIteration)):
        raise Finding(f"an error that ends its caller: {type(error)}")
    shown: BaseException | None = error
    while shown is not None:  # as a traceback shows it, with its causes
        text = str(shown)
        if len(text) > 3 * _LONGEST_ERROR_CHARS:
            raise Finding(f"an error of {len(text)} characters")
        if printable(text, limit_chars=len(text) + 1) != text:
            raise Finding(f"an error that would act on a terminal: {text[:300]!a}")
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)


_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, bytearray, range, type(Ellipsis),
    torch.dtype, torch.device, torch.Size, RemoteObject, dt.datetime, dt.date, dt.time,
    dt.timedelta, decimal.Decimal, fractions.Fraction, uuid.UUID, pathlib.PurePosixPath,
)  # fmt: skip
_HOLDERS = (list, tuple, set, frozenset, TupleRecord)


def _check_value(value: Any) -> None:
    """Hold a value against the closed set, and its tensors against their memory."""
    left = [value]
    while left:
        item = left.pop()
        kind = type(item)
        if kind in _HOLDERS:
            left.extend(item)
        elif kind in (dict, OrderedDict, MappingRecord):
            left.extend(item)
            left.extend(item.values())
        elif kind is slice:
            left.extend((item.start, item.stop, item.step))
        elif kind is EnumRecord:
            left.append(item.value)
        elif kind is torch.Tensor and item.is_quantized:
            left.append(item.int_repr())
        elif kind is torch.Tensor and item.layout is torch.sparse_coo:
            left.extend((item._indices(), item._values()))
            _check_indices(item)
        elif kind is torch.Tensor and item.layout is not torch.strided:
            _check_indices(item)
        elif kind is torch.Tensor and not item.is_meta:
            _check_memory(item)
        elif kind is np.ndarray and item.dtype.kind in "SUVMm":
            repr(item[:1] if item.ndim else item)
        elif kind is np.ndarray:
            _check_memory(torch.from_numpy(item))
        elif kind is torch.Tensor:
            assert item.is_meta
        elif kind not in _PLAIN and not issubclass(kind, (np.generic, RemoteModule, RemoteObject)):
            raise Finding(f"a {kind.__name__}, which is outside of the closed set")


def _check_indices(tensor: torch.Tensor) -> None:
    """An index outside of the tensor would write there."""
    if tensor.numel() < 1 << 16:
        with contextlib.suppress(NotImplementedError):  # torch has no such function for some dtypes
            tensor.to_dense()


def _check_memory(tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    if not tensor.numel():
        return
    sizes, strides = tensor.shape, tensor.stride()
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    end = (last + 1) * tensor.element_size()
    if not 0 < end <= storage.nbytes():
        raise Finding(f"a tensor whose last byte is {end} of a storage of {storage.nbytes()}")
    ctypes.string_at(storage.data_ptr(), storage.nbytes())  # all of it is there
    if tensor.dtype is torch.bool and tensor.numel() < 1 << 16 and int(tensor.contiguous().view(torch.uint8).max()) > 1:
        raise Finding("a bool that is neither 0 nor 1")


def preface(how: int = 0, descriptors: int = 0, kind: int = 0, late: int = 0, fill: int = 0) -> bytes:
    """The first bytes of an input."""
    return struct.pack("4B", how, descriptors | kind << 5, late, fill)
