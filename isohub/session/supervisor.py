"""A worker as the caller sees it: ask, wait, notice its death, kill.

Rules:

1. Nothing waits without a way out: every wait polls the worker's channel *and* its status socket, on which
   the zygote tells the end of the worker, and whose own end tells the end of the zygote.
2. A worker that breaks the protocol, passes its deadline, or is interrupted in the middle of a frame is
   killed, by pidfd, so that no other process can be hit.
3. A caller that is interrupted while it only waits (Ctrl-C) has its worker interrupted too, and leaves the
   question open; the answer is thrown away when the next question is asked.
4. A worker that is gone stays gone: every later question gets the same error.

Side: caller. Trust: what comes from a worker is hostile until `replies` and `wire` have checked it.
"""

from __future__ import annotations

import array
import contextlib
import enum
import os
import queue
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from isohub.environments.runtime import HOST, Runtime
from isohub.errors import (
    ConfinementError,
    IsohubError,
    ProtocolError,
    SessionClosedError,
    ValueNotTransferableError,
    WorkerDiedError,
    WorkerError,
    WorkerLimitError,
    WorkerStartError,
    WorkerTimeoutError,
    printable,
)
from isohub.network.proxy import AllowListProxy
from isohub.repos.http_errors import shown
from isohub.sandbox.confine import UNCONFINED
from isohub.sandbox.policy import Confinement, Sandbox
from isohub.session.background import Background, Budget, Output
from isohub.session.broker import Broker, Given
from isohub.session.devices import Gpus, Traffic
from isohub.session.gradients import GRAPHS_SHARE, Recording
from isohub.session.options import Interruption
from isohub.session.register import Row, start_ticks
from isohub.session.replies import Answer, Fault, Ready, Reply, Want, read_reply, read_status
from isohub.session.request import Placement, memory_limit_bytes
from isohub.session.watchdog import Excess, Watchdog
from isohub.wire.arena import LARGEST_KEPT_BYTES, Arena, Cargo, Claims, copying, open_parcel, unload, viewing
from isohub.wire.channel import Channel, ChannelClosed, discard
from isohub.wire.codec import Decoder, Encoder
from isohub.wire.protocol import MAX_FRAME_BYTES, Conversation, Event, State

__all__ = ["CallInterrupted", "Faulted", "Question", "Versions", "Worker"]

#: Importing torch over a slow network disk takes minutes; waiting for ever helps nobody.
_START_TIMEOUT_S = 600.0
# A zygote tells a worker's end within a millisecond; a worker that is gone without a word is one whose
# zygote is gone too, or one that closed its channel and lives on.
_EXIT_NOTICE_S = 1.0
# threading.TIMEOUT_MAX is centuries on 64 bits; acquire refuses more.
_LONGEST_WAIT_S = threading.TIMEOUT_MAX
_SMALLEST_ARENA_BYTES = 1 << 20
#: Answers beyond this come as parcels: no arena of the caller's is as large.
_LARGEST_OUTBOX_BYTES = 64 << 20


class _Stage(enum.Enum):
    """How far the question under way has come: what an interruption would leave behind."""

    IDLE = "idle"  # nothing was sent
    SENDING = "sending"
    WAITING = "waiting"  # all was sent, nothing has come: the answer can be thrown away later
    READING = "reading"
    SERVING = "serving"  # the worker waits for a download of ours


_EVENTS = {Ready: Event.READY, Answer: Event.VALUE, Fault: Event.ERROR, Want: Event.WANT}


class CallInterrupted(BaseException):
    """The wait for an answer was ended by an `Interruption`. No Exception: the way out is that of Ctrl-C."""


class _DeadlinePassed(Exception):  # noqa: N818 - a signal within this module
    pass


@dataclass
class Question:
    """One thing asked of a worker.

    Attributes:
        op: Name of the operation (`worker.serve.Server.do_<op>`).
        args: Positional arguments, any values.
        phase: What this is in words, for errors: "importing hubconf.py", "calling forward()".
        target: Number of the object that it is done to, None for the worker itself.
        timeout_s: Seconds it may take, None for no limit.
        limit_bytes: The most tensor bytes that the answer may hold.
        parcel: Whether the answer comes in memory that is then mapped, not copied.
        grad: The caller's gradient mode.
        inference: Whether the caller is in inference mode.
        verbose: Whether a download that it leads to may show its progress.
        modes: What else of the caller's state of torch differs from the default (`modes.carried`).
        recording: What takes note of the call for a backward pass, if one may come.
        interruption: What can end the wait for the answer from another thread.
    """

    op: str
    args: Sequence[Any]
    phase: str
    target: int | None = None
    timeout_s: float | None = None
    limit_bytes: int = 4 << 30
    parcel: bool = False
    grad: bool = True
    inference: bool = False
    verbose: bool = True
    modes: dict[str, Any] | None = None
    recording: Recording | None = None
    interruption: Interruption | None = None


class Versions(NamedTuple):
    """What a worker runs on, as it said once its packages were there: text of a closed form.

    Attributes:
        python: Such as "3.9.18".
        torch: Such as "1.13.1+cpu".
    """

    python: str
    torch: str


class Worker:
    """One worker process. Thread-safe: questions of several threads are asked in turn.

    Attributes:
        name: Such as ``org/repo@1a2b3c4``.
        commit: The commit whose code it runs.
        pid: Its process, as this process sees it.
        ticks: When that started, in the kernel's ticks.
        init_pid: The first process of its pid namespace, which has what it leaves behind; 0 without one.
        confinement: What it is confined by.
        placement: What it was to be confined to.
        watchdog: Looks at what it uses.
        runtime: What it was started on.
        versions: What it says that this is.
        lacking: Names of dtypes that this process's torch has, and the worker's has not.
        started: ``time.monotonic()`` of its start.
        handles: The caller's handles to objects in it, by number.
        broker: Brings what it asks for while a question is open; without one all of that is refused.
        calls: Questions that it was asked.
        asked: ``time.monotonic()`` of the beginning of its last question.
        used: ``time.monotonic()`` of the end of its last question.
        row: Where other processes of the user's read what it does.
    """

    def __init__(
        self,
        name: str,
        commit: str,
        channel: socket.socket,
        status: socket.socket,
        outputs: tuple[Output, Output],
        background: Background,
        placement: Placement,
        watchdog: Watchdog,
        runtime: Runtime = HOST,
    ) -> None:
        self.name = name
        self.runtime = runtime
        self.versions = Versions("", "")
        self.lacking: frozenset[str] = frozenset()
        self.commit = commit
        self.pid = 0
        self.ticks = 0
        self.init_pid = 0
        self.placement = placement
        self.watchdog = watchdog
        self.confinement = Confinement()
        self._proxy: AllowListProxy | None = None
        self.started = time.monotonic()
        self.handles: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.broker: Broker | None = None
        self._channel = Channel(channel, self._wait)
        self._status = status
        self._outputs = outputs
        self._background = background
        self._poll = select.poll()
        self._poll.register(status.fileno(), select.POLLIN)
        self._pidfd = -1
        self._lock = threading.Lock()
        self._conversation = Conversation()
        self._deadline: float | None = None
        self._stage = _Stage.IDLE
        self._interruption: Interruption | None = None  # of the question under way
        self._owner = 0  # the thread whose question is open
        self._phase = ""
        self._excess: Excess | None = None  # the limit that it passed
        self._abandoned = ""  # what was under way when a caller was interrupted
        self._refusal: IsohubError | None = None  # what the broker could not do, and the caller has to hear
        self.calls = 0
        self.asked = self.used = self.started
        self.row: Row | None = None
        self._closing = False
        self._kill_lock = threading.Lock()
        self._obituary: IsohubError | None = None
        self._inbox: Arena | None = None
        self._outbox: Arena | None = None
        policy = placement.policy
        limit = memory_limit_bytes(Sandbox() if isinstance(policy, str) else policy)
        self._graphs_limit_bytes = int(limit * GRAPHS_SHARE)
        self._traffic = Traffic(Gpus.of(policy))
        self._known_arenas: list[Arena] = []  # those whose descriptors the worker has
        self._next_outbox_bytes = _SMALLEST_ARENA_BYTES
        self._released: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._forgotten: queue.SimpleQueue[int] = queue.SimpleQueue()  # recorded calls that nobody can ask for

    def greet(self, timeout_s: float | None) -> None:
        """Wait until the zygote has made it and it has said that it is ready."""
        self._deadline = time.monotonic() + (_START_TIMEOUT_S if timeout_s is None else timeout_s)
        try:
            self._learn_pid()
            reply, descriptors = self._hear_frame()
            self._take_listener(descriptors)
        except ChannelClosed:
            if self._pidfd < 0:
                raise  # there never was a process
            raise self._died("starting") from None
        except _DeadlinePassed:
            raise self._timed_out("starting", timeout_s if timeout_s is not None else _START_TIMEOUT_S) from None
        except ProtocolError as error:
            raise self._broke_protocol(error, "starting") from error
        except BaseException:
            self.close()
            raise
        assert isinstance(reply, Ready)
        policy = self.placement.policy
        self.confinement = Confinement(
            asked=() if isinstance(policy, str) else policy.required,
            active=tuple(reply.layers[0]),
            missing=tuple(reply.layers[1]),
            details=reply.details,
        )
        if not isinstance(policy, str):
            budget = Budget(int(policy.output), self._too_much_output)
            for output in self._outputs:
                output.budget = budget
        self.watchdog.watch(self)

    def _too_much_output(self, printed_bytes: int) -> None:
        policy = self.placement.policy
        assert not isinstance(policy, str)
        allowed = int(policy.output)
        words = f"printed {printed_bytes} bytes, and {allowed} are allowed"
        self.end_for(Excess("output", allowed, printed_bytes, words))

    def _take_listener(self, descriptors: Sequence[int]) -> None:
        """Keep what came with its first word. It says that before any of the repo's code runs."""
        policy = self.placement.policy
        wanted = not isinstance(policy, str) and policy.network not in ((), "open")
        if len(descriptors) > wanted:
            discard(descriptors)
            raise ProtocolError("descriptors that were not asked for")
        if descriptors:
            hosts = None if isinstance(policy, str) else policy.proxy_hosts
            assert hosts is not None
            # Made by the zygote's code before any of the repo's; it listens in the worker's network namespace.
            try:
                listener = socket.socket(fileno=descriptors[0])
            except OSError as error:
                discard(descriptors)
                raise ProtocolError("a listener that is no socket") from error
            try:
                self._proxy = AllowListProxy(listener, hosts, who=self.name)
            except (OSError, ValueError) as error:
                listener.close()
                raise ProtocolError("a listener that does not listen") from error

    def _learn_pid(self) -> None:
        while not self._poll.poll(_milliseconds(self._deadline)):
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise _DeadlinePassed
        data, ancillary, _, _ = self._status.recvmsg(1 << 12, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise ChannelClosed
        status = read_status(data)
        if status.failed is not None or status.pid is None:
            self.close()
            raise WorkerStartError(
                f"no worker could be made for {self.name}: {status.failed}", reference=self.name, phase="starting"
            )
        rights = array.array("i")
        for _, _, raw in ancillary:
            rights.frombytes(raw)
        if not rights:
            raise ChannelClosed
        self._pidfd = rights[0]
        self.pid = max(_number_of(self._pidfd), 0) or status.pid
        self.ticks = start_ticks(self.pid)
        if len(rights) > 1:
            self.init_pid = _number_of(rights[1])
            os.close(rights[1])
        self._poll.register(self._channel.fileno(), select.POLLIN)

    def equip(self, broker: Broker) -> bool:
        """Give it a broker, unless it has one or is gone; whether it took this one, and will close it."""
        with self._kill_lock:
            if self.broker is not None or self._obituary is not None:
                return False
            self.broker = broker
            return True

    # Asking.

    def ask(
        self,
        question: Question,
        other: Callable[[Cargo, Any], Any],
        remote: Callable[[list[Any]], Any],
    ) -> Any:
        """Ask, wait, and give the answer.

        Args:
            question: What to ask.
            other: Encodes arguments outside of the closed set.
            remote: Makes a handle from a reference in the answer.

        Raises:
            WorkerDiedError: The worker's process ended, now or before.
            WorkerTimeoutError: The answer did not come in time; the worker was killed.
            ProtocolError: The worker sent what the wire does not allow; it was killed.
            RemoteError: The repo's code raised.
            SessionClosedError: The worker was closed before.
        """
        if self._owner == threading.get_ident():
            raise WorkerError(
                f"the worker of {self.name} was asked something within its own question ({self._phase})",
                hint="a signal handler, a finalizer or an argument's __reduce__ cannot use the handle that is in use",
                reference=self.name,
                commit=self.commit,
                phase=question.phase,
            )
        deadline = None if question.timeout_s is None else time.monotonic() + question.timeout_s
        if not self._lock.acquire(
            timeout=-1 if question.timeout_s is None else min(question.timeout_s, _LONGEST_WAIT_S)
        ):
            raise WorkerTimeoutError(
                f"the worker of {self.name} was busy {self._phase} for another thread, "
                f"for all of {question.timeout_s:g} s",
                hint="nothing was killed; give it longer with timeout_s=, or wait for the other call",
                reference=self.name,
                commit=self.commit,
                phase=question.phase,
                timeout_s=question.timeout_s,
            )
        try:
            self._owner, self._phase = threading.get_ident(), question.phase
            self.calls += 1
            self.asked = time.monotonic()
            if self.row is not None:
                self.row.write(self.calls, question.phase)
            self.watchdog.nudge()
            if self._obituary is not None:
                raise _again(self._obituary)
            self._deadline = deadline
            self._interruption = question.interruption
            self._stage = _Stage.IDLE
            try:
                self._settle()
                if not self._channel.quiet():
                    raise ProtocolError("words that nobody asked for")
                body, arenas = self._pack(question, other)
                self._stage = _Stage.SENDING
                self._conversation.ask()
                self._channel.send(body, [*(arena.descriptor for arena in arenas), *self._traffic.descriptors])
                self._known_arenas = [arena for arena in (self._inbox, self._outbox) if arena is not None]
                self._stage = _Stage.READING
                answer = self._receive(question, remote)
                self._stage = _Stage.IDLE
            except ChannelClosed:
                raise self._died(question.phase) from None
            except _DeadlinePassed:
                assert question.timeout_s is not None
                phase = (
                    f"{self._abandoned}, from which its caller was interrupted," if self._abandoned else question.phase
                )
                raise self._timed_out(phase, question.timeout_s) from None
            except ProtocolError as error:
                raise self._broke_protocol(error, question.phase) from error
            except BaseException as error:
                if self._stage is _Stage.WAITING:
                    self._signal(signal.SIGINT)
                    self._abandoned = self._abandoned or question.phase  # the first is what it still does
                elif not isinstance(error, Exception) and self._stage in (_Stage.SENDING, _Stage.READING):
                    self._bury(
                        SessionClosedError(f"the worker of {self.name} was interrupted in the middle of a message")
                    )
                raise
            return answer
        finally:
            self._interruption = None
            self._owner = 0
            self.used = time.monotonic()
            if self.row is not None:
                self.row.write(self.calls, None)
            self._lock.release()

    def _settle(self) -> None:
        """Throw away the answer to a question that its asker did not wait for."""
        while self._conversation.state is State.BUSY:
            self._stage = _Stage.READING
            reply, descriptors = self._hear_frame()
            discard(descriptors)
            if isinstance(reply, Want):
                self._say(Given.interrupted(), reply.wish)
                continue
            self._note_kept(reply)
            if isinstance(reply, Answer):
                for number in _references(reply.value):
                    self.release(number, 1)
        self._abandoned = ""
        self._stage = _Stage.IDLE

    def _pack(self, question: Question, other: Callable[[Cargo, Any], Any]) -> tuple[bytes, list[Arena]]:
        """The message, and the arenas that the worker does not have yet."""
        cargo = Cargo()
        encoder = Encoder(cargo, lambda value: other(cargo, value), exact=True, lacking=self.lacking)
        args = [encoder.encode(argument) for argument in question.args]
        devices = self._traffic.lay_out(cargo)
        offer = self._traffic.offer() if devices else None
        try:
            self._make_arenas(cargo.size_bytes)
        except OSError as error:
            raise WorkerError(
                f"no shared memory for {cargo.size_bytes} bytes of arguments to {self.name}: {error}",
                hint="close handles that are not needed; `ulimit -n` and `free -h` show what is left",
                reference=self.name,
                commit=self.commit,
                phase=question.phase,
            ) from error
        if cargo.size_bytes:
            assert self._inbox is not None
            if cargo.claims.devices:
                self._inbox.lock_pages()
            cargo.write_to(self._inbox.address)
        if devices:
            self._traffic.write(cargo)
        arenas = {"inbox": self._inbox, "outbox": self._outbox}
        unknown = {
            name: arena
            for name, arena in arenas.items()
            if arena is not None and not any(arena is known for known in self._known_arenas)
        }
        released, forgotten = [], []
        while not self._released.empty():  # this thread alone takes from it
            released.append(self._released.get_nowait())
        while not self._forgotten.empty():
            forgotten.append(self._forgotten.get_nowait())
        message = {
            "number": self._conversation.number + 1,
            "op": question.op,
            "target": question.target,
            "args": args,
            "claims": cargo.claims[:2],
            "arenas": list(unknown),
            "released": released,
            "limit": question.limit_bytes,
            "parcel": question.parcel,
            "grad": question.grad,
            "inference": question.inference,
            "forgotten": forgotten,
        }
        if devices:
            message["devices"] = devices
        if offer is not None:
            message["offer"] = offer
        if question.modes:
            message["modes"] = question.modes
        if question.recording is not None:
            rows = encoder.differentiable
            inputs = question.recording.begin(self._conversation.number + 1, rows, self._forgotten)
            message["record"] = {"inputs": inputs, "limit": self._graphs_limit_bytes}
        body = msgspec.json.encode(message)
        if len(body) > MAX_FRAME_BYTES:
            for item in released:
                self._released.put(item)
            for number in forgotten:
                self._forgotten.put(number)
            raise ValueNotTransferableError(
                f"the arguments take {len(body)} bytes of text; one message takes {MAX_FRAME_BYTES}",
                hint="pass large data as tensors, arrays or bytes",
                reference=self.name,
                commit=self.commit,
                phase=question.phase,
            )
        return body, list(unknown.values())

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

    def _receive(self, question: Question, remote: Callable[[list[Any]], Any]) -> Any:
        reply, descriptors = self._hear_frame()
        while isinstance(reply, Want):
            if descriptors:
                discard(descriptors)
                raise ProtocolError("descriptors with a wish")
            self._bring(reply, question)
            reply, descriptors = self._hear_frame()
        try:
            self._note_kept(reply)
            if self._refusal is not None:
                refusal, self._refusal = self._refusal, None
                if isinstance(reply, Answer):
                    for number in _references(reply.value):
                        self.release(number, 1)
                raise refusal
            if isinstance(reply, Answer):
                try:
                    return self._decode(reply, descriptors, question, remote)
                except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
                    # Nothing that a worker says should get this far; if it does, it is still the worker's doing.
                    raise ProtocolError(f"an answer that cannot be read: {error}") from error
            assert isinstance(reply, Fault)
            if descriptors:
                raise ProtocolError("an error with descriptors")
            raise Faulted(reply)
        finally:
            discard(descriptors)

    def _bring(self, want: Want, question: Question) -> None:
        """Have the broker do what the worker wants, and tell it; the question's time and the worker's end count."""
        if self.broker is None:
            self._say(Given.refused(), want.wish)
            return
        phase = question.phase
        question.phase = f"{phase}, waiting for the download of {shown(want.address)}"
        errand = self.broker.send(want, verbose=question.verbose)
        try:
            self._stage = _Stage.SERVING
            self._await(errand.fileno())
            given = errand.take()
        except (ChannelClosed, _DeadlinePassed):
            raise
        except BaseException:
            # Ctrl-C, or a mistake of ours: the worker is told, and the caller hears what was raised.
            try:
                self._say(Given.interrupted(), want.wish)
            except (ChannelClosed, _DeadlinePassed, ProtocolError):
                self._bury(SessionClosedError(f"the worker of {self.name} was interrupted while it waited"))
            else:
                self._stage = _Stage.WAITING
            raise
        finally:
            errand.leave()
        question.phase = phase
        self._refusal = self._refusal or given.refusal
        self._say(given, want.wish)

    def _await(self, descriptor: int) -> None:
        """Return when this can be read; raise when the worker ends before, time is over, or the call is given up."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(self._status.fileno(), select.POLLIN)
        poll.register(self._channel.fileno(), 0)  # its end alone
        interruption = -1 if self._interruption is None else self._interruption.fileno()
        if interruption >= 0:
            poll.register(interruption, select.POLLIN)
        while True:
            ready = dict(poll.poll(_milliseconds(self._deadline)))
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise _DeadlinePassed
            if self._status.fileno() in ready or self._channel.fileno() in ready:
                raise ChannelClosed
            if descriptor in ready:
                return
            if interruption in ready:
                raise CallInterrupted

    def _say(self, given: Given, wish: int) -> None:
        """Tell the worker what came of its wish."""
        try:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise _DeadlinePassed  # a wish after a wish is no way past it either
            body = msgspec.json.encode({"number": self._conversation.number, "wish": wish, **given.message()})
            self._stage = _Stage.SENDING
            self._conversation.give()
            self._channel.send(body, [] if given.descriptor is None else [given.descriptor])
        finally:
            given.drop()
        self._stage = _Stage.READING

    def _decode(
        self, reply: Answer, descriptors: Sequence[int], question: Question, remote: Callable[[list[Any]], Any]
    ) -> Any:
        claims = Claims(*reply.claims, reply.devices)
        if len(descriptors) != (reply.via == "parcel"):
            raise ProtocolError(f"{len(descriptors)} descriptors with an answer by {reply.via}")
        if reply.via == "parcel":
            mapping = open_parcel(descriptors[0], question.limit_bytes)
            size = 0 if mapping is None else len(mapping)
            place = self._traffic.placing(reply.devices, viewing(mapping))
            storages, tensors = unload(claims, size, viewing(mapping), place)
            if not question.parcel:
                self._next_outbox_bytes = min(max(self._next_outbox_bytes, size), _LARGEST_OUTBOX_BYTES)
        elif reply.via == "outbox":
            assert self._outbox is not None
            place = self._traffic.placing(reply.devices, viewing(self._outbox.carrier))
            if place is not None:
                self._outbox.lock_pages()
            storages, tensors = unload(claims, self._outbox.size_bytes, copying(self._outbox.address), place)
        else:
            place = self._traffic.placing(reply.devices, viewing(b""))
            storages, tensors = unload(claims, 0, viewing(b""), place)
        value = Decoder(storages, tensors, remote).decode(reply.value)
        if reply.recorded:
            if question.recording is None:
                raise ProtocolError("gradients of a call that was not recorded")
            question.recording.answered(reply.recorded, tensors)
        return value

    def _note_kept(self, reply: Reply) -> None:
        """Do not write to an input that the model kept; nor hold on to more than is needed."""
        if isinstance(reply, (Ready, Want)):
            return
        self._traffic.answered(reply.took)
        if reply.kept or (self._inbox is not None and self._inbox.size_bytes > LARGEST_KEPT_BYTES):
            self._drop_inbox()

    def _drop_inbox(self) -> None:
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None

    def release(self, number: int, count: int) -> None:
        """Let the worker forget an object, with the next question. Any thread."""
        self._released.put((number, count))

    # Hearing.

    def _hear_frame(self) -> tuple[Reply, Sequence[int]]:
        frame = self._channel.receive()
        try:
            reply = read_reply(frame.body)
            self._conversation.hear(_EVENTS[type(reply)], reply.number)
        except BaseException:
            discard(frame.descriptors)
            raise
        return reply, frame.descriptors

    def _wait(self, event: int) -> None:
        """Return when the channel can be used; raise when that will never be, or not in time."""
        channel = self._channel.fileno()
        self._poll.modify(channel, event)
        reading = self._stage is _Stage.READING
        if reading:
            self._stage = _Stage.WAITING
        interruption = self._interruption if reading else None
        if interruption is not None:
            self._poll.register(interruption.fileno(), select.POLLIN)
        try:
            ready = dict(self._poll.poll(_milliseconds(self._deadline)))
        finally:
            if interruption is not None:
                self._poll.unregister(interruption.fileno())
        if interruption is not None and ready.pop(interruption.fileno(), 0) and not ready:
            raise CallInterrupted
        if reading:
            self._stage = _Stage.READING
        late = self._deadline is not None and time.monotonic() >= self._deadline
        # Before death: a worker may answer and then die. Half a message in time is not in time.
        if channel in ready and not (late and (event == select.POLLOUT or self._channel.begun)):
            return
        if ready and channel not in ready:
            raise ChannelClosed
        if late:
            raise _DeadlinePassed

    # Ends.

    def _died(self, phase: str) -> IsohubError:
        """The error for a worker whose channel has closed."""
        if self._closing:
            closed = SessionClosedError(f"the worker of {self.name} was closed while {phase}", hint="load it again")
            self._bury(closed)
            return closed
        status = self._exit_status(_EXIT_NOTICE_S)
        if status is None:
            self.kill()
            status = self._exit_status(_EXIT_NOTICE_S)
            if status is not None:
                return self._broke_protocol(ProtocolError("the channel was closed by a worker that lived on"), phase)
        tail = self._tail()
        signal_name, exit_code, how = _status_words(status)
        excess = self._excess or self._limit_of(signal_name)
        if excess is not None:
            return self._passed(excess, phase, tail)
        if phase == "starting" and exit_code == UNCONFINED:
            unconfined = ConfinementError(
                f"the worker of {self.name} could not be confined: {tail}",
                hint="isohub doctor says what this machine can do",
            )
            self._bury(unconfined)
            return unconfined
        error = WorkerDiedError(
            f"the worker of {self.name} {how} while {phase}" + (f"; its last output:\n{tail}" if tail else ""),
            hint="load it again for a new worker; `logging.getLogger('isohub.worker')` shows all of its output",
            reference=self.name,
            commit=self.commit,
            phase=phase,
            pid=self.pid,
            signal_name=signal_name,
            exit_code=exit_code,
            stderr_tail=tail,
        )
        self._bury(error)
        return error

    def _limit_of(self, signal_name: str | None) -> Excess | None:
        """The limit for which the kernel ended it."""
        policy = self.placement.policy
        if signal_name != "SIGXCPU" or isinstance(policy, str) or policy.cpu_time_s is None:
            return None
        words = f"used the {policy.cpu_time_s:g} s of processor time that are allowed"
        return Excess("cpu_time_s", policy.cpu_time_s, None, words)

    def _passed(self, excess: Excess, phase: str, tail: str) -> WorkerLimitError:
        """The error for a worker that was killed for a limit."""
        error = WorkerLimitError(
            f"the worker of {self.name} {excess.words}; it was killed while {phase}",
            hint=f"isohub.Sandbox({excess.limit}=...) allows more",
            reference=self.name,
            commit=self.commit,
            phase=phase,
            pid=self.pid,
            signal_name="SIGKILL" if self._excess is not None else "SIGXCPU",
            stderr_tail=tail,
            limit=excess.limit,
            allowed=excess.allowed,
            used=excess.used,
        )
        self._bury(error)
        return error

    def end_for(self, excess: Excess) -> None:
        """Kill it for a limit that it passed. Any thread, and under any lock but that of killing."""
        if self._excess is None:
            self._excess = excess
        self.kill()

    @property
    def busy(self) -> bool:
        """Whether a question is open."""
        return self._owner != 0

    @property
    def doing(self) -> str | None:
        """What the open question is in words; None when none is open."""
        return self._phase if self.busy else None

    @property
    def obituary(self) -> IsohubError | None:
        """What every later question gets; None while it lives."""
        return None if self._obituary is None else _again(self._obituary)

    def look(self, *, wait: bool = False) -> bool:
        """Whether it can still be asked, as far as the kernel has told by now.

        Args:
            wait: Whether to wait until a worker that has ended is buried, so that its obituary is there: for a
                question that is open in another thread, never for a worker that lives.
        """
        if self._owner == threading.get_ident():
            return self.alive
        with self._kill_lock:
            ended = self._pidfd < 0 or _readable(self._pidfd)
        if ended and self._lock.acquire(blocking=wait):
            try:
                if self._obituary is None:
                    self._died("waiting to be asked")
            finally:
                self._lock.release()
        return not ended

    def retire(self, obituary: IsohubError) -> bool:
        """End it unless it is busy; whether it was ended. Later questions get the obituary."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._obituary is None:
                self.kill()
                self._exit_status(_EXIT_NOTICE_S)
                self._bury(obituary)
            return True
        finally:
            self._lock.release()

    def _timed_out(self, phase: str, timeout_s: float) -> WorkerTimeoutError:
        self.kill()
        self._exit_status(_EXIT_NOTICE_S)
        tail = self._tail()
        error = WorkerTimeoutError(
            f"the worker of {self.name} was still {phase} after {timeout_s:g} s and was killed"
            + (f"; its last output:\n{tail}" if tail else ""),
            hint="give it longer with timeout_s=",
            reference=self.name,
            commit=self.commit,
            phase=phase,
            timeout_s=timeout_s,
            stderr_tail=tail,
        )
        self._bury(error)
        return error

    def _broke_protocol(self, error: ProtocolError, phase: str) -> ProtocolError:
        self.kill()
        self._exit_status(_EXIT_NOTICE_S)
        told = ProtocolError(
            f"the worker of {self.name} broke the protocol while {phase} and was killed: {printable(error.message)}",
            hint="a repo's own code cannot do this by accident: look at what it does before you load it again",
        )
        self._bury(told)
        return told

    def refuse(self, what: str, phase: str) -> ProtocolError:
        """Kill it for an answer of a form that no honest worker gives; returns the error to raise."""
        with self._lock:
            return self._broke_protocol(ProtocolError(what), phase)

    def _exit_status(self, timeout_s: float) -> int | None:
        """The wait status that the zygote tells, or None when it does not."""
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        if self._status.fileno() < 0:
            return None
        poll.register(self._status.fileno(), select.POLLIN)
        while True:
            if not poll.poll(_milliseconds(deadline)):
                return None
            data = self._status.recv(1 << 12)
            if not data:
                return None
            status = read_status(data)
            if status.exit is not None:
                return status.exit

    def _tail(self) -> str:
        for output in self._outputs:
            output.drain()
        return self._outputs[1].tail() or self._outputs[0].tail()

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with self._kill_lock:  # the number must not become another process's between the look and the call
            if self._pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, number)

    def _bury(self, obituary: IsohubError) -> None:
        """Let go of everything; `obituary` is what later questions get."""
        if self._obituary is None:
            # A copy: the one that is raised collects frames, and those hold the handles whose end ends this worker.
            self._obituary = _again(obituary)
        self.kill()
        self._channel.close()
        self._status.close()
        with self._kill_lock:
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
            if self.broker is not None:
                self.broker.close()
        for arena in (self._inbox, self._outbox):
            if arena is not None:
                arena.close()
        self._inbox = self._outbox = None
        self._traffic.close()
        if self.row is not None:
            self.row.close()
        if self._proxy is not None:
            self._proxy.close()
        for output in self._outputs:
            self._background.forget(output)

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._obituary is None

    def close(self) -> None:
        """Kill it and wait until it is gone. A question that is open in another thread fails."""
        self._closing = True
        self.kill()
        with self._lock:
            if self._obituary is None:
                self._exit_status(_EXIT_NOTICE_S)
                self._bury(SessionClosedError(f"the worker of {self.name} was closed", hint="load it again"))


class Faulted(Exception):  # noqa: N818 - between this module and `handles`, which says what it means
    """The worker answered with an error."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.kind)
        self.fault = fault


def _number_of(pidfd: int) -> int:
    """A process's number in this process's pid namespace: 0 if it has none, -1 if it has ended."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return 0


def _readable(descriptor: int) -> bool:
    """Whether there is something to read; of a pidfd, whether its process has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


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


def _milliseconds(deadline: float | None) -> float | None:
    # Rounded up: a poll of 0 ms just before the deadline would spin. poll(2) takes a C int; waiters look again.
    return None if deadline is None else min(max(0.0, (deadline - time.monotonic()) * 1000 + 1), 2.0**31 - 1)


def _status_words(status: int | None) -> tuple[str | None, int | None, str]:
    """Signal's name, exit code, and the clause for a message."""
    if status is None:
        return None, None, "is gone, and so is the process that started it"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in signal.valid_signals() and number < 32 else f"signal {number}"
        why = " (out of memory?)" if number == signal.SIGKILL else ""
        return name, None, f"was ended by {name} ({number}){why}"
    code = os.WEXITSTATUS(status)
    return None, code, f"ended itself with exit code {code}"


def _again(obituary: IsohubError) -> IsohubError:
    """The same error once more, as a new object: a raised exception collects tracebacks."""
    fields = dict(obituary.fields)
    return type(obituary)(obituary.message, hint=obituary.hint, **fields)
