import collections
import functools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from isohub.execution.digests import digest_of

SCALE = 2


def helper(x):
    return x + 1


def metric(scale):
    def fn(model, batch):
        return {"a": helper(batch) * scale * SCALE}

    return fn


class Meter:
    def __init__(self, k):
        self.k = k

    def __call__(self, model, batch):
        return {"k": self.k}


def test_what_is_equal_is_the_same():
    for value in (1, "a", [1, 2], {"a": torch.ones(3)}, np.arange(3), (None, True), {3, "x"}, 1j, metric(2), Meter(3)):
        assert digest_of(value) == digest_of(value)
    assert digest_of(metric(2)) == digest_of(metric(2))
    assert digest_of(Meter(3)) == digest_of(Meter(3))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        ("1", 1),
        (b"a", "a"),
        ([1, [2]], [[1], 2]),
        (["ab", "c"], ["a", "bc"]),
        ([1], (1,)),
        (torch.ones(4), torch.ones(2, 2)),
        (torch.ones(4), torch.ones(4, dtype=torch.float64)),
        (torch.zeros(2), torch.tensor([0.0, -0.0])),
        (np.ones(4), torch.ones(4)),
        (metric(2), metric(3)),
        (lambda x: x + 1, lambda x: x + 2),
        (Meter(3), Meter(4)),
        ({"a": 1}, {"b": 1}),
    ],
)
def test_what_is_not_is_another(one, other):
    assert digest_of(one) != digest_of(other)


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


class Base:
    def __call__(self, model, batch):
        return {"a": 1}


class Derived(Base):
    pass


def test_what_an_object_holds_counts_wherever_it_holds_it(monkeypatch):
    assert digest_of(functools.partial(metric, 2)) == digest_of(functools.partial(metric, 2))
    assert digest_of(functools.partial(metric, 2)) != digest_of(functools.partial(metric, 3))
    assert digest_of(functools.partial(metric, 2)) != digest_of(functools.partial(helper, 2))
    assert digest_of(Slotted(1)) == digest_of(Slotted(1)) != digest_of(Slotted(2))
    assert digest_of(collections.defaultdict(list, a=[1])) != digest_of(collections.defaultdict(list, a=[2]))
    assert digest_of(collections.deque([1])) != digest_of(collections.deque([2]))
    assert digest_of(torch.nn.Linear(2, 2)) != digest_of(torch.nn.Linear(2, 2))
    before = digest_of(Derived())
    monkeypatch.setattr(Base, "__call__", lambda self, model, batch: {"a": 2})
    assert digest_of(Derived()) != before


def test_a_helper_and_a_global_count(monkeypatch):
    before = digest_of(metric(2))
    monkeypatch.setitem(globals(), "SCALE", 3)
    changed = digest_of(metric(2))
    assert changed != before
    monkeypatch.undo()
    monkeypatch.setitem(globals(), "helper", lambda x: x + 5)
    assert digest_of(metric(2)) not in (before, changed)


def test_what_leads_back_to_itself_ends():
    loop = [1]
    loop.append(loop)
    assert digest_of(loop) == digest_of(loop)

    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    assert digest_of(even) != digest_of(odd)


def test_it_is_the_same_in_every_process(tmp_path):
    code = textwrap.dedent("""
        import torch
        from isohub.execution.digests import digest_of
        NAMES = {"b", "a", "c"}
        class Thing:
            def __init__(self): self.x = object(); self.f = len; self.d = torch.float32
        def fn(model, batch, thing=Thing()):
            if batch in {"x", "y", "z"}:
                return NAMES, [].append
            return torch.nn.functional.cross_entropy, Thing
        print(digest_of(fn), digest_of({"a", "b", "c"}))
    """)
    path = tmp_path / "program.py"
    path.write_text(code)
    said = {
        subprocess.run(
            [sys.executable, path], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed, "PATH": ""}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


@pytest.mark.parametrize("form", ["staticmethod", "classmethod", "property", "lru_cache(None)", "cached_property", ""])
def test_what_a_class_holds_counts(form):
    """A metric that is an object: its file goes on with the same code alone."""

    def metric(number, default=0, value=0):
        lines = [
            "class Metric:",
            f"    VALUE = {value}",
            f"    @{form}" if form else "",
            f"    def part(self=None): return {number}",
            f"    def __call__(self, model, batch, scale={default}): return {{}}",
        ]
        space = {"__name__": "a_module", "lru_cache": functools.lru_cache, "cached_property": functools.cached_property}
        exec("\n".join(lines), space)
        return space["Metric"]()

    assert digest_of(metric(1)) == digest_of(metric(1))
    others = {digest_of(metric(*each)) for each in ((1,), (2,), (1, 1), (1, 0, 1))}
    assert len(others) == 4
