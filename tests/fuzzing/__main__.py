"""A plain random run over the caller's reading of a worker's bytes: ``python -m tests.fuzzing --frames 1000000``.

Needs nothing but what the tests need. Ends with the figures, and with 1 if anything was found; the input is then
in a file of its own, which belongs in `corpus`.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import psutil

from tests.fuzzing.harness import Finding, one_input
from tests.fuzzing.mutate import mutated, seeds

CORPUS = Path(__file__).parent / "corpus"
#: What a first stretch of frames takes is not growth: caches fill, pools of memory open.
_WARM_UP = 20_000


def main() -> int:
    """Run, report, and say whether anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=100_000, help="how many frames to read (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers; the same one gives the same inputs")
    parser.add_argument(
        "--write-corpus", action="store_true", help="write the true inputs to tests/fuzzing/corpus and end"
    )
    parser.add_argument("inputs", nargs="*", type=Path, help="files to read instead, such as a finding's")
    asked = parser.parse_args()
    if asked.write_corpus:
        for name, data in seeds().items():
            (CORPUS / name).write_bytes(data)
        return 0
    if asked.inputs:
        for path in asked.inputs:
            print(f"{path}: {dict(one_input(path.read_bytes()))}")
        return 0
    return _run(asked.frames, asked.seed)


def _run(frames: int, seed: int) -> int:
    came: Counter[str] = Counter()
    read = inputs = findings = 0
    before = _state() if frames < _WARM_UP else None
    started = time.monotonic()
    while read < frames:
        chance = Random(f"{seed}/{inputs}")
        data = chance.randbytes(chance.randint(0, 200)) if chance.random() < 0.02 else mutated(chance)
        inputs += 1
        try:
            came.update(one_input(data))
        except Finding as finding:
            findings += 1
            path = Path(f"finding-{hashlib.sha256(data).hexdigest()[:12]}")
            path.write_bytes(data)
            print(f"{path}: {finding}", flush=True)
            came["finding"] += 1
        read = sum(came.values()) - came["closed"]
        if before is None and read >= _WARM_UP:
            before = _state()
    took_s = time.monotonic() - started
    after = _state()
    assert before is not None
    print(f"{read} frames in {inputs} inputs, {took_s:.0f} s, {read / took_s:.0f} frames a second; seed {seed}")
    for name, count in came.most_common():
        print(f"  {name:<14} {count:>9}")
    print(
        f"resident memory {before[0] >> 20} MiB after {min(_WARM_UP, frames)} frames, {after[0] >> 20} MiB at the end"
    )
    print(f"descriptors {before[1]} and {after[1]}; mappings {before[2]} and {after[2]}")
    return 1 if findings else 0


def _state() -> tuple[int, int, int]:
    """Resident bytes, open descriptors, and mappings of shared memory."""
    gc.collect()
    with Path("/proc/self/maps").open() as maps:
        mappings = sum("memfd:" in line for line in maps)
    return psutil.Process().memory_info().rss, len(os.listdir("/proc/self/fd")), mappings


if __name__ == "__main__":
    sys.exit(main())
