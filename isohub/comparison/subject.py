"""One ref of a comparison: brought, built, asked, timed. What goes wrong is kept as its result.

Rules:

1. A ref that failed is asked nothing more; what it gave before stays.
2. What is wrong for every ref (a reference that is none, an argument that cannot be sent, a policy that cannot hold, a
   session that is closed) is no ref's failure: it is raised.
3. Memory is what the kernel says of the process (``VmHWM``), not what the worker says. A confined worker cannot set it
   back, since it cannot write to its own ``/proc/self/clear_refs``; one with ``sandbox="none"`` could.

Side: caller. Trust: what a worker answers goes to `leaves`, `states`, `modules` and `timing`, which check it.
Source: proc(5) for ``VmHWM``.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isohub.comparison.inputs import Call
from isohub.comparison.leaves import Leaf, leaves_by_place
from isohub.comparison.modules import Structure, read_structure
from isohub.comparison.outputs import Noise, OutputPair
from isohub.comparison.result import Failure, Phase, RefResult
from isohub.comparison.states import State, read_state
from isohub.comparison.timing import Timing, timed
from isohub.errors import (
    InvalidReferenceError,
    IsohubError,
    PolicyError,
    RemoteError,
    SessionClosedError,
    UntrustedRepoError,
    ValueNotTransferableError,
    printable,
)

if TYPE_CHECKING:
    import os

    from isohub.hub import Session
    from isohub.repos.pins import Checkout
    from isohub.session.link import Remote

__all__ = ["Recipe", "Subject"]

#: Rule 2.
_CALLERS_OWN = (
    InvalidReferenceError,
    PolicyError,
    SessionClosedError,
    UntrustedRepoError,
    ValueNotTransferableError,
)
_MESSAGE_CHARS = 600
_TRACEBACK_CHARS = 4000
_MOST_THREADS = 1 << 16
# A model that is built again is in memory twice.
_LARGEST_REBUILT_BYTES = 256 << 20
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """What every ref is asked, the inputs aside.

    Attributes:
        model: The entrypoint.
        args: Its positional arguments.
        kwargs: Its keywords.
        seed: Of the build and of each call.
        training: Mode that the model is put into; None leaves it as it was built.
        method: What is called; the empty text is the model itself.
        options: More keywords of `Session.load`.
        fetch: Keywords of `Session.fetch`.
    """

    model: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    seed: int | None
    training: bool | None
    method: str
    options: Mapping[str, Any]
    fetch: Mapping[str, Any]


@dataclass
class Subject:
    """One ref and what is known of it so far."""

    repo: str | os.PathLike[str] | Checkout
    recipe: Recipe
    failure: Failure | None = None
    checkout: Checkout | None = None
    structure: Structure | None = None
    state: State | None = None
    outputs: tuple[tuple[str, str], ...] = ()
    noise: Mapping[str, Noise] = field(default_factory=dict)
    asked_twice: bool = False
    noisy: bool = False
    timing: Timing | None = None
    rebuilt: Timing | None = None
    load_s: float | None = None
    build_s: float | None = None
    round_trip_s: float | None = None
    built: Any = None
    peak_rss_bytes: int | None = None
    threads: int = 0
    _remote: Remote | None = None
    _class_name: str | None = None
    _environment: str | None = None

    def fetch(self, session: Session) -> None:
        """Bring its code."""
        from isohub.repos.pins import Checkout

        if isinstance(self.repo, Checkout):
            self.checkout = self.repo
            return
        try:
            self.checkout = session.fetch(self.repo, **self.recipe.fetch)
        except IsohubError as error:
            self.fail("fetch", error)

    def load(self, session: Session) -> None:
        """Build the model, and read what it is made of."""
        if self.checkout is None:
            return
        recipe = self.recipe
        phase: Phase = "load"
        try:
            started = time.perf_counter()
            self.built = session.load(
                self.checkout,
                recipe.model,
                *recipe.args,
                entry_kwargs=recipe.kwargs,
                seed=recipe.seed,
                verbose=False,
                **recipe.options,
            )
            self.load_s = time.perf_counter() - started
            self._find_model()
            phase = "modules"
            self._look()
            if self.state is None and self.structure is not None:
                phase = "state"
                assert self._remote is not None
                self.state = read_state(self._remote)
        except (IsohubError, TypeError) as error:  # a TypeError: a device, for what is no module
            self.fail(phase, error)

    def _find_model(self) -> None:
        """What is called: the first module in what the entrypoint gave, else the first object."""
        from isohub.session.recipe import remotes_in

        found = [(handle, remote) for _, handle, remote in remotes_in(self.built)]
        if not found:
            self._class_name = printable(type(self.built).__name__, newlines=False)
            return
        modules = [pair for pair in found if pair[1].sort == "module"]
        handle, self._remote = (modules or found)[0]
        if self.recipe.options.get("device") is None:
            worker = self._remote.worker
            self.build_s = max(0.0, worker.used - worker.asked)  # its last question was the build
        self._class_name = self._remote.class_name
        self._environment = self._remote.worker.runtime.key
        if self.recipe.training is not None and modules:
            handle.train(self.recipe.training)

    def _look(self) -> None:
        if self._remote is None:
            return
        told = self._remote.ask("threads", phase="telling its threads")
        self.threads = told if type(told) is int and 0 < told < _MOST_THREADS else 0
        if self._remote.sort == "module":
            self.structure = read_structure(self._remote)

    def fail(self, phase: Phase, error: IsohubError | TypeError) -> None:
        """Keep why it gave no answer.

        Raises:
            The error itself, if it is the caller's own (rule 2).
        """
        if isinstance(error, _CALLERS_OWN):
            raise error
        self.note_memory()
        kind, message, hint, trace = type(error).__name__, str(error), None, None
        if isinstance(error, IsohubError):
            message, hint = error.message, error.hint
        if isinstance(error, RemoteError):
            kind, message = error.remote_type or kind, error.remote_message or message
            trace = error.remote_traceback
        self.failure = Failure(
            phase,
            printable(kind, limit_chars=200, newlines=False),
            printable(message, limit_chars=_MESSAGE_CHARS),
            None if hint is None else printable(hint, limit_chars=_MESSAGE_CHARS),
            None if trace is None else printable(trace[-_TRACEBACK_CHARS:]),
        )

    def refuse(self) -> None:
        """Keep that there is nothing to call."""
        if self.failure is None and self.checkout is not None and self._remote is None:
            words = f"the entrypoint gave a {self._class_name}, which is no model to call"
            self.fail("call", IsohubError(words, hint="leave the inputs out: then what it gave is compared"))

    @property
    def callable(self) -> bool:
        """Whether it can be asked."""
        return self.failure is None and self._remote is not None

    def given(self) -> Mapping[str, Leaf] | None:
        """What the entrypoint gave, of one that gave values and no model."""
        if self.failure is not None or self.checkout is None or self._remote is not None:
            return None
        try:
            leaves = leaves_by_place(self.built, "built")
        except IsohubError as error:
            self.fail("load", error)
            return None
        self.outputs = _forms(leaves)
        return leaves

    def answer(self, call: Call) -> Mapping[str, Leaf] | None:
        """The leaves of its answer to one call; None if it has failed."""
        if not self.callable:
            return None
        assert self._remote is not None
        recipe = self.recipe
        try:
            started = time.perf_counter()
            value = self._remote.ask(
                "answer",
                recipe.seed,
                recipe.method,
                list(call.args),
                dict(call.kwargs),
                phase=f"calling {recipe.method or 'forward'}()",
            )
            took_s = time.perf_counter() - started
            self.round_trip_s = took_s if self.round_trip_s is None else min(took_s, self.round_trip_s)
            leaves = leaves_by_place(value)
        except IsohubError as error:
            self.fail("call", error)
            return None
        if not self.outputs:
            self.outputs = _forms(leaves)
        return leaves

    def listen(self, call: Call, first: Mapping[str, Leaf], repeats: int) -> None:
        """Ask the same again, to know its noise; a model that has some is asked a few times more."""
        pair = OutputPair()
        for number in range(repeats):
            again = self.answer(call)
            if again is None:
                return
            pair.add(first, again)
            self.asked_twice = True
            self.noise = pair.noise()
            self.noisy = any(leaf.verdict != "same" for leaf in pair.result())
            if number == 0 and not self.noisy:
                return

    def run(self, call: Call, calls: int) -> float | None:
        """Seconds of so many calls; None if it has failed."""
        if not self.callable:
            return None
        assert self._remote is not None
        try:
            return timed(self._remote, self.recipe.seed, self.recipe.method, call.args, call.kwargs, calls)
        except IsohubError as error:
            self.fail("time", error)
            return None

    def rebuildable(self, time_s: float) -> bool:
        """Whether to build it again costs little time and memory."""
        if not self.callable or self.build_s is None or self.build_s > time_s / 2:
            return False
        return self.state is None or self.state.size_bytes <= _LARGEST_REBUILT_BYTES

    def rebuild(self) -> float | None:
        """Seconds that the entrypoint takes once more, in the same worker; None if it will not."""
        from isohub.session.recipe import remotes_in

        recipe = self.recipe
        assert self._remote is not None
        link = self._remote.link
        arguments = [*recipe.args], dict(recipe.kwargs)
        try:
            again = link.ask("build", recipe.model, recipe.seed, False, *arguments, phase="building it again")
            took_s = max(0.0, link.worker.used - link.worker.asked)
            for _, _, remote in remotes_in(again):
                if remote.received[0] == 1:  # else it is what was built before
                    remote.close()
        except IsohubError:  # an entrypoint that can be called once is no failure
            return None
        return took_s

    def note_memory(self) -> None:
        """Keep what the kernel says of its worker's memory, before something else is done there."""
        if self._remote is None:
            return
        try:
            found = _PEAK.search(Path(f"/proc/{self._remote.worker.pid}/status").read_text(encoding="ascii"))
        except (OSError, UnicodeDecodeError):
            return  # it has ended
        if found is not None:
            self.peak_rss_bytes = int(found[1]) * 1024

    def close(self) -> None:
        """Give back what was built."""
        from isohub.session.recipe import remotes_in

        with contextlib.suppress(IsohubError):  # its worker has died
            for _, _, remote in remotes_in(self.built):
                remote.close()
        self.built = self._remote = None

    def result(self) -> RefResult:
        """What is known of it, as plain values."""
        noise = max((each.max_abs for each in self.noise.values()), default=0.0)
        return RefResult(
            reference=printable(str(_written(self.repo)), limit_chars=300, newlines=False),
            name=None if self.checkout is None else printable(self.checkout.pin.name, newlines=False),
            commit=None if self.checkout is None else self.checkout.commit,
            failure=self.failure,
            environment=self._environment,
            class_name=self._class_name,
            parameters=None if self.structure is None else self.structure.parameters,
            state_bytes=None if self.state is None else self.state.size_bytes,
            outputs=self.outputs,
            deterministic=not self.noisy if self.asked_twice else None,
            noise=noise,
            unstable=tuple(path for path, each in self.noise.items() if each.unstable),
            load_s=self.load_s,
            build_s=self.build_s,
            rebuilt=self.rebuilt,
            call=self.timing,
            round_trip_s=self.round_trip_s,
            peak_rss_bytes=self.peak_rss_bytes,
        )


def _forms(leaves: Mapping[str, Leaf]) -> tuple[tuple[str, str], ...]:
    return tuple((path, leaf.form if leaf.tensor is not None else leaf.shown) for path, leaf in leaves.items())


def _written(repo: str | os.PathLike[str] | Checkout) -> object:
    from isohub.repos.pins import Checkout

    return repo.pin.reference if isinstance(repo, Checkout) else repo
