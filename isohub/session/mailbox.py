"""What is written to one worker and read of it, and the memory that both share.

1. An arena is written to when the worker has answered, and is let go when a model kept an input in it.
2. What an answer says is checked by the wire before anything is built of it.
3. Objects and graphs that nobody here holds any more are named in a note before the next question.

Side: caller. Trust: what comes is a worker's.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from isohub.errors import ProtocolError, ValueNotTransferableError, WorkerError
from isohub.sandbox.policy import Sandbox
from isohub.session.devices import Gpus, Traffic
from isohub.session.gradients import GRAPHS_SHARE
from isohub.session.question import Question
from isohub.session.replies import Answer, Ready, Reply, Want
from isohub.session.request import memory_limit_bytes
from isohub.wire.arena import LARGEST_KEPT_BYTES, Arena, Cargo, open_parcel
from isohub.wire.codec import Decoder, Encoder
from isohub.wire.copies import move
from isohub.wire.protocol import MAX_FRAME_BYTES
from isohub.wire.tables import Copying, Source, Viewing
from isohub.wire.templates import Signed, Template, Templates, signed

__all__ = ["Mailbox"]

_SMALLEST_ARENA_BYTES = 1 << 20
#: Answers beyond this come as parcels: no arena of the caller's is as large.
_LARGEST_OUTBOX_BYTES = 64 << 20
# A note of these takes less than a frame's limit; the next question brings the rest.
_MOST_NOTED = 100_000


_FIRST_TENSOR = ["T", 0]


class Mailbox:
    """The arenas of one worker, and the form of its questions and answers.

    One thread at a time, but for `release`.

    Args:
        name: Of the worker, for errors.
        commit: Likewise.
        policy: What it may have: its memory, and the GPUs that it sees.
    """

    def __init__(self, name: str, commit: str, policy: Sandbox | str) -> None:
        self._name = name
        self._commit = commit
        self._inbox: Arena | None = None
        self._outbox: Arena | None = None
        self._known: list[Arena] = []  # those whose descriptors the worker has
        self._next_outbox_bytes = _SMALLEST_ARENA_BYTES
        self._graphs_limit_bytes = int(
            memory_limit_bytes(Sandbox() if isinstance(policy, str) else policy) * GRAPHS_SHARE
        )
        self._released: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._forgotten: queue.SimpleQueue[int] = queue.SimpleQueue()  # recorded calls that nobody can ask for
        self._templates = Templates()
        self.traffic = Traffic(Gpus.of(policy))

    def pack(
        self, question: Question, number: int, other: Callable[[Cargo, Any], Any], lacking: frozenset[str]
    ) -> tuple[bytes, list[int]]:
        """The message, and descriptors of the arenas that the worker does not have yet.

        Args:
            question: What to ask.
            number: The question's.
            other: Encodes arguments outside of the closed set.
            lacking: Names of dtypes that the worker's torch has not.

        Raises:
            WorkerError: There is no memory for the arguments.
            ValueNotTransferableError: They take too much text.
        """
        recorded = question.recording is not None
        values = None if question.modes else _signed(question)
        if values is not None:
            template = self._templates.get(values.signature)
            if template is not None and not (recorded and template.differentiable) and self._reaches(template):
                self.traffic.withdraw()
                if template.size_bytes:
                    assert self._inbox is not None
                    template.fill(self._inbox.address, values.tensors, move)
                if question.recording is not None:
                    question.recording.begin(number, (), self._forgotten)
                return template.body, []
        cargo = Cargo()
        encoder = Encoder(cargo, lambda value: other(cargo, value), exact=True, lacking=lacking)
        args = [encoder.encode(argument) for argument in question.args]
        devices = self.traffic.lay_out(cargo)
        offer = self.traffic.offer() if devices else None
        try:
            self._make_arenas(cargo.size_bytes)
        except OSError as error:
            raise WorkerError(
                f"no shared memory for {cargo.size_bytes} bytes of arguments to {self._name}: {error}",
                hint="close handles that are not needed; `ulimit -n` and `free -h` show what is left",
                reference=self._name,
                commit=self._commit,
                phase=question.phase,
            ) from error
        if cargo.size_bytes:
            assert self._inbox is not None
            if cargo.claims.devices:
                self._inbox.lock_pages()
            cargo.write_to(self._inbox.address, move)
        if devices:
            self.traffic.write(cargo)
        unknown = {
            name: arena
            for name, arena in (("inbox", self._inbox), ("outbox", self._outbox))
            if arena is not None and arena not in self._known
        }
        message: dict[str, Any] = {
            "op": question.op,
            "target": question.target,
            "args": args,
            "claims": cargo.claims[:2],
            "limit": question.limit_bytes,
            "parcel": question.parcel,
            "grad": question.grad,
            "inference": question.inference,
        }
        if unknown:
            message["arenas"] = list(unknown)
        if devices:
            message["devices"] = devices
        if offer is not None:
            message["offer"] = offer
        if question.modes:
            message["modes"] = question.modes
        if question.recording is not None:
            rows = encoder.differentiable
            inputs = question.recording.begin(number, rows, self._forgotten)
            message["record"] = {"inputs": inputs, "limit": self._graphs_limit_bytes}
        body = msgspec.json.encode(message)
        if len(body) > MAX_FRAME_BYTES:
            raise ValueNotTransferableError(
                f"the arguments take {len(body)} bytes of text; one message takes {MAX_FRAME_BYTES}",
                hint="pass large data as tensors, arrays or bytes",
                reference=self._name,
                commit=self._commit,
                phase=question.phase,
            )
        if values is not None and not unknown and not devices:
            rows_of_gradients = [row for row, _ in encoder.differentiable]
            self._templates.keep(values.signature, _signed(question), cargo, body, rows_of_gradients)
        return body, [*(arena.descriptor for arena in unknown.values()), *self.traffic.descriptors]

    def _reaches(self, template: Template) -> bool:
        """Whether the worker has the arenas that a message by this template needs, and they are large enough."""
        inbox, outbox = self._inbox, self._outbox
        if outbox is None or outbox not in self._known or outbox.size_bytes < self._next_outbox_bytes:
            return False
        size_bytes = template.size_bytes
        return not size_bytes or (inbox is not None and inbox in self._known and inbox.size_bytes >= size_bytes)

    def gone(self) -> bytes | None:
        """What the worker may let go, as the body of a note; None if it is nothing."""
        if self._released.empty() and self._forgotten.empty():
            return None
        note: dict[str, list[Any]] = {"released": [], "forgotten": []}
        left: queue.SimpleQueue[Any]
        for name, left in (("released", self._released), ("forgotten", self._forgotten)):
            while not left.empty() and len(note[name]) < _MOST_NOTED:  # this thread alone takes from it
                note[name].append(left.get_nowait())
        return msgspec.json.encode(note)

    def _make_arenas(self, size_bytes: int) -> None:
        """Have an inbox for this much, if it is anything, and an outbox as large as the last answer."""
        if size_bytes and (self._inbox is None or self._inbox.size_bytes < size_bytes):
            self._drop_inbox()
            self._inbox = Arena.create(max(size_bytes, _SMALLEST_ARENA_BYTES))
        if self._outbox is None or self._outbox.size_bytes < self._next_outbox_bytes:
            if self._outbox is not None:
                self._outbox.close()
                self._outbox = None
            self._outbox = Arena.create(self._next_outbox_bytes)

    def sent(self) -> None:
        """The message has gone: the worker has all of the arenas."""
        self._known = [arena for arena in (self._inbox, self._outbox) if arena is not None]

    def unpack(
        self, reply: Answer, descriptors: Sequence[int], question: Question, remote: Callable[[list[Any]], Any]
    ) -> Any:
        """The value that an answer holds.

        Args:
            reply: Trust: worker.
            descriptors: What came with it; they stay the asker's to close.
            question: That it answers.
            remote: Makes a handle from a reference.

        Raises:
            ProtocolError: It is none.
        """
        if len(descriptors) != (reply.via == "parcel"):
            raise ProtocolError(f"{len(descriptors)} descriptors with an answer by {reply.via}")
        memory: Any
        source: Source
        arena: Arena | None = None
        if reply.via == "parcel":
            memory = open_parcel(descriptors[0], question.limit_bytes)
            size, source = 0 if memory is None else len(memory), Viewing(memory)
            if not question.parcel:
                self._next_outbox_bytes = min(max(self._next_outbox_bytes, size), _LARGEST_OUTBOX_BYTES)
        elif reply.via == "outbox":
            arena = self._outbox
            assert arena is not None
            memory, size, source = arena.carrier, arena.size_bytes, Copying(arena.address, move)
        else:
            memory, size, source = b"", 0, Viewing(b"")
        place = self.traffic.placing(reply.devices, memory)
        if place is not None and arena is not None:
            arena.lock_pages()
        storages, tensors = reply.tables.build(size, source, place)
        if reply.value == _FIRST_TENSOR and type(reply.value[1]) is int and len(tensors) == 1:
            value = tensors[0]  # as the decoder would have it
        else:
            value = Decoder(storages, tensors, remote).decode(reply.value)
        if reply.recorded:
            if question.recording is None:
                raise ProtocolError("gradients of a call that was not recorded")
            question.recording.answered(reply.recorded, tensors)
        return value

    def note(self, reply: Reply) -> None:
        """Do not write to an input that the model kept; nor hold on to more than is needed."""
        if isinstance(reply, (Ready, Want)):
            return
        self.traffic.answered(reply.took)
        if reply.kept or (self._inbox is not None and self._inbox.size_bytes > LARGEST_KEPT_BYTES):
            self._drop_inbox()

    def _drop_inbox(self) -> None:
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None

    def release(self, number: int, count: int) -> None:
        """Let the worker forget an object, with the next question. Any thread."""
        self._released.put((number, count))

    def drop(self, reply: Reply) -> None:
        """Give back what an answer refers to that nobody decodes."""
        if isinstance(reply, Answer):
            for number in _references(reply.value):
                self.release(number, 1)

    def close(self) -> None:
        """Let the memory go."""
        for arena in (self._inbox, self._outbox):
            if arena is not None:
                arena.close()
        self._inbox = self._outbox = None
        self.traffic.close()


def _signed(question: Question) -> Signed | None:
    """The signature of a question without modes."""
    values = signed(question.args)
    if values is None:
        return None
    asked = (question.op, question.target, question.limit_bytes, question.parcel, question.grad, question.inference)
    return Signed((*asked, question.recording is not None, values.signature), values.tensors)


def _references(claimed_value: Any) -> Iterator[int]:
    """Numbers of the objects that an answer refers to, for one that nobody decodes."""
    left = [claimed_value]
    while left:
        tree = left.pop()
        if not isinstance(tree, list):
            continue
        if len(tree) > 1 and tree[0] == "r" and type(tree[1]) is int:
            yield tree[1]
        left.extend(tree)
