"""One thing that is asked of a worker, and the signals that end the wait for its answer.

Side: caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isohub.session.gradients import Recording
    from isohub.session.options import Interruption
    from isohub.session.replies import Fault

__all__ = ["CallInterrupted", "Faulted", "Question"]


@dataclass(slots=True)
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


class CallInterrupted(BaseException):
    """The wait for an answer was ended by an `Interruption`. No Exception: the way out is that of Ctrl-C."""


class Faulted(Exception):  # noqa: N818 - between this module and `handles`, which says what it means
    """The worker answered with an error."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.kind)
        self.fault = fault
