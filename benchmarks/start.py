"""Importing, loading and closing."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Callable
from typing import Any

from benchmarks.bench import Bench
from benchmarks.measure import Contestant, Row, Table, compete, timed
from benchmarks.peers import PICKLE, Spawned, fresh_process, load_here

__all__ = ["measure_close", "measure_first_load", "measure_import", "measure_warm_load"]

_WAIT = "\nprint('ready', flush=True)\nsys.stdin.read()"
_ONE_REF = "one ref of a repo in a process; no confinement"

_IMPORTS = {
    "import torch": "import sys, torch",
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
    return [Table("import", "import", "Import", "ms", "import torch", rows, notes)]


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
        Table("first_load", "first_load", f"First load: {model}, until it is loaded", "ms", _TORCH, loaded, notes),
        Table("first_load", "first_load_end", "The same, until the program has ended", "ms", _TORCH, ended),
    ]


_TORCH = "torch.hub.load in a fresh process"
_FIRST = {_TORCH: _ONE_REF, "isohub.load in a fresh process": ""}


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

    with bench.session() as session:
        other = bench.copy_of_hub(1)
        neighbour = session.load(other, "twice")
        contestants = [
            Contestant(_HERE, repeated(lambda: load_here(hub, "convolutions", size)), _ONE_REF),
            Contestant(
                "isohub, a new worker",
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
        ]
        rows = compete(contestants, sizes.rounds, warm_ups=1 if sizes.rounds > 1 else 0)
        neighbour.close()
    notes = [
        f"A model of {size} MB from a local repo, with torch's own initial values.",
        "A new worker imports the repo's modules anew; in this process torch.hub finds those of its first load again.",
    ]
    return [Table("warm_load", "warm_load", "Warm load", "ms", _HERE, rows, notes)]


_HERE = "torch.hub.load in this process"


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
