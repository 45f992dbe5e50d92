"""What one more model costs in memory."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import psutil

from benchmarks.bench import Bench
from benchmarks.measure import Row, Table

__all__ = ["SMALL_FRESH", "SMALL_ISOHUB", "measure_memory"]

_FRESH_CODE = """\
import sys, torch
m = torch.hub.load(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]), source='local')
m(torch.ones(1, 3, 32, 32) if sys.argv[2] == 'classifier' else torch.ones(1, 120, 8, 8))
print('ready', flush=True)
sys.stdin.read()
"""
_FRESH_OF = "fresh process with torch.hub, one of {}"
_ALONE, _ONE_OF = "isohub, the only worker", "isohub, one of {} workers"
_KINDS = {
    "uss": "alone its own (USS)",
    "pss": "its share of what is shared included (PSS)",
    "rss": "all that is mapped (RSS)",
}
_ROUNDS = 2
SMALL_FRESH = "fresh process with torch.hub, small model"
SMALL_ISOHUB = "isohub, a further worker, small model"


def measure_memory(bench: Bench) -> list[Table]:
    """Each process's memory, and that of many together."""
    count = bench.sizes.workers
    names = [_FRESH_OF.format(count), _ALONE, _ONE_OF.format(count)]
    rows = {kind: [Row(name, "no confinement" if "fresh" in name else "") for name in names] for kind in _KINDS}
    totals = [
        Row(f"{count} fresh processes with torch.hub", "no confinement"),
        Row(f"isohub, a zygote and {count} workers", ""),
    ]
    small = [Row(SMALL_FRESH, "no confinement"), Row(SMALL_ISOHUB, "")]
    large = ("convolutions", bench.sizes.model_mb)
    for _ in range(_ROUNDS if bench.sizes.rounds > 1 else 1):
        fresh = _fresh(bench, count, *large)
        alone, _ = _isohub(bench, 1, *large)
        many, zygote = _isohub(bench, count, *large)
        for kind, table in rows.items():
            for row, measured in zip(table, (fresh, alone, many), strict=True):
                row.rounds.append([figures[kind] for figures in measured])
        totals[0].rounds.append([sum(figures["pss"] for figures in fresh)])
        totals[1].rounds.append([sum(figures["pss"] for figures in many) + zygote["pss"]])
        small[0].rounds.append([figures["uss"] for figures in _fresh(bench, 1, "classifier")])
        # Each beside the first: that one's pages are also its own, until a second shares them.
        small[1].rounds.append([figures["uss"] for figures in _isohub(bench, count, "classifier")[0][1:]])
    model = f"a model of {bench.sizes.model_mb} MB, called once"
    tables = [
        Table("memory", f"memory_{kind}", f"Memory of a process with {model}: {words}", "MiB", names[0], rows[kind])
        for kind, words in _KINDS.items()
    ]
    tables[0].notes.append("USS is what comes back when the process ends: the price of one more.")
    title = f"Memory of {count} live models together (sum of PSS)"
    tables.append(Table("memory", "memory_total", title, "MiB", totals[0].name, totals))
    title = "Memory of a process with a small model of two convolutions, called once: alone its own (USS)"
    notes = [f"isohub's are {count - 1} workers of a session that has one already."]
    return [*tables, Table("memory", "memory_small", title, "MiB", SMALL_FRESH, small, notes)]


def _isohub(bench: Bench, count: int, model: str, *args: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Every worker's memory, all of them alive, and their zygote's."""
    import torch

    x = torch.ones(1, 3, 32, 32) if model == "classifier" else torch.ones(1, 120, 8, 8)
    with bench.session() as session, ExitStack() as stack:
        handles: list[Any] = []
        for number in range(count):
            handle = session.load(bench.copy_of_hub(number), model, *args)
            handles.append(stack.enter_context(handle))
            handle(x)
        processes = [psutil.Process(handle.stats().pid) for handle in handles]
        zygote = processes[0].parent()
        assert zygote is not None
        return [_figures(process) for process in processes], _figures(zygote)


def _fresh(bench: Bench, count: int, model: str, *args: int) -> list[dict[str, float]]:
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", _FRESH_CODE, str(bench.hub), model, *map(str, args)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.enter_context(process)  # closes its stdin, which ends it, and waits
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("a fresh process could not load the model")
        return [_figures(psutil.Process(process.pid)) for process in processes]


def _figures(process: psutil.Process) -> dict[str, float]:
    memory = process.memory_full_info()
    return {kind: getattr(memory, kind) / (1 << 20) for kind in _KINDS}
