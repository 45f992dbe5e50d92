"""Frames and turns between a caller and one worker. No I/O: bytes in, frames out.

Rules:

1. The worker speaks first, once: ``ready``. Until then the caller sends nothing.
2. The caller asks (``request``), the worker answers (``value`` or ``error``), in turns. Before it answers a
   worker may ask for something to be brought (``want``), which the caller does or refuses (``give``). A worker
   never speaks out of turn, and what it says carries the number of the question that is open.
3. A frame is a header, a body of JSON and as many descriptors as the header says. The descriptors
   travel with the frame's first byte (unix(7): ancillary data is a barrier in a stream).
4. Every length and count has a limit, checked before memory is taken.
5. What breaks a rule is `ProtocolError`. In the caller it always ends in the worker's death;
   there is no way to resynchronise, on purpose.

Refuses to: guess, skip a damaged frame, keep a descriptor that no frame claimed.
Side: both. Trust: in the caller every byte here is the worker's, and hostile.
"""

from __future__ import annotations

import enum
import os
import struct
from collections import deque
from typing import Deque, Dict, List, NamedTuple, Optional, Sequence, Tuple

from isohub.errors import ProtocolError

__all__ = [
    "HEADER",
    "MAX_DEPTH",
    "MAX_DESCRIPTORS",
    "MAX_DIMENSIONS",
    "MAX_FRAME_BYTES",
    "MAX_NODES",
    "MAX_PARTS",
    "MAX_REFERENCES",
    "MAX_TENSORS",
    "TURNS",
    "Conversation",
    "Event",
    "Frame",
    "FrameReader",
    "State",
    "close_descriptors",
    "pack",
]

#: Magic, version, descriptors, length of the body, number of the question. Little-endian, 16 bytes.
HEADER = struct.Struct("<2sBBIQ")
_MAGIC = b"ih"
_VERSION = 2

#: Bodies hold names, numbers and tables; tensors and bytes travel in shared memory. A state dict
#: of 100,000 tensors makes a table of 12 MB; h2 and gRPC cut messages at 4 MB by default.
MAX_FRAME_BYTES = 64 << 20
#: The kernel allows 253 (SCM_MAX_FD, net/core/scm.c); no message here needs more than 2.
MAX_DESCRIPTORS = 4
#: The encoder takes about five frames of the interpreter's thousand a level; real outputs nest fewer
#: than ten levels.
MAX_DEPTH = 64
#: Values in one message, counted before any is built. Encoding takes about 2 µs a value; more belongs in arrays.
MAX_NODES = 1_000_000
MAX_TENSORS = 1_000_000
#: Commas and brackets in one body, strings included: what its parts can be at most.
MAX_PARTS = 8_000_000
#: Objects that one message may leave in the worker: each is a handle in the caller.
MAX_REFERENCES = 10_000
#: torch's own limit (dim_bitset_size in aten/src/ATen/WrapDimUtilsMulti.h); numpy 2 has the same.
MAX_DIMENSIONS = 64


class Event(enum.Enum):
    """What passes between the two sides."""

    READY = "ready"
    REQUEST = "request"
    WANT = "want"
    GIVE = "give"
    VALUE = "value"
    ERROR = "error"

    __hash__ = object.__hash__  # by what it is; Enum's own hashes its name, in Python


class State(enum.Enum):
    """Whose turn it is."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    OWING = "owing"

    __hash__ = object.__hash__


#: The whole machine. What is not here is a `ProtocolError`.
TURNS: Dict[Tuple[State, Event], State] = {
    (State.STARTING, Event.READY): State.IDLE,
    (State.IDLE, Event.REQUEST): State.BUSY,
    (State.BUSY, Event.WANT): State.OWING,
    (State.OWING, Event.GIVE): State.BUSY,
    (State.BUSY, Event.VALUE): State.IDLE,
    (State.BUSY, Event.ERROR): State.IDLE,
}


class Conversation:
    """Whose turn it is, and which question is open. Either side may keep one."""

    __slots__ = ("number", "state")

    def __init__(self) -> None:
        self.state = State.STARTING
        self.number = 0

    def ask(self) -> int:
        """The caller asks a question; returns its number."""
        self._turn(Event.REQUEST)
        self.number += 1
        return self.number

    def give(self) -> None:
        """The caller brings or refuses what the worker wanted."""
        self._turn(Event.GIVE)

    def hear(self, event: Event, claimed_number: int) -> None:
        """Check a frame of the worker's against the table and the open question."""
        self._turn(event)
        if claimed_number != self.number:
            raise ProtocolError(f"an answer to question {claimed_number} while question {self.number} is open")

    def _turn(self, event: Event) -> None:
        following = TURNS.get((self.state, event))
        if following is None:
            allowed = sorted(known.value for state, known in TURNS if state is self.state)
            raise ProtocolError(f"{event.value!r} while {self.state.value}; expected one of {allowed}")
        self.state = following


class Frame(NamedTuple):
    """One message: its JSON, and the descriptors that came with it. Whoever holds it owns them.

    Attributes:
        number: Of the question that it asks or belongs to.
    """

    number: int
    body: bytes
    descriptors: Tuple[int, ...]


def pack(number: int, body: bytes, descriptors: int = 0) -> bytes:
    """A frame's header and body.

    Args:
        number: The question's.
        body: JSON.
        descriptors: How many go with it.

    Raises:
        ProtocolError: The body is longer than `MAX_FRAME_BYTES`. Nothing was sent.
    """
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes; the wire takes {MAX_FRAME_BYTES}")
    return HEADER.pack(_MAGIC, _VERSION, descriptors, len(body), number) + body


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Close each descriptor; one that is closed already is passed over."""
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except OSError:
            pass


class FrameReader:
    """Turns bytes and descriptors, in the order in which they came, into frames.

    Whatever happens, a descriptor that was fed is either in a returned frame or closed by `close`.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._descriptors: Deque[int] = deque()
        self._claimed: Optional[Tuple[int, int, int]] = None  # length, descriptors, number, of the frame under way

    def whole(self, data: bytes) -> Optional[Frame]:
        """The frame that these bytes are, if they are one without descriptors, and nothing came before; else fed."""
        if not self._bytes and not self._descriptors and len(data) >= HEADER.size:
            magic, version, count, length, number = HEADER.unpack_from(data)
            if magic == _MAGIC and version == _VERSION and not count and length == len(data) - HEADER.size:
                return Frame(number, data[HEADER.size :], ())
        self.feed(data)
        return None

    def feed(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Take what one ``recvmsg`` gave. The descriptors are this reader's from here on."""
        if descriptors:
            self._descriptors.extend(descriptors)
            if len(self._descriptors) > MAX_DESCRIPTORS:
                raise ProtocolError(f"{len(self._descriptors)} descriptors in flight; at most {MAX_DESCRIPTORS} may be")
        self._bytes += data

    @property
    def begun(self) -> bool:
        """Whether bytes or descriptors have come that are in no frame yet."""
        return bool(self._bytes or self._descriptors)

    def wanted(self) -> int:
        """How many bytes the frame under way still lacks: a bound for the next read."""
        if self._header() is None:
            return HEADER.size - len(self._bytes)
        assert self._claimed is not None
        return HEADER.size + self._claimed[0] - len(self._bytes)

    def next(self) -> Optional[Frame]:
        """The next whole frame, or None when more bytes are needed."""
        claimed = self._header()
        if claimed is None:
            return None
        length, count, number = claimed
        end = HEADER.size + length
        if len(self._bytes) < end:
            return None
        held = self._descriptors
        if len(held) < count:
            raise ProtocolError(f"a frame claims {count} descriptors; {len(held)} came with it")
        body = bytes(memoryview(self._bytes)[HEADER.size : end])
        del self._bytes[:end]
        self._claimed = None
        if not held:
            return Frame(number, body, ())
        if not self._bytes and len(held) != count:
            raise ProtocolError(f"a frame claims {count} descriptors; {len(held)} came with it")
        return Frame(number, body, tuple(held.popleft() for _ in range(count)))

    def close(self) -> None:
        """Close every descriptor that no frame took."""
        held: List[int] = list(self._descriptors)
        self._descriptors.clear()
        close_descriptors(held)

    def _header(self) -> Optional[Tuple[int, int, int]]:
        if self._claimed is None and len(self._bytes) >= HEADER.size:
            magic, version, count, length, number = HEADER.unpack_from(self._bytes)
            if magic != _MAGIC or version != _VERSION:
                raise ProtocolError(
                    f"a frame begins with {bytes(self._bytes[:4])!r}; expected {_MAGIC!r} and {_VERSION}"
                )
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} may come")
            if count > MAX_DESCRIPTORS:
                raise ProtocolError(f"a frame claims {count} descriptors; at most {MAX_DESCRIPTORS} may come")
            self._claimed = (length, count, number)
        return self._claimed
