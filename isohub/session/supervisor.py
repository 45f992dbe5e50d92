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

import enum
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from isohub.environments.runtime import HOST, Runtime
from isohub.errors import (
    IsohubError,
    ProtocolError,
    SessionClosedError,
    WorkerError,
    WorkerStartError,
    WorkerTimeoutError,
)
from isohub.repos.naming import shown
from isohub.sandbox.policy import Confinement
from isohub.session.background import Background, Budget, Output
from isohub.session.broker import Broker, Given
from isohub.session.mailbox import Mailbox
from isohub.session.obituary import AGAIN, again, of_death, of_protocol, of_time
from isohub.session.options import Interruption
from isohub.session.process import DeadlinePassed, NotMade, Process, milliseconds
from isohub.session.question import CallInterrupted, Faulted, Question
from isohub.session.register import Row
from isohub.session.replies import Answer, Fault, Ready, Replies, Reply, Want
from isohub.session.request import Placement
from isohub.session.watchdog import Excess, Watchdog
from isohub.wire.arena import Cargo
from isohub.wire.channel import Channel, ChannelClosed, discard
from isohub.wire.patience import Patience
from isohub.wire.protocol import Conversation, Event, State

if TYPE_CHECKING:
    from isohub.network.proxy import AllowListProxy

__all__ = ["Versions", "Worker"]

_E = TypeVar("_E", bound=IsohubError)

#: Importing torch over a slow network disk takes minutes; waiting for ever helps nobody.
_START_TIMEOUT_S = 600.0
# A zygote tells a worker's end within a millisecond; a worker that is gone without a word is one whose
# zygote is gone too, or one that closed its channel and lives on.
_EXIT_NOTICE_S = 1.0
# threading.TIMEOUT_MAX is centuries on 64 bits; acquire refuses more.
_LONGEST_WAIT_S = threading.TIMEOUT_MAX


class _Stage(enum.Enum):
    """How far the question under way has come: what an interruption would leave behind."""

    IDLE = "idle"  # nothing was sent
    SENDING = "sending"
    WAITING = "waiting"  # all was sent, nothing has come: the answer can be thrown away later
    READING = "reading"
    SERVING = "serving"  # the worker waits for a download of ours


_EVENTS = {Ready: Event.READY, Answer: Event.VALUE, Fault: Event.ERROR, Want: Event.WANT}


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
        claimed_facts: Versions and dtypes that it told with its first word; None where it could not know them yet.
        versions: What it says that this is.
        lacking: Names of dtypes that this process's torch has, and the worker's has not.
        started: ``time.monotonic()`` of its start.
        handles: The caller's handles to objects in it, by number.
        broker: Brings what it asks for while a question is open; without one all of that is refused.
        calls: Questions that it was asked.
        asked: ``time.monotonic()`` of the beginning of its last question.
        used: ``time.monotonic()`` of the end of its last question.
        row: Where other processes of the user's read what it does.
        weak: A weak reference to it.
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
        self.claimed_facts: tuple[str, str, list[str]] | None = None
        self.lacking: frozenset[str] = frozenset()
        self.commit = commit
        self.placement = placement
        self.watchdog = watchdog
        self.confinement = Confinement()
        self._proxy: AllowListProxy | None = None
        self.started = time.monotonic()
        self.handles: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.broker: Broker | None = None
        self._channel = Channel(channel, self._wait)
        self._process = Process(status)
        self._outputs = outputs
        self._background = background
        self._poll = select.poll()
        self._poll.register(status.fileno(), select.POLLIN)
        self._lock = threading.Lock()
        self._conversation = Conversation()
        self._replies = Replies()
        self._patience = Patience(channel.fileno())
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
        self.weak = weakref.ref(self)
        self._closing = False
        self._broker_lock = threading.Lock()
        self._obituary: IsohubError | None = None
        self._mailbox = Mailbox(name, commit, placement.policy)

    @property
    def pid(self) -> int:
        """Its process, as this process sees it."""
        return self._process.pid

    @property
    def ticks(self) -> int:
        """When that started, in the kernel's ticks."""
        return self._process.ticks

    @property
    def init_pid(self) -> int:
        """The first process of its pid namespace, which has what it leaves behind; 0 without one."""
        return self._process.init_pid

    def greet(self, timeout_s: float | None) -> None:
        """Wait until the zygote has made it and it has said that it is ready."""
        self._deadline = time.monotonic() + (_START_TIMEOUT_S if timeout_s is None else timeout_s)
        try:
            self._process.meet(self._deadline)
            self._poll.register(self._channel.fileno(), select.POLLIN)
            reply, descriptors = self._hear_frame()
            self._take_listener(descriptors)
        except NotMade as error:
            self.close()
            raise WorkerStartError(
                f"no worker could be made for {self.name}: {error}", reference=self.name, phase="starting"
            ) from None
        except ChannelClosed:
            if not self._process.met:
                raise  # there never was a process
            raise self._died("starting") from None
        except DeadlinePassed:
            raise self._timed_out("starting", timeout_s if timeout_s is not None else _START_TIMEOUT_S) from None
        except ProtocolError as error:
            raise self._broke_protocol(error, "starting") from error
        except BaseException:
            self.close()
            raise
        assert isinstance(reply, Ready)
        self.claimed_facts = reply.facts
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
            from isohub.network.proxy import AllowListProxy

            try:
                self._proxy = AllowListProxy(listener, hosts, who=self.name)
            except (OSError, ValueError) as error:
                listener.close()
                raise ProtocolError("a listener that does not listen") from error

    def equip(self, broker: Broker) -> bool:
        """Give it a broker, unless it has one or is gone; whether it took this one, and will close it."""
        with self._broker_lock:
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
        if self._owner == threading.get_ident() and self._lock.locked():
            raise WorkerError(
                f"the worker of {self.name} was asked something within its own question ({self._phase})",
                hint="a signal handler, a finalizer or an argument's __reduce__ cannot use the handle that is in use",
                reference=self.name,
                commit=self.commit,
                phase=question.phase,
            )
        if question.timeout_s is None:
            with self._lock:  # an interruption finds it either free or taken for this block
                return self._ask(question, None, other, remote)
        deadline = time.monotonic() + question.timeout_s
        if not self._lock.acquire(timeout=min(question.timeout_s, _LONGEST_WAIT_S)):
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
            return self._ask(question, deadline, other, remote)
        finally:
            self._lock.release()

    def _ask(
        self,
        question: Question,
        deadline: float | None,
        other: Callable[[Cargo, Any], Any],
        remote: Callable[[list[Any]], Any],
    ) -> Any:
        """`ask`, when it is this thread's turn."""
        try:
            self._owner, self._phase = threading.get_ident(), question.phase
            self.calls += 1
            self.asked = time.monotonic()
            if self.row is not None:
                self.row.write(self.calls, question.phase)
            self.watchdog.nudge()
            if self._obituary is not None:
                raise again(self._obituary)
            self._deadline = deadline
            self._interruption = question.interruption
            self._stage = _Stage.IDLE
            try:
                self._settle()
                if not self._channel.quiet():
                    raise ProtocolError("words that nobody asked for")
                body, descriptors = self._mailbox.pack(question, self._conversation.number + 1, other, self.lacking)
                self._stage = _Stage.SENDING
                note = self._mailbox.gone()
                if note is not None:
                    self._channel.send(0, note)
                number = self._conversation.ask()
                self._channel.send(number, body, descriptors)
                self._mailbox.sent()
                self._stage = _Stage.READING
                answer = self._receive(question, remote)
                self._stage = _Stage.IDLE
            except ChannelClosed:
                raise self._died(question.phase) from None
            except DeadlinePassed:
                assert question.timeout_s is not None
                phase = (
                    f"{self._abandoned}, from which its caller was interrupted," if self._abandoned else question.phase
                )
                raise self._timed_out(phase, question.timeout_s) from None
            except ProtocolError as error:
                raise self._broke_protocol(error, question.phase) from error
            except BaseException as error:
                if self._stage is _Stage.WAITING:
                    self._process.send(signal.SIGINT)
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

    def _settle(self) -> None:
        """Throw away the answer to a question that its asker did not wait for."""
        while self._conversation.state is State.BUSY:
            self._stage = _Stage.READING
            reply, descriptors = self._hear_frame()
            discard(descriptors)
            if isinstance(reply, Want):
                self._say(Given.interrupted(), reply.wish)
                continue
            self._mailbox.note(reply)
            self._mailbox.drop(reply)
        self._abandoned = ""
        self._stage = _Stage.IDLE

    def _receive(self, question: Question, remote: Callable[[list[Any]], Any]) -> Any:
        reply, descriptors = self._hear_frame()
        while isinstance(reply, Want):
            if descriptors:
                discard(descriptors)
                raise ProtocolError("descriptors with a wish")
            self._bring(reply, question)
            reply, descriptors = self._hear_frame()
        try:
            self._mailbox.note(reply)
            if self._refusal is not None:
                refusal, self._refusal = self._refusal, None
                self._mailbox.drop(reply)
                raise refusal
            if isinstance(reply, Answer):
                try:
                    return self._mailbox.unpack(reply, descriptors, question, remote)
                except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
                    # Nothing that a worker says should get this far; if it does, it is still the worker's doing.
                    raise ProtocolError(f"an answer that cannot be read: {error}") from error
            assert isinstance(reply, Fault)
            if descriptors:
                raise ProtocolError("an error with descriptors")
            raise Faulted(reply)
        finally:
            if descriptors:
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
        except (ChannelClosed, DeadlinePassed):
            raise
        except BaseException:
            # Ctrl-C, or a mistake of ours: the worker is told, and the caller hears what was raised.
            try:
                self._say(Given.interrupted(), want.wish)
            except (ChannelClosed, DeadlinePassed, ProtocolError):
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
        poll.register(self._process.fileno(), select.POLLIN)
        poll.register(self._channel.fileno(), 0)  # its end alone
        interruption = -1 if self._interruption is None else self._interruption.fileno()
        if interruption >= 0:
            poll.register(interruption, select.POLLIN)
        while True:
            ready = dict(poll.poll(milliseconds(self._deadline)))
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise DeadlinePassed
            if self._process.fileno() in ready or self._channel.fileno() in ready:
                raise ChannelClosed
            if descriptor in ready:
                return
            if interruption in ready:
                raise CallInterrupted

    def _say(self, given: Given, wish: int) -> None:
        """Tell the worker what came of its wish."""
        try:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise DeadlinePassed  # a wish after a wish is no way past it either
            body = msgspec.json.encode({"wish": wish, **given.message()})
            self._stage = _Stage.SENDING
            self._conversation.give()
            self._channel.send(self._conversation.number, body, [] if given.descriptor is None else [given.descriptor])
        finally:
            given.drop()
        self._stage = _Stage.READING

    def release(self, number: int, count: int) -> None:
        """Let the worker forget an object, with the next question. Any thread."""
        self._mailbox.release(number, count)

    # Hearing.

    def _hear_frame(self) -> tuple[Reply, Sequence[int]]:
        frame = self._channel.receive()
        try:
            reply = self._replies.read(frame.body)
            self._conversation.hear(_EVENTS[type(reply)], frame.number)
        except BaseException:
            discard(frame.descriptors)
            raise
        return reply, frame.descriptors

    def _wait(self, event: int) -> None:
        """Return when the channel can be used; raise when that will never be, or not in time."""
        channel = self._channel.fileno()
        reading = self._stage is _Stage.READING
        slept = False
        if reading:
            self._stage = _Stage.WAITING
            if not self._channel.begun:
                if self._patience.look():
                    self._stage = _Stage.READING
                    return
                slept = True
        self._poll.modify(channel, event)
        interruption = self._interruption if reading else None
        if interruption is not None:
            self._poll.register(interruption.fileno(), select.POLLIN)
        try:
            ready = dict(self._poll.poll(milliseconds(self._deadline)))
        finally:
            if interruption is not None:
                self._poll.unregister(interruption.fileno())
        if interruption is not None and ready.pop(interruption.fileno(), 0) and not ready:
            raise CallInterrupted
        if reading:
            self._stage = _Stage.READING
            if slept:
                self._patience.slept()
        late = self._deadline is not None and time.monotonic() >= self._deadline
        # Before death: a worker may answer and then die. Half a message in time is not in time.
        if channel in ready and not (late and (event == select.POLLOUT or self._channel.begun)):
            return
        if ready and channel not in ready:
            raise ChannelClosed
        if late:
            raise DeadlinePassed

    # Ends.

    def _died(self, phase: str) -> IsohubError:
        """The error for a worker whose channel has closed."""
        if self._closing:
            return self._end(SessionClosedError(f"the worker of {self.name} was closed while {phase}", hint=AGAIN))
        status = self._process.exit_status(_EXIT_NOTICE_S)
        if status is None:
            self.kill()
            status = self._process.exit_status(_EXIT_NOTICE_S)
            if status is not None:
                return self._broke_protocol(ProtocolError("the channel was closed by a worker that lived on"), phase)
        return self._end(of_death(self, phase, status, self._excess, self._tail()))

    def _end(self, obituary: _E) -> _E:
        self._bury(obituary)
        return obituary

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
        return None if self._obituary is None else again(self._obituary)

    def look(self, *, wait: bool = False) -> bool:
        """Whether it can still be asked, as far as the kernel has told by now.

        Args:
            wait: Whether to wait until a worker that has ended is buried, so that its obituary is there: for a
                question that is open in another thread, never for a worker that lives.
        """
        if self._owner == threading.get_ident():
            return self.alive
        ended = self._process.ended()
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
                self._process.exit_status(_EXIT_NOTICE_S)
                self._bury(obituary)
            return True
        finally:
            self._lock.release()

    def _timed_out(self, phase: str, timeout_s: float) -> WorkerTimeoutError:
        self.kill()
        self._process.exit_status(_EXIT_NOTICE_S)
        return self._end(of_time(self, phase, timeout_s, self._tail()))

    def _broke_protocol(self, error: ProtocolError, phase: str) -> ProtocolError:
        self.kill()
        self._process.exit_status(_EXIT_NOTICE_S)
        return self._end(of_protocol(self, phase, error))

    def refuse(self, what: str, phase: str) -> ProtocolError:
        """Kill it for an answer of a form that no honest worker gives; returns the error to raise."""
        with self._lock:
            return self._broke_protocol(ProtocolError(what), phase)

    def _tail(self) -> str:
        for output in self._outputs:
            output.drain()
        return self._outputs[1].tail() or self._outputs[0].tail()

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        self._process.kill()

    def _bury(self, obituary: IsohubError) -> None:
        """Let go of everything; `obituary` is what later questions get."""
        if self._obituary is None:
            # A copy: the one that is raised collects frames, and those hold the handles whose end ends this worker.
            self._obituary = again(obituary)
        self._process.close()
        self._channel.close()
        with self._broker_lock:
            if self.broker is not None:
                self.broker.close()
        self._mailbox.close()
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

    def begin_to_close(self) -> None:
        """Kill it, and do not wait; `close` is to follow."""
        self._closing = True
        self.kill()

    def close(self) -> None:
        """Kill it and wait until it is gone. A question that is open in another thread fails."""
        self.begin_to_close()
        with self._lock:
            if self._obituary is None:
                self._process.exit_status(_EXIT_NOTICE_S)
                self._bury(SessionClosedError(f"the worker of {self.name} was closed", hint=AGAIN))
