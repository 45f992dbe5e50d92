"""Ways out that were found by a second reader, each closed: C18, C19, C22, C23, C27 and C28."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys

import pytest
import torch

import isohub
from isohub import errors
from isohub.sandbox.policy import Sandbox
from tests.conftest import companions, eventually, gone, require_layers
from tests.servers.git_repo import GitRepo

HUBCONF = "import torch\n\n\ndef model():\n    return torch.nn.Linear(1, 1)\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    require_layers("landlock", "seccomp", "namespaces")
    with isohub.Session(tmp_path_factory.mktemp("ways-out"), timeout_s=60) as opened:
        yield opened


def attempt(module, act, *args):
    try:
        return act(*args)
    except OSError as error:
        return f"{type(error).__name__}: {error.errno}"


def test_c18_a_subdirectory_of_links_opens_no_more_than_the_tree(whole, tmp_path):
    """The way that is written is longer than the one that it leads."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("secret")
    repo = GitRepo(private / "repo")
    (repo.path / "m").mkdir()
    (repo.path / "m" / "hubconf.py").write_text(HUBCONF)
    (repo.path / "a" / "b" / "c").mkdir(parents=True)
    (repo.path / "a" / "b" / "c" / "way").symlink_to("../../../m")
    repo.commit()
    for subdirectory in ("a/b/c/way", "m"):  # the second is the control: it loads, and sees as little
        with whole.load(f"git+file://{repo.path}#subdirectory={subdirectory}", "model") as handle:
            worker = whole._pool.workers()[0]
            assert worker.placement.checkout.name == "tree"
            assert handle.run(attempt, os.listdir, str(private)).startswith(("FileNotFoundError", "PermissionError"))
            above = str(worker.placement.checkout.parent.parent)
            assert set(handle.run(attempt, os.listdir, above)) <= {worker.placement.checkout.parent.name}


def test_c19_devices_and_standard_input_cannot_be_changed(whole, hub):
    def change(module):
        found = {}
        for place in ("/dev/null", "/dev/urandom", 0):
            try:
                os.chmod(place, 0o666)
                found[str(place)] = "changed"
            except OSError as error:
                found[str(place)] = error.errno
        own = os.path.join(os.environ["TMPDIR"], "own")
        open(own, "w").close()
        os.chmod(own, 0o640)  # the control
        return found, os.stat(own).st_mode & 0o777

    with whole.load(hub("good"), "mlp") as handle:
        assert handle.run(change) == ({"/dev/null": 30, "/dev/urandom": 30, "0": 30}, 0o640)


def test_c19_no_file_is_left_that_runs_as_its_owner(whole, hub, tmp_path):
    def make(module, directory):
        found = []
        libc = ctypes.CDLL(None, use_errno=True)
        path = os.path.join(directory, "file")
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o755)
        acts = [
            lambda: os.chmod(path, 0o4755),
            lambda: os.fchmod(descriptor, 0o2755),
            lambda: os.open(path + "2", os.O_CREAT | os.O_WRONLY, 0o4755),
            lambda: os.mknod(path + "3", 0o104755),
            lambda: libc.syscall(85, path.encode() + b"4", 0o4755),
        ]
        for act in acts:
            try:
                found.append(act())
            except OSError as error:
                found.append(error.errno)
        os.chmod(path, 0o750)
        return found

    with whole.load(hub("good"), "mlp", sandbox=Sandbox(write=[tmp_path])) as handle:
        found = handle.run(make, str(tmp_path))
    assert found[:4] == [1, 1, 1, 1]
    assert found[4] == -1 or os.uname().machine != "x86_64"
    made = [path.stat().st_mode for path in tmp_path.iterdir()]
    assert made
    assert not any(mode & (stat.S_ISUID | stat.S_ISGID) for mode in made)
    assert [mode & 0o777 for mode in made] == [0o750]  # the control: an ordinary mode was set


def test_c22_the_first_process_shows_nothing_of_the_host(whole, hub):
    def look(module):
        seen = {}
        for path in ("/proc/1/net/tcp", "/proc/1/mountinfo", "/proc/1/cmdline", "/proc/self/mountinfo"):
            try:
                with open(path) as file:
                    seen[path] = len(file.read()) > 0
            except OSError:
                seen[path] = None
        return seen

    with whole.load(hub("good"), "mlp") as handle:
        seen = handle.run(look)
    assert seen.pop("/proc/self/mountinfo") is True  # the control
    assert set(seen.values()) == {None}


def test_c23_no_child_is_given_to_the_zygote(whole, hub):
    def adopt(module, flags):
        libc = ctypes.CDLL(None, use_errno=True)
        number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
        pid = libc.syscall(number, flags | 17, 0, 0, 0, 0)  # clone(2), with SIGCHLD
        if pid == 0:
            import time as remote_time

            remote_time.sleep(60)
            os._exit(0)
        return pid > 0 or ctypes.get_errno()

    handle = whole.load(hub("good"), "mlp")
    assert handle.run(adopt, 0x8000) == 1  # CLONE_PARENT: EPERM
    assert handle.run(adopt, 0) is True  # the control: a child of its own
    pids = companions(handle.stats().pid)
    handle.close()
    assert eventually(lambda: all(gone(pid) for pid in pids))


def test_c18_nothing_is_given_within_what_a_worker_may_change(whole, hub, tmp_path):
    inner = tmp_path / "project" / "out"
    inner.mkdir(parents=True)
    outer = inner.parent
    for wanted in ({"write": [outer, inner]}, {"write": [outer], "read": [inner]}):
        with pytest.raises(errors.PolicyError, match="lies within write="):
            whole.load(hub("good"), "mlp", sandbox=Sandbox(**wanted))
    (inner / "hubconf.py").write_text(HUBCONF)
    with pytest.raises(errors.PolicyError, match="lies within write="):
        whole.load(str(inner), "model", sandbox=Sandbox(write=[outer]))
    with whole.load(str(inner), "model", sandbox=Sandbox(write=[inner])) as handle:  # the control
        assert handle(torch.ones(1, 1)).shape == (1, 1)


def test_c28_descriptors_in_flight_leave_the_caller_its_own(tmp_path, hub):
    code = (
        "import resource, socket, array, isohub, torch\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))\n"
        "with isohub.Session(timeout_s=60) as session:\n"
        f"    handle = session.load({hub('good')!r}, 'mlp')\n"
        "    print(handle.run(lambda module: __import__('resource').getrlimit(7)))\n"
        "    print(handle(torch.ones(1, 4)).shape[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ISOHUB_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.split("\n")[:2] == ["(300, 300)", "2"], done.stderr


def test_c28_lines_count_more_than_their_bytes(whole, hub):
    def flood(module, lines):
        import sys as remote_sys

        remote_sys.stdout.write("\n" * lines)
        remote_sys.stdout.flush()
        return lines

    with whole.load(hub("good"), "mlp", sandbox=Sandbox(output="1 MiB")) as handle:
        assert handle.run(flood, 1000) == 1000  # the control
        with pytest.raises(errors.WorkerLimitError, match="printed"):
            handle.run(flood, 500_000)
            handle.run(flood, 1)


def test_c27_layers_that_untrusted_repos_have_are_not_bargained_away(hub, tmp_path, monkeypatch):
    from isohub.session import spawn
    from tests.lacking import start_without

    with isohub.Session(tmp_path / "home", timeout_s=60) as session:
        monkeypatch.setattr(spawn, "START", start_without(tmp_path, "landlock"))
        with pytest.raises(errors.ConfinementError, match="landlock"):
            session.load(hub("good"), "mlp", sandbox=Sandbox(require=("seccomp",)))
        trusted = session.load(hub("good"), "mlp", sandbox=Sandbox(require=("seccomp",)), trust_repo=True)
        assert "landlock" in trusted.confinement.missing
        trusted.close()


def test_c18_a_git_directory_is_hidden_by_whatever_name_it_has(whole, tmp_path):
    def read(module, path):
        try:
            with open(path) as file:
                return file.read()
        except OSError as error:
            return type(error).__name__

    (tmp_path / "hubconf.py").write_text(HUBCONF)
    (tmp_path / "kept").mkdir()
    for name in ("kept/config", "data"):
        (tmp_path / name).write_text("token")
    (tmp_path / ".git").symlink_to("kept")
    with whole.load(str(tmp_path), "model") as handle:
        for name in (".git/config", "kept/config"):
            assert handle.run(read, str(tmp_path / name)) in ("FileNotFoundError", "PermissionError")
        assert handle.run(read, str(tmp_path / "data")) == "token"  # the control


def test_c19_a_worker_with_gpus_changes_its_own_threads_names_and_no_other_file_of_proc(jail, hub):
    """libcuda does not start where it cannot name its threads by ``/proc``."""

    def write(module, paths):
        import threading

        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        threads = sorted(map(int, os.listdir("/proc/self/task")))
        found = {}
        for path in [*paths, f"/proc/self/task/{threads[-1]}/comm", f"/proc/self/task/{threads[-1]}/comm"]:
            try:
                with open(path, "w") as file:
                    file.write("isohub-test")
                with open(path) as file:
                    found[path] = file.read().strip()
            except OSError:
                found[path] = "refused"
        stop.set()
        thread.join()
        return found

    paths = [
        "/proc/self/comm", "/proc/self/uid_map", "/proc/self/oom_score_adj", "/proc/self/timerslack_ns", "/proc/1/comm",
        "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger", f"/proc/{os.getpid()}/comm",
        f"/proc/{os.getpid()}/task/{os.getpid()}/comm",
    ]  # fmt: skip
    with jail.session.load(hub("good"), "mlp", sandbox=Sandbox(gpu=True)) as handle:
        found = handle.run(write, paths)
    with jail.session.load(hub("good"), "mlp") as handle:
        without = handle.run(write, paths)
    assert {found.pop(path) for path in paths} == {without.pop(path) for path in paths} == {"refused"}
    assert set(found.values()) == {"isohub-test"}  # the control
    assert set(without.values()) == {"refused"}


def test_c19_no_worker_may_change_the_cache(hub, tmp_path):
    store = tmp_path / "around" / "store"
    (tmp_path / "around" / "store" / "within").mkdir(parents=True)
    (tmp_path / "link").symlink_to(store)
    beside = tmp_path / "around" / "beside"
    beside.mkdir()
    with isohub.Session(store, timeout_s=60) as own:
        for path in (store, store / "within", store.parent, tmp_path / "link"):
            with pytest.raises(errors.PolicyError, match="own cache"):
                own.load(hub("good"), "mlp", sandbox=Sandbox(write=[path]))
        assert own.load(hub("good"), "mlp", sandbox=Sandbox(write=[beside])).training  # the control
