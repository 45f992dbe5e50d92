"""The coverage-guided run: ``make fuzz``. Needs atheris, which the target installs.

Arguments are libFuzzer's: directories of inputs, the first of which collects what reaches new code, and options.
"""

from __future__ import annotations

import sys
from random import Random

import atheris

with atheris.instrument_imports(include=["isohub.wire", "isohub.session"]):
    from tests.fuzzing.harness import one_input

from tests.fuzzing.mutate import LONGEST, mutated


def _mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """What libFuzzer calls for a new input: two of three know the wire, the third is libFuzzer's own."""
    chance = Random(seed)
    if chance.random() < 0.66:
        return mutated(chance, data)[:max_size]
    return atheris.Mutate(data, max_size)


def _one_input(data: bytes) -> None:
    one_input(data)


if __name__ == "__main__":
    atheris.Setup([*sys.argv, f"-max_len={LONGEST}"], _one_input, custom_mutator=_mutate)
    atheris.Fuzz()
