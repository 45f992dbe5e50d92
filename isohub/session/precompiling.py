"""Bytecode for a checkout whose modules took long to import: made after the load, by a worker that runs none of it.

Rules:

1. Once for each checkout in a session, and only where none is there: a thread of its own, in which nothing is raised.
2. It is asked of a worker of its own with the default policy, never of one that has run the repo's code; with no more
   memory and processor time than the session's own workers may have, and only where there is room for one more.
3. It is for the host's own packages alone: those of an environment may be anybody's, and would run where it is made.
4. Where a lockfile binds, or nothing confines the worker, nobody is given any: neither a commit's hash nor a lockfile
   vouches for it.

Side: caller. Trust: what comes is bytes, which are stored and given to workers of the same checkout.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from isohub.environments.runtime import HOST
from isohub.errors import IsohubError, ProtocolError
from isohub.repos.bytecode import Shelf
from isohub.sandbox.policy import DEFAULT_REQUIRED, Sandbox
from isohub.session.question import Faulted, Question
from isohub.session.request import Placement, memory_limit_bytes

if TYPE_CHECKING:
    from isohub.repos.pins import Checkout
    from isohub.session.pool import Pool
    from isohub.session.supervisor import Worker

__all__ = ["WORTH_S", "bytecode_of", "may_have", "precompile"]

_log = logging.getLogger("isohub.session")

#: An import that took longer has modules that are worth it: starting a worker for them takes about as long.
WORTH_S = 0.05
_TIMEOUT_S = 120.0
_MOST_MEMORY_BYTES = 4 << 30
_MOST_BYTES = 128 << 20


def may_have(worker: Worker, *, locked: bool) -> bool:
    """Whether bytecode is made and used for this worker.

    Args:
        worker: It.
        locked: Whether a lockfile binds its session.
    """
    return not locked and worker.runtime == HOST and isinstance(worker.placement.policy, Sandbox)


def bytecode_of(checkout: Checkout, worker: Worker) -> bytes | None:
    """What is stored of a checkout for this worker's Python."""
    try:
        with Shelf(checkout, worker.versions.python) as shelf:
            return shelf.read()
    except OSError:
        return None


def precompile(pool: Pool, checkout: Checkout, beside: Worker) -> threading.Thread:
    """Make it in the background.

    Args:
        pool: The session's.
        checkout: A stored one.
        beside: A worker of it that may have it, whose policy counts.
    """
    thread = threading.Thread(target=_make, args=(pool, checkout, beside), name="isohub-precompile", daemon=True)
    thread.start()
    return thread


def _make(pool: Pool, checkout: Checkout, beside: Worker) -> None:
    try:
        with Shelf(checkout, beside.versions.python) as shelf:
            if not pool.has_room():
                return
            placement = Placement(_policy(beside.placement.policy), beside.placement.checkout)
            zygote = pool.warm(beside.runtime)
            worker = zygote.spawn(beside.name, checkout.commit, _TIMEOUT_S, placement, beside.watchdog)
            with contextlib.closing(worker):
                if set(DEFAULT_REQUIRED) <= set(worker.confinement.active):
                    shelf.write(_asked(worker, checkout))
    except (IsohubError, Faulted, OSError) as error:
        _log.debug("no bytecode was made of %s: %s", beside.name, error)


def _policy(beside: Sandbox | str) -> Sandbox:
    """The default, with no more than a worker beside may have."""
    assert isinstance(beside, Sandbox)
    seconds = _TIMEOUT_S if beside.cpu_time_s is None else min(_TIMEOUT_S, beside.cpu_time_s)
    return Sandbox(memory=min(_MOST_MEMORY_BYTES, memory_limit_bytes(beside)), cpu_time_s=seconds)


def _asked(worker: Worker, checkout: Checkout) -> bytes:
    question = Question(
        "compile_tree", (str(checkout.path),), "compiling its modules", timeout_s=_TIMEOUT_S, limit_bytes=_MOST_BYTES
    )
    claimed = worker.ask(question, _nothing_else, _no_reference)
    if type(claimed) is not bytes:
        raise worker.refuse("bytecode that is no bytes", question.phase)
    return claimed


def _nothing_else(*_: Any) -> NoReturn:
    raise AssertionError("it has no other arguments")


def _no_reference(*_: Any) -> NoReturn:
    raise ProtocolError("a reference where bytecode belongs")
