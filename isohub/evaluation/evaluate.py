"""``isohub.evaluate``: the caller's metric, in workers of many refs, over the same batches.

Rules:

1. Failures of a ref or a batch are results; they end nothing else. Mistakes of the caller's (a function or data that
   cannot be sent, reducers that do not fit, a file of another question) are raised.
2. The table depends on refs, function, data and seed; not on lanes, order, retries or interruptions.
3. With a file of results, whatever has been computed once is not computed again: see `isohub.execution.journal`.

Side: caller.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from isohub.checking import check_choice, check_name, check_path, checked_seed, checked_timeout, checked_trust
from isohub.environments.environment import checked_environment
from isohub.errors import InvalidReferenceError, IsohubError, ValueNotTransferableError
from isohub.execution.executor import Executor, LocalExecutor, load_options
from isohub.execution.seats import Seat, failure_text, seat_of
from isohub.repos.pins import Checkout

if TYPE_CHECKING:
    from isohub.evaluation.batches import Batches, Weight
    from isohub.evaluation.table import Evaluation
    from isohub.hub import On, RepoOrDir, Session
    from isohub.sandbox.policy import Sandbox

__all__ = ["Progress", "evaluate"]

#: Told of each finished piece of work: how many there are, and how many in all, if that is known.
Progress = Callable[[int, int | None], None]
_FETCHES = 4


def evaluate(
    fn: Callable[[Any, Any], Mapping[str, Any]],
    repos: RepoOrDir | Sequence[RepoOrDir],
    model: str,
    data: Any,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    seed: int | None = 0,
    reducers: str | Mapping[str, str] = "mean",
    weight: Weight = None,
    batch_size: int | None = None,
    training: bool | None = False,
    results: str | os.PathLike[str] | None = None,
    retries: int = 1,
    workers: int | None = None,
    progress: bool | Progress | None = None,
    executor: Executor | None = None,
    session: Session | None = None,
    sandbox: Sandbox | Literal["none"] | None = None,
    environment: On | None = None,
    device: Any = None,
    timeout_s: float | None = None,
    trust_repo: bool | Literal["check"] = "check",
    **fetch: Any,
) -> Evaluation:
    """Run ``fn(model, batch)`` in workers of every ref, over all batches, and reduce what it gives.

    Args:
        fn: Gives a dict of names to numbers and tensors. It runs in the worker with the live model, without gradients;
            sent by cloudpickle, so a closure over plain values and tensors is well, and one over handles is refused.
        repos: References, directories or checkouts, as `isohub.load` takes them.
        model: Name of the entrypoint.
        data: Batches: a list, a ``Dataset``, a ``DataLoader``, an iterable, or a path or glob of files. What is no list
            is read once, as it is needed; see `isohub.evaluation.batches`.
        args: For the entrypoint.
        kwargs: For the entrypoint.
        seed: Seeds every load, and with its number each batch, so that no result depends on the order. None: neither.
        reducers: How batches become one value, for all metrics or by name, with "mean" for what is not named: "mean"
            (weighted), "sum", "min", "max", "count" (of batches), "list", "concat" (along the first dimension).
        weight: What a batch weighs in a mean: a function of it, or the name of a metric. None: the first dimension of
            its first tensor, which is its number of examples.
        batch_size: Collate so many items of `data` to one batch; each item is one unless given.
        training: The mode that modules are put into; None leaves them as the entrypoint gave them.
        results: A file that takes each result as it comes, and from which the same call goes on.
        retries: How often what failed is tried again, on a fresh worker.
        workers: How many at once; None: one each core. Each gets an equal share of the cores as threads.
        progress: A bar on stderr, True or False; None: on a terminal. Or a function that is told the numbers.
        executor: Where the work is done; this machine unless given.
        session: Whose cache and rules; the default session unless given.
        sandbox: As for `isohub.load`, and so are `environment`, `device`, `timeout_s` and `trust_repo`.
        environment: See there.
        device: See there.
        timeout_s: Seconds that each question to a worker (an import, a build, a batch) may take.
        trust_repo: Whether to trust the repos, for what needs trust.
        **fetch: As `isohub.fetch` takes it: `source`, `force_reload`, `skip_validation`, `submodules`, `lfs`.

    Returns:
        A row for each ref, in their order.

    Raises:
        ValueNotTransferableError: `fn`, `args` or `kwargs` cannot be sent to a worker.
        InvalidReferenceError: One of `repos` is no reference.
        ResultsError: The file is of another question, in use, damaged, or cannot be written.
        PolicyError: The sandbox that was asked for makes no sense.
        ValueError, TypeError: An argument is not what it has to be.

    Trust: `fn` is sent, never a result's code brought back: what a worker gives is checked plain values.
    """
    check_name(model)
    seed, timeout_s = checked_seed(seed), checked_timeout(timeout_s)
    check_choice("training", training, (None, True, False))
    check_path("results", results)
    if not callable(fn):
        raise TypeError(f"fn is a {type(fn).__name__}; expected a function of (model, batch)")
    if type(retries) is not int or retries < 0:
        raise ValueError(f"retries={retries!r}; expected a whole number, 0 or more")
    if executor is not None and (workers is not None or session is not None):
        raise ValueError("workers= and session= are for this machine; the executor has its own")
    executor = LocalExecutor(workers, session) if executor is None else executor
    wanted = [repos] if isinstance(repos, (str, os.PathLike, Checkout)) else list(repos)
    if not wanted:
        raise ValueError("repos is empty; expected at least one reference")

    from isohub.evaluation.batches import batches_of
    from isohub.evaluation.run import Run
    from isohub.evaluation.working import Function
    from isohub.session.arguments import pickled

    chosen = _checked_reducers(reducers)
    _check_weight(weight)
    batches = batches_of(data, batch_size)
    function = Function(_sent("fn", fn, pickled), seed, training)
    for name, value in (("args", args), ("kwargs", kwargs)):
        if value:
            _sent(name, value, pickled)
    began = time.monotonic()
    options = load_options(
        executor,
        seed=seed,
        sandbox=sandbox,
        environment=environment,
        device=device,
        timeout_s=timeout_s,
        trust_repo=checked_trust(trust_repo),
    )
    rest = {"args": tuple(args), "kwargs": dict(kwargs or {}), "options": options}
    seats = [
        found if isinstance(found, tuple) else seat_of(executor, found, number, model, **rest)
        for number, found in enumerate(_checkouts(executor.session, wanted, retries, fetch))
    ]
    on = checked_environment(environment) or executor.session.environment
    header = None if results is None else _header(fn, seats, model, rest, batches, weight, function, on)
    texts = [str(repo.reference) if isinstance(repo, Checkout) else os.fspath(repo) for repo in wanted]
    run = Run(
        executor, seats, texts, function, batches,
        reducers=chosen, weight=weight, retries=retries, results=results, header=header,
    )  # fmt: skip
    return run.table(model, _progress(progress), began)


def _checked_reducers(reducers: Any) -> dict[str, str]:
    """By name of metric; that of all others is under the empty name."""
    from isohub.evaluation.values import REDUCERS

    chosen = {"": reducers} if isinstance(reducers, str) else {"": "mean", **reducers}
    for name, reducer in chosen.items():
        check_choice("reducers" if not name else f"reducers[{name!r}]", reducer, tuple(REDUCERS))
    return chosen


def _check_weight(weight: Any) -> None:
    if weight is not None and not isinstance(weight, str) and not callable(weight):
        raise TypeError(f"weight is a {type(weight).__name__}; expected a function of a batch or a metric's name")


def _sent(name: str, value: Any, pickled: Callable[[Any], bytes]) -> bytes:
    """What goes to a worker; an error names the argument."""
    try:
        return pickled(value)
    except ValueNotTransferableError as error:
        raise ValueNotTransferableError(
            f"{name}: {error.message}", hint=error.hint, **{**error.fields, "where": name}
        ) from error.__cause__


def _checkouts(
    session: Session, wanted: Sequence[RepoOrDir], retries: int, fetch: Mapping[str, Any]
) -> list[Checkout | tuple[str, str, int]]:
    """The commit of each, or why there is none: kind, message, tries."""

    def bring(repo: RepoOrDir) -> Checkout | tuple[str, str, int]:
        if isinstance(repo, Checkout):
            return repo
        tries = 0
        while True:
            tries += 1
            try:
                return session.fetch(repo, verbose=False, **fetch)
            except InvalidReferenceError:
                raise
            except IsohubError as error:
                if tries > retries or not getattr(error, "passing", False):
                    return (*failure_text(error), tries)

    with ThreadPoolExecutor(min(len(wanted), _FETCHES), thread_name_prefix="isohub-fetch") as pool:
        return list(pool.map(bring, wanted))


def _header(
    fn: Callable[..., Any],
    seats: Sequence[Seat | tuple[str, str, int]],
    model: str,
    rest: Mapping[str, Any],
    batches: Batches,
    weight: Weight,
    function: Any,
    on: Any,
) -> dict[str, Any]:
    """What makes this question another than others; see docs/evaluate.md."""
    import platform

    import torch

    from isohub.execution.digests import digest_of

    first = batches.first()
    return {
        "format": 1,
        "commits": [seat.commit if isinstance(seat, Seat) else None for seat in seats],
        "model": model,
        "args": digest_of((rest["args"], rest["kwargs"])),
        "on": digest_of((str(rest["options"]["device"]), on)),
        "fn": digest_of(fn),
        "seed": function.seed,
        "training": function.training,
        "weight": weight if isinstance(weight, str) or weight is None else digest_of(weight),
        "data": [batches.kind, batches.count, None if first is None else digest_of(first)],
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def _progress(progress: bool | Progress | None) -> Progress:
    """What is told of each step."""
    if callable(progress):
        return progress
    if not (sys.stderr.isatty() if progress is None else progress):
        return _untold
    from tqdm import tqdm

    bar = tqdm(desc="evaluate", unit="batch", dynamic_ncols=True)

    def show(done: int, total: int | None) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def _untold(done: int, total: int | None) -> None:
    """Nobody wants to know."""
