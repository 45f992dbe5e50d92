"""What a program costs that has loaded a model and does nothing: processor time of all of its processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.actors import RAY
from benchmarks.bench import Bench
from benchmarks.measure import Contestant, Table, compete
from benchmarks.peers import PICKLE

__all__ = ["ISOHUB", "NOTHING_MS", "measure_idle"]

ISOHUB = "isohub, one handle"
_HERE = "torch.hub in one process"
_POOL = "ProcessPoolExecutor (spawn), one process"
_RAY = "Ray, one actor"

#: Milliseconds of processor time a second that nobody sees: `top` rounds to a tenth of a percent.
NOTHING_MS = 0.5
_SETTLE_S = 3.0
_LEAST_SETTLE_S = 0.5

_WAIT = "\nprint('ready', flush=True)\nsys.stdin.read()\n"
_PROGRAMS = {
    _HERE: """\
import sys, torch
model = torch.hub.load(sys.argv[1], "twice", source="local", verbose=False)
model(torch.ones(1))
"""
    + _WAIT,
    ISOHUB: """\
import sys, torch, isohub
model = isohub.load(sys.argv[1], "twice")
model(torch.ones(1))
"""
    + _WAIT,
    _POOL: """\
import multiprocessing, sys, torch
from concurrent.futures import ProcessPoolExecutor


def hold(hub):
    global model
    model = torch.hub.load(hub, "twice", source="local", verbose=False)


if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    pool.submit(hold, sys.argv[1]).result()
"""
    "    print('ready', flush=True)\n    sys.stdin.read()\n    pool.shutdown()\n",
    _RAY: """\
import logging, sys, torch, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         object_store_memory=1 << 27, _temp_dir=sys.argv[2])


@ray.remote
class Holder:
    def __init__(self, hub):
        self.model = torch.hub.load(hub, "twice", source="local", verbose=False)

    def call(self, x):
        return self.model(x)


holder = Holder.remote(sys.argv[1])
ray.get(holder.call.remote(torch.ones(1)))
"""
    + _WAIT
    + "ray.shutdown()\n",
}
_GIVES_UP = {_HERE: "no process of its own; one ref of a repo; no confinement", ISOHUB: "", _POOL: PICKLE, _RAY: RAY}


def measure_idle(bench: Bench) -> list[Table]:
    """Milliseconds of processor time a second."""
    names = [name for name in _PROGRAMS if name != _RAY or _has_ray(bench)]
    rows = compete(
        [Contestant(name, _idling(bench, name), _GIVES_UP[name]) for name in names], min(bench.sizes.rounds, 2)
    )
    notes = (
        f"All threads of a program and of every process below it, over {bench.sizes.idle_s:g} seconds, some seconds "
        "after its first call; 1,000 is one processor."
    )
    return [Table("idle", "idle", "Idle: processor time a second", "ms", _HERE, rows, [notes])]


def _idling(bench: Bench, name: str) -> Callable[[], list[float]]:
    program = bench.directory / f"idle{list(_PROGRAMS).index(name)}.py"
    program.write_text(_PROGRAMS[name])

    def run() -> list[float]:
        arguments = [str(bench.hub), str(bench.directory_for("ray"))]
        with subprocess.Popen(
            [sys.executable, str(program), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"the program of {name} ended before it was ready")
            time.sleep(max(_LEAST_SETTLE_S, min(_SETTLE_S, bench.sizes.idle_s)))
            seconds = bench.sizes.idle_s
            before, start = _spent_ns(process.pid), time.monotonic()
            time.sleep(seconds)
            spent, took = _spent_ns(process.pid) - before, time.monotonic() - start
            process.stdin.close()
            process.wait()
        return [spent / 1e6 / took]

    return run


def _spent_ns(pid: int) -> int:
    """Processor time of a process and all below it, in nanoseconds. Source: sched-stats in the kernel's documents."""
    top = psutil.Process(pid)
    return sum(_of_threads(process.pid) for process in (top, *top.children(recursive=True)))


def _of_threads(pid: int) -> int:
    spent = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            spent += int(path.read_text().split()[0])
        except OSError:  # the thread has ended
            continue
    return spent


def _has_ray(bench: Bench) -> bool:
    found: Any = subprocess.run([sys.executable, "-c", "import ray"], capture_output=True, text=True, check=False)
    if found.returncode:
        bench.absent["Ray"] = f"not installed: {found.stderr.strip().splitlines()[-1]}"
    return found.returncode == 0
