"""Many refs live at once, many calls at once, nothing to do, and no growth over a long life."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bench import Bench
from benchmarks.measure import Row, Table, timed

__all__ = ["measure_many", "measure_soak"]

_LIVE, _LIVE_QUICK = 64, 4
_CALLS = 4000
_IDLE_S = 5.0
_HUBCONF = """\
import torch

dependencies = ["torch"]


class Shift(torch.nn.Module):
    def forward(self, x):
        return x + {number}


def shift():
    return Shift()
"""
_TICKS = os.sysconf("SC_CLK_TCK")


def measure_many(bench: Bench) -> list[Table]:
    """As many refs of one repo as a comparison may want, alive in one session."""
    import torch

    import isohub

    count = _LIVE if bench.sizes.rounds > 1 else _LIVE_QUICK
    repo, commits = _repo(bench.directory / f"many{count}", count)
    x = torch.ones(1)
    second, last = "each of the first eight after the first", f"each of the last eight of {count}"
    starts, ends, memory, idle = (
        Row(second, ""),
        Row(last, ""),
        Row(f"{count} workers and their zygote", ""),
        Row(f"a session with {count} workers", ""),
    )
    closing = Row(f"close of a session with {count} workers", "")
    widths = [width for width in (1, 8, 64) if width <= count]
    calls = {width: Row(f"{width} at once, each from a thread", "") for width in widths}
    for _ in range(2 if bench.sizes.rounds > 1 else 1):
        with isohub.Session(cache_dir=bench.directory / "isohub") as session, ExitStack() as stack:
            for commit in commits:
                session.fetch(f"{repo}:{commit}")
            handles: list[Any] = []
            took = []
            for commit in commits:
                began = time.perf_counter()
                handles.append(stack.enter_context(session.load(f"{repo}:{commit}", "shift")))
                took.append((time.perf_counter() - began) * 1e3)
            starts.rounds.append(took[1:][:8])
            ends.rounds.append(took[1:][-8:])
            for number, handle in enumerate(handles):
                if handle(x).item() != 1 + number:
                    raise RuntimeError("a ref answered for another")
            for width, row in calls.items():
                row.rounds.append([_together(handles[:width], x)])
            pids = [info.pid for info in session.workers()]
            memory.rounds.append([_pss_mib(pids)])
            idle.rounds.append([_idle_ms(_family(pids))])
            stack.pop_all()
            closing.rounds.append([timed(session.close)])
    return [
        Table("many", "many_start", "Start of a worker, while others live", "ms", second, [starts, ends]),
        Table(
            "many",
            "many_call",
            "A call of 4 B to each of several workers",
            "µs",
            next(iter(calls.values())).name,
            [*calls.values()],
        ),
        Table("many", "many_memory", "Memory of many live refs (sum of PSS)", "MiB", memory.name, [memory]),
        Table(
            "many",
            "many_idle",
            f"Processor time in {_IDLE_S:g} s in which nothing is asked, of the caller and all of its session",
            "ms",
            idle.name,
            [idle],
            [f"Counted in ticks of {1000 // _TICKS} ms. The watchdog looks at an idle worker every 2 to 16 seconds."],
        ),
        Table("many", "many_close", "Close with many live refs", "ms", closing.name, [closing]),
    ]


def measure_soak(bench: Bench) -> list[Table]:
    """A long life: loads and calls, and what is there after them that was not before."""
    import torch

    loads, calls = (10_000, 1_000_000) if bench.sizes.rounds > 1 else (20, 1_000)
    x = torch.ones(1)
    names = ["before", f"after {loads:,} loads", f"and {calls:,} calls"]
    kept = {name: Row(name, "") for name in names}
    resident = {(who, name): Row(f"{who}, {name}", "") for who in ("caller", "zygote") for name in names}
    with bench.session() as session, session.load(bench.hub, "twice") as handle:
        zygote = psutil.Process(session.workers()[0].pid).parent()
        assert zygote is not None

        def note(name: str) -> None:
            kept[name].rounds.append([_held(zygote)])
            for who, process in (("caller", psutil.Process()), ("zygote", zygote)):
                resident[who, name].rounds.append([process.memory_info().rss / (1 << 20)])

        other = bench.copy_of_hub(1)
        for _ in range(10):  # what the first ones bring stays
            session.load(other, "twice").close()
            handle(x)
        note(names[0])
        for _ in range(loads):
            with session.load(other, "twice") as fresh:
                fresh(x)
        note(names[1])
        for _ in range(calls):
            handle(x)
        note(names[2])
    return [
        Table(
            "soak", "soak_held", "Descriptors and threads of caller and zygote together", "", names[0], [*kept.values()]
        ),
        Table("soak", "soak_rss", "Resident memory", "MiB", f"caller, {names[0]}", [*resident.values()]),
    ]


def _repo(place: Path, count: int) -> tuple[Path, list[str]]:
    """A repository with so many commits, each of another answer."""
    place.mkdir()

    def git(*words: str) -> str:
        who = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
        return subprocess.run(["git", "-C", place, *who, *words], check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    for number in range(count):
        (place / "hubconf.py").write_text(_HUBCONF.format(number=number))
        git("add", "hubconf.py")
        git("commit", "--quiet", "--message", f"shift by {number}")
    return place, git("rev-list", "--reverse", "HEAD").split()


def _together(handles: list[Any], x: Any) -> float:
    """Microseconds for a call, all of them called at once."""
    each = max(1, _CALLS // len(handles))

    def call(handle: Any) -> None:
        for _ in range(each):
            handle(x)

    threads = [threading.Thread(target=call, args=(handle,)) for handle in handles]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return timed(run, 1e6) / (each * len(handles))


def _family(pids: Iterable[int]) -> list[psutil.Process]:
    """This process, the workers, and the processes between."""
    found = {psutil.Process().pid: psutil.Process()}
    for pid in pids:
        for process in (psutil.Process(pid), *psutil.Process(pid).parents()):
            if process.pid == os.getpid():
                break
            found[process.pid] = process
    return [*found.values()]


def _idle_ms(processes: list[psutil.Process]) -> float:
    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    time.sleep(3.0)  # until what has just been asked is settled
    before = used()
    time.sleep(_IDLE_S)
    return (used() - before) * 1e3


def _pss_mib(pids: list[int]) -> float:
    zygote = psutil.Process(pids[0]).parent()
    assert zygote is not None
    return sum(process.memory_full_info().pss for process in (zygote, *map(psutil.Process, pids))) / (1 << 20)


def _held(zygote: psutil.Process) -> float:
    return sum(process.num_fds() + process.num_threads() for process in (psutil.Process(), zygote))
