"""C22 to C26: what a worker does to other processes, what powers it gains, and what two workers share. Nothing."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import isohub
from tests.attacks import acts
from tests.attacks.acts import DONE
from tests.conftest import companions, eventually, gone, zygote_of

ROOT = Path(__file__).parents[2]
#: What the control gets where it may do no more than a worker: an ordinary user's words, or an older kernel's.
NOT_HERE = ("EPERM", "EACCES", "ENOSYS", "ENODEV", "EOPNOTSUPP", "EINVAL", "EIO", "ENOTTY", "EAFNOSUPPORT")


_controls: dict[object, str] = {}


class Victim:
    """A process of the caller's user, with a secret in its environment and in its memory."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tests.attacks.acts import wait_for_nothing; wait_for_nothing()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "SECRET": "isohub-secret", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.address = int(self.process.stdout.readline())
        self.pid = self.process.pid

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def victim():
    made = Victim()
    yield made
    made.close()


# C22: other processes.


@pytest.fixture(scope="module")
def others(jail, victim, hub):
    """Everybody whom a worker would like to reach, by number in this namespace."""
    family = psutil.Process(jail.session._pool.warm().pid)
    sibling = jail.session.load(hub("edits_sys_path"), "model")
    around = [family, *family.children(recursive=True)]
    own = {jail.handle.stats().pid}
    return {
        "the caller": os.getpid(),
        "its shell": os.getppid(),
        "the first of all": 1,
        "another of its user's": victim.pid,
        "a sibling": sibling.stats().pid,
        **{f"around it, {place}": process.pid for place, process in enumerate(around) if process.pid not in own},
        "keeps it": sibling,
    }


@pytest.mark.parametrize("way", [acts.signal_nothing, *acts.PEEKS, *acts.CHANGES], ids=lambda way: way.__name__)
def test_c22_nobody_is_signalled_traced_read_or_changed(jail, others, victim, way):
    # With a pid namespace, 1 is that one's first.
    names = [name for name in others if name != "keeps it" and not (jail.namespaced and others[name] == 1)]
    outcomes = dict(zip(names, jail.attempts(way, [(others[name],) for name in names]), strict=True))
    assert [name for name in names if outcomes[name] == DONE] == []
    assert victim.process.poll() is None
    outcome = _controls.setdefault(way, "") or acts.beside(way, victim.pid)
    _controls[way] = outcome
    if way in (acts.move_pages, acts.change_io_priority, acts.compare_kernel_objects) and outcome in NOT_HERE:
        pytest.skip(f"{way.__name__}: nor does this kernel let anybody: {outcome}")
    assert outcome == DONE


@pytest.mark.parametrize("way", acts.KILLS, ids=lambda way: way.__name__)
def test_c22_nobody_is_killed(jail, others, way):
    with contextlib.closing(Victim()) as one:
        assert jail.attempt(way, one.pid) != DONE
        time.sleep(0.01)
        assert one.process.poll() is None
        names = [name for name in others if name == "a sibling" or name.startswith("around")]
        assert DONE not in jail.attempts(way, [(others[name],) for name in names])
        assert not any(gone(others[name]) for name in names)
        if way not in _controls:
            _controls[way] = acts.beside(way, one.pid)
            assert eventually(lambda: one.process.poll() is not None)
        assert _controls[way] == DONE


@pytest.mark.parametrize("way", [acts.vm_read, acts.vm_write], ids=lambda way: way.__name__)
def test_c22_no_memory_is_read_or_written(jail, victim, way):
    assert jail.attempt(way, victim.pid, victim.address) == "EPERM"
    assert acts.beside(way, victim.pid, victim.address) == DONE


def test_c22_nor_all_at_once(jail):
    """kill(2) with -1 succeeds where it reaches nobody, and this signal hurts nobody whom it reaches."""
    with contextlib.closing(Victim()) as one:
        jail.attempt(os.kill, -1, signal.SIGURG)
        jail.attempt(os.kill, 0, signal.SIGURG)
        assert one.process.stdout is not None
        assert select.select([one.process.stdout], [], [], 0.05)[0] == []
        os.kill(one.pid, signal.SIGURG)  # the control
        assert one.process.stdout.read(3) == b"hit"


def test_c22_no_other_process_is_seen(jail, victim):
    def look(module):
        try:
            seen = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        except OSError:
            return []
        return seen

    assert set(jail.handle.run(look)) <= {1, *jail.handle.run(lambda module: [os.getpid()])}
    assert {victim.pid, os.getpid()} <= set(look(None))  # the control


def test_c22_the_first_process_of_its_namespace_tells_nothing(jail):
    if not jail.namespaced:
        for act in acts.PEEKS:
            assert jail.attempt(act, 1) != DONE
        return
    for act in (*acts.PEEKS, acts.change_limits, acts.read_limits):
        assert jail.attempt(act, 1) != DONE, act
    for act in (acts.signal_kill, acts.signal_by_descriptor, acts.signal_with_a_value):
        jail.attempt(act, 1)  # the kernel drops what a namespace sends to its own first process
    assert jail.handle(torch.ones(1, 4)).shape == (1, 2)


# C23: nothing outlives.


def _alive(pid):
    return {one for one in companions(pid) if not gone(one)}


def _hidden(session, hub):
    """A worker with a process that does all it can to live on, and the numbers of all in its namespace."""
    handle = session.load(hub("outlives"), "leaves")
    pid = session.workers()[0].pid
    time.sleep(0.1)  # for its parent, which lives for a moment
    assert eventually(lambda: len(_alive(pid)) == 3)
    return handle, _alive(pid)


@pytest.mark.parametrize("who", ["the outer process", "the keeper", "the zygote", "the first of its namespace"])
def test_c23_nothing_is_left_when_one_of_those_around_is_killed(whole_of_its_own, hub, who):
    with whole_of_its_own() as session:
        handle, left = _hidden(session, hub)
        outer = psutil.Process(session._pool.warm().pid)
        keeper = outer.children()[0]
        zygote = zygote_of(session)
        (first,) = [one for one in keeper.children() if one.pid in left]
        victims = {"the outer process": outer, "the keeper": keeper, "the zygote": zygote}
        victims["the first of its namespace"] = first
        victims[who].kill()
        assert eventually(lambda: all(gone(pid) for pid in left))
        with pytest.raises(isohub.errors.WorkerDiedError):
            handle.attribute  # noqa: B018


def test_c23_nothing_is_left_when_the_caller_is_killed(whole_of_its_own, hub, tmp_path):
    code = (
        "import isohub, json, sys, time\n"
        "from tests.attacks.test_processes import _hidden\n"
        "session = isohub.Session(sys.argv[1], timeout_s=60)\n"
        "handle, left = _hidden(session, lambda name: sys.argv[2] + '/' + name)\n"
        "print(json.dumps([*left, session._pool.warm().pid]), flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(ROOT / "tests" / "hubs")]
    caller = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert caller.stdout is not None
        left = json.loads(caller.stdout.readline())
        assert not any(gone(pid) for pid in left)  # the control
        caller.send_signal(signal.SIGKILL)
        assert eventually(lambda: all(gone(pid) for pid in left))
    finally:
        caller.kill()
        caller.communicate()


def test_c23_nothing_is_left_when_a_worker_ends(jail, hub):
    handle = jail.session.load(hub("outlives"), "leaves")
    (worker,) = [worker for worker in jail.session.workers() if "outlives" in worker.name]
    family = psutil.Process(worker.pid)
    left = {one.pid for one in family.children(recursive=True)} | _orphans(jail)
    assert left  # the control
    del handle
    assert eventually(lambda: gone(worker.pid) and all(gone(pid) for pid in left))
    assert eventually(lambda: not _orphans(jail))


def _orphans(jail):
    """Processes below the session's that have closed all of their descriptors, as the hidden one does."""
    found = set()
    for one in psutil.Process(jail.session._pool.warm().pid).children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            if one.num_fds() == 0 and not gone(one.pid):
                found.add(one.pid)
    return found


@pytest.fixture
def whole_of_its_own(whole, tmp_path):
    """Sessions that a test may break."""
    return lambda: isohub.Session(tmp_path / "isohub-home", timeout_s=60)


# C24: powers.


@pytest.mark.parametrize("way", acts.POWERS, ids=lambda way: way.__name__)
def test_c24_no_power_is_gained(jail, way):
    assert jail.attempt(acts.in_fork, way) in ("EPERM", "ENOSYS", "EACCES")
    assert jail.handle(torch.ones(1, 4)).shape == (1, 2)
    if way not in _controls:
        _controls[way] = acts.beside(acts.in_fork, way)
    outcome = _controls[way]
    # With arguments that do no harm some end there: past the question whether they may.
    harmless = {
        acts.ask_for_a_key: "ENOKEY",
        acts.search_a_keyring: "ENOKEY",
        acts.unmount: "EINVAL",
        acts.pivot: "EBUSY",
    }
    if outcome not in (DONE, harmless.get(way)):
        assert outcome in NOT_HERE
        pytest.skip(f"{way.__name__}: nor has user {os.geteuid()} it outside: {outcome}")


def test_c24_a_worker_has_no_capability_and_cannot_get_one(jail):
    def status(module):
        with open("/proc/self/status") as file:
            return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)

    inside = jail.handle.run(status)
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", *(["CapBnd"] if os.geteuid() == 0 or jail.namespaced else [])):
        assert int(inside[name], 16) == 0, name
    assert inside["NoNewPrivs"] == "1"
    assert inside["Seccomp"] == "2"
    outside = status(None)
    assert outside["NoNewPrivs"] == "0" or os.geteuid()
    if os.geteuid() == 0:
        assert int(outside["CapEff"], 16) != 0  # the control


def test_c24_programs_with_setuid_gain_nothing(jail):
    def become_root(module):
        import subprocess as remote_subprocess

        commands = (
            ["su", "-c", "true"],
            ["mount", "-t", "tmpfs", "none", os.environ["TMPDIR"]],
            ["unshare", "-r", "true"],
            ["chroot", "/", "true"],
        )
        answers = []
        for command in commands:
            try:
                answers.append(
                    remote_subprocess.run(command, stdin=-3, capture_output=True, check=False, timeout=30).returncode
                )
            except OSError:
                answers.append(-1)
        return answers

    assert 0 not in jail.handle.run(become_root)

    def mounts(module):
        with open("/proc/self/mountinfo") as file:
            return [line.split()[4:6] for line in file]

    if jail.namespaced:
        shown = jail.handle.run(mounts)
        assert [place for place, options in shown if "nosuid" not in options.split(",")] == []
        assert "nosuid" not in dict(mounts(None))["/"]  # the control
    if os.geteuid() == 0:
        assert (
            subprocess.run(["su", "-c", "true"], stdin=subprocess.DEVNULL, check=False).returncode == 0
        )  # the control


def test_c24_a_setuid_program_stays_its_callers(whole, hub, tmp_path):
    """One of root's, for a worker that is not: where the tests run as an ordinary user, any that the system has."""
    programs = [path for name in ("su", "passwd", "newgrp", "chsh", "mount") if (path := shutil.which(name))]
    programs = [path for path in programs if os.stat(path).st_mode & 0o4000]
    if not programs:
        pytest.skip("this system has no program with setuid")

    def effective(module, program):
        import subprocess as remote_subprocess
        import time as remote_time

        with remote_subprocess.Popen([program, "--help"], stdin=-1, stdout=-1, stderr=-1) as started:
            try:
                remote_time.sleep(0.01)
                with open(f"/proc/{started.pid}/status") as file:
                    return next(line.split()[2] for line in file if line.startswith("Uid:"))
            except (OSError, StopIteration):
                return None
            finally:
                started.kill()

    with whole.load(hub("good"), "mlp") as handle:
        assert handle.run(effective, programs[0]) in (None, str(os.geteuid()))


@pytest.mark.parametrize("option", [(4, 1), (22, 1), (22, 2), (28, 0), (35, 1), (0x59616D61, 1), (24, 0), (47, 2, 0)])
def test_c24_nothing_is_loosened_by_prctl(jail, option):
    outcome = jail.attempt(acts.in_fork, acts.prctl, *option)
    assert outcome in ("EPERM", "EINVAL")


def test_c24_the_signal_of_its_parents_death_stays(jail):
    outcome = jail.attempt(acts.in_fork, acts.prctl, 1, 0)
    assert outcome == (DONE if jail.namespaced else "EPERM")  # with namespaces the kernel needs none
    assert acts.beside(acts.in_fork, acts.prctl, 1, 0) == DONE  # the control


@pytest.mark.parametrize("high", [0, 1, 0xFFFFFFFF])
def test_c24_nothing_is_typed_for_anybody(jail, high):
    assert jail.attempt(acts.in_fork, acts.type_for_a_terminal, high) == "EPERM"
    outcome = acts.beside(acts.in_fork, acts.type_for_a_terminal, high)
    if outcome == "EIO":
        pytest.skip("nor by anybody here: dev.tty.legacy_tiocsti=0")
    assert outcome == DONE


# C25: other architectures.


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86_64 alone has calls of other architectures")
@pytest.mark.parametrize("way", [acts.x32_call, acts.i386_call], ids=lambda way: way.__name__)
def test_c25_a_call_of_another_architecture_ends_the_process(jail, way):
    assert jail.attempt(acts.in_fork, way) == "SIGSYS"
    outcome = acts.beside(way)
    assert outcome in (("", DONE, "ENOSYS") if way is acts.x32_call else ("", "SIGSEGV"))  # the control: it lives
    if outcome == "SIGSEGV":
        pytest.skip("nor does anybody here make calls of 32 bits")


# C26: two workers.


def test_c26_two_workers_of_different_repos_share_no_writable_thing(jail, hub):
    """Every place where one can write, looked for by the other and by the caller."""

    def mark(module, word):
        made, roots = (
            [],
            ["/", "/dev", "/dev/shm", "/dev/mqueue", "/tmp", "/var/tmp", "/run", "/run/lock", "/proc", "/sys"],
        )
        roots += [os.environ[name] for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")] + [os.getcwd()]
        try:
            with open("/proc/self/mountinfo") as file:
                roots += [line.split()[4] for line in file]
        except OSError:
            pass
        for root in dict.fromkeys(roots):
            for directory, names, files in os.walk(root):
                if directory.count("/") > root.count("/") + 2 or directory.startswith("/proc/"):
                    names.clear()
                    continue
                path = os.path.join(directory, word)
                try:
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                    made.append(path)
                except OSError:
                    pass
                for name in files[:200]:
                    other = os.path.join(directory, name)
                    try:
                        os.close(os.open(other, os.O_WRONLY | os.O_NONBLOCK))
                        made.append(other)
                    except OSError:
                        pass
        own = [os.path.dirname(os.environ["HOME"])]
        return sorted(set(made)), own

    word = f"isohub-mark-{time.monotonic_ns()}"
    with jail.session.load(hub("edits_sys_path"), "model") as second:
        made, (own,) = jail.handle.run(mark, word)
        devices = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"}
        allowed = (own + "/", *(["/dev/shm/"] if jail.namespaced else []), "/proc/", "/dev/fd", "/dev/std")
        assert [path for path in made if path not in devices and not path.startswith(allowed)] == []
        marks = [path for path in made if path.endswith(word)]
        assert marks  # the control
        assert [
            path for path in marks if second.run(acts.attempt, os.stat, path) == DONE and not path.startswith(own)
        ] == []
        assert [path for path in marks if second.run(acts.attempt, acts.read, path) == DONE] == []
        if jail.namespaced:
            assert [path for path in marks if os.path.exists(path)] == []
        assert [path for path in marks if jail.handle.run(acts.attempt, os.stat, path) != DONE] == []  # the control


def test_c26_nor_a_socket_a_queue_or_a_key(jail, hub):
    name = f"\0isohub-{time.monotonic_ns()}"

    def bind(module, address):
        import socket as remote_socket

        try:
            module.kept = remote_socket.socket(remote_socket.AF_UNIX)
            module.kept.bind(address)
            module.kept.listen()
        except OSError:
            return False
        return True

    with jail.session.load(hub("edits_sys_path"), "model") as second:
        bound = jail.handle.run(bind, name)
        assert bound is jail.namespaced
        assert second.run(acts.attempt, acts.connect_to_a_path, name) != DONE
        assert acts.attempt(None, acts.connect_to_a_path, name) != DONE
        if bound:
            assert jail.attempt(acts.connect_to_a_path, name) == DONE  # the control
        for act in (acts.shared_memory_by_key, acts.message_queue, acts.add_a_key):
            assert second.run(acts.attempt, act) in ("EPERM", "ENOSYS")


def test_c26_the_names_of_the_machine_and_its_memory_are_not_shared(whole, hub):
    with whole.load(hub("good"), "mlp") as one, whole.load(hub("edits_sys_path"), "model") as two:

        def namespaces(module):
            return [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "ipc", "uts", "pid", "user")]

        first, second, here = one.run(namespaces), two.run(namespaces), namespaces(None)
        for place, name in enumerate(("mnt", "net", "ipc", "uts", "pid", "user")):
            assert len({first[place], second[place], here[place]}) == 3, name
