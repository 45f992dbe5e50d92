"""isohub.session.ahead: what a first load does before this process has torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

_HEAVY = ("torch", "numpy", "requests", "dulwich", "psutil", "filelock", "msgspec", "tqdm", "rich", "asyncio")


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_session_brings_nothing_heavy():
    code = f"import sys, isohub\nisohub.Session()\nprint([name for name in {_HEAVY} if name in sys.modules])"
    assert run(code) == "[]"


def test_a_zygote_is_started_before_anything_heavy_is_imported(hub):
    code = f"""\
import subprocess, sys, isohub
start, seen = subprocess.Popen.__init__, []
def note(self, arguments, *others, **more):
    if "zygote" in arguments:
        seen.append([name for name in {_HEAVY} if name in sys.modules])
    start(self, arguments, *others, **more)
subprocess.Popen.__init__ = note
with isohub.Session() as session:
    session.load(sys.argv[1], "mlp")
    session.load(sys.argv[1], "mlp")
print(seen)
"""
    assert run(code, hub("good")) == "[[]]"


def test_a_load_without_torch_says_so_and_leaves_nothing(hub, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')\n")
    code = f"""\
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
import isohub
session = isohub.Session()
before = set(os.listdir("/proc/self/fd"))
for _ in range(2):
    try:
        session.load(sys.argv[1], "mlp")
    except ImportError as error:
        print(error)
session.close()
print(len(set(os.listdir("/proc/self/fd")) - before))
"""
    assert run(code, hub("good")).splitlines() == ["no torch today", "no torch today", "0"]


@pytest.mark.parametrize("before", ["", "gc.disable()", "gc.freeze()"])
def test_collections_are_as_they_were(hub, before):
    code = f"""\
import gc, sys, isohub
{before}
was = gc.isenabled(), gc.get_freeze_count() > 0
class Cycle: pass
one = Cycle()
one.own = one
import weakref
gone = weakref.ref(one)
del one
with isohub.Session() as session:
    session.load(sys.argv[1], "mlp")
assert (gc.isenabled(), gc.get_freeze_count() > 0) == was
gc.collect()
print(gone() is None)
"""
    assert run(code, hub("good")) == "True"
