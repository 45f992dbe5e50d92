"""Workers that were forked ahead of need: used once, as confined as others, and never in the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

import isohub
from tests.conftest import companions, eventually, gone, require_layers, spare_of, spares_of, zygote_of
from tests.lacking import start_without

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own(hub):
    """A session whose zygote has a spare."""
    with isohub.Session(timeout_s=60) as opened:
        opened.load(hub("good"), "mlp").close()
        spare_of(opened)
        yield opened


@pytest.fixture(params=["namespaces", "no namespaces"])
def either(request, hub, tmp_path, monkeypatch):
    """Likewise, on a machine with and without namespaces."""
    if request.param == "namespaces":
        require_layers("namespaces")
    else:
        monkeypatch.setattr("isohub.session.spawn.START", start_without(tmp_path, "namespaces"))
    with isohub.Session(timeout_s=60) as opened:
        opened.load(hub("good"), "mlp").close()
        spare_of(opened)
        yield opened


def _standing(module):
    """What a worker can say of its confinement."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":\t", 1) for line in status.read().splitlines() if ":\t" in line)
    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters", "Threads")
    descriptors = []
    for name in sorted(os.listdir("/proc/self/fd"), key=int):
        try:
            descriptors.append(os.readlink(f"/proc/self/fd/{name}").split(":")[0])
        except OSError:
            pass  # that of the listing
    return {
        **{name: lines[name].strip() for name in names},
        "namespaces": sorted(os.listdir("/proc/self/ns")),
        "descriptors": descriptors,
        "root": sorted(os.listdir("/")) if os.access("/proc/1/root", os.F_OK) else None,
        "mounts": Path("/proc/self/mountinfo").read_text().count("\n"),
        "variables": sorted(os.environ),
        "places": [os.environ["HOME"].rpartition("/")[2], os.getcwd().rpartition("/")[2]],
        "umask": os.umask(0o077),
        "leads": os.getsid(0) == os.getpid(),
        "modules": "hubconf" in sys.modules,
    }


def test_a_spare_becomes_the_next_worker_and_another_takes_its_place(own, hub):
    spare = spare_of(own)
    with own.load(hub("good"), "mlp") as handle:
        assert handle.stats().pid == spare
        assert handle(torch.ones(1, 4)).shape == (1, 2)
        second = spare_of(own)
        assert second != spare
        with own.load(hub("edits_sys_path"), "model") as other:
            assert other.stats().pid == second


def test_it_is_confined_as_a_worker_that_was_not_forked_ahead(either, hub):
    os.kill(spare_of(either), signal.SIGKILL)
    assert eventually(lambda: spares_of(either) == [])
    found = []
    for _ in range(2):
        spares = spares_of(either)
        with either.load(hub("good"), "mlp") as handle:
            found.append((handle.stats().pid in spares, handle.confinement, handle.run(_standing)))
        spare_of(either)
    assert [ahead for ahead, *_ in found] == [False, True]
    assert found[0][1:] == found[1][1:]


def test_it_has_nothing_of_the_worker_before(own, hub):
    def leave(module):
        Path(os.environ["HOME"], "left").write_text("x")
        os.environ["LEFT"] = "x"

    def look(module):
        return os.listdir(os.environ["HOME"]), "LEFT" in os.environ, os.environ["HOME"], torch.initial_seed()

    with own.load(hub("good"), "mlp") as handle:
        handle.run(leave)
        home, seed = handle.run(look)[2:]
        spare_of(own)
        with own.load(hub("edits_sys_path"), "model") as other:
            files, variable, its_home, its_seed = other.run(look)
    assert files == []
    assert not variable
    assert its_home != home
    assert its_seed != seed


@pytest.mark.parametrize(
    "policy", [isohub.Sandbox(processes=64), isohub.Sandbox(network="open")], ids=["processes", "network"]
)
def test_a_policy_that_it_does_not_fit_forks_another(own, hub, policy):
    spare = spare_of(own)
    with own.load(hub("good"), "mlp", sandbox=policy, trust_repo=True) as handle:
        assert handle.stats().pid != spare
        assert handle(torch.ones(1, 4)).shape == (1, 2)
        assert eventually(lambda: gone(spare))  # the next one is likely to be as this one
        assert spare_of(own) != spare


def test_a_policy_of_paths_and_limits_fits(own, hub, tmp_path):
    def look(module, readable, writable):
        with pytest.raises(OSError, match="."):
            Path(readable, "new").write_text("x")
        Path(writable, "new").write_text("x")
        return Path(readable, "file").read_text(), os.statvfs(os.environ["HOME"]).f_blocks * 4096

    places = [tmp_path / name for name in ("read", "write")]
    for place in places:
        place.mkdir()
    (places[0] / "file").write_text("content")
    spare = spare_of(own)
    policy = isohub.Sandbox(read=[places[0]], write=[places[1]], disk=64 << 20, memory=8 << 30)
    with own.load(hub("good"), "mlp", sandbox=policy) as handle:
        assert handle.stats().pid == spare
        content, disk = handle.run(look, str(places[0]), str(places[1]))
    assert content == "content"
    assert (places[1] / "new").read_text() == "x"
    if "namespaces" in handle.confinement.active:
        assert disk == 64 << 20


def test_one_that_died_is_noticed_and_not_made_again_before_a_load(either, hub):
    os.kill(spare_of(either), signal.SIGKILL)
    assert eventually(lambda: spares_of(either) == [])
    time.sleep(0.1)
    assert spares_of(either) == []
    with either.load(hub("good"), "mlp") as handle:
        assert handle(torch.ones(1, 4)).shape == (1, 2)
        spare_of(either)


def test_loads_at_once_share_nothing(own, hub):
    spare = spare_of(own)
    names = ["good", "edits_sys_path", "changes_directory", "echoes"]
    entries = {"good": "mlp", "edits_sys_path": "model", "changes_directory": "where", "echoes": "echo"}
    with ThreadPoolExecutor(4) as threads:
        handles = [*threads.map(lambda name: own.load(hub(name), entries[name]), names)]
    del handles
    with ThreadPoolExecutor(4) as threads:
        workers = [*threads.map(lambda replica: own.load(hub(replica), entries[replica]), ["good", "edits_sys_path"])]
        pids = [handle.stats().pid for handle in workers]
    assert len(set(pids)) == 2
    assert gone(spare) or spare in pids


def test_a_file_that_was_put_in_anothers_place_is_what_the_next_worker_sees(hub, tmp_path, monkeypatch):
    """What a spare shows was there when it was made: a module of an installation in place, saved by an editor."""
    module = tmp_path / "installed" / "beside_the_repo.py"
    module.parent.mkdir()
    module.write_text("VALUE = 1")
    site = tmp_path / "site"
    site.mkdir()
    (site / "in_place.pth").write_text(str(module.parent))
    monkeypatch.setattr("isohub.session.spawn._site_directories", lambda: [str(site)])

    def look(module):
        import beside_the_repo

        return beside_the_repo.VALUE

    with isohub.Session(timeout_s=60) as own:
        with own.load(hub("good"), "mlp") as handle:
            assert handle.run(look) == 1
        spare = spare_of(own)
        saved = module.with_suffix(".new")
        saved.write_text("VALUE = 22")
        saved.replace(module)
        with own.load(hub("good"), "mlp") as handle:
            assert handle.stats().pid != spare
            assert handle.run(look) == 22
        assert eventually(lambda: gone(spare))


MOUNTS = """
import os, sys, time
from pathlib import Path
from isohub.sandbox import namespaces
place = sys.argv[3]
namespaces.become_own_user()
namespaces.leave_host(network=True)
namespaces._mount("tmpfs", place, "tmpfs", 0)
import isohub
from tests.conftest import eventually, gone, spare_of, spares_of
with isohub.Session(sys.argv[1], timeout_s=60) as session:
    session.load(sys.argv[2], "mlp").close()
    spare = spare_of(session)
    assert place in Path(f"/proc/{spare}/mountinfo").read_text()  # the control
    namespaces.libc_call("umount2", place.encode(), 0)
    assert eventually(lambda: gone(spare))
    assert spares_of(session) == []
    session.load(sys.argv[2], "mlp").close()
    spare_of(session)
    namespaces._mount("tmpfs", place, "tmpfs", 0)
    Path(place, "file").write_text("mounted since")
    policy = isohub.Sandbox(read=[place])
    with session.load(sys.argv[2], "mlp", sandbox=policy) as handle:
        print(handle.run(lambda module, path: Path(path, "file").read_text(), place))
"""


def test_mounts_that_change_end_it(hub, tmp_path):
    """What was unmounted is let go, and what was mounted since is seen."""
    require_layers("namespaces")
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, "-c", MOUNTS, str(tmp_path / "home"), hub("good"), str(place)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "mounted since"), done.stderr


def test_it_waits_without_work(own):
    spare, zygote = psutil.Process(spare_of(own)), zygote_of(own)
    time.sleep(0.1)

    def used():
        return [(*one.cpu_times()[:2], *one.num_ctx_switches()) for one in (spare, zygote)]

    before = used()
    time.sleep(0.5)
    assert used() == before


def test_closing_ends_it_and_what_is_around_it(either):
    spare = spare_of(either)
    around = {*companions(spare), spare} if "/" in os.readlink(f"/proc/{spare}/ns/pid") else {spare}
    around = {pid for pid in around if os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid")} | {spare}
    directory = Path(zygote_of(either).cwd())
    assert directory.exists()
    either.close()
    assert all(gone(pid) for pid in around)
    assert not directory.exists()


@pytest.mark.parametrize("victim", ["caller", "zygote"])
def test_it_does_not_outlive(hub, tmp_path, victim):
    code = (
        "import isohub, sys, time\n"
        "from tests.conftest import spare_of, zygote_of\n"
        "session = isohub.Session(sys.argv[1], timeout_s=60)\n"
        "session.load(sys.argv[2], 'mlp').close()\n"
        "print(spare_of(session), zygote_of(session).pid, zygote_of(session).cwd(), flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path), hub("good")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as caller:
        try:
            assert caller.stdout is not None
            spare, zygote, directory = caller.stdout.readline().split()
            assert not gone(int(spare))
            os.kill(caller.pid if victim == "caller" else int(zygote), signal.SIGKILL)
            assert eventually(lambda: gone(int(spare)) and gone(int(zygote)))
            assert eventually(lambda: not Path(directory).exists())
        finally:
            caller.kill()
