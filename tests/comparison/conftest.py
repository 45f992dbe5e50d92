"""A git repository of one model in many variants, one tag each, and a way to compare some of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import isohub

HUBCONF = '''
import os
import time

import torch
from torch import nn

from variant import VARIANT


if VARIANT.startswith("liar"):
    import sys

    worker = sys.modules["isohub.worker.measuring"].Measurements
    if VARIANT == "liar_index":
        worker.do_state_index = lambda self, target: [("a", "torch.float32", [-1], 4, 0)]
    if VARIANT == "liar_part":
        worker.do_state_part = lambda self, target, names: {name: torch.zeros(3) for name in names}
    if VARIANT == "liar_modules":
        worker.do_structure = lambda self, target: [("", "Net", "", -5)]
    if VARIANT == "liar_threads":
        worker.do_threads = lambda self, target: "many"


class Head(nn.Linear):
    def extra_repr(self):
        return super().extra_repr() + f", of={object()}"  # another address in every process


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = Head(8, 6)
        if VARIANT == "tied":
            self.body[2].weight = self.body[0].weight
        if VARIANT == "renamed":
            self.trunk = self.body
            del self.body
        if VARIANT == "wider":
            self.head = Head(8, 7)
        if VARIANT == "half":
            self.head = self.head.to(torch.float64)
        if VARIANT == "values":
            with torch.no_grad():
                self.body[0].weight[3, 5] += 0.25
                self.head.bias.mul_(2)

    def forward(self, x, scale=1.0):
        body = self.trunk if VARIANT == "renamed" else self.body
        hidden = body(x)
        logits = self.head(hidden.to(self.head.weight.dtype)) * scale
        if VARIANT == "nudged":
            logits = logits + 1e-4
        if VARIANT == "nan":
            logits[1, 2] = float("nan")
        if VARIANT.startswith("noisy"):
            logits = logits + int.from_bytes(os.urandom(2), "little") / 65536 + (100 if VARIANT == "noisy_far" else 0)
        if VARIANT == "raises":
            raise ValueError("a sum of \\x1b[31mred")
        if VARIANT == "dies":
            os._exit(3)
        if VARIANT == "slow":
            time.sleep(0.03)
        words = {"logits": logits, "hidden": (hidden, nn.functional.dropout(hidden)), "name": "net", "count": 3}
        if VARIANT == "other_name":
            words["name"] = "another"
        if VARIANT == "fewer":
            del words["count"]
            words["more"] = [1, 2]
        if VARIANT == "random_words":
            words["name"] = os.urandom(4).hex()
        return words

    def classify(self, x):
        return self(x)["logits"].argmax(1)


def model(bad=False):
    """The model."""
    if VARIANT == "broken" or bad:
        raise RuntimeError("it cannot be built")
    if VARIANT == "lies":
        began = time.time()
        time.perf_counter = lambda: (time.time() - began) * 1e6
    return Net()


def pair():
    return "first", Net()


def numbers(count=3):
    return {"values": torch.arange(count) + (VARIANT == "values"), "text": VARIANT if VARIANT == "values" else "same"}


def function():
    return lambda x: x * (2 if VARIANT == "values" else 1)


def opaque():
    return lambda x: {"rows": iter([1, 2]), "x": x}


def scatter():
    return [[number] for number in range(15_000)]


def scattered():
    return lambda x: scatter()


if VARIANT == "gone":
    del model
'''
VARIANTS = [
    "base",
    "same",
    "values",
    "renamed",
    "tied",
    "wider",
    "half",
    "nudged",
    "nan",
    "raises",
    "dies",
    "slow",
    "other_name",
    "fewer",
    "random_words",
    "broken",
    "lies",
    "gone",
    "noisy",
    "noisy_again",
    "noisy_far",
    "liar_index",
    "liar_part",
    "liar_modules",
    "liar_threads",
]


def git(repo: Path, *arguments: str) -> str:
    own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    own.update(GIT_CONFIG_GLOBAL="/dev/null", GIT_CONFIG_NOSYSTEM="1")
    who = ["-c", "user.name=T", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", *who, *arguments], cwd=repo, env=own, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repo = tmp_path_factory.mktemp("variants") / "net"
    repo.mkdir()
    git(repo, "init", "--quiet", "--initial-branch=main")
    (repo / "hubconf.py").write_text(HUBCONF)
    for name in VARIANTS:
        (repo / "variant.py").write_text(f'VARIANT = "{name}"\n')
        if name == "same":
            (repo / "variant.py").write_text('# The same again.\nVARIANT = "base"\n')
        git(repo, "add", "--all")
        git(repo, "commit", "--quiet", "--message", name)
        git(repo, "tag", name)
    git(repo, "checkout", "--quiet", "base")
    return repo


Compared = Callable[..., isohub.Comparison]


@pytest.fixture(scope="session")
def compared(variants: Path, session: isohub.Session) -> Compared:
    """``compared("base", "values", model="model", ...)``, not timed unless asked for."""

    def compare(*names: str, model: str = "model", inputs: Any = "randn(4,8)", **options: Any) -> isohub.Comparison:
        refs = [f"{variants}:{name}" for name in names]
        return isohub.compare(refs, model, inputs, **{"repeats": 0, "session": session, **options})

    return compare
