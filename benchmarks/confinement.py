"""What confinement costs: the same session with it and without."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.bench import Bench
from benchmarks.measure import Contestant, Table, compete, no_collections, timed

__all__ = ["CONFINED", "FREE", "measure_confinement", "sampled_calls"]

CONFINED, FREE = "isohub, as it is by default", "the same with sandbox='none'"
_GIVES_UP = "confinement; for trusted repos alone"
#: Of one turn; those before it wake the worker, and are not counted.
_CALLS, _CALLS_BEFORE = 50, 5
_KEPT = (
    f"{_CALLS} calls a turn, a turn each round, so that what else the machine does meets both. Kept there by "
    "sched_setaffinity(2): left alone, a worker mostly stays where its fork began, and that costs or saves more than "
    "what is to be seen. The model works in one thread."
)
_LEAST_CALLS, _MOST_CALLS = 3, 5000


def measure_confinement(bench: Bench) -> list[Table]:
    """A worker's start, its calls and its work, confined and not."""
    import torch

    sizes = bench.sizes
    tables = []
    with ExitStack() as stack:
        session = stack.enter_context(bench.session())
        trusted: dict[str, Any] = {"sandbox": "none", "trust_repo": True}
        other = bench.copy_of_hub(2)  # holds a worker of each kind, so that both zygotes are warm
        held = [stack.enter_context(session.load(other, "twice", **more)) for more in ({}, trusted)]

        def start(**more: Any) -> Callable[[], list[float]]:
            def run() -> list[float]:
                samples: list[float] = []
                kept: list[Any] = []
                for _ in range(sizes.loads):
                    samples.append(timed(lambda: kept.append(session.load(bench.hub, "twice", **more))))
                    kept.pop().close()
                return samples

            return run

        rows = compete(
            [Contestant(CONFINED, start()), Contestant(FREE, start(**trusted), _GIVES_UP)],
            sizes.call_rounds,
            warm_ups=1,
        )
        notes = ["From `isohub.load` of a tiny model to its handle, in a worker made for it; the zygote is warm."]
        title = "Confinement: a new worker"
        tables.append(Table("confinement", "confinement_start", title, "ms", FREE, rows, notes))

        for size, apart in ((sizes.call_bytes[0], True), (sizes.call_bytes[0], False), (sizes.call_bytes[1], True)):
            places = _places(apart)
            if places is None:
                print("one processor: calls on two are left out", file=sys.stderr)
                continue
            x = torch.ones(max(1, size // 4))
            for handle in held:
                _use_one_thread(handle)
            with _kept_to(places, [handle.stats().pid for handle in held]):
                rows = compete(
                    [
                        Contestant(name, _few_calls(handle, x), gives_up)
                        for name, handle, gives_up in zip((CONFINED, FREE), held, ("", _GIVES_UP), strict=True)
                    ],
                    sizes.short_rounds,
                    warm_ups=2,
                    settle_s=0,
                )
            where = "caller and worker on a processor each" if apart else "both on one processor"
            title = f"Confinement: a call, {x.nbytes:,} B, {where}"
            key = f"confinement_call_{x.nbytes}" + ("" if apart else "_one")
            tables.append(Table("confinement", key, title, "µs", FREE, rows, [_KEPT]))

        models = [
            stack.enter_context(session.load(other, "convolutions", sizes.model_mb, **more)) for more in ({}, trusted)
        ]
        rows = compete(
            [
                Contestant(name, _work(bench, model), gives_up)
                for name, model, gives_up in zip((CONFINED, FREE), models, ("", _GIVES_UP), strict=True)
            ],
            sizes.call_rounds,
            warm_ups=1,
        )
        notes = ["Timed by the worker itself: a product of two 512 x 512 matrices, and a file written and read again."]
        title = "Confinement: work within the worker"
        tables.append(Table("confinement", "confinement_work", title, "µs", FREE, rows, notes))
    return tables


def _places(apart: bool) -> tuple[int, int] | None:
    """A processor for this thread, and one for the workers."""
    processors = sorted(os.sched_getaffinity(0))
    if apart:
        return None if len(processors) < 2 else (processors[0], processors[1])
    return processors[0], processors[0]


@contextmanager
def _kept_to(places: tuple[int, int], pids: Sequence[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {places[0]})
    for pid in pids:
        os.sched_setaffinity(pid, {places[1]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        for pid in pids:
            os.sched_setaffinity(pid, before)


def _use_one_thread(handle: Any) -> None:
    def there(_: Any) -> None:
        import torch

        torch.set_num_threads(1)

    handle.run(there)


def _few_calls(handle: Any, x: Any) -> Callable[[], list[float]]:
    def run() -> list[float]:
        clock = time.perf_counter
        samples: list[float] = []
        for _ in range(_CALLS_BEFORE):
            handle(x)
        with no_collections(first=False):
            for _ in range(_CALLS):
                start = clock()
                handle(x)
                samples.append((clock() - start) * 1e6)
        return samples

    return run


def sampled_calls(bench: Bench, handle: Any, x: Any) -> Callable[[], list[float]]:
    """What times calls of a handle, in microseconds, for as long as the sizes say."""

    def run() -> list[float]:
        clock = time.perf_counter
        samples: list[float] = []
        handle(x)
        with no_collections():
            end = clock() + bench.sizes.call_s
            while len(samples) < _MOST_CALLS and (len(samples) < _LEAST_CALLS or clock() < end):
                start = clock()
                handle(x)
                samples.append((clock() - start) * 1e6)
        return samples

    return run


def _work(bench: Bench, model: Any) -> Callable[[], list[float]]:
    def within(_: Any, seconds: float) -> list[float]:
        import time as remote_time

        import torch

        a = torch.ones(512, 512)
        samples: list[float] = []
        end = remote_time.perf_counter() + seconds
        while remote_time.perf_counter() < end:
            start = remote_time.perf_counter()
            product = a @ a
            with open("work", "wb") as file:  # noqa: PTH123 - a repo would
                file.write(product[0].numpy().tobytes())
            with open("work", "rb") as file:  # noqa: PTH123
                file.read()
            samples.append((remote_time.perf_counter() - start) * 1e6)
        return samples

    return lambda: list(model.run(within, bench.sizes.call_s))
