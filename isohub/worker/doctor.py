"""What this machine can give a worker: asked of the kernel, and then tried.

A process is confined as a worker with the default policy is, and tries what a worker must not do. A layer that is
there by the kernel's word, and does not hold, is seen here.

Side: worker's, in a process of its own that the caller starts; runs no repo's code and imports no torch.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from typing import Any, Callable, Dict, List, NoReturn, Tuple

from isohub.sandbox import namespaces
from isohub.sandbox.confine import Machine, confine
from isohub.sandbox.kernel import ARCHITECTURES

__all__ = ["TRIALS", "examine"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_MIB = 1 << 20
_WANTED = {
    "level": "full", "network": "none", "read": [], "write": [], "memory": 1 << 32, "cpu_time_s": 60.0,
    "processes": 64, "open_files": 64, "disk": _MIB, "file_size": None, "gpu": False,
}  # fmt: skip


def _read_the_secret(secret: str) -> None:
    with open(secret) as file:
        file.read()


def _write_beside_it(secret: str) -> None:
    with open(secret + ".new", "w") as file:
        file.write("x")


def _open_a_socket(_: str) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()


def _signal_the_caller(_: str) -> None:
    os.kill(int(os.environ["ISOHUB_DOCTOR_CALLER"]), 0)


def _read_the_caller(_: str) -> None:
    with open(f"/proc/{os.environ['ISOHUB_DOCTOR_CALLER']}/environ", "rb") as file:
        file.read(1)


def _make_a_namespace(_: str) -> None:
    namespaces.unshare(namespaces.NEW_USER)


def _write_to_its_own(_: str) -> None:
    with open(os.path.join(os.environ["TMPDIR"], "x"), "w") as file:
        file.write("x")


#: What is tried: what it is, whether it must fail, how.
TRIALS: Tuple[Tuple[str, bool, Callable[[str], None]], ...] = (
    ("read a file of the caller's", True, _read_the_secret),
    ("write a file of the caller's", True, _write_beside_it),
    ("open a socket", True, _open_a_socket),
    ("signal the caller", True, _signal_the_caller),
    ("read the caller's environment", True, _read_the_caller),
    ("enter a new user namespace", True, _make_a_namespace),
    ("write to its own directory", False, _write_to_its_own),
)


def examine(directory: str) -> NoReturn:
    """Print what was found as JSON, and end.

    Args:
        directory: Empty, the caller's to remove.
    """
    place = os.path.join(directory, "root")
    os.mkdir(place, 0o700)
    first = Machine.look(_PACKAGE, [], None)
    known = first.name in ARCHITECTURES
    reason = namespaces.fault(place, first.name) if known else "no system call numbers for this machine"
    machine = first._replace(namespaces=reason)
    found: Dict[str, Any] = {
        "machine": machine.name,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "user": os.geteuid(),
        "landlock_abi": machine.landlock,
    }
    found.update(_tried(machine, directory))
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    os._exit(0)


def _tried(machine: Machine, directory: str) -> Dict[str, Any]:
    secret = os.path.join(directory, "secret")
    with open(secret, "w") as file:
        file.write("secret")
    checkout, own = os.path.join(directory, "checkout"), os.path.join(directory, "w1")
    os.mkdir(checkout)
    os.mkdir(own)
    caller = os.getpid()
    read, write = os.pipe()
    first = os.fork()
    if first == 0:
        parent, second = os.getpid(), 0
        if machine.namespaces is None:
            namespaces.become_own_user(namespaces.NEW_PID)
            parent, second = 0, os.fork()
        else:
            second = os.fork()
        if second == 0:
            _try_all(machine, {**_WANTED, "checkout": checkout}, own, write, parent, caller, secret)
        os.waitpid(second, 0)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        words = answer.read()
    os.waitpid(first, 0)
    silent: Dict[str, Any] = {
        "active": [],
        "missing": [],
        "details": {},
        "trials": {},
        "fault": "it ended in silence",
    }
    return json.loads(words) if words else silent


def _try_all(
    machine: Machine, wanted: Dict[str, Any], own: str, write: int, parent: int, caller: int, secret: str
) -> NoReturn:
    said: Dict[str, Any] = {"active": [], "missing": [], "details": {}, "trials": {}, "fault": None}
    try:
        variables = {"PATH": os.environ.get("PATH", ""), "ISOHUB_DOCTOR_CALLER": str(caller)}
        confined = confine(machine, wanted, own, variables, [write], parent)
        said.update(active=confined.active, missing=confined.missing, details=confined.details)
        trials: Dict[str, List[Any]] = {}
        for name, must_fail, act in TRIALS:
            try:
                act(secret)
            except OSError as error:
                trials[name] = [must_fail, error.strerror or str(error)]
            else:
                trials[name] = [not must_fail, "succeeded"]
        said["trials"] = trials
    except (OSError, ValueError) as error:
        said["fault"] = str(error)
    finally:
        os.write(write, json.dumps(said).encode())
        os._exit(0)
