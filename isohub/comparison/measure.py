"""`compare`: several refs, each in a worker of its own, asked the same with the same seed.

Rules:

1. All refs are brought, then built one after another, then asked in turn: each call goes to every ref before the next
   call is made. No answer is kept beyond the call, no state beyond a part of it.
2. The first call is made twice of every ref: what a model shows against itself is its noise, and no change.
3. What does not answer keeps its error; the others go on.
4. Gradients are off: what is compared is what models give, not how they learn.

Side: caller.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from isohub.checking import check_name, checked_seed
from isohub.comparison.code import CodeDifference, compare_trees
from isohub.comparison.inputs import Call, calls_of
from isohub.comparison.modules import compare_structures
from isohub.comparison.outputs import OutputPair
from isohub.comparison.result import Comparison, Difference
from isohub.comparison.states import State, StateDifference, compare_states
from isohub.comparison.subject import Recipe, Subject
from isohub.comparison.timing import summed_up, take_turns
from isohub.errors import IsohubError, printable
from isohub.execution.executor import done_once, load_options
from isohub.execution.seats import reference_text
from isohub.hub import RepoOrDir, Session

if TYPE_CHECKING:
    from isohub.execution.executor import Executor, Place
    from isohub.sandbox.policy import Sandbox

__all__ = ["compare"]

# How often a model is asked the same, if the second answer was not the first.
_CONTROLS = 4
_SHOWN_CHARS = 200
_FETCH = frozenset({"force_reload", "lfs", "skip_validation", "source", "submodules", "verbose"})


def compare(
    repos: Sequence[RepoOrDir],
    model: str,
    inputs: Any = None,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    seed: int | None = 0,
    tolerance: float | tuple[float, float] = 0.0,
    method: str = "",
    training: bool | None = None,
    repeats: int | None = None,
    time_s: float = 0.5,
    executor: Executor | None = None,
    session: Session | None = None,
    sandbox: Sandbox | Literal["none"] | None = None,
    environment: Any = None,
    device: Any = None,
    timeout_s: float | None = None,
    trust_repo: bool | Literal["check"] = "check",
    **fetch: Any,
) -> Comparison:
    """Ask several refs the same, and say what differs from the first: outputs, state, modules, code, time, memory.

    Args:
        repos: Two or more, each as `load` takes it: refs of one repo, other repos, pull requests, a clone as it stands
            (``./clone``) and a ref of it (``./clone:main``). The first is what is expected.
        model: Name of the entrypoint, in all of them.
        inputs: What the models are called with; see docs/compare.md. A tensor or any plain value is one argument, a
            tuple is arguments, a dict keywords, a text a specification such as ``randn(1,3,224,224)`` or the name of a
            ``.npy``, ``.pt`` or ``.safetensors`` file; what is iterated is a data set of these. None: the models are
            built and not called.
        args: Of the entrypoint.
        kwargs: Likewise.
        seed: Seeds each build, each call, and random inputs. None: each worker draws its own numbers.
        tolerance: The largest absolute difference of an output that is no change; or that and the relative one, as
            ``(atol, rtol)``: a change is beyond ``atol + rtol * |expected|``.
        method: What to call in place of the model itself.
        training: Mode that models are put into; None leaves them as they were built.
        repeats: How many runs of calls are timed, of each ref; 0: none; None: until they agree, for `time_s` at most.
        time_s: Seconds of timed calls of each ref.
        executor: Where it is done: as one piece of work, so that all refs are timed on one machine; here unless given.
        session: Whose workers these are. Unless given, one of its own, which ends with the comparison.
        sandbox: As `load` takes it, and so are `environment`, `device`, `timeout_s` and `trust_repo`.
        environment: What each ref runs on.
        device: Where the models are.
        timeout_s: Seconds that each question to a worker may take.
        trust_repo: Whether to trust the repos, for what needs trust.
        **fetch: As `fetch` takes it: `source`, `force_reload`, `skip_validation`, `submodules`, `lfs`.

    Returns:
        What was found; it prints as a table.

    Raises:
        ValueError: Fewer than two refs, or an argument that is none.
        InvalidReferenceError, PolicyError, UntrustedRepoError, ValueNotTransferableError, SessionClosedError: What
            is wrong for every ref. Other errors of a ref are its result.
    """
    repos = _checked_repos(repos)
    check_name(model)
    unknown = sorted(fetch.keys() - _FETCH)
    if unknown:
        raise TypeError(f"compare() got an unexpected keyword argument {unknown[0]!r}")
    seed = checked_seed(seed)
    atol, rtol = _checked_tolerance(tolerance)
    options = {
        "sandbox": sandbox,
        "environment": environment,
        "device": device,
        "timeout_s": timeout_s,
        "trust_repo": trust_repo,
    }
    if executor is not None:
        if session is not None:
            raise ValueError("session= is for this machine; the executor has its own")
        more = {"args": args, "kwargs": kwargs, "seed": seed, "tolerance": tolerance, "method": method}
        more |= {
            "training": training,
            "repeats": repeats,
            "time_s": time_s,
            **load_options(executor, **options),
            **fetch,
        }
        return done_once(executor, _compare_there, [_sent(repo, executor) for repo in repos], model, inputs, more)
    recipe = Recipe(model, tuple(args), dict(kwargs or {}), seed, training, method, options, fetch)
    with ExitStack() as stack:
        if session is None:
            session = stack.enter_context(Session())
        from torch import no_grad

        stack.enter_context(no_grad())
        subjects = [Subject(repo, recipe) for repo in repos]
        for subject in subjects:
            stack.callback(subject.close)
        for subject in subjects:
            subject.fetch(session)
        for subject in subjects:
            subject.load(session)
        states = _states(subjects)
        calls, pairs, first = _asked(subjects, inputs, seed, atol, rtol)
        if first is not None and repeats != 0:
            _timed(subjects, first, repeats, time_s)
        for subject in subjects:
            if subject.failure is None:
                subject.note_memory()
        if repeats != 0:
            _rebuilt(subjects, repeats, time_s)
        refs = tuple(subject.result() for subject in subjects)
        differences = []
        for subject, state, pair in zip(subjects[1:], states, pairs, strict=True):
            differences.append(_difference(subjects[0], subject, state, pair))
    return Comparison(
        model=printable(model, newlines=False),
        refs=refs,
        differences=tuple(differences),
        calls=calls,
        seed=seed,
        atol=atol,
        rtol=rtol,
        arguments=_shown_arguments(args, kwargs or {}),
        inputs="none" if first is None else _shown_inputs(first),
        machine=_machine(),
    )


def _compare_there(
    place: Place, repos: Sequence[RepoOrDir], model: str, inputs: Any, more: dict[str, Any]
) -> Comparison:
    """The same where the place is."""
    return compare(repos, model, inputs, session=place.session, **more)


def _sent(repo: RepoOrDir, executor: Executor) -> RepoOrDir:
    """A ref as it is to be read where the work is done: a checkout of this machine's is none of another's."""
    from isohub.repos.pins import Checkout

    return repo if executor.here or not isinstance(repo, Checkout) else reference_text(repo)


def _checked_repos(repos: Any) -> list[RepoOrDir]:
    from isohub.repos.pins import Checkout

    if isinstance(repos, (str, os.PathLike, Checkout)) or not isinstance(repos, Sequence) or len(repos) < 2:
        raise ValueError(
            f"two references or more are compared, as a list; got {printable(repr(repos), limit_chars=200)}"
        )
    return list(repos)


def _checked_tolerance(tolerance: Any) -> tuple[float, float]:
    pair = tolerance if isinstance(tolerance, (tuple, list)) else (tolerance, 0.0)
    fine = len(pair) == 2 and all(
        isinstance(part, (int, float)) and not isinstance(part, bool) and 0 <= part < math.inf for part in pair
    )
    if not fine:
        raise ValueError(f"tolerance must be a number from 0 on, or (atol, rtol); got {tolerance!r}")
    return float(pair[0]), float(pair[1])


def _states(subjects: Sequence[Subject]) -> list[StateDifference | None]:
    """Each state but the first against the first."""
    base = subjects[0].state
    others = [subject.state for subject in subjects[1:] if subject.state is not None]
    if base is None or not others:
        return [None] * (len(subjects) - 1)
    owners = {id(subject.state): subject for subject in subjects if subject.state is not None}

    def failed(state: State, error: IsohubError) -> None:
        owners[id(state)].fail("state", error)

    found = iter(compare_states(base, others, failed))
    return [None if subject.state is None else next(found) for subject in subjects[1:]]


def _asked(
    subjects: Sequence[Subject], inputs: Any, seed: int | None, atol: float, rtol: float
) -> tuple[int, list[OutputPair | None], Call | None]:
    """Every call of every ref: how many there were, what each ref's answers are against the base's, the first call."""
    pairs = [OutputPair(atol, rtol) for _ in subjects[1:]]
    compared = [False] * len(pairs)
    first: Call | None = None
    count = 0
    if inputs is not None:
        for subject in subjects:
            subject.refuse()
        for call in calls_of(inputs, seed):
            answers = [subject.answer(call) for subject in subjects]
            for number, answer in enumerate(answers[1:]):
                if answers[0] is not None and answer is not None:
                    pairs[number].add(answers[0], answer)
                    compared[number] = True
            if first is None:
                first = call
                for subject, answer in zip(subjects, answers, strict=True):
                    if answer is not None:
                        subject.listen(call, answer, _CONTROLS)
            count += 1
            if not any(subject.callable for subject in subjects):
                break
        if first is None:
            raise ValueError("the inputs are a data set without items: nothing would be compared")
    else:
        values = [subject.given() for subject in subjects]
        for number, value in enumerate(values[1:]):
            if values[0] is not None and value is not None:
                pairs[number].add(values[0], value)
                compared[number] = True
    return count, [pair if done else None for pair, done in zip(pairs, compared, strict=True)], first


def _timed(subjects: Sequence[Subject], call: Call, repeats: int | None, time_s: float) -> None:
    found = take_turns(
        lambda number, calls: subjects[number].run(call, calls), len(subjects), runs=repeats, time_s=time_s
    )
    for subject, timing in zip(subjects, found, strict=True):
        if timing is not None and timing[1] and subject.callable:
            calls, samples = timing
            subject.timing = summed_up(samples, calls, subject.threads)


def _rebuilt(subjects: Sequence[Subject], repeats: int | None, time_s: float) -> None:
    again = [subject for subject in subjects if subject.rebuildable(time_s)]
    found = take_turns(lambda number, _: again[number].rebuild(), len(again), runs=repeats, time_s=time_s, most_calls=1)
    for subject, timing in zip(again, found, strict=True):
        if timing is not None and timing[1]:
            subject.rebuilt = summed_up(timing[1], 1, subject.threads)


def _difference(base: Subject, subject: Subject, state: StateDifference | None, pair: OutputPair | None) -> Difference:
    code: CodeDifference | None = None
    if base.checkout is not None and subject.checkout is not None:
        code = compare_trees(base.checkout.whole, subject.checkout.whole)
    structures = base.structure, subject.structure
    timings = base.timing, subject.timing
    return Difference(
        outputs=None if pair is None else pair.result(base.noise, subject.noise),
        state=state,
        modules=compare_structures(structures[0], structures[1]) if structures[0] and structures[1] else None,
        code=code,
        time_ratio=timings[0].ratio(timings[1]) if timings[0] and timings[1] else None,
    )


def _shown_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    parts = [*(repr(arg) for arg in args), *(f"{name}={value!r}" for name, value in kwargs.items())]
    return printable(", ".join(parts), limit_chars=_SHOWN_CHARS, newlines=False)


def _shown_inputs(first: Call) -> str:
    parts = [*(_form(arg) for arg in first.args), *(f"{name}={_form(arg)}" for name, arg in first.kwargs.items())]
    return printable(first.text or ", ".join(parts), limit_chars=_SHOWN_CHARS, newlines=False)


def _form(value: Any) -> str:
    from isohub.comparison.leaves import leaves_of

    leaves = list(leaves_of(value))
    if len(leaves) == 1:
        return leaves[0].form if leaves[0].tensor is not None else leaves[0].shown
    return f"{type(value).__name__} of {len(leaves) - 1} values"


def _machine() -> dict[str, str | int]:
    import torch

    import isohub

    return {
        "isohub": isohub.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
    }
