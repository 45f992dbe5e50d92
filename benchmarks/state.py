"""A large state dict: built elsewhere, used here."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bench import Bench
from benchmarks.measure import Contestant, Row, Table, compete
from benchmarks.peers import PICKLE, Queued, Spawned, load_here

__all__ = ["BUILT_HERE", "GIVEN", "ISOHUB", "SAFETENSORS", "measure_state_dict"]

_PAGE_BYTES = 4096
_LOOK_S = 0.01
BUILT_HERE = "built in this process"
_CLONED = "a clone in this process"
ISOHUB = "isohub"
GIVEN = 'isohub, load(returns="state_dict"), from the end of the build'
_SAVED = "spawned process, torch.save in shared memory, torch.load(mmap=True)"
SAFETENSORS = "spawned process, safetensors in shared memory"
_QUEUED = "spawned process, torch.multiprocessing queue"
_NAMES = (ISOHUB, SAFETENSORS, _SAVED, _QUEUED)
_GIVES_UP = {
    BUILT_HERE: "no process of its own; one ref of a repo; no confinement",
    _CLONED: "no process of its own",
    ISOHUB: "",
    GIVEN: "",
    SAFETENSORS: "aliases and _metadata; no confinement; a file that stays when something dies",
    _SAVED: "reads a pickle (weights_only); no confinement; a file that stays when something dies",
    _QUEUED: f"{PICKLE}; a descriptor for each tensor; both sides share the memory, so each sees the other's writes",
}


def measure_state_dict(bench: Bench) -> list[Table]:
    """The whole way, the transfer alone, and the memory that it takes."""
    sizes = bench.sizes
    megabytes = sizes.state_mb
    hub = str(bench.hub)
    numbers = itertools.count()
    with ExitStack() as stack:
        session = stack.enter_context(bench.session())
        spawned = stack.enter_context(closing(Spawned(bench.hub)))
        queued = stack.enter_context(closing(Queued(bench.hub)))
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isohub-bench-", dir=_shared_memory())))

        def build_here() -> Any:
            return load_here(hub, "linears", megabytes).state_dict()

        def build_isohub() -> Any:
            return session.load(hub, "linears", megabytes, returns="state_dict")

        def build_by_file(transfer: Callable[[], Any]) -> Callable[[], Any]:
            def build() -> Any:
                spawned.ask("load", "linears", megabytes)
                state = transfer()
                spawned.ask("drop")
                return state

            return build

        def build_queued() -> Any:
            queued.ask("load", "linears", megabytes)
            state = queued.ask("state_dict")
            queued.ask("drop")
            return state

        def saved() -> Any:
            import torch

            path = shared / f"state{next(numbers)}.pt"
            spawned.ask("save", str(path))
            state = torch.load(path, mmap=True, weights_only=True)
            path.unlink()  # the mapping keeps it
            return state

        def safetensors() -> Any:
            from safetensors.torch import load_file

            path = shared / f"state{next(numbers)}.safetensors"
            spawned.ask("save_safetensors", str(path))
            state = load_file(path)
            path.unlink()
            return state

        ways = (build_here, build_isohub, build_by_file(safetensors), build_by_file(saved), build_queued)
        builders = dict(zip((BUILT_HERE, *_NAMES), ways, strict=True))
        _check(builders)
        whole, read = _races(builders, sizes.rounds)
        memory = compete(
            [Contestant(name, _peak(build), _GIVES_UP[name]) for name, build in builders.items()],
            min(sizes.rounds, 2),
        )
        # The transfer alone: the model is there, in each process.
        state = build_here()
        handle = stack.enter_context(session.load(hub, "linears", megabytes))
        spawned.ask("load", "linears", megabytes)
        queued.ask("load", "linears", megabytes)
        transfers = dict(
            zip(
                (_CLONED, GIVEN, *_NAMES),
                (
                    lambda: {name: tensor.clone() for name, tensor in state.items()},
                    build_isohub,
                    handle.state_dict,
                    safetensors,
                    saved,
                    lambda: queued.ask("state_dict"),
                ),
                strict=True,
            )
        )
        # torch's queue moves tensors to shared memory where they are, once: each round needs fresh ones.
        sent, sent_read = _races(
            transfers, sizes.rounds, before={_QUEUED: lambda: queued.ask("load", "linears", megabytes)}
        )
        state.clear()
    size = f"{megabytes} MiB"
    notes = ["The processes are there and have imported torch; isohub forks a new worker for each load."]
    memory_notes = (
        "The most that the caller, the workers and shared memory grew by until the state dict was read, the built "
        "model included: private memory of all processes, and the machine's shared memory. In runs of their own."
    )
    return [
        Table("state_dict", "state_load", f"State dict of {size}: build and transfer", "ms", BUILT_HERE, whole, notes),
        Table("state_dict", "state_load_read", "The same, and a word of every page read", "ms", BUILT_HERE, read),
        Table("state_dict", "state_transfer", f"State dict of {size}: transfer alone", "ms", _CLONED, sent),
        Table("state_dict", "state_transfer_read", "The same, and a word of every page read", "ms", _CLONED, sent_read),
        Table(
            "state_dict",
            "state_memory",
            f"State dict of {size}: memory at the peak of build and transfer",
            "MiB",
            BUILT_HERE,
            memory,
            [memory_notes],
        ),
    ]


def _races(
    actions: dict[str, Callable[[], Any]], rounds: int, before: dict[str, Callable[[], Any]] | None = None
) -> tuple[list[Row], list[Row]]:
    """Milliseconds until the state dict is there, and until it has been read once."""
    prepare = before or {}
    reads: dict[str, list[float]] = {name: [] for name in actions}

    def racing(name: str, action: Callable[[], Any]) -> Callable[[], list[float]]:
        def run() -> list[float]:
            prepare.get(name, int)()
            start = time.perf_counter()
            state = action()
            there = time.perf_counter()
            if name == GIVEN:
                start = float(state["built_at"])  # the machine's clock, which perf_counter is too
            _read(state)
            reads[name].append((time.perf_counter() - start) * 1e3)
            return [(there - start) * 1e3]

        return run

    rows = compete(
        [Contestant(name, racing(name, action), _GIVES_UP[name]) for name, action in actions.items()], rounds
    )
    return rows, [Row(name, _GIVES_UP[name], [[sample] for sample in samples]) for name, samples in reads.items()]


def _read(state: Any) -> float:
    import torch

    words = [tensor.flatten().view(torch.uint8)[::_PAGE_BYTES] for tensor in state.values()]
    return float(sum(int(word.sum()) for word in words))


def _peak(action: Callable[[], Any]) -> Callable[[], list[float]]:
    """MiB by which this process, its descendants and shared memory grow at most."""

    def run() -> list[float]:
        gc.collect()
        before = _in_use()
        seen, over = [before], threading.Event()

        def look() -> None:
            while not over.wait(_LOOK_S):
                seen.append(_in_use())

        watcher = threading.Thread(target=look)
        watcher.start()
        state = action()
        _read(state)
        seen.append(_in_use())
        over.set()
        watcher.join()
        del state
        return [(max(seen) - before) / (1 << 20)]

    return run


def _in_use() -> int:
    """Bytes of private memory of this process and its descendants, and of all shared memory.

    Shared memory is the machine's: a memfd that is mapped nowhere belongs to no process's figures.
    """
    own = psutil.Process()
    return psutil.virtual_memory().shared + sum(_private(process.pid) for process in (own, *own.children(True)))


def _private(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))


def _check(builders: dict[str, Callable[[], Any]]) -> None:
    """All give the same names and shapes. Also the first touch of every process."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in build().items()} for build in builders.values()]
    if any(other != shapes[0] for other in shapes[1:]):
        raise RuntimeError("two ways of building a state dict gave different ones")


def _shared_memory() -> str | None:
    """Where a file is memory, if there is such a place: the best that the peer can do."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
