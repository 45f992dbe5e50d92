"""What an environment costs: workers on the host's packages, over an overlay, and on an interpreter of their own.

Needs uv and a package index; without Python 3.9 or 3.8 the last is left out, and says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from benchmarks.bench import Bench
from benchmarks.confinement import sampled_calls
from benchmarks.measure import Contestant, Table, compete, timed

__all__ = ["measure_environments"]

_HOST = "isohub, on the host's packages"
_OVERLAY = "isohub, over an overlay (Environment('auto', requirements=['toolz']))"
_OLD = "isohub, on Python {} and torch 1.13.1"
#: A worker that imports torch takes a second: fewer of them.
_LATE_LOADS = 2
_FEW = "torch before the fork: each worker imports it"


def measure_environments(bench: Bench) -> list[Table]:
    """A worker's start and its calls in each kind of environment."""
    import torch

    import isohub

    sizes = bench.sizes
    kinds: dict[str, Any] = {_HOST: None, _OVERLAY: isohub.Environment("auto", requirements=["toolz"])}
    old = _old()
    if old is not None:
        kinds[_OLD.format(old.python)] = old
    else:
        print("no Python 3.9 or 3.8 here: left out", file=sys.stderr)
    with ExitStack() as stack:
        session = stack.enter_context(bench.session())
        other = bench.copy_of_hub(2)  # holds a worker of each kind, so that all zygotes are warm
        held = {
            name: stack.enter_context(session.load(other, "twice", environment=environment))
            for name, environment in kinds.items()
        }

        def start(environment: Any) -> Callable[[], list[float]]:
            def run() -> list[float]:
                samples: list[float] = []
                kept: list[Any] = []
                for _ in range(sizes.loads if environment is not old else _LATE_LOADS):
                    samples.append(
                        timed(lambda: kept.append(session.load(bench.hub, "twice", environment=environment)))
                    )
                    kept.pop().close()
                return samples

            return run

        contestants = [
            Contestant(name, start(environment), _FEW if environment is not None and environment is old else "")
            for name, environment in kinds.items()
        ]
        notes = ["From `isohub.load` of a tiny model to its handle, in a worker made for it; the zygote is warm."]
        rows = compete(contestants, sizes.call_rounds, warm_ups=1)
        tables = [Table("environments", "environments_start", "Environments: a new worker", "ms", _HOST, rows, notes)]
        for size in sizes.call_bytes[:2]:
            x = torch.ones(max(1, size // 4))
            rows = compete(
                [Contestant(name, sampled_calls(bench, handle, x)) for name, handle in held.items()],
                sizes.call_rounds,
                warm_ups=1,
            )
            title = f"Environments: a call, {x.nbytes:,} B"
            tables.append(Table("environments", f"environments_call_{x.nbytes}", title, "µs", _HOST, rows))
    return tables


def _old() -> Any:
    import isohub
    from isohub.environments.interpreters import find_interpreter

    for python in ("3.9", "3.8"):
        try:
            find_interpreter(python)
        except isohub.EnvironmentBuildError:
            continue
        return isohub.Environment(requirements=["torch==1.13.1", "numpy<2"], python=python)
    return None
