"""Errors for the end of a worker: what it died of, in words and fields.

Side: caller. Trust: a worker's last output is its own; `Output.tail` has made it printable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isohub.errors import (
    ConfinementError,
    IsohubError,
    ProtocolError,
    WorkerDiedError,
    WorkerLimitError,
    WorkerTimeoutError,
    printable,
)
from isohub.sandbox.confine import UNCONFINED
from isohub.session.process import status_words
from isohub.session.watchdog import Excess

if TYPE_CHECKING:
    from isohub.session.supervisor import Worker

__all__ = ["AGAIN", "again", "of_death", "of_protocol", "of_time"]

AGAIN = "load it again"


def of_death(worker: Worker, phase: str, status: int | None, excess: Excess | None, tail: str) -> IsohubError:
    """The error for a worker that is gone.

    Args:
        worker: Which.
        phase: What it did, in words.
        status: The wait status that the zygote told, if any.
        excess: The limit for which it was killed from here, if one was.
        tail: Its last output.
    """
    signal_name, exit_code, how = status_words(status)
    passed = excess or _limit_of(worker, signal_name)
    if passed is not None:
        return WorkerLimitError(
            f"the worker of {worker.name} {passed.words}; it was killed while {phase}",
            hint=f"isohub.Sandbox({passed.limit}=...) allows more",
            reference=worker.name,
            commit=worker.commit,
            phase=phase,
            pid=worker.pid,
            signal_name="SIGKILL" if excess is not None else "SIGXCPU",
            stderr_tail=tail,
            limit=passed.limit,
            allowed=passed.allowed,
            used=passed.used,
        )
    if phase == "starting" and exit_code == UNCONFINED:
        return ConfinementError(
            f"the worker of {worker.name} could not be confined: {tail}",
            hint="isohub doctor says what this machine can do",
        )
    return WorkerDiedError(
        f"the worker of {worker.name} {how} while {phase}" + _with(tail),
        hint="load it again for a new worker; `logging.getLogger('isohub.worker')` shows all of its output",
        reference=worker.name,
        commit=worker.commit,
        phase=phase,
        pid=worker.pid,
        signal_name=signal_name,
        exit_code=exit_code,
        stderr_tail=tail,
    )


def of_time(worker: Worker, phase: str, timeout_s: float, tail: str) -> WorkerTimeoutError:
    """The error for a worker that was killed since it took longer than it may."""
    return WorkerTimeoutError(
        f"the worker of {worker.name} was still {phase} after {timeout_s:g} s and was killed" + _with(tail),
        hint="load it again for a new worker, and give it longer with timeout_s=",
        reference=worker.name,
        commit=worker.commit,
        phase=phase,
        timeout_s=timeout_s,
        stderr_tail=tail,
    )


def of_protocol(worker: Worker, phase: str, error: ProtocolError) -> ProtocolError:
    """The error for a worker that was killed for what it said."""
    return ProtocolError(
        f"the worker of {worker.name} broke the protocol while {phase} and was killed: {printable(error.message)}",
        hint="a repo's own code cannot do this by accident: look at what it does before you load it again",
    )


def again(obituary: IsohubError) -> IsohubError:
    """The same error once more, as a new object: a raised exception collects tracebacks."""
    fields = dict(obituary.fields)
    return type(obituary)(obituary.message, hint=obituary.hint, **fields)


def _limit_of(worker: Worker, signal_name: str | None) -> Excess | None:
    """The limit for which the kernel ended it."""
    policy = worker.placement.policy
    if signal_name != "SIGXCPU" or isinstance(policy, str) or policy.cpu_time_s is None:
        return None
    words = f"used the {policy.cpu_time_s:g} s of processor time that are allowed"
    return Excess("cpu_time_s", policy.cpu_time_s, None, words)


def _with(tail: str) -> str:
    return f"; its last output:\n{tail}" if tail else ""
