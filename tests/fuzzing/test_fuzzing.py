"""C2 to C5, C9 and C10 over inputs that nobody thought of; `make fuzz` and ``python -m tests.fuzzing`` do more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from isohub.wire.codec import TAGS
from tests.fuzzing import harness
from tests.fuzzing.harness import Finding, one_input
from tests.fuzzing.mutate import mutated, seeds

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
SEEDS = seeds()
#: The true inputs that are refused all the same: what they ask for is not allowed.
REFUSED = {
    "value-p", "value-upper-i", "values-at-once", "parcel-too-long", "parcel-pipe", "parcels", "descriptors-many", "ready-twice"
}  # fmt: skip

common = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", SEEDS)
def test_what_is_true_is_taken(name):
    came = one_input(SEEDS[name])
    assert ("ProtocolError" in came) == (name in REFUSED)


def test_every_tag_and_event_is_among_what_mutations_begin_with():
    spoken = b"".join(SEEDS.values())
    assert all(f'["{tag}"'.encode() in spoken for tag in TAGS)
    assert all(f'"event": "{event}"'.encode() in spoken for event in ("ready", "value", "want", "error"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_corpus_finds_nothing(path):
    assert one_input(path.read_bytes())


def test_the_corpus_holds_what_mutations_begin_with():
    written = {path.name: path.read_bytes() for path in CORPUS}
    assert {name: written.get(name) for name in SEEDS} == SEEDS, "python -m tests.fuzzing --write-corpus"


@settings(common, max_examples=3000)
@given(st.integers(0, (1 << 64) - 1))
def test_what_is_nearly_true_gives_a_value_or_an_error(seed):
    assert one_input(mutated(Random(seed)))


@settings(common, max_examples=600)
@given(st.binary(max_size=300))
@example(b"")
def test_any_bytes_give_a_value_or_an_error(data):
    assert one_input(data)


def _raises(self, claimed, count):
    raise RuntimeError("not a ProtocolError")


def _leaks(self, claimed, count):
    import os

    os.dup(0)
    return


@pytest.mark.parametrize(("fault", "told"), [(_raises, "RuntimeError came out"), (_leaks, "descriptors are open")])
def test_a_fault_of_the_callers_is_found(fault, told, monkeypatch):
    monkeypatch.setattr(harness.Link, "_handle", fault)
    with pytest.raises(Finding, match=told):
        one_input(SEEDS["value-r"])


def test_a_run_reports_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing", "--frames", "2000", "--seed", "7"],
        cwd=Path(__file__).parent.parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "frames a second" in done.stdout
