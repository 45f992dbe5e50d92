"""What a fixed workload does, counted and not timed: a check for machines that are not quiet.

``python -m benchmarks.counts`` counts, and holds the figures against `counts.json`; ``--write`` renews that file. It
needs no performance counters, which hosted machines mostly lack:

- lines and functions of isohub's own code, in the caller's thread and in the worker, by `sys.settrace`;
- functions of C that they call, and among these the ones that ask the kernel for something, by `sys.setprofile`;
- page faults of a thread (getrusage(2)), that is memory which was touched for the first time: a copy into new memory
  shows as one fault a page;
- bytes that the worker writes (proc(5), io): how often it copies a state dict;
- sleeps of the caller's threads (voluntary context switches) beyond one a call: a hand-over to another thread shows;
- what is imported, and what stays open.

A count may be lower than the baseline; then ``--write`` is due, and the check still passes. Whether an answer was
already there when its reader looked depends on the machine, so a call's figures are medians over many, looking before
sleeping (`isohub.wire.patience`) is not counted, and each figure has room. The baseline is the most of several counts,
and what is above it is counted again: the least counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hubs import write_hub

__all__ = ["BASELINE", "compare", "count", "main"]

BASELINE = Path(__file__).with_name("counts.json")
_ROOT = str(Path(__file__).resolve().parents[1] / "isohub") + os.sep

#: How much more than the baseline passes: a share of it, and beside that a number, for small counts.
_SHARE = 0.10
_SHARE_ELSEWHERE = 0.30  # on a minor version of Python that the baseline does not have
#: By how the figure's name ends, the first that fits.
_ROOM = (
    ("by page faults", 0.05),
    ("by bytes written", 0.05),
    ("page faults", 25.0),
    ("sleeps", 0.6),
    ("functions of C", 4.0),
    ("functions", 2.0),
    ("lines", 8.0),
    (": modules", 10.0),
    ("", 1.0),  # of the kernel
)

_AGAIN = 2

_CALLS = 200
_TRACED_CALLS = 30
_LOADS = 5
_STATE_MIB = 16

#: Functions of C that end in a system call, by their names.
_KERNEL = [
    "send",
    "sendto",
    "sendmsg",
    "recv",
    "recv_into",
    "recvmsg",
    "poll",
    "select",
    "read",
    "write",
    "pwrite",
    "pread",
    "open",
    "close",
    "dup",
    "memfd_create",
    "ftruncate",
    "fcntl",
    "mmap",
    "fstat",
    "stat",
    "lstat",
    "scandir",
    "listdir",
    "unlink",
    "rename",
    "mkdir",
    "socketpair",
    "fork",
    "waitpid",
    "kill",
    "pipe2",
    "pidfd_send_signal",
]


def count() -> dict[str, float]:
    """Every figure, by name. Takes some seconds; starts processes of its own."""
    found: dict[str, float] = {}
    for what in ("isohub", "isohub; isohub.Session"):
        modules = _imported(what)
        found[f"import {what}: modules"] = len(modules)
        found[f"import {what}: modules of torch"] = sum(name.split(".")[0] == "torch" for name in modules)
    with tempfile.TemporaryDirectory(prefix="ihb-") as directory:
        found |= _session(Path(directory))
    return {name: round(value, 2) for name, value in found.items()}


def compare(found: dict[str, float], baseline: dict[str, dict[str, float]]) -> list[str]:
    """What is more than it was, in words; empty when nothing is.

    Args:
        found: From `count`.
        baseline: Figures by minor version of Python, such as "3.11".
    """
    own = baseline.get(_python())
    expected, share = (own, _SHARE) if own is not None else (baseline[max(baseline)], _SHARE_ELSEWHERE)
    complaints = []
    for name, value in found.items():
        # What is new was nothing before.
        before = expected.get(name, 0.0)
        most = before * (1 + share) + next(room for word, room in _ROOM if name.endswith(word) or not word)
        if value > most:
            complaints.append(f"{name}: {value:g}, at most {most:.4g} (it was {before:g})")
    return complaints


def main(arguments: list[str] | None = None) -> int:
    """Count, and say what is more than it was."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description="counts of a fixed workload")
    parser.add_argument("--write", action="store_true", help=f"make these the baseline: {BASELINE.name}")
    parser.add_argument("--once", action="store_true", help="do not count again what is above it")
    options = parser.parse_args(arguments)
    found = count()
    if options.write:
        for _ in range(_AGAIN):
            found = _combined(found, count(), max)
        baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
        BASELINE.write_text(json.dumps({**baseline, _python(): found}, indent=1, sort_keys=True) + "\n")
        return 0
    baseline = json.loads(BASELINE.read_text())
    complaints = compare(found, baseline)
    for _ in range(0 if options.once else _AGAIN):
        if complaints:
            found = _combined(found, count(), min)
            complaints = compare(found, baseline)
    for name, value in found.items():
        print(f"{value:10g}  {name}")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if complaints:
        print("hint: if that is as it should be, python -m benchmarks.counts --write", file=sys.stderr)
    return 1 if complaints else 0


def _combined(
    one: dict[str, float], other: dict[str, float], choose: Callable[[float, float], float]
) -> dict[str, float]:
    """A figure that one of them lacks is nothing there."""
    return {name: choose(one.get(name, 0.0), other.get(name, 0.0)) for name in {**one, **other}}


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _imported(what: str) -> list[str]:
    """Modules that an import brings into a fresh interpreter."""
    code = f"import sys\nbefore = set(sys.modules)\nimport {what}\nprint(*sorted(set(sys.modules) - before))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def _session(directory: Path) -> dict[str, float]:
    import torch

    import isohub

    found: dict[str, float] = {}
    hub = write_hub(directory / "hub")
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()  # what a collection finds is not this call's
    with isohub.Session(cache_dir=directory / "isohub") as session:
        # What happens once: the zygote, imports, caches.
        session.load(hub, "twice").close()
        session.load(hub, "linears", 1, returns="state_dict")

        before = _descriptors()
        loads = []
        for _ in range(_LOADS):
            start, stop = _counter(_ROOT, _KERNEL)
            start()
            handle = session.load(hub, "twice")
            loads.append(stop())
            handle.close()
        found |= _named("a warm load, caller", _medians(loads))
        found["warm loads, caller: descriptors that stay, each"] = (_descriptors() - before) / _LOADS

        with session.load(hub, "twice") as handle:
            handle.run(_one_thread())
            for size in (4, 600_000):
                found |= _calls(handle, torch.ones(size // 4), f"a call of {size:,} B")
        with session.load(hub, "linears", _STATE_MIB) as handle:
            handle.state_dict()
            found |= _state(handle)
    return found


def _calls(handle: Any, x: Any, what: str) -> dict[str, float]:
    for _ in range(10):
        handle(x)
    caller = []
    for _ in range(_TRACED_CALLS):
        start, stop = _counter(_ROOT, _KERNEL)
        start()
        handle(x)
        caller.append(stop())
    begin, end = _in_worker()
    handle.run(begin)
    for _ in range(_TRACED_CALLS):
        handle(x)
    worker = handle.run(end)
    faults = _faults(handle)
    sleeps = []
    before = faults()
    for _ in range(_CALLS):
        asleep = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        handle(x)
        # One is the wait for the answer, if that is not there so soon that the caller need not sleep.
        sleeps.append(max(0, resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - asleep - 1))
    after = faults()
    return {
        **_named(f"{what}, caller", _medians(caller)),
        **_named(f"{what}, worker", {name: value / _TRACED_CALLS for name, value in worker.items()}),
        f"{what}, caller: page faults": (after[0] - before[0]) / _CALLS,
        f"{what}, worker: page faults": (after[1] - before[1]) / _CALLS,
        f"{what}, caller: further sleeps": statistics.median(sleeps),
    }


def _state(handle: Any) -> dict[str, float]:
    """A state dict's way: a copy of it would be one fault a page, or all of it written."""
    size = _STATE_MIB << 20
    faults, written = _faults(handle), _written()
    figures, touched, copied = [], [], []
    for _ in range(_LOADS):
        start, stop = _counter(_ROOT, _KERNEL)
        began, before = handle.run(written), faults()
        start()
        state = handle.state_dict()
        figures.append(stop())
        after = faults()
        copied.append((handle.run(written) - began) / size)
        touched.append([(b - a) * resource.getpagesize() / size for a, b in zip(before, after, strict=True)])
        del state
    what = f"a state dict of {_STATE_MIB} MiB"
    return {
        **_named(f"{what}, caller", _medians(figures)),
        f"{what}, caller: copies by page faults": statistics.median(of_caller for of_caller, _ in touched),
        f"{what}, worker: copies by page faults": statistics.median(of_worker for _, of_worker in touched),
        f"{what}, worker: copies by bytes written": statistics.median(copied),
    }


def _written() -> Callable[[Any], int]:
    def there(_: Any) -> int:
        with open("/proc/self/io") as file:  # noqa: PTH123 - in the worker
            return next(int(line.split()[1]) for line in file if line.startswith("wchar:"))

    return there


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _faults(handle: Any) -> Callable[[], tuple[int, int]]:
    """Reads the page faults of this thread and of the worker's process so far."""
    path = Path(f"/proc/{handle.stats().pid}/stat")

    def read() -> tuple[int, int]:
        minflt = path.read_text().rsplit(")", 1)[1].split()[7]
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt, int(minflt)

    return read


def _counter(root: str, kernel: list[str]) -> tuple[Callable[[], None], Callable[[], dict[str, float]]]:
    """What starts to count in its thread, and what ends it and tells. Is sent to workers, so it needs nothing else."""
    import sys

    seen: dict[str, float] = {"lines": 0, "functions": 0, "functions of C": 0}

    def counted(frame):
        path = frame.f_code.co_filename
        # How often one looks before one sleeps is the machine's doing.
        return path.startswith(root) and not path.endswith("patience.py")

    def line(_, event, __):
        if event == "line":
            seen["lines"] += 1
        return line

    def trace(frame, *_):
        if not counted(frame):
            return None
        seen["functions"] += 1
        return line

    def profile(frame, event, function):
        if event == "c_call" and counted(frame):
            seen["functions of C"] += 1
            name = function.__name__
            if name in kernel:
                name = "kernel's " + name
                seen[name] = seen.get(name, 0) + 1

    def start() -> None:
        sys.settrace(trace)
        sys.setprofile(profile)

    def stop() -> dict[str, float]:
        sys.settrace(None)
        sys.setprofile(None)
        return seen

    return start, stop


def _in_worker() -> tuple[Callable[[Any], None], Callable[[Any], dict[str, float]]]:
    """The same for a worker's thread, which goes on between the two."""
    make, root, kernel = _counter, _ROOT, _KERNEL

    def begin(_: Any) -> None:
        import sys

        sys.isohub_counts = make(root, kernel)
        sys.isohub_counts[0]()

    def end(_: Any) -> dict[str, float]:
        import sys

        return sys.isohub_counts[1]()

    return begin, end


def _one_thread() -> Callable[[Any], None]:
    def there(_: Any) -> None:
        import torch

        torch.set_num_threads(1)

    return there


def _medians(many: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for figures in many for name in figures})
    return {name: statistics.median(figures.get(name, 0) for figures in many) for name in names}


def _named(what: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{what}: {name}": value for name, value in figures.items()}


if __name__ == "__main__":
    sys.exit(main())
