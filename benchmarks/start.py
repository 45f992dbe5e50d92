"""Importing, loading and closing."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from benchmarks.actors import RAY, Actor, Actors
from benchmarks.bench import Bench
from benchmarks.hubs import write_clock_hub
from benchmarks.measure import Contestant, Row, Table, compete, timed
from benchmarks.peers import PICKLE, Spawned, fresh_process, load_here

__all__ = [
    "FIRST_ISOHUB",
    "FIRST_TORCH",
    "HERE",
    "IMPORT_IN_FRESH",
    "IMPORT_TORCH",
    "LINE_ISOHUB",
    "NEW_WORKER",
    "measure_close",
    "measure_first_line",
    "measure_first_load",
    "measure_import",
    "measure_warm_load",
]

_WAIT = "\nprint('ready', flush=True)\nsys.stdin.read()"
_ONE_REF = "one ref of a repo in a process; no confinement"

IMPORT_TORCH = "import torch"
_IMPORTS = {
    IMPORT_TORCH: "import sys, torch",
    "an empty program": "import sys",
    "import isohub": "import sys, isohub",
    "import isohub; isohub.Session": "import sys, isohub; isohub.Session",
}
_TORCH_LOAD = "import sys, torch\nm = torch.hub.load(sys.argv[1], 'convolutions', int(sys.argv[2]), source='local')"
_ISOHUB_LOAD = "import sys, isohub\nm = isohub.load(sys.argv[1], 'convolutions', int(sys.argv[2]))"


def measure_import(bench: Bench) -> list[Table]:
    """``import isohub`` beside ``import torch``, each in a fresh process."""

    def fresh(code: str) -> Callable[[], list[float]]:
        return lambda: [fresh_process(code + _WAIT, environment=bench.environment)[0]]

    rows = compete([Contestant(name, fresh(code)) for name, code in _IMPORTS.items()], bench.sizes.rounds, 1)
    notes = [
        "Each in a fresh interpreter, from its start until the import is done.",
        "`isohub.Session` brings what resolves and fetches references; torch comes with the first load.",
    ]
    return [Table("import", "import", "Import", "ms", IMPORT_TORCH, rows, notes)]


def measure_first_load(bench: Bench) -> list[Table]:
    """The first load of a program's life."""
    sizes = bench.sizes
    hub, size = str(bench.hub), str(sizes.model_mb)

    def fresh(name: str, code: str) -> Callable[[], list[float]]:
        def run() -> list[float]:
            ready, end = fresh_process(code + _WAIT, hub, size, environment=bench.environment)
            ends.append((name, end))
            return [ready]

        return run

    warm_ups = 1 if sizes.rounds > 1 else 0
    ends: list[tuple[str, float]] = []
    loaded = compete(
        [
            Contestant(name, fresh(name, code), _FIRST[name])
            for name, code in zip(_FIRST, (_TORCH_LOAD, _ISOHUB_LOAD), strict=True)
        ],
        sizes.rounds,
        warm_ups,
    )
    ended = [Row(name, gives_up) for name, gives_up in _FIRST.items()]
    for row in ended:
        row.rounds = [[end] for name, end in ends if name == row.name][warm_ups:]
    model = f"a model of {sizes.model_mb} MB from a local repo"
    notes = [
        "From the start of a fresh interpreter, bytecode of all packages cached.",
        "isohub imports torch in two processes at once, the caller and the zygote, so it needs two cores to itself.",
    ]
    return [
        Table("first_load", "first_load", f"First load: {model}, until it is loaded", "ms", FIRST_TORCH, loaded, notes),
        Table("first_load", "first_load_end", "The same, until the program has ended", "ms", FIRST_TORCH, ended),
    ]


FIRST_TORCH, FIRST_ISOHUB = "torch.hub.load in a fresh process", "isohub.load in a fresh process"
_FIRST = {FIRST_TORCH: _ONE_REF, FIRST_ISOHUB: ""}


def measure_first_line(bench: Bench) -> list[Table]:
    """From a request to the first line of the repo's hubconf, in a worker made for it."""
    sizes = bench.sizes
    hub = write_clock_hub(bench.directory_for("clock") / "hub")

    def warm() -> list[float]:
        samples = []
        for _ in range(sizes.loads):
            start = time.monotonic()
            # CLOCK_MONOTONIC is one clock for all processes (clock_gettime(2)); workers are in no time namespace.
            samples.append((session.load(hub, "first_line") - start) * 1e3)
            time.sleep(_BETWEEN_S)  # a program does something with what it loaded
        return samples

    def fresh() -> list[float]:
        return [fresh_process("import sys, torch" + _WAIT, environment=bench.environment)[0]]

    with bench.session() as session:
        rows = compete(
            [Contestant(IMPORT_IN_FRESH, fresh, "a process is not yet a model"), Contestant(LINE_ISOHUB, warm)],
            sizes.rounds,
            warm_ups=1 if sizes.rounds > 1 else 0,
        )
    notes = [
        "isohub: from the call of `load` to hubconf's first line, by one clock; in a new worker, fully confined.",
        "The fresh process: from its start until torch is imported.",
    ]
    title = "Warm worker: from the request to hubconf's first line"
    return [Table("first_line", "first_line", title, "ms", IMPORT_IN_FRESH, rows, notes)]


IMPORT_IN_FRESH, LINE_ISOHUB = "import torch in a fresh process", "isohub, a new worker at hubconf's first line"
#: Long enough that a session has what it keeps ready.
_BETWEEN_S = 0.05


def measure_warm_load(bench: Bench) -> list[Table]:
    """A further load in a session that has loaded before."""
    sizes = bench.sizes
    hub, size = str(bench.hub), sizes.model_mb

    def repeated(action: Callable[[], Any], after: Callable[[Any], None] = lambda _: None) -> Callable[[], list[float]]:
        def run() -> list[float]:
            samples = []
            kept: list[Any] = []
            for _ in range(sizes.loads):
                samples.append(timed(lambda: kept.append(action())))
                after(kept.pop())
            return samples

        return run

    def spawned() -> list[float]:
        processes: list[Spawned] = []

        def start() -> None:
            processes.append(Spawned(bench.hub))
            processes[0].ask("load", "convolutions", size)

        samples = [timed(start)]
        processes[0].close()
        return samples

    def acted() -> list[float]:
        started: list[Actor] = []

        def start() -> None:
            assert actors is not None
            started.append(Actor(actors, bench.hub))
            started[0].load("convolutions", size)

        samples = [timed(start)]
        started[0].close()
        return samples

    with ExitStack() as stack:
        session = stack.enter_context(bench.session())
        other = bench.copy_of_hub(1)
        neighbour = session.load(other, "twice")
        actors = bench.peer(stack, "Ray", lambda: Actors(bench.directory_for("ray")))
        contestants = [
            Contestant(HERE, repeated(lambda: load_here(hub, "convolutions", size)), _ONE_REF),
            Contestant(
                NEW_WORKER,
                repeated(lambda: session.load(hub, "convolutions", size), lambda handle: handle.close()),
            ),
            Contestant(
                "isohub, a further object in a worker that lives",
                repeated(lambda: session.load(other, "convolutions", size), lambda handle: handle.close()),
            ),
            Contestant(
                "isohub, a new worker, returns='state_dict'",
                repeated(lambda: session.load(hub, "convolutions", size, returns="state_dict")),
            ),
            Contestant("multiprocessing (spawn) and torch.hub.load there", spawned, PICKLE),
            *([] if actors is None else [Contestant("a new Ray actor and torch.hub.load there", acted, RAY)]),
        ]
        rows = compete(contestants, sizes.rounds, warm_ups=1 if sizes.rounds > 1 else 0)
        neighbour.close()
    notes = [
        f"A model of {size} MB from a local repo, with torch's own initial values.",
        "A new worker imports the repo's modules anew; in this process torch.hub finds those of its first load again.",
    ]
    return [Table("warm_load", "warm_load", "Warm load", "ms", HERE, rows, notes)]


HERE, NEW_WORKER = "torch.hub.load in this process", "isohub, a new worker"


def measure_close(bench: Bench) -> list[Table]:
    """Giving a model back."""
    sizes = bench.sizes

    def isohub() -> list[float]:
        samples = []
        for _ in range(sizes.loads):
            handle = session.load(bench.hub, "convolutions", sizes.model_mb)
            samples.append(timed(handle.close))
        return samples

    def here() -> list[float]:
        models = [load_here(str(bench.hub), "convolutions", sizes.model_mb)]

        def drop() -> None:
            models.clear()
            gc.collect()

        return [timed(drop)]

    def spawned() -> list[float]:
        process = Spawned(bench.hub)
        process.ask("load", "convolutions", sizes.model_mb)

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            process.process.join()

        descriptor = os.pidfd_open(process.process.pid or 0)
        samples = [timed(kill)]
        os.close(descriptor)
        return samples

    with bench.session() as session:
        rows = compete(
            [
                Contestant(_KILLED, spawned, PICKLE),
                Contestant("isohub, close() of a worker's only handle", isohub),
                Contestant("del and gc.collect() in this process", here, "its modules and settings stay"),
            ],
            sizes.rounds,
        )
    notes = ["isohub's close returns when the worker's process is gone, and with it all of its memory."]
    return [Table("close", "close", f"Close of a model of {sizes.model_mb} MB", "ms", _KILLED, rows, notes)]


_KILLED = "multiprocessing (spawn), killed and joined"
