"""The first thing that a worker is asked: to bring the packages of its environment, and what they are.

Of an environment that isohub has installed, that is when anything of its packages runs for the first time: the worker
is confined by then, and has said so.

Side: caller. Trust: worker; versions are of a closed form, texts are escaped.
"""

from __future__ import annotations

import re
import shlex
from typing import Any, NoReturn

import torch

from isohub.environments.runtime import Runtime
from isohub.errors import ProtocolError, WorkerStartError, printable
from isohub.session.question import Faulted, Question
from isohub.session.supervisor import Versions, Worker
from isohub.wire.arena import dtype_names

__all__ = ["could_not_start", "prepare"]

_PHASE = "importing torch"
_PYTHON = re.compile(r"[0-9]{1,2}\.[0-9]{1,3}\.[0-9]{1,3}", re.ASCII)
# PEP 440, local part included, and what torch calls a build from source.
_TORCH = re.compile(r"[0-9][0-9A-Za-z.+_-]{0,63}", re.ASCII)
#: Of a traceback: an ImportError of a missing library stands at its end.
_MOST_LINES = 12


def prepare(worker: Worker, timeout_s: float | None) -> None:
    """Have a worker import torch, unless its zygote has, and note the versions that it tells.

    A worker that has told with its first word that it is on the caller's own torch is asked nothing.

    Args:
        worker: One that has greeted, and was asked nothing yet.
        timeout_s: Seconds that this may take.

    Raises:
        WorkerStartError: There is no torch that workers can use.
        WorkerDiedError, WorkerTimeoutError, ProtocolError: As for any question.
    """
    own = dtype_names()
    if worker.claimed_facts is not None:
        versions, dtypes = _checked(worker.claimed_facts, worker)
        if versions.torch == str(torch.__version__) and dtypes == own:
            worker.versions = versions
            return
    question = Question("prepare", (str(torch.__version__), own), _PHASE, timeout_s=timeout_s, verbose=False)
    try:
        claimed = worker.ask(question, _nothing_else, _no_reference)
        worker.versions, dtypes = _checked(claimed, worker)
        worker.lacking = frozenset(own).difference(dtypes)
    except Faulted as faulted:
        fault = faulted.fault
        tail = printable("\n".join(fault.traceback.rstrip().splitlines()[-_MOST_LINES:]))
        words = f"no worker could be made for {worker.name}: its interpreter, {worker.runtime.python}, "
        what = printable(f"{fault.type}: {fault.message}", limit_chars=500)
        raise could_not_start(f"{words}has no torch that works: {what}", worker.runtime, tail) from None


def _checked(claimed: Any, worker: Worker) -> tuple[Versions, list[str]]:
    if type(claimed) is tuple and len(claimed) == 3:
        python, own_torch, dtypes = claimed
        if (
            type(python) is str
            and _PYTHON.fullmatch(python)
            and type(own_torch) is str
            and _TORCH.fullmatch(own_torch)
            and type(dtypes) is list
            and all(type(name) is str for name in dtypes)
        ):
            return Versions(python, own_torch), dtypes
    raise worker.refuse("versions of a wrong form", _PHASE)


def _nothing_else(*_: Any) -> NoReturn:
    raise AssertionError("it has no arguments")


def _no_reference(*_: Any) -> NoReturn:
    raise ProtocolError("a reference where versions belong")


def could_not_start(words: str, runtime: Runtime, tail: str) -> WorkerStartError:
    """The error for an interpreter on which no worker runs.

    Args:
        words: What happened.
        runtime: The interpreter and its packages.
        tail: The last lines that were printed, escaped.
    """
    python = shlex.quote(runtime.python)
    command = f"{python} -I -c 'import torch'"
    if runtime.packages:
        command = f"PYTHONPATH={shlex.quote(':'.join(runtime.packages))} {python} -c 'import torch'"
    return WorkerStartError(
        words + (f"; the last lines:\n{tail}" if tail else ""),
        hint=f"run `{command}`: it must work on its own, with torch 1.13 or newer on Python 3.8 or newer",
        phase="starting",
        stderr_tail=tail,
    )
