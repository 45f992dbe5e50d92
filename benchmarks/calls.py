"""The round trip of one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from benchmarks.actors import RAY, Actor, Actors
from benchmarks.bench import Bench
from benchmarks.isolates import PYISOLATE, Isolate
from benchmarks.measure import Contestant, Table, compete, no_collections
from benchmarks.peers import PICKLE, Ponger, Pool, Queued, Spawned, load_here

__all__ = ["APART", "HERE", "ISOHUB", "NO_PEERS", "POOL", "RAY_ARRAYS", "RAY_TENSORS", "measure_calls"]

#: From here on in milliseconds.
_LARGE_BYTES = 10_000_000
_LEAST_CALLS, _MOST_CALLS = 3, 5000

HERE = "in this process"
ISOHUB = "isohub, a handle"
POOL = "ProcessPoolExecutor (spawn)"
RAY_ARRAYS, RAY_TENSORS = "Ray actor, arrays", "Ray actor, tensors"
APART, TOGETHER = "bare socketpair, two idle processors", "bare socketpair, where the scheduler puts it"
_SHARED = "Pipe to a spawned process, one tensor that lies in shared memory"
#: What no program of a user's could take instead.
NO_PEERS = frozenset({HERE, ISOHUB, APART, TOGETHER, _SHARED})
_ANEW = (
    "torch's ways of sharing move a tensor into shared memory at its first crossing, and a program's inputs come anew: "
    "there each call gets an argument of its own, made before the clock starts. All others copy what they are given "
    "each time."
)
_FD = "a descriptor for each tensor"


@dataclass
class _Way:
    """One way to call, and what is done before and after its turn."""

    name: str
    call: Callable[[Any], Any]
    gives_up: str = ""
    arrays: bool = False
    #: Whether each call gets an argument of its own: this way moves a tensor into shared memory at its first crossing.
    moves: bool = False
    begin: Callable[[], None] | None = None
    rest: Callable[[], None] | None = None


def measure_calls(bench: Bench) -> list[Table]:
    """``x * 2`` there and back."""
    import torch

    sizes = bench.sizes
    tables = []
    with ExitStack() as stack:
        here = load_here(str(bench.hub), "twice")
        ways = _ways(bench, stack, here)
        floors = _floors(bench, stack)
        for size in sizes.call_bytes:
            x = torch.ones(max(1, size // 4))
            _check(ways, here, x)
            racing = [*ways, *(floors if size <= 64 else [])]
            rows = compete([_contestant(bench, way, x) for way in racing], sizes.call_rounds, warm_ups=1)
            unit = "µs" if x.nbytes < _LARGE_BYTES else "ms"
            notes = [
                "`x * 2` of a float32 tensor; the answer is as large as the argument and is dropped at once.",
                _ANEW,
            ]
            if any(way in floors for way in racing):
                notes.append(
                    "With two idle processors each message wakes one of them; where caller and other end share one, "
                    "there is nothing to wake, and nothing can be done at once either."
                )
            tables.append(Table("call", f"call_{x.nbytes}", f"Call, {_bytes(x.nbytes)}", unit, HERE, rows, notes))
    return tables


def _ways(bench: Bench, stack: ExitStack, here: Any) -> list[_Way]:
    """All that run here, each with its process."""
    session = stack.enter_context(bench.session())
    handle = stack.enter_context(session.load(bench.hub, "twice"))
    spawned = stack.enter_context(closing(Spawned(bench.hub)))
    spawned.ask("load", "twice")
    pool = stack.enter_context(closing(Pool(bench.hub, "twice")))
    queued = stack.enter_context(closing(Queued(bench.hub)))
    queued.ask("load", "twice")
    ways = [
        _Way(HERE, here, "no process of its own; one ref of a repo; no confinement"),
        _Way(ISOHUB, handle),
        _Way("Pipe to a spawned process, arrays", lambda a: spawned.ask("call_array", a), PICKLE, arrays=True),
        _Way("Pipe to a spawned process, tensors", lambda x: spawned.ask("call", x), f"{PICKLE}; {_FD}", moves=True),
        _Way(_SHARED, lambda x: spawned.ask("call", x), f"{PICKLE}; {_FD}; arguments of one's own"),
        _Way(POOL, pool.call, f"{PICKLE}; {_FD}", moves=True),
        _Way("torch.multiprocessing queues", lambda x: queued.ask("call", x), f"{PICKLE}; {_FD}", moves=True),
    ]
    isolate = bench.peer(stack, "pyisolate", lambda: Isolate(bench.directory_for("isolate"), bench.hub))
    if isolate is not None:
        ways.append(_Way("pyisolate, torch shared", isolate.call, PYISOLATE, moves=True, rest=isolate.rest))
    # Last: a cluster's processes are never quite idle, and stop between its turns.
    actors = bench.peer(stack, "Ray", lambda: Actors(bench.directory_for("ray")))
    if actors is not None:
        actor = stack.enter_context(closing(Actor(actors, bench.hub)))
        actor.load("twice")
        ways.append(_Way(RAY_ARRAYS, actor.call_array, RAY, arrays=True, begin=actors.begin, rest=actors.rest))
        ways.append(_Way(RAY_TENSORS, actor.call, RAY, begin=actors.begin, rest=actors.rest))
        stack.callback(actors.begin)
    return ways


def _floors(bench: Bench, stack: ExitStack) -> list[_Way]:
    all_of_it = "everything: it shows what the kernel's wake-ups cost"
    floors = []
    for name, apart in ((APART, True), (TOGETHER, False)):
        pong = bench.peer(stack, name, lambda apart=apart: Ponger(apart))  # type: ignore[misc]
        if pong is not None:
            floors.append(
                _Way(name, lambda _, pong=pong: pong.call(), all_of_it, begin=pong.begin, rest=pong.rest)  # type: ignore[misc]
            )
    return floors


def _contestant(bench: Bench, way: _Way, x: Any) -> Contestant:
    import torch

    def made() -> Any:
        """An argument. By numpy: torch would copy with all of its threads, and these spin on for a while."""
        array = x.numpy().copy()
        return array if way.arrays else torch.from_numpy(array)

    def run() -> list[float]:
        clock = time.perf_counter
        large = x.nbytes >= _LARGE_BYTES
        scale = 1e3 if large else 1e6
        call, argument = way.call, made()
        samples: list[float] = []
        if way.begin is not None:
            way.begin()
        try:
            for _ in range(2):  # wakes the process, and grows what is kept between calls
                call(argument)
            with no_collections():
                end = clock() + bench.sizes.call_s * (2 if large else 1)
                while len(samples) < _MOST_CALLS and (len(samples) < _LEAST_CALLS or clock() < end):
                    if way.moves:
                        argument = made()
                    start = clock()
                    call(argument)
                    samples.append((clock() - start) * scale)
        finally:
            if way.rest is not None:
                way.rest()
        return samples

    return Contestant(way.name, run, way.gives_up)


def _check(ways: list[_Way], here: Any, x: Any) -> None:
    """All give the same answer."""
    import torch

    expected = here(x)
    for way in ways:
        if way.begin is not None:
            way.begin()
        answer = way.call(x.numpy().copy() if way.arrays else x.clone())
        if not torch.equal(torch.tensor(answer) if way.arrays else answer, expected):
            raise RuntimeError(f"{way.name} gave another answer to x * 2")
        if way.rest is not None:
            way.rest()


def _bytes(size: int) -> str:
    for unit, factor in (("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:g} {unit}"
    return f"{size} B"
