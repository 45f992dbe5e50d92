"""How a handle reaches its object: questions, references, errors, and when the object may go.

Side: caller. Trust: names, texts and kinds that a worker gives are checked or escaped before they are used.
"""

from __future__ import annotations

import itertools
import os
import queue
import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch

from isohub.errors import (
    EntrypointNotFoundError,
    IsohubError,
    ProtocolError,
    RemoteError,
    SessionClosedError,
    ValueNotTransferableError,
    printable,
)
from isohub.repos.naming import near_names
from isohub.session.arguments import pickled, place_of
from isohub.session.ending import fork_hint, refused
from isohub.session.gradients import recording_for
from isohub.session.iterations import prompt_end
from isohub.session.modes import carried
from isohub.session.options import Interruption, current_interruption, resumed, timeout_of
from isohub.session.question import Faulted, Question
from isohub.session.supervisor import Worker
from isohub.session.tracing import refuse_if_watched
from isohub.session.versions import lacked_dtype, other_python
from isohub.wire.codec import LackedDtype, TooLargeToEncode
from isohub.wire.protocol import MAX_REFERENCES

if TYPE_CHECKING:
    from isohub.repos.pins import Checkout
    from isohub.session.pool import Pool
    from isohub.session.recipe import Recipe
    from isohub.session.recovery import Recovery
    from isohub.session.replies import Fault
    from isohub.wire.arena import Cargo

__all__ = ["Gate", "Link", "Remote", "Stats", "refuse_pickle", "remote_of"]

# What a worker is doing, for errors.
_OPERATION_WORDS = {
    "getattr": "reading its attribute",
    "setattr": "setting its attribute",
    "delattr": "deleting its attribute",
    "getitem": "reading its item",
    "setitem": "setting its item",
    "delitem": "deleting its item",
    "repr": "describing itself",
    "summary": "describing itself",
    "str": "describing itself",
    "dir": "listing its attributes",
    "len": "telling its length",
    "iter": "starting an iteration",
    "bool": "telling its truth value",
    "contains": "looking for an item",
}
# Those that give no tensor, and those that only store one: no backward pass comes to them.
_UNRECORDED_OPERATIONS = frozenset({*_OPERATION_WORDS, "int", "float", "reversed", "aiter"} - {"getattr", "getitem"})
# What the kernel says of a limit or a wall of the sandbox, and which field of the policy moves it.
_SANDBOX_HINTS = tuple(
    (re.compile(pattern), hint)
    for pattern, hint in (
        (r"MemoryError|can't allocate memory|Cannot allocate memory", "isohub.Sandbox(memory=...) allows more memory"),
        (r"Errno 28\]|No space left on device", "isohub.Sandbox(disk=...) gives the worker more room of its own"),
        (r"Errno 27\]", "isohub.Sandbox(file_size=...) allows larger files"),
        (r"Errno 24\]", "isohub.Sandbox(open_files=...) allows more descriptors"),
        (r"Errno 11\]|can't start new thread", "isohub.Sandbox(processes=...) allows more processes and threads"),
        (r"Errno 30\]", "a worker writes to its own directories; isohub.Sandbox(write=[...]) opens others to it"),
        (
            r"URLError|Connection(?:Error|RefusedError)|NameResolutionError|gaierror|ProxyError",
            "a worker has no network but torch.hub's own downloads; isohub.Sandbox(network=[host]) leads to a host",
        ),
        (
            r"(?:Errno 2|Errno 13)\][^\n]*: '/",
            "a worker sees its checkout and the interpreter; isohub.Sandbox(read=[...]) shows it more",
        ),
        (r"Errno 1\] Operation not permitted", "the sandbox refuses this; isohub.Sandbox says what it can allow"),
    )
)
_SEARCHED_CHARS = 10_000
# Names that an error lists; a hubconf that has more gets the first.
_MOST_SHOWN = 200
_SORTS = frozenset({"module", "object", "function", "iterator", "stream", "awaitable"})


class Gate(Protocol):
    """Opens programs of a worker's in this process, if the repo is trusted."""

    def check(self, form: str) -> None:
        """Raise unless it may."""

    def open(self, form: str, data: bytes) -> Any:
        """Check, and open."""


@dataclass(frozen=True)
class Stats:
    """What the system says of a worker's process.

    Attributes:
        pid: The process.
        rss_bytes: Resident memory, shared pages counted whole.
        pss_bytes: Resident memory, each shared page divided among those that share it.
        uss_bytes: Memory that would come back if it ended.
        cpu_user_s: Processor time in user mode.
        cpu_system_s: Processor time in the kernel.
        threads: Threads.
        created: Start, in seconds since the epoch.
    """

    pid: int
    rss_bytes: int
    pss_bytes: int
    uss_bytes: int
    cpu_user_s: float
    cpu_system_s: float
    threads: int
    created: float


class Link:
    """How handles of one load reach their worker.

    Attributes:
        worker: Where the objects live.
        checkout: Whose code it is.
        gate: What opens its programs here.
        make_handle: Makes a handle of (remote, whether it is a module, whether it can be indexed).
        timeout_s: Seconds that each question may take.
        limit_bytes: The most tensor bytes that one answer may hold.
        verbose: Whether downloads of the worker's may show their progress.
        weak: A weak reference to it.
        recipe: What was asked of the entrypoint; None before that.
        recovery: Builds it again once the worker has died, if that was asked for.
        import_s: Seconds that importing hubconf took.
    """

    recipe: Recipe | None = None
    recovery: Recovery | None = None
    import_s = 0.0

    def __init__(
        self,
        worker: Worker,
        pool: Pool,
        checkout: Checkout,
        gate: Gate,
        make_handle: Callable[[Remote, bool, bool], Any],
        timeout_s: float | None,
        limit_bytes: int,
        verbose: bool = True,
    ) -> None:
        self.worker = worker
        self.pool = pool
        self.checkout = checkout
        self.gate = gate
        self._make_handle = make_handle
        self.timeout_s = timeout_s
        self.limit_bytes = limit_bytes
        self.verbose = verbose
        self.weak = weakref.ref(self)
        self._pid = os.getpid()
        self._queue: queue.SimpleQueue[Callable[[], None] | None] | None = None
        self._queue_lock = threading.Lock()

    def ask(
        self,
        op: str,
        *args: Any,
        phase: str,
        target: int | None = None,
        parcel: bool = False,
        limit_bytes: int | None = None,
        record: bool = False,
        also: Sequence[torch.Tensor] = (),
    ) -> Any:
        """Ask the worker; errors of the repo's come out as `RemoteError`.

        Args:
            op: Name of the operation.
            *args: Its arguments.
            phase: What this is in words, for errors.
            target: Number of the remote object that it is done to.
            parcel: Whether the answer is mapped instead of copied.
            limit_bytes: The most tensor bytes that the answer may hold; the link's own unless given.
            record: Whether a backward pass may come to it.
            also: What it gives gradients for, beside its arguments: inputs of an earlier call.
        """
        self._check_process()
        refuse_if_watched(op, args, self.worker.name)
        recording = recording_for(self, also) if record else None
        question = Question(
            op,
            args,
            phase,
            target=target,
            timeout_s=timeout_of(self, self.timeout_s),
            interruption=current_interruption(),
            limit_bytes=self.limit_bytes if limit_bytes is None else limit_bytes,
            parcel=parcel,
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            verbose=self.verbose,
            modes=carried(),
            recording=recording,
        )
        references = itertools.count(1)  # of this one answer
        answered = False
        try:
            answer = self.worker.ask(
                question,
                lambda cargo, value: self._encode(cargo, value, question),
                lambda claimed: self._handle(claimed, next(references)),
            )
            answered = True
        except Faulted as faulted:
            raise self._error(faulted, question) from None
        except SessionClosedError as error:
            raise refused(error) from None
        except LackedDtype as error:
            raise lacked_dtype(error.args[0], self.worker, phase) from None
        except TooLargeToEncode:
            raise ValueNotTransferableError(
                "the arguments hold more values than one message takes",
                hint="pass large data as tensors or arrays",
                phase=phase,
            ) from None
        finally:
            if recording is not None and not answered:
                recording.abandon()
        if recording is not None:
            recording.tie()
        return answer

    def ours(self) -> bool:
        """Whether this is the process that made the link, and no fork of it."""
        return os.getpid() == self._pid

    def _check_process(self) -> None:
        if not self.ours():
            raise SessionClosedError(
                f"a handle to {self.worker.name} was used in a forked process (pid {os.getpid()}, made in {self._pid})",
                hint=fork_hint(),
            )

    def submit(self, work: Callable[[], Any], interruption: Interruption | None = None) -> Future[Any]:
        """Do this in a thread of the link's own, after what was submitted before, under the modes of this one."""
        self._check_process()
        work = resumed(work, interruption)
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001 - the future carries it to whoever waits
                    future.set_exception(error)

        with self._queue_lock:
            if self._queue is None:
                self._queue = queue.SimpleQueue()
                # A daemon, unlike an executor's threads: a call that never ends must not keep Python from ending.
                threading.Thread(target=_work, args=(self._queue,), name="isohub-submit", daemon=True).start()
                weakref.finalize(self, self._queue.put, None).atexit = False
            self._queue.put(run)
        return future

    def _error(self, faulted: Faulted, question: Question) -> IsohubError:
        fault = faulted.fault
        name, commit, phase = self.worker.name, self.worker.commit, question.phase
        if fault.kind == "no_entrypoint":
            if question.op not in ("build", "help"):
                return self.worker.refuse("an entrypoint that nobody asked for", phase)
            wanted = printable(str(question.args[0]), limit_chars=200, newlines=False)
            known = [printable(entry, limit_chars=200, newlines=False) for entry in fault.details[:_MOST_SHOWN]]
            near = near_names(wanted, known)
            return EntrypointNotFoundError(
                f"{name} has no entrypoint {wanted!r}; it has {', '.join(known) or 'none'}",
                hint=f"did you mean {' or '.join(repr(entry) for entry in near)}?"
                if near
                else "isohub.list(repo) shows them",
                reference=name,
                commit=commit,
                entrypoint=wanted,
                near=near,
            )
        fields: dict[str, Any] = {"reference": name, "commit": commit, "phase": phase}
        if fault.kind == "too_large":
            return RemoteError.class_for(["MemoryError"])(
                f"{name}, {phase}: {printable(fault.message)}",
                hint="isohub.Session(max_reply_bytes=...) raises the limit; h.run(fn) sends less",
                **fields,
            )
        fields["hint"] = None if isinstance(self.worker.placement.policy, str) else _hint(fault)
        remote_type, message = printable(fault.type, newlines=False), printable(fault.message)
        trace = printable(fault.traceback).rstrip()
        return RemoteError.class_for(fault.bases)(
            f"{remote_type}: {message}\n(raised by {name} while {phase})" + (f"\n\n{trace}" if trace else ""),
            remote_type=remote_type,
            remote_message=message,
            remote_traceback=trace,
            **fields,
        )

    def _encode(self, cargo: Cargo, value: Any, question: Question) -> list[Any]:
        """An argument outside of the closed set: a handle of this worker's, else by cloudpickle."""
        try:
            number = self._number_of(value)
            if number is not None:
                return ["r", number]
            hidden = None if question.recording is None else question.recording.hidden
            other = other_python(self.worker.versions)
            return ["p", cargo.add_bytes(pickled(value, self._number_of, hidden, other_python=other))]
        except ValueNotTransferableError as error:
            place = place_of(value, question.op, question.args)
            if place is None:
                raise
            fields = {**error.fields, "phase": question.phase, "where": place}
            raise ValueNotTransferableError(f"{place}: {error.message}", hint=error.hint, **fields) from error.__cause__

    def _number_of(self, value: Any) -> int | None:
        """The number of the object that a handle stands for; None for what is no handle."""
        remote = remote_of(value)
        if remote is None:
            return None
        if remote.worker is not self.worker:
            raise ValueNotTransferableError(
                f"a handle to an object of {remote.worker.name} was passed to {self.worker.name}; "
                "each lives in a process of its own",
                hint="pass its outputs or its state_dict() instead",
                where=type(value).__name__,
            )
        return remote.number

    def _handle(self, claimed: list[Any], count: int) -> Any:
        """The handle that a reference of the worker's stands for. Trust: worker."""
        if len(claimed) != 4:
            raise ProtocolError("a reference that is none")
        number, sort, class_name, indexable = claimed
        if type(number) is not int or not 0 < number < 1 << 53 or type(sort) is not str or sort not in _SORTS:
            raise ProtocolError("a reference that is none")
        if type(class_name) is not str or type(indexable) is not bool:
            raise ProtocolError("a reference that is none")
        if count > MAX_REFERENCES:
            raise ProtocolError(f"more than {MAX_REFERENCES} references in one answer")
        known = self.worker.handles.get(number)
        if known is not None:
            remote_of(known).received[0] += 1  # type: ignore[union-attr]
            return known
        remote = Remote(self, number, printable(class_name[:1000], newlines=False))
        remote.sort = sort
        handle = self._make_handle(remote, sort == "module", indexable)
        remote.bind(handle)
        return handle


class Remote:
    """What every handle has: a link, the object's number, and the class's name as text."""

    def __init__(self, link: Link, number: int, class_name: str) -> None:
        self.link = link
        self.worker = link.worker  # the link's own, unless that was built again and this object was not
        self.number = number
        self.class_name = class_name
        self.path: tuple[Any, ...] | None = None  # its place in what an entrypoint gave; None for a part of that
        self.sort = "object"
        self.called = ""  # of a function: the attribute that it was read as, for errors
        self.prompt = True  # whether an iterator may have something to do once it is given back
        self.loaded = False  # whether an entrypoint gave it, and not another handle
        self.received = [1]  # how often the worker sent it: it forgets the object when all are given back
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def bind(self, handle: Any) -> None:
        """Tie the remote object's life to this handle's."""
        self.link.pool.hold(self.worker)
        self._tie(handle)

    def adopt(self, other: Remote) -> None:
        """Stand for what another one stood for, which is of no use from here on."""
        held = None if self._finalizer is None else self._finalizer.detach()
        if held is not None and other._finalizer is not None and other._finalizer.detach() is not None:
            self.link.pool.drop(self.worker)
            self.worker, self.number, self.received = other.worker, other.number, other.received
            self._tie(held[0])

    def _tie(self, handle: Any) -> None:
        worker, pool, number, received = self.worker, self.link.pool, self.number, self.received
        worker.handles[number] = handle
        # Called at any moment, in any thread: only hands over.
        self._finalizer = weakref.finalize(handle, _let_go, pool, worker, number, received, prompt_end(self))
        self._finalizer.atexit = False

    def __reduce__(self) -> NoReturn:
        refuse_pickle(self)

    @property
    def ref(self) -> Remote:
        """Itself, if it may still be used."""
        if self._finalizer is None or not self._finalizer.alive:
            raise SessionClosedError(
                f"this handle to {self.class_name} of {self.worker.name} was closed", hint="load it again"
            )
        if self.link.recovery is not None:
            self.link.recovery.ready(self)
        return self

    def close(self) -> None:
        """Give the object back now. Waits for the worker's end if this was the last."""
        if self._finalizer is not None and self._finalizer.detach() is not None and self.link.ours():
            worker = self.worker
            worker.handles.pop(self.number, None)
            worker.release(self.number, self.received[0])
            self.link.pool.drop(worker)

    def ask(self, op: str, *args: Any, phase: str, **options: Any) -> Any:
        """`Link.ask`, with this object as the target."""
        number, recovery = self.ref.number, self.link.recovery
        if recovery is None:
            return self.link.ask(op, *args, phase=phase, target=number, **options)
        with recovery.watching(self, op, args):
            return self.link.ask(op, *args, phase=phase, target=number, **options)

    def call(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the object, or its method of that name."""
        return self.ask("call", name, args, kwargs, phase=f"calling {name or 'forward'}()", record=True)

    def operate(self, operation: str, *args: Any) -> Any:
        """One of Python's own operations: ``getattr``, ``len``, ``getitem`` ..."""
        words = _OPERATION_WORDS.get(operation, f"doing {operation}")
        name = f" {args[0]!r}" if args and isinstance(args[0], str) else ""
        record = operation not in _UNRECORDED_OPERATIONS
        value = self.ask("operate", operation, args, phase=words + name, record=record)
        if operation == "getattr" and isinstance(got := getattr(value, "__dict__", {}).get("_isohub"), Remote):
            got.called = got.called or str(args[0])
        return value

    def refuse(self, what: str, phase: str) -> ProtocolError:
        """Kill the worker for an answer of a wrong form; returns the error to raise."""
        return self.worker.refuse(f"{what} of a wrong form", phase)

    def stats(self) -> Stats:
        """See `RemoteModule.stats`."""
        import psutil

        worker = self.ref.worker
        try:
            process = psutil.Process(worker.pid)
            with process.oneshot():
                memory, times = process.memory_full_info(), process.cpu_times()
                return Stats(
                    pid=worker.pid,
                    rss_bytes=memory.rss,
                    pss_bytes=memory.pss,
                    uss_bytes=memory.uss,
                    cpu_user_s=times.user,
                    cpu_system_s=times.system,
                    threads=process.num_threads(),
                    created=process.create_time(),
                )
        except psutil.NoSuchProcess:
            raise SessionClosedError(f"the worker of {worker.name} is gone", hint="load it again") from None


def _hint(fault: Fault) -> str | None:
    """What helps where the sandbox is a likely reason. Trust: worker; its words choose among ours."""
    text = f"{fault.type}: {fault.message}"[:_SEARCHED_CHARS]
    return next((hint for pattern, hint in _SANDBOX_HINTS if pattern.search(text)), None)


def remote_of(value: Any) -> Remote | None:
    """The `Remote` behind a handle, else None."""
    remote = getattr(value, "__dict__", {}).get("_isohub")
    return remote.ref if isinstance(remote, Remote) else None


def _let_go(pool: Pool, worker: Worker, number: int, received: list[int], end: Callable[[], None] | None) -> None:
    """A handle is gone. Runs in a finalizer: no lock may be taken here."""
    worker.release(number, received[0])  # before any later question
    pool.background.defer(lambda: pool.drop(worker) if end is None else end())


def _work(work: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (item := work.get()) is not None:
        item()
        del item


def refuse_pickle(remote: Remote) -> NoReturn:
    """What every handle says to ``copy`` and ``pickle``."""
    raise TypeError(
        f"a handle to {remote.class_name} of {remote.worker.name} cannot be copied or pickled: it stands for an "
        "object in another process\nhint: send its state_dict(), or call isohub.load() in the process that needs it"
    )
