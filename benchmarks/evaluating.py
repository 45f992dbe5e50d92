"""One metric over the same batches, for several refs: each way from a fresh interpreter to printed figures."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.measure import Contestant, Table, compete

__all__ = ["measure_evaluation"]

_MOST_ROUNDS = 3
_BATCH = 8

_BY_HAND = """
import sys, torch
model = torch.hub.load(sys.argv[2], "classifier", source="local", verbose=False)
right = loss = count = 0
with torch.no_grad():
    for x, y in torch.load(sys.argv[1]):
        z = model(x)
        right += (z.argmax(1) == y).float().mean().item() * len(y)
        loss += torch.nn.functional.cross_entropy(z, y).item() * len(y)
        count += len(y)
print(right / count, loss / count)
"""

_ISOHUB = """
import sys, torch, isohub


def metric(model, batch):
    x, y = batch
    z = model(x)
    return {"right": (z.argmax(1) == y).float().mean(), "loss": torch.nn.functional.cross_entropy(z, y)}


found = isohub.evaluate(metric, sys.argv[2:], "classifier", torch.load(sys.argv[1]))
for row in found.rows:
    print(row.metrics["right"], row.metrics["loss"])
"""

_REFERENCE = "a fresh process for each ref, one after another"
_GIVES_UP = "confinement, retries, resuming; a loop by hand"


def measure_evaluation(bench: Bench) -> list[Table]:
    """isohub.evaluate beside processes by hand."""
    import torch

    sizes = bench.sizes
    data = bench.directory / "batches.pt"
    generator = torch.Generator().manual_seed(0)
    torch.save(
        [
            (torch.randn(_BATCH, 3, 32, 32, generator=generator), torch.randint(10, (_BATCH,), generator=generator))
            for _ in range(sizes.batches)
        ],
        data,
    )
    hubs = [bench.copy_of_hub(number) for number in range(sizes.refs)]
    cores = len(os.sched_getaffinity(0))
    one_thread = {"OMP_NUM_THREADS": "1"}
    contestants = [
        Contestant(_REFERENCE, _by_hand(bench, data, hubs, 1, {}), _GIVES_UP),
        Contestant(f"{_REFERENCE}, of one thread", _by_hand(bench, data, hubs, 1, one_thread), _GIVES_UP),
        Contestant(f"the same, {cores} at once", _by_hand(bench, data, hubs, cores, one_thread), _GIVES_UP),
        Contestant("isohub.evaluate", lambda: [_timed(bench, _ISOHUB, [data, *hubs], sizes.refs)]),
    ]
    rows = compete(contestants, min(_MOST_ROUNDS, sizes.rounds))
    notes = [
        "From the start of a fresh interpreter until the figures are printed; bytecode of all packages cached.",
        f"A batch is {_BATCH} pictures of 32 by 32; the network has two convolutions.",
        f"Torch's imports are in each figure: {sizes.refs} of them by hand, two with isohub.",
        "The figures that were printed were held against each other.",
    ]
    title = f"Evaluation: {sizes.refs} refs, {sizes.batches} batches each"
    return [Table("evaluate", "evaluate", title, "s", _REFERENCE, rows, notes)]


def _by_hand(
    bench: Bench, data: Path, hubs: Sequence[Path], at_once: int, variables: dict[str, str]
) -> Callable[[], list[float]]:
    def run() -> list[float]:
        began = time.perf_counter()
        waiting, running = list(hubs), []
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(bench, _BY_HAND, [data, waiting.pop(0)], variables))
            process = running.pop(0)
            said, _ = process.communicate()
            _check(said, 1, process.returncode)
        return [time.perf_counter() - began]

    return run


def _timed(bench: Bench, code: str, arguments: Sequence[Path], lines: int) -> float:
    began = time.perf_counter()
    process = _start(bench, code, arguments, {})
    said, _ = process.communicate()
    _check(said, lines, process.returncode)
    return time.perf_counter() - began


def _start(bench: Bench, code: str, arguments: Sequence[Path], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        env={**os.environ, **bench.environment, **variables},
    )


_expected: list[float] = []


def _check(said: bytes, lines: int, status: int) -> None:
    """All ways give the same figures, but for the order of sums."""
    rows = [[float(word) for word in line.split()] for line in said.decode().splitlines()]
    if status or len(rows) != lines:
        raise RuntimeError(f"a benchmark's process ended with {status} and {len(rows)} of {lines} lines")
    for row in rows:
        _expected[:] = _expected or row
        if not all(math.isclose(*pair, rel_tol=1e-5) for pair in zip(_expected, row, strict=True)):
            raise RuntimeError(f"figures of one model differ: {_expected} and {row}")
