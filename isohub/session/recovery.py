"""``load(..., restart="on-death")``: a handle whose worker has died is built again at its next use.

Rules:

1. The call during which a worker dies is an error: whether it was done nobody knows. The next use of what `load`
   gave starts another worker of the same commit, with the same arguments and the same seed.
2. What changed the object since is done again where that gives the same (moves, conversions, modes), and is named
   in a `RuntimeWarning` where it cannot: a state that was loaded, what a function or a method may have changed.
3. Handles that were taken from the object (submodules, results) belong to the dead worker and say so.
4. After three deaths without an answer to a call between them, the death stays.
5. A worker that was killed for breaking the protocol is not built again.

Side: caller.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from isohub.errors import ProtocolError, RemoteError, SessionClosedError, WorkerStartError, printable
from isohub.session.link import Remote
from isohub.session.recipe import path_words, remotes_in

if TYPE_CHECKING:
    from isohub.session.link import Link

__all__ = ["Recovery"]

_log = logging.getLogger("isohub.session")

#: So many in a row, without an answer to a call between them, are no accident.
_MOST_DEATHS = 3
# Methods that give the same when they are called again on the same object.
_MODES = frozenset({"train", "eval"})
_CONVERSIONS = frozenset(
    {"to", "cpu", "cuda", "half", "float", "double", "bfloat16", "type", "_apply", "requires_grad_"}
)
_REPLAYED = _MODES | _CONVERSIONS
_READS = frozenset({"get_submodule", "get_parameter", "get_buffer", "extra_repr"})
_WRITING_OPERATIONS = frozenset({"setattr", "setitem", "delattr", "delitem"})
# What runs code of the repo's beside calls, and what that may leave behind, in words.
_RUNNING = {
    "next": "what an iteration{} changed",
    "anext": "what an iteration{} changed",
    "await": "what awaiting{} changed",
    "enter": "the context{} that was entered",
    "exit": "what leaving a context{} changed",
}
# What a parameter's copy does to it, where it does not only read.
_PARAMETER_WORDS = {
    "set_grad": "the gradient of",
    "add_grad": "the gradient of",
    "requires_grad": "requires_grad of",
    "register": "the parameter",
}
_IN_PLACE = frozenset({
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "ilshift", "irshift", "iand_", "ior_",
    "ixor",
})  # fmt: skip
# One who converts to and fro for ever must not fill memory; beyond this they are named as lost.
_MOST_REPLAYED = 200
_MOST_NAMED = 8
_HINT = "the repo's code, its inputs or a limit ends it each time; load it again once that is changed"

_NOT_THE_USERS = (
    *(os.path.dirname(file) + os.sep for file in (os.path.dirname(__file__), torch.__file__)),  # noqa: PTH120 - as frames have them
    contextlib.__file__,
)

Again = Callable[[], AbstractContextManager[tuple["Link", Any]]]


class Recovery:
    """What one load can do about the death of its worker. Thread-safe.

    Args:
        again: Builds the same in a worker that lives as long as the block; gives its link and what it built.
        built: What the entrypoint gave. Its handles are held weakly.
    """

    def __init__(self, again: Again, built: Any) -> None:
        self._again = again
        self._loaded = {path: (weakref.ref(handle), remote) for path, handle, remote in remotes_in(built)}
        self._lock = threading.RLock()
        self._deaths = 0
        self._replayed: list[tuple[Remote, str, tuple[Any, ...]]] = []
        self._lost: dict[str, None] = {}

    def ready(self, remote: Remote) -> None:
        """Return once this remote stands for an object in a worker that lives.

        Raises:
            SessionClosedError: It was a part of what died, or the session is closed.
            WorkerDiedError: Too often, or while it was built again.
        """
        link = remote.link
        if remote.worker is link.worker and link.worker.look(wait=True):
            return
        with self._lock:
            if not link.worker.look(wait=True):
                self._rebuild(link)
            if remote.worker is not link.worker:
                raise SessionClosedError(
                    f"this handle to {remote.class_name} is of a worker of {link.worker.name} that has died",
                    hint="take it again from what load() gave; that was built anew in another worker",
                )

    @contextlib.contextmanager
    def watching(self, remote: Remote, op: str, args: tuple[Any, ...]) -> Iterator[None]:
        """Note what a question changes."""
        for _ in remotes_in(list(args)):
            pass  # handles that are passed are built again now: within the question it would be too late
        lost = self._change(remote, op, args)
        if lost is not None:  # whether or not it succeeds
            self.note(lost)
        yield
        with self._lock:
            if lost is None and self._is_replayed(op, args):
                self._remember(remote, op, args)
            elif op in ("call", "run", *_RUNNING):
                self._deaths = 0

    def note(self, lost: str) -> None:
        """Note a change that nobody can do again, in words."""
        with self._lock:
            self._lost[lost] = None

    @staticmethod
    def _is_replayed(op: str, args: tuple[Any, ...]) -> bool:
        if op == "operate":
            return bool(args[0] == "setattr" and args[1][0] == "training")
        return op == "call" and args[0] in _REPLAYED

    def _change(self, remote: Remote, op: str, args: tuple[Any, ...]) -> str | None:
        """What a question may change and nobody can do again, in words."""
        own = any(remote is known for _, known in self._loaded.values())
        part = "" if own else f" of a {remote.class_name} in it"
        if own and self._is_replayed(op, args):
            return None
        if op == "load_state_dict":
            return f"the state{part} that load_state_dict() brought"
        if op == "run":
            return f"what {getattr(args[0], '__name__', 'a function')}() of run(){part} changed"
        if op == "call" and args[0] not in _READS:
            return f"what {args[0]}(){part} changed" if args[0] else f"what calls{part} left in it"
        if op == "operate" and args[0] in _WRITING_OPERATIONS:
            return f"the {'attribute' if 'attr' in args[0] else 'item'} {args[1][0]!r}{part}"
        if op == "operate" and args[0] in _IN_PLACE:
            return f"what {args[0].rstrip('_')}{part} changed"
        if op in _RUNNING:
            return _RUNNING[op].format(part)
        if op == "parameter" and args[1] in _PARAMETER_WORDS:
            return f"{_PARAMETER_WORDS[args[1]]} {args[0]!r}{part}"
        return None

    def _remember(self, remote: Remote, op: str, args: tuple[Any, ...]) -> None:
        if len(self._replayed) >= _MOST_REPLAYED:
            self._lost["some of its many conversions"] = None
            return
        if _sets_mode(op, args):  # the last one counts; it touches nothing that a conversion does
            self._replayed = [each for each in self._replayed if each[0] is not remote or not _sets_mode(*each[1:])]
        self._replayed.append((remote, op, args))

    def _rebuild(self, link: Link) -> None:
        obituary = link.worker.obituary
        assert obituary is not None
        if isinstance(obituary, ProtocolError):
            raise obituary
        self._deaths += 1
        if self._deaths >= _MOST_DEATHS:
            obituary.hint = f"it died {self._deaths} times without an answer between, and is not built again; {_HINT}"
            raise obituary
        why = obituary.message.splitlines()[0]
        _log.info("building it again: %s", printable(why, newlines=False))
        with self._again() as (fresh, built):
            self._take_over(link, fresh, built)
        done, lost = self._replay(link), [*self._lost]
        self._lost.clear()
        more = f"; and {len(lost) - _MOST_NAMED} more" if len(lost) > _MOST_NAMED else ""
        text = printable(
            f"{why}; it was built again in another worker. Done again: {', '.join(done) or 'nothing'}. "
            f"Lost: {'; '.join(lost[:_MOST_NAMED]) or 'nothing'}{more}.",
            newlines=False,
        )
        warnings.warn(text, RuntimeWarning, stacklevel=_callers_level())

    def _take_over(self, link: Link, fresh: Link, built: Any) -> None:
        """Have the handles stand for what was built."""
        found = {path: (handle, remote) for path, handle, remote in remotes_in(built)}
        pairs = []
        for path, (handle, old) in self._loaded.items():
            if handle() is None:
                continue
            new_handle, new = found.get(path, (None, None))
            if new is None or type(new_handle) is not type(handle()) or new.link is not fresh:
                raise WorkerStartError(
                    f"{link.worker.name} gave something else when it was built again: at "
                    f"{path_words(path) or 'the top'} no {old.class_name} of its own",
                    hint="load it again",
                    reference=link.worker.name,
                    commit=link.worker.commit,
                    phase="building it again",
                )
            pairs.append((old, new))
        link.worker = fresh.worker
        for old, new in pairs:
            old.adopt(new)

    def _replay(self, link: Link) -> list[str]:
        done = []
        for remote, op, args in self._replayed:
            if remote.worker is not link.worker:
                continue  # nobody has its handle any more
            name = "training" if op == "operate" else f"{args[0]}()"
            try:
                link.ask(op, *args, phase=f"doing {name} again", target=remote.number)
            except RemoteError as error:
                self._lost[f"{name}, which failed: {error.message.splitlines()[0]}"] = None
            else:
                done.append(name)
        return done


def _callers_level() -> int:
    """How far up the frame of the user's is who used the handle, for ``warnings.warn`` of the caller of this."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    return level


def _sets_mode(op: str, args: tuple[Any, ...]) -> bool:
    return op == "operate" or args[0] in _MODES
