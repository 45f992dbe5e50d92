"""One batch in the place where it is computed: the model is loaded if need be, and the caller's function is asked.

Rules:

1. Whatever fails is an answer, not an exception: only what is the caller's own mistake, or the end of the session, is
   raised. After a failure the worker is closed, so that another try has a fresh one.
2. The function goes to a worker once, not with each batch.

Side: caller, or the caller's own process on another machine. Trust: the answer is a worker's, and is checked here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isohub.errors import IsohubError, PolicyError, RemoteError, SessionClosedError, ValueNotTransferableError
from isohub.execution.executor import Place
from isohub.execution.seats import Seat, Seated, failure_text, take_seat

__all__ = ["Done", "Failed", "Function", "evaluate_batch"]


@dataclass(frozen=True)
class Function:
    """The caller's metric, to be sent.

    Attributes:
        code: As `isohub.session.arguments.pickled` has it.
        seed: What each batch is seeded with, beside its number.
        training: The mode that modules are put into; None leaves it.
    """

    code: bytes
    seed: int | None
    training: bool | None


@dataclass(frozen=True)
class Done:
    """A batch's result.

    Attributes:
        metrics: Names to numbers and tensors, checked.
        seconds: How long the worker took.
        load_s: How long the model took to load, if it was for this batch.
        memory_bytes: What the worker has of its own, if it was loaded for this batch.
    """

    metrics: Mapping[str, Any]
    seconds: float
    load_s: float | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Failed:
    """Why there is none.

    Attributes:
        stage: ``load`` or ``batch``.
        kind: Name of the error.
        message: What it says, safe to show.
        again: Whether another try may end otherwise.
        own: Whether the function or the model raised it, and the worker lived on.
    """

    stage: str
    kind: str
    message: str
    again: bool = True
    own: bool = False


def evaluate_batch(
    place: Place, drop: Sequence[int], seat: Seat, function: Function, number: int, batch: Any
) -> Done | Failed:
    """Ask for one batch.

    Args:
        place: Where.
        drop: Numbers of seats that are not needed any more.
        seat: Which model.
        function: What to ask it.
        number: Of the batch.
        batch: The caller's data.

    Raises:
        PolicyError: The sandbox that was asked for makes no sense.
        SessionClosedError: The session is closed, or the lane was stopped.
    """
    import torch

    from isohub.evaluation.values import metrics_of

    for each in drop:
        _leave(place, each)
    fresh = seat.number not in place.kept
    try:
        with torch.no_grad():
            seated = take_seat(place, seat)
            if seated.more is None:
                seated.more = _evaluator(seated, function, place.threads)
    except (PolicyError, SessionClosedError):
        raise
    except (IsohubError, TypeError, ValueError, OSError) as error:
        _leave(place, seat.number)
        return Failed("load", *failure_text(error), again=not isinstance(error, ValueNotTransferableError))
    try:
        with torch.no_grad():
            began = time.perf_counter()
            claimed = seated.more(number, batch)
            seconds = time.perf_counter() - began
            metrics = metrics_of(claimed)
        memory_bytes = next(seated.remotes()).stats().uss_bytes if fresh else None
        return Done(metrics, seconds, seated.load_s if fresh else None, memory_bytes)
    except SessionClosedError:
        _leave(place, seat.number)
        raise
    except ValueNotTransferableError as error:
        return Failed("batch", *failure_text(error), again=False)  # the batch is the caller's, the worker is well
    except Exception as error:  # noqa: BLE001 - whatever a worker's value does here is that batch's failure
        _leave(place, seat.number)
        wrong_form = not isinstance(error, IsohubError)
        return Failed("batch", *failure_text(error), again=not wrong_form, own=isinstance(error, RemoteError))


def _evaluator(seated: Seated, function: Function, threads: int | None) -> Any:
    from isohub.session.versions import other_python

    remote = next(seated.remotes(), None)
    if remote is None:
        raise TypeError(f"the entrypoint gave a {type(seated.built).__name__}, which is no model")
    python = other_python(remote.worker.versions)
    if python:
        raise ValueNotTransferableError(
            f"fn is code of this Python, which that of {remote.worker.name}, {python}, does not read",
            hint="evaluate refs on the Python of this process; isohub.compare and handles take any",
        )
    settings = {"seed": function.seed, "threads": threads, "training": function.training}
    return remote.ask("evaluator", seated.built, function.code, settings, phase="taking the function in")


def _leave(place: Place, number: int) -> None:
    seated = place.kept.pop(number, None)
    if seated is not None:
        seated.close()
