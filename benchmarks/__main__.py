"""``python -m benchmarks [part ...] [--quick] [--json FILE] [--write FILE]``."""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, open_bench
from benchmarks.calls import measure_calls
from benchmarks.confinement import measure_confinement
from benchmarks.environments import measure_environments
from benchmarks.evaluating import measure_evaluation
from benchmarks.goals import judge
from benchmarks.idle import measure_idle
from benchmarks.many import measure_many, measure_soak
from benchmarks.measure import Sizes, Table, machine
from benchmarks.memory import measure_memory
from benchmarks.page import render, render_goals, render_table
from benchmarks.start import (
    measure_close,
    measure_first_line,
    measure_first_load,
    measure_import,
    measure_warm_load,
)
from benchmarks.state import measure_state_dict

__all__ = ["PARTS", "main"]

PARTS: dict[str, Callable[[Bench], list[Table]]] = {
    "import": measure_import,
    "first_line": measure_first_line,
    "first_load": measure_first_load,
    "warm_load": measure_warm_load,
    "call": measure_calls,
    "state_dict": measure_state_dict,
    "confinement": measure_confinement,
    "environments": measure_environments,
    "memory": measure_memory,
    "idle": measure_idle,
    "close": measure_close,
    "evaluate": measure_evaluation,
    "many": measure_many,
    "soak": measure_soak,
}
#: Those that run when they are asked for: ten minutes for one table.
_ASKED_FOR = {"soak"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for, print the tables, and write the report."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    sizes = Sizes.quick() if options.quick else Sizes()
    given = {name: getattr(options, name) for name in _FIELDS if getattr(options, name) is not None}
    sizes = dataclasses.replace(sizes, **given)
    parts = [name for name in PARTS if name in (options.part or {*PARTS} - _ASKED_FOR)]

    start = time.monotonic()
    report: dict[str, Any] = {
        "format": 1,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "command": _command(options, given),
        "isohub": _version(),
        "quick": options.quick,
        "parts": parts,
        "sizes": dataclasses.asdict(sizes),
        "machine": machine(),
        "tables": [],
    }
    with open_bench(sizes) as bench:
        for part in parts:
            print(f"{part} ...", file=sys.stderr, flush=True)
            for table in PARTS[part](bench):
                summary = table.summary()
                report["tables"].append(summary)
                print(render_table(summary), flush=True)
        report["absent"] = bench.absent
    report["goals"] = judge(report["tables"])
    print(render_goals(report["goals"]), flush=True)
    report["seconds"] = round(time.monotonic() - start, 1)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if options.write:
        options.write.write_text(render(report))
    print(f"{report['seconds']} s", file=sys.stderr)
    return 0


#: Sizes that the command line may set, and their types.
_FIELDS: dict[str, type] = {
    "rounds": int,
    "call_rounds": int,
    "call_s": float,
    "model_mb": int,
    "state_mb": int,
    "loads": int,
    "workers": int,
    "refs": int,
    "batches": int,
    "short_rounds": int,
    "idle_s": float,
    "call_bytes": int,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="isohub beside what one would use instead"
    )
    parser.add_argument(
        "part", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}; all but soak unless given"
    )
    parser.add_argument("--quick", action="store_true", help="under a minute; the figures mean little")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there: docs/performance.md")
    for name, kind in _FIELDS.items():
        many = {"nargs": "+"} if name == "call_bytes" else {}
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=_positive(kind), metavar="N", help="see benchmarks/measure.py", **many
        )
    return parser


def _command(options: argparse.Namespace, given: dict[str, Any]) -> str:
    """The command less where it writes: that is this machine's business."""
    words = ["python -m benchmarks", *options.part, *(["--quick"] if options.quick else [])]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


def _positive(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    return read


def _version() -> str:
    import isohub

    return isohub.__version__


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # spawned processes repeat torch's
    sys.exit(main())
