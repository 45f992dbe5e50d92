"""One commit is asked: it is brought, built and tested, and what it gives is an answer, whatever happens.

Rules:

1. A commit that cannot be brought or built tells nothing: it is skipped. What its model does when it is called is the
   test's; an exception there, or the worker's end, is skipped too unless the caller says that it is bad.
2. What is wrong for every commit (a policy, an argument that cannot be sent, the caller's own function) is raised.
3. Every probe has a worker of its own, which ends with it.

Side: caller, or the caller's own process on another machine. Trust: what a model gives is its worker's; a command is
the caller's own and has the caller's powers.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from isohub.errors import (
    BisectionError,
    IsohubError,
    PolicyError,
    SessionClosedError,
    UntrustedRepoError,
    ValueNotTransferableError,
    WorkerError,
    printable,
)
from isohub.execution.executor import Place
from isohub.execution.seats import Seat, bring, failure_text, take_seat

if TYPE_CHECKING:
    from isohub.comparison.inputs import Call
    from isohub.comparison.leaves import Leaf

__all__ = ["Answer", "CommandTest", "FunctionTest", "OutputTest", "Test", "ask_commit"]

_CALLERS_OWN = (PolicyError, SessionClosedError, UntrustedRepoError, ValueNotTransferableError)
#: As for ``git bisect run``.
_SKIP_STATUS, _LAST_BAD_STATUS = 125, 127


@dataclass(frozen=True)
class OutputTest:
    """What the model gives for these.

    Attributes:
        calls: The inputs.
        method: What is called; the empty text is the model itself.
        training: The mode that it is put into; None leaves it.
    """

    calls: Sequence[Call]
    method: str = ""
    training: bool | None = False


@dataclass(frozen=True)
class FunctionTest:
    """What the caller's function says of the handle.

    Attributes:
        function: Takes what `isohub.load` gives. Runs where the place is, not in the worker.
        training: As for `OutputTest`.
    """

    function: Callable[[Any], Any]
    training: bool | None = False


@dataclass(frozen=True)
class CommandTest:
    """What a command's exit status says: 0 is good, 125 cannot be told, others up to 127 are bad.

    Attributes:
        command: Program and arguments. It is not confined.
    """

    command: tuple[str, ...]


Test = OutputTest | FunctionTest | CommandTest


@dataclass(frozen=True)
class Answer:
    """What one commit gave.

    Attributes:
        kind: "good", "bad"; "skip"; "value" and "outputs" are judged by who asked.
        value: Of a metric.
        outputs: For each call, the leaves by place; then the same of a second time.
        message: Why it is skipped, or how it is bad; safe to show.
        seconds: How long it took.
    """

    kind: Literal["good", "bad", "skip", "value", "outputs"]
    value: float | None = None
    outputs: Sequence[tuple[Mapping[str, Leaf], Mapping[str, Leaf]]] = field(default=(), repr=False)
    message: str = ""
    seconds: float = 0.0


def ask_commit(place: Place, seat: Seat, test: Test, errors: Literal["skip", "bad"]) -> Answer:
    """Ask one commit.

    Args:
        place: Where.
        seat: The commit, and how its model is built.
        test: What to ask.
        errors: What a commit is whose model raises or whose worker ends.

    Raises:
        BisectionError: A command could not be run, or stopped the search.
    """
    began = time.perf_counter()
    answer = _command(place, seat, test) if isinstance(test, CommandTest) else _model(place, seat, test, errors)
    return Answer(answer.kind, answer.value, answer.outputs, answer.message, time.perf_counter() - began)


def _skipped(error: IsohubError) -> Answer:
    kind, message = failure_text(error)
    return Answer("skip", message=f"{kind}: {message}")


def _model(place: Place, seat: Seat, test: OutputTest | FunctionTest, errors: Literal["skip", "bad"]) -> Answer:
    from torch import no_grad

    try:
        try:
            with no_grad():
                seated = take_seat(place, seat)
                handle, remote = seated.model()
                if test.training is not None and remote is not None and remote.sort == "module":
                    handle.train(test.training)
        except _CALLERS_OWN:
            raise
        except IsohubError as error:
            return _skipped(error)
        try:
            with no_grad():
                if isinstance(test, FunctionTest):
                    return _judged(test.function(seated.built))
                return _outputs(handle, remote, seat, test)
        except _CALLERS_OWN:
            raise
        except (WorkerError, IsohubError) as error:
            kind, message = failure_text(error)
            return Answer(errors, message=f"{kind}: {message}")
    finally:
        seated_here = place.kept.pop(seat.number, None)
        if seated_here is not None:
            seated_here.close()


def _judged(value: Any) -> Answer:
    """What the caller's function said. A tensor or an array of one element is a number."""
    if hasattr(value, "item") and not isinstance(value, (bool, int, float)):
        value = value.item()
    if isinstance(value, bool):
        return Answer("good" if value else "bad")
    if isinstance(value, (int, float)):
        return Answer("value", value=float(value))
    raise TypeError(f"test gave a {type(value).__name__}; expected True for good, False for bad, or a number")


def _outputs(handle: Any, remote: Any, seat: Seat, test: OutputTest) -> Answer:
    from isohub.comparison.leaves import leaves_by_place

    if remote is None:
        leaves = leaves_by_place(handle, "built")
        return Answer("outputs", outputs=[(leaves, leaves)])

    def ask(call: Call) -> Mapping[str, Leaf]:
        arguments = [*call.args], dict(call.kwargs)
        phase = f"calling {test.method or 'forward'}()"
        value = remote.ask("answer", seat.options.get("seed"), test.method, *arguments, phase=phase)
        return leaves_by_place(value)

    return Answer("outputs", outputs=[(ask(call), ask(call)) for call in test.calls])


def _command(place: Place, seat: Seat, test: CommandTest) -> Answer:
    try:
        checkout = bring(place, seat)
    except IsohubError as error:
        return _skipped(error)
    variables = {
        "ISOHUB_REPO": str(seat.repo),
        "ISOHUB_COMMIT": seat.commit,
        "ISOHUB_CHECKOUT": str(checkout.path),
    }
    try:
        done = subprocess.run(test.command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        raise BisectionError(
            f"the command {printable(test.command[0], newlines=False)!r} cannot be run: {error.strerror}",
            hint="a program on PATH, or a path to one that is executable",
            commit=seat.commit,
        ) from error
    status = done.returncode
    if status == _SKIP_STATUS:
        return Answer("skip", message=f"exit status {status}")
    if 0 <= status <= _LAST_BAD_STATUS:
        return Answer("bad" if status else "good", message=f"exit status {status}")
    words = f"was ended by signal {-status}" if status < 0 else f"ended with {status}"
    raise BisectionError(
        f"the command {words} at {seat.name}; expected 0 for good, 125 for what cannot be told, up to 127 for bad",
        hint="as git bisect run has it; what was found so far is in the log, if there is one",
        commit=seat.commit,
    )
