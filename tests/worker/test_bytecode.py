"""Bytecode of a checkout: made by a worker that runs none of it, and believed as far as the text is."""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import isohub
from isohub.repos.bytecode import Shelf
from isohub.repos.verify import verify
from isohub.worker.bytecode import compile_tree, install
from tests.conftest import eventually

_HUBCONF = """\
import time
time.sleep(0.1)
import inner
from package import module as other

def module():
    import torch
    return torch.nn.Linear(1, 1)

def values():
    return inner.VALUE, other.VALUE, inner.__file__, inner.f.__code__.co_filename, type(inner.__loader__).__name__
"""
_GIT = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.fixture
def clone(tmp_path):
    """A repo whose import takes long enough, as a clone."""
    place = tmp_path / "clone"
    (place / "package").mkdir(parents=True)
    (place / "hubconf.py").write_text(_HUBCONF)
    (place / "inner.py").write_text("VALUE = 1\ndef f(): return 1\n")
    (place / "package" / "__init__.py").write_text("")
    (place / "package" / "module.py").write_text("VALUE = 2\n")
    (place / "broken.py").write_text("this is no Python\n")
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "x"]):
        subprocess.run(["git", *words], cwd=place, check=True, env={**os.environ, **_GIT})
    return place


@pytest.fixture
def own(tmp_path):
    with isohub.Session(tmp_path / "home", timeout_s=60) as opened:
        yield opened


def _file(tmp_path):
    found = [*(tmp_path / "home").glob("checkouts/*/*/*/*/bytecode-*")]
    return found[0] if found else None


def _ready(own, clone, tmp_path):
    """Load it once, and wait until its bytecode is there."""
    own.load(f"{clone}:main", "values")
    assert eventually(lambda: _file(tmp_path) is not None, 30)
    return _file(tmp_path)


def test_the_next_worker_finds_its_modules_compiled(own, clone, tmp_path):
    before = own.load(f"{clone}:main", "values")
    _ready(own, clone, tmp_path)
    after = own.load(f"{clone}:main", "values")
    assert before[:4] == after[:4]
    assert (before[4], after[4]) == ("SourceFileLoader", "Loader")


def test_it_is_the_checkouts_own_for_verify_ls_and_rm(own, clone, tmp_path):
    file = _ready(own, clone, tmp_path)
    assert verify(tmp_path / "home") == []
    assert file.stat().st_mode & 0o222 == 0
    (file.parent / ".bytecode-3.11.7-0123456789abcdef").write_bytes(b"of a killed writer")
    assert verify(tmp_path / "home") == []
    (file.parent / "bytecode").write_text("something else")
    assert [damage.path.name for damage in verify(tmp_path / "home")] == ["bytecode"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "link", "directory"])
def test_damage_costs_a_load_nothing_but_time(own, clone, tmp_path, damage):
    file = _ready(own, clone, tmp_path)
    body = bytearray(file.read_bytes())
    file.unlink()
    if damage == "link":
        file.symlink_to("/dev/zero")
    elif damage == "directory":
        file.mkdir()
    else:
        body[len(body) // 2] ^= 1
        file.write_bytes({"cut": bytes(body[:40]), "flipped": bytes(body), "empty": b""}[damage])
    values = own.load(f"{clone}:main", "values")
    assert values[:2] == (1, 2)
    assert values[4] == "SourceFileLoader"


def test_a_directory_of_the_users_gets_none(own, clone, tmp_path):
    own.load(clone, "values")
    time.sleep(0.5)
    assert not [path for path in tmp_path.rglob("*") if "bytecode" in path.name]
    _ready(own, clone, tmp_path)  # the control
    assert not [path for path in clone.rglob("*") if "bytecode" in path.name]


def _loader(session, clone, **options):
    return session.load(f"{clone}:main", "values", **options)[4]


def test_nobody_is_given_any_where_a_lockfile_binds_or_nothing_confines(own, clone, tmp_path):
    """Neither the lockfile nor the commit's hash vouches for it."""
    _ready(own, clone, tmp_path)
    assert _loader(own, clone) == "Loader"  # the control
    assert _loader(own, clone, sandbox="none", trust_repo=True) == "SourceFileLoader"
    for frozen in (False, True):
        lock = tmp_path / "isohub.lock"
        with isohub.Session(tmp_path / "home", timeout_s=60, lockfile=lock, frozen=frozen) as locked:
            assert _loader(locked, clone) == "SourceFileLoader"


def test_none_is_made_where_a_lockfile_binds_or_there_is_no_room(clone, tmp_path):
    home = tmp_path / "home"
    for options in ({"lockfile": tmp_path / "isohub.lock"}, {"max_workers": 1}):
        with isohub.Session(home, timeout_s=60, **options) as session:
            kept = session.load(f"{clone}:main", "module")
            time.sleep(1.0)
            assert kept is not None
        assert _file(tmp_path) is None
    with isohub.Session(home, timeout_s=60) as session:
        assert _ready(session, clone, tmp_path)  # the control


def test_it_is_for_the_hosts_packages_alone(own, clone, tmp_path):
    """An environment's may be anybody's, and would run where it is made."""
    from isohub.environments.runtime import HOST
    from isohub.session.precompiling import may_have

    handle = own.load(f"{clone}:main", "module")
    worker = handle._isohub.worker
    assert may_have(worker, locked=False)
    assert not may_have(worker, locked=True)
    for other in (replace(HOST, packages=("/somewhere",)), replace(HOST, key="0" * 64, python="/somewhere/python")):
        assert not may_have(SimpleNamespace(runtime=other, placement=worker.placement), locked=False)


def test_what_compiles_has_no_more_than_the_session_allows():
    from isohub.sandbox.policy import Sandbox
    from isohub.session.precompiling import _policy

    strict = _policy(Sandbox(memory="512MiB", cpu_time_s=3))
    assert (int(strict.memory), strict.cpu_time_s) == (512 << 20, 3)
    generous = _policy(Sandbox(memory="64GiB"))
    assert (int(generous.memory), generous.cpu_time_s) == (4 << 30, 120)


def test_large_files_are_left_to_who_imports_them(tmp_path):
    (tmp_path / "hubconf.py").write_text("VALUE = 1\n")
    (tmp_path / "large.py").write_text("VALUE = [\n" + "    1,\n" * (1 << 18) + "]\n")
    names = [path for path, *_ in marshal.loads(compile_tree(str(tmp_path)))[2]]
    assert names == ["hubconf.py"]


def test_what_cannot_be_written_is_not_there(own, clone, tmp_path):
    checkout = own.fetch(f"{clone}:main")
    name = f"bytecode-{'.'.join(map(str, sys.version_info[:3]))}"
    taken = checkout.root.parent / name / "full"
    taken.mkdir(parents=True)
    with Shelf(checkout, name.partition("-")[2]) as shelf:
        with pytest.raises(OSError, match="."):
            shelf.write(b"x")
        assert shelf.read() is None
    for _ in range(2):
        assert own.load(f"{clone}:main", "values")[:2] == (1, 2)
        time.sleep(0.5)
    assert [path.name for path in checkout.root.parent.iterdir() if "bytecode" in path.name] == [name]


def test_a_worker_that_has_run_the_repos_code_writes_none(own, clone, tmp_path):
    file = _ready(own, clone, tmp_path)
    before = file.read_bytes()

    def spoil(module, file):
        found = [file.exists()]
        for act in (lambda: file.write_bytes(b"x"), file.unlink, file.with_name("tree").rmdir):
            try:
                act()
            except OSError as error:
                found.append(type(error).__name__)
        return found

    with own.load(f"{clone}:main", "module") as handle:
        seen, *failed = handle.run(spoil, file)
        assert not seen
        assert len(failed) == 3
    assert file.read_bytes() == before


def test_processes_at_once_leave_one_whole_file(own, clone, tmp_path):
    checkout = own.fetch(f"{clone}:main")
    code = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from pathlib import Path\n"
        "from isohub.repos.bytecode import Shelf\n"
        "with Shelf(SimpleNamespace(root=Path(sys.argv[1])), '3.11.7') as shelf:\n"
        "    for _ in range(50):\n"
        "        shelf.write(sys.argv[2].encode() * 100_000)\n"
        "        assert len(shelf.read()) == 100_000\n"
    )
    command = [sys.executable, "-c", code, str(checkout.root)]
    writers = [subprocess.Popen([*command, letter], cwd=Path(__file__).parents[2]) for letter in "abcdefgh"]
    assert [writer.wait(60) for writer in writers] == [0] * 8
    assert [path.name for path in checkout.root.parent.iterdir() if "bytecode" in path.name] == ["bytecode-3.11.7"]


def test_it_is_made_of_text_alone(tmp_path):
    """Nothing of it is run; what is no Python is left out, and so are links."""
    (tmp_path / "runs.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "broken.py").write_text("(")
    (tmp_path / "null.py").write_bytes(b"\0")
    (tmp_path / "deep.py").write_text("(" * 5000)
    (tmp_path / "link.py").symlink_to("/etc/passwd")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.py").write_text("")
    entries = marshal.loads(compile_tree(str(tmp_path)))[2]
    assert [path for path, *_ in entries] == ["runs.py"]


IMPORTS = """
import json, sys
from isohub.worker.bytecode import install
root, bundle = sys.argv[1], open(sys.argv[2], "rb").read()
install(root, bundle)
sys.path.insert(0, root)
import one, json.tool, pkgutil
print(json.dumps([one.VALUE, type(one.__loader__).__name__, json.tool.__loader__.__class__.__name__,
                  sorted(m.name for m in pkgutil.iter_modules([root]))]))
"""


@pytest.mark.parametrize("change", ["nothing", "text", "time", "place"])
def test_it_is_used_for_what_it_was_made_of(tmp_path, change):
    root, bundle = tmp_path / "root", tmp_path / "bundle"
    root.mkdir()
    module = root / "one.py"
    module.write_text("VALUE = 1\n")
    made = marshal.loads(compile_tree(str(root)))
    path, size, time_ns, _ = made[2][0]
    told = marshal.dumps(compile("VALUE = 'compiled'", str(module), "exec"))
    place = "/elsewhere" if change == "place" else made[1]
    bundle.write_bytes(marshal.dumps((made[0], place, [(path, size, time_ns, told)])))
    if change == "text":
        module.write_text("VALUE = 'changed'\n")
    elif change == "time":
        os.utime(module, ns=(1, 1))
    command = [sys.executable, "-c", IMPORTS, str(root), str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    value = {"nothing": "compiled", "text": "changed"}.get(change, 1)
    assert done.stdout.strip() == f'[{value!r}, "Loader", "SourceFileLoader", ["one"]]'.replace("'", '"')


def test_of_another_interpreter_it_is_nothing(tmp_path):
    before = [*sys.path_hooks]
    (tmp_path / "one.py").write_text("VALUE = 1")
    magic, root, entries = marshal.loads(compile_tree(str(tmp_path)))
    try:
        loader = install(str(tmp_path), marshal.dumps((b"none", root, entries)))
        code = loader("one", str(tmp_path / "one.py")).get_code("one")
    finally:
        sys.path_hooks[:] = before
    assert magic != b"none"
    names = {}
    exec(code, names)
    assert names["VALUE"] == 1
