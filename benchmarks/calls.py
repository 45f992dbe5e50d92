"""The round trip of one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

from benchmarks.bench import Bench
from benchmarks.measure import Contestant, Table, compete, no_collections
from benchmarks.peers import PICKLE, Ponger, Pool, Queued, Spawned, load_here

__all__ = ["measure_calls"]

#: From here on in milliseconds.
_LARGE_BYTES = 10_000_000
_LEAST_CALLS, _MOST_CALLS = 3, 5000
_REFERENCE = "in this process"


def measure_calls(bench: Bench) -> list[Table]:
    """``x * 2`` there and back."""
    import torch

    sizes = bench.sizes
    tables = []
    with ExitStack() as stack:
        session = stack.enter_context(bench.session())
        handle = stack.enter_context(session.load(bench.hub, "twice"))
        here = load_here(str(bench.hub), "twice")
        spawned = stack.enter_context(closing(Spawned(bench.hub)))
        spawned.ask("load", "twice")
        pool = stack.enter_context(closing(Pool(bench.hub, "twice")))
        queued = stack.enter_context(closing(Queued(bench.hub)))
        queued.ask("load", "twice")
        pong = stack.enter_context(closing(Ponger()))
        for size in sizes.call_bytes:
            x = torch.ones(max(1, size // 4))
            array = x.numpy()
            contestants = [
                _contestant(bench, _REFERENCE, here, x, "no process of its own; one ref of a repo; no confinement"),
                _contestant(bench, "isohub, a handle", handle, x),
                _contestant(
                    bench, "Pipe to a spawned process, arrays", lambda a: spawned.ask("call_array", a), array, PICKLE
                ),
                _contestant(
                    bench, "Pipe to a spawned process, tensors", lambda x: spawned.ask("call", x), x, f"{PICKLE}; {_FD}"
                ),
                _contestant(bench, "ProcessPoolExecutor (spawn)", pool.call, x, f"{PICKLE}; {_FD}"),
                _contestant(
                    bench, "torch.multiprocessing queues", lambda x: queued.ask("call", x), x, f"{PICKLE}; {_FD}"
                ),
            ]
            if size <= 64:
                contestants.append(
                    _contestant(
                        bench,
                        "bare socketpair, 4 bytes",
                        lambda _: pong.call(),
                        x,
                        "everything: it shows what the kernel's wake-ups cost",
                    )
                )
            _check(contestants[1:], here, x, handle, spawned, pool, queued)
            rows = compete(contestants, sizes.call_rounds, warm_ups=1)
            unit = "µs" if x.nbytes < _LARGE_BYTES else "ms"
            notes = ["`x * 2` of a float32 tensor; the answer is as large as the argument and is dropped at once."]
            tables.append(Table("call", f"call_{x.nbytes}", f"Call, {_bytes(x.nbytes)}", unit, _REFERENCE, rows, notes))
    return tables


_FD = "a descriptor for each tensor"


def _contestant(bench: Bench, name: str, call: Callable[[Any], Any], x: Any, gives_up: str = "") -> Contestant:
    def run() -> list[float]:
        clock = time.perf_counter
        scale = 1e6 if x.nbytes < _LARGE_BYTES else 1e3
        call(x)  # wakes the process, and grows what is kept between calls
        call(x)
        samples: list[float] = []
        with no_collections():
            end = clock() + bench.sizes.call_s
            while len(samples) < _MOST_CALLS and (len(samples) < _LEAST_CALLS or clock() < end):
                start = clock()
                call(x)
                samples.append((clock() - start) * scale)
        return samples

    return Contestant(name, run, gives_up)


def _check(_: Any, here: Any, x: Any, handle: Any, spawned: Spawned, pool: Pool, queued: Queued) -> None:
    """All give the same answer."""
    import torch

    expected = here(x)
    answers = [
        handle(x),
        torch.from_numpy(spawned.ask("call_array", x.numpy())),
        spawned.ask("call", x),
        pool.call(x),
        queued.ask("call", x),
    ]
    if not all(torch.equal(answer, expected) for answer in answers):
        raise RuntimeError("two ways of calling x * 2 gave different answers")


def _bytes(size: int) -> str:
    for unit, factor in (("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:g} {unit}"
    return f"{size} B"
