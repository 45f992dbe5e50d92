"""``isohub.bisect``: the first commit between a good and a bad one at which a metric or an output left its tolerance.

Rules:

1. Both ends are asked first: a search between ends that are not what they are said to be finds nothing. Where the good
   end is on another branch, the last commits that both have in common are asked as well.
2. What is good is what is within the tolerance of the good end, or what the test says.
3. Questions are asked in rounds, one for each lane, so that the same search asks the same commits.
4. With a log, what was asked once is not asked again.

Side: caller.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from isohub.bisection.probing import CommandTest, FunctionTest, OutputTest, Test
from isohub.bisection.report import Bisection, Probe
from isohub.bisection.search import Search, Told
from isohub.checking import check_choice, check_name, check_path, checked_seed, checked_timeout, checked_trust
from isohub.errors import InvalidReferenceError, printable
from isohub.execution.executor import Executor, LocalExecutor, load_options
from isohub.execution.seats import Seat
from isohub.repos.reference import parse

if TYPE_CHECKING:
    from isohub.hub import On, Session
    from isohub.sandbox.policy import Sandbox

__all__ = ["bisect"]


def bisect(
    repo: str | os.PathLike[str],
    good: str,
    bad: str,
    test: Callable[[Any], Any] | Sequence[str] | None = None,
    *,
    model: str | None = None,
    inputs: Any = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    seed: int | None = 0,
    tolerance: float | tuple[float, float] = 0.0,
    method: str = "",
    training: bool | None = False,
    errors: Literal["skip", "bad"] = "skip",
    log: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: bool | Told | None = None,
    executor: Executor | None = None,
    session: Session | None = None,
    sandbox: Sandbox | Literal["none"] | None = None,
    environment: On | None = None,
    device: Any = None,
    timeout_s: float | None = None,
    trust_repo: bool | Literal["check"] = "check",
    **fetch: Any,
) -> Bisection:
    """Find the first bad commit.

    Args:
        repo: As `isohub.load` takes it, without a ref: ``owner/repo``, a URL, or a clone on this machine.
        good: A branch, tag or commit that is as it should be.
        bad: One that is not.
        test: A function of what `isohub.load` gives, called in this process: True for good, False for bad, or a number
            that is good within `tolerance` of the good end's. Or a command, as for ``git bisect run``: it has
            ISOHUB_REPO, ISOHUB_COMMIT and ISOHUB_CHECKOUT in its environment, and is not confined. None: the model's
            outputs for `inputs` are held against those of the good end.
        model: Name of the entrypoint; for a command, none.
        inputs: What the model is called with, as for `isohub.compare`.
        args: For the entrypoint.
        kwargs: For the entrypoint.
        seed: Seeds each build, each call, and random inputs.
        tolerance: As for `isohub.compare`: absolute, or absolute and relative.
        method: What is called in place of the model itself.
        training: The mode that the model is put into; None leaves it as the entrypoint gave it.
        errors: What a commit is whose model raises when it is called, or whose worker ends. One that cannot be built is
            always skipped.
        log: A file that takes each answer, and from which the same search goes on.
        workers: How many commits are asked at once; None: one each core.
        progress: Lines on stderr, True or False; None: on a terminal. Or a function that is told each probe, and how
            many commits are left.
        executor: Where commits are asked; this machine unless given.
        session: Whose cache and rules; the default session unless given.
        sandbox: As for `isohub.load`, and so are `environment`, `device`, `timeout_s` and `trust_repo`.
        environment: See there.
        device: See there.
        timeout_s: Seconds that each question to a worker may take.
        trust_repo: Whether to trust the repos, for what needs trust.
        **fetch: As `isohub.fetch` takes it: `source`, `force_reload`, `skip_validation`, `submodules`, `lfs`.

    Returns:
        The first bad commit, or those of which it is one where commits between could not be told.

    Raises:
        BisectionError: An end is not what it is said to be, or nothing lies between; or a command stopped the search.
        FetchError: A ref or the history cannot be brought.
        ResultsError: The log is of another search, in use, damaged, or cannot be written.
        ValueError, TypeError: An argument is not what it has to be.
    """
    seed, timeout_s = checked_seed(seed), checked_timeout(timeout_s)
    check_choice("errors", errors, ("skip", "bad"))
    check_choice("training", training, (None, True, False))
    check_path("log", log)
    reference = parse(repo)
    if reference.ref is not None:
        raise InvalidReferenceError(
            f"{reference.text!r} has a ref; the ends of a search are its refs",
            hint="give the repo without it, and the refs as good= and bad=",
            reference=reference.text,
            part="ref",
        )
    if executor is not None and (workers is not None or session is not None):
        raise ValueError("workers= and session= are for this machine; the executor has its own")
    executor = LocalExecutor(workers, session) if executor is None else executor
    atol, rtol = _checked_tolerance(tolerance)
    chosen = _checked_test(test, model, inputs, seed, method, training)
    options = load_options(
        executor,
        seed=seed,
        sandbox=sandbox,
        environment=environment,
        device=device,
        timeout_s=timeout_s,
        trust_repo=checked_trust(trust_repo),
    )
    brought = [executor.session.fetch(str(replace(reference, ref=ref)), verbose=False, **fetch) for ref in (good, bad)]
    ends = [checkout.commit for checkout in brought]
    commits = executor.session.history(reference.text, *ends)
    extras = dict.fromkeys(brought[0].pin.extras, True)
    seat = Seat(0, "", "", "", model or "", tuple(args), dict(kwargs or {}), options, extras)
    search = Search(
        executor, reference, commits, chosen, seat, errors=errors, atol=atol, rtol=rtol, told=_told(progress)
    )
    if log is not None:
        search.open_log(log, ends, test, inputs)
    try:
        return search.run(*ends)
    finally:
        search.close()


def _checked_tolerance(tolerance: Any) -> tuple[float, float]:
    pair = tolerance if isinstance(tolerance, (tuple, list)) else (tolerance, 0.0)
    fine = len(pair) == 2 and all(type(part) in (int, float) and 0 <= part < math.inf for part in pair)
    if not fine:
        raise ValueError(f"tolerance must be a number from 0 on, or (atol, rtol); got {tolerance!r}")
    return float(pair[0]), float(pair[1])


def _checked_test(
    test: Any, model: str | None, inputs: Any, seed: int | None, method: str, training: bool | None
) -> Test:
    if isinstance(test, (list, tuple)) and test and all(isinstance(word, str) for word in test):
        if model is not None or inputs is not None:
            raise ValueError("a command tests a checkout; model= and inputs= are for the other tests")
        return CommandTest(tuple(test))
    if model is None:
        raise ValueError("model= is missing: the name of the entrypoint whose model is tested")
    check_name(model)
    if test is None:
        from isohub.comparison.inputs import calls_of

        calls = [] if inputs is None else list(calls_of(inputs, seed))
        if not calls:
            raise ValueError("inputs= is missing: what the model is called with; or test=, a function or a command")
        return OutputTest(calls, method, training)
    if not callable(test):
        raise TypeError(f"test is a {type(test).__name__}; expected a function, a command as a list of words, or None")
    if inputs is not None or method:
        raise ValueError("inputs= and method= are for outputs; a test= calls the model itself")
    return FunctionTest(test, training)


def _told(progress: bool | Told | None) -> Told:
    if callable(progress):
        return progress
    if not (sys.stderr.isatty() if progress is None else progress):
        return _untold

    def show(probe: Probe, left: int) -> None:
        words = f"{probe.commit[:12]} {probe.verdict:<4}  {probe.words}  ({left} commits left before)"
        sys.stderr.write(printable(words, newlines=False) + "\n")
        sys.stderr.flush()

    return show


def _untold(probe: Probe, left: int) -> None:
    """Nobody wants to know."""
