"""What confinement costs: the same session with it and without."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from benchmarks.bench import Bench
from benchmarks.measure import Contestant, Table, compete, no_collections, timed

__all__ = ["measure_confinement", "sampled_calls"]

_CONFINED, _FREE = "isohub, as it is by default", "the same with sandbox='none'"
_GIVES_UP = "confinement; for trusted repos alone"
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
            [Contestant(_CONFINED, start()), Contestant(_FREE, start(**trusted), _GIVES_UP)],
            sizes.call_rounds,
            warm_ups=1,
        )
        notes = ["From `isohub.load` of a tiny model to its handle, in a worker made for it; the zygote is warm."]
        title = "Confinement: a new worker"
        tables.append(Table("confinement", "confinement_start", title, "ms", _FREE, rows, notes))

        for size in sizes.call_bytes[:2]:
            x = torch.ones(max(1, size // 4))
            rows = compete(
                [
                    Contestant(name, sampled_calls(bench, handle, x), gives_up)
                    for name, handle, gives_up in zip((_CONFINED, _FREE), held, ("", _GIVES_UP), strict=True)
                ],
                sizes.call_rounds,
                warm_ups=1,
            )
            title = f"Confinement: a call, {x.nbytes:,} B"
            tables.append(Table("confinement", f"confinement_call_{x.nbytes}", title, "µs", _FREE, rows))

        models = [
            stack.enter_context(session.load(other, "convolutions", sizes.model_mb, **more)) for more in ({}, trusted)
        ]
        rows = compete(
            [
                Contestant(name, _work(bench, model), gives_up)
                for name, model, gives_up in zip((_CONFINED, _FREE), models, ("", _GIVES_UP), strict=True)
            ],
            sizes.call_rounds,
            warm_ups=1,
        )
        notes = ["Timed by the worker itself: a product of two 512 x 512 matrices, and a file written and read again."]
        title = "Confinement: work within the worker"
        tables.append(Table("confinement", "confinement_work", title, "µs", _FREE, rows, notes))
    return tables


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
