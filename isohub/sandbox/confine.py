"""What is taken from a worker before it runs a byte of a repo's code, in order.

1. Descriptors, environment and directories; then namespaces and mounts, which need capabilities; then limits;
   then capabilities, Landlock and the filter, after which none of this can be done any more.
2. A `Machine` says what there is to apply. What there is and cannot be applied is an error, and the worker ends:
   no layer is lost on the way. What there is not is named in what the worker says first; its caller decides.
3. It runs in a fork of one thread, before any other thread and any foreign byte.

Side: worker; `Machine.look` in its zygote. Source: prctl(2), setrlimit(2), and what `landlock`, `seccomp` and
`namespaces` name. The order is that of mounts before Landlock (which refuses them: EPERM) and of everything before
seccomp.
"""

from __future__ import annotations

import os
import socket
import tempfile
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from isohub.sandbox import landlock, namespaces, seccomp
from isohub.sandbox.grants import interpreter_rules, is_below, worker_rules
from isohub.sandbox.kernel import ARCHITECTURES, architecture, drop_capabilities, prctl
from isohub.sandbox.landlock import Rule
from isohub.sandbox.limits import apply_limits
from isohub.sandbox.policy import LAYERS, NAMESPACES
from isohub.sandbox.processes import close_all_but, die_with_parent
from isohub.sandbox.seccomp import Traits

__all__ = [
    "BASE_LAYERS",
    "UNCONFINED",
    "Confined",
    "Machine",
    "confine",
]

#: What every worker has, on every machine, with every policy.
BASE_LAYERS: Tuple[str, ...] = (
    "descriptors",
    "environment",
    "private home, tmp and cwd",
    "no_new_privs",
    "no core dumps",
    "dies with its caller",
)

#: The exit code of a worker that could not be confined: EX_OSERR of sysexits.h.
UNCONFINED = 71

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_OWN_PROC = (
    "/proc/cpuinfo", "/proc/filesystems", "/proc/loadavg", "/proc/meminfo", "/proc/stat", "/proc/sys/kernel",
    "/proc/sys/vm", "/proc/uptime", "/proc/version",
)  # fmt: skip


class Machine(NamedTuple):
    """What a zygote found that its workers can be given.

    Attributes:
        name: As ``uname -m`` has it.
        landlock: The ABI; 0 for none.
        seccomp: Whether filters can be installed.
        namespaces: None where there are all of them; else why not.
        rules: What every worker of this interpreter may read.
        fewest: The same without symlinks, and without what is below another: for Landlock.
    """

    name: str
    landlock: int
    seccomp: bool
    namespaces: Optional[str]
    rules: Tuple[Rule, ...]
    fewest: Tuple[Rule, ...]

    @classmethod
    def look(cls, package: str, packages: Sequence[str], no_namespaces: Optional[str]) -> Machine:
        """Ask this machine, and prepare what is the same for each fork.

        Args:
            package: isohub's own directory.
            packages: Directories of the environment's overlay.
            no_namespaces: Why there are none; None if this process is in a user namespace of its own.
        """
        name = architecture()
        known = name in ARCHITECTURES
        rules = interpreter_rules(package, packages)
        machine = cls(
            name=name,
            landlock=landlock.abi() if known else 0,
            seccomp=known and seccomp.is_available(name),
            namespaces=no_namespaces,
            rules=tuple(rules),
            fewest=tuple(_fewest(rules)),
        )
        if machine.seccomp and no_namespaces is None:
            seccomp.prepare(name, machine.traits("none", namespaced=True))
        return machine

    def traits(self, network: str, *, namespaced: bool) -> Traits:
        """What a worker's filter has to know."""
        return Traits(private=namespaced, scoped=self.landlock >= 6, network=network, truncation=self.landlock >= 3)


class Confined(NamedTuple):
    """What a worker got.

    Attributes:
        active: Layers by name.
        missing: Those that it did not get.
        details: What each consists of, or why it is missing.
        listener: Where connections to the caller's proxy are made to; None without one.
    """

    active: Tuple[str, ...]
    missing: Tuple[str, ...]
    details: Dict[str, str]
    listener: Optional[socket.socket] = None


def confine(
    machine: Machine,
    wanted: Mapping[str, Any],
    directory: str,
    variables: Mapping[str, str],
    keep: Sequence[int],
    parent: int,
) -> Confined:
    """Apply every layer that there is and that the policy wants.

    Args:
        machine: What there is.
        wanted: The caller's request: ``sandbox`` of `isohub.session.request.worker_request`.
        directory: The worker's own; ``home``, ``tmp`` and ``cwd`` are made in it, and below it ``root``.
        variables: The whole environment, less the directories that are the worker's own.
        keep: Descriptors that stay open.
        parent: As `die_with_parent` has it.

    Returns:
        What is active and what is missing.

    Raises:
        OSError: A layer cannot be applied; the worker must not go on.
    """
    close_all_but(keep)
    active, details = [*BASE_LAYERS], {}
    listener: Optional[socket.socket] = None
    process = -1
    layered = wanted["level"] != "none"
    namespaced = layered and machine.namespaces is None
    if layered and wanted["network"] == "proxy" and not namespaced:
        # Without a network of its own it would have all of the caller's by TCP, or none.
        raise OSError(f"network= with names of hosts needs namespaces, and there are none: {machine.namespaces}")
    places: Dict[str, str] = {name: os.path.join(directory, name) for name in ("home", "tmp", "cwd")}
    private = [*places.values()]
    rules: List[Rule] = []  # beside the machine's
    if layered:
        rules = worker_rules(wanted, private)
    if namespaced:
        others = [rule for rule in rules if rule.path not in private]
        process, listener = _enter_namespaces(machine, wanted, directory, others)
        rules += [Rule(namespaces.SHARED_MEMORY, "write"), Rule("/", "list")]  # the names of what the tree has
    for place in places.values():
        os.mkdir(place, 0o700)
    _set_environment(variables, places, listener)
    os.chdir(places["cwd"])
    os.umask(0o077)
    if namespaced:
        namespaces.become_own_user(process=process)
        active.append("namespaces")
        details["namespaces"] = _namespace_words(wanted)
    die_with_parent(parent)
    if layered:
        details["limits"] = apply_limits(wanted, namespaced)
        active.append("limits")
        if namespaced and not wanted["gpu"]:  # whose threads' files would be root's
            # Its caller owns its zygote's user namespace and can look at it all the same. Elsewhere an ordinary user
            # could not (``smaps``), and other workers cannot in any case: they trace nobody, and of /proc see
            # themselves.
            prctl(_PR_SET_DUMPABLE, 0)
        drop_capabilities()
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if layered and machine.landlock:
        rules += _proc_rules(namespaced, names_threads=wanted["gpu"])
        ports = [] if listener is None else [listener.getsockname()[1]]
        own = _fewest(rules)
        landlock.restrict(machine.landlock, [*machine.fewest, *own], None if wanted["network"] == "open" else ports)
        active.append("landlock")
        details["landlock"] = f"ABI {machine.landlock}"
    if layered and machine.seccomp:
        seccomp.install(machine.name, machine.traits(wanted["network"], namespaced=namespaced), os.getpid())
        active.append("seccomp")
    return Confined(tuple(active), *_missing(machine, layered, active, details), listener)


def _missing(
    machine: Machine, layered: bool, active: Sequence[str], details: Dict[str, str]
) -> Tuple[Tuple[str, ...], Dict[str, str]]:
    missing = tuple(name for name in LAYERS if name not in active)
    reasons = {
        "landlock": "the kernel has none, or it is switched off",
        "seccomp": "the kernel has no filters",
        "namespaces": machine.namespaces or "",
    }
    for name in missing:
        if not layered:
            details[name] = "sandbox='none'"
        elif machine.name not in ARCHITECTURES and name in ("landlock", "seccomp"):
            details[name] = f"{machine.name} is not supported; {' and '.join(ARCHITECTURES)} are"
        else:
            details[name] = reasons[name]
    return missing, details


def _enter_namespaces(
    machine: Machine, wanted: Mapping[str, Any], directory: str, rules: Sequence[Rule]
) -> Tuple[int, Optional[socket.socket]]:
    namespaces.leave_host(network=wanted["network"] == "open")
    tree = namespaces.Tree(os.path.join(os.path.dirname(directory), "root"), machine.name)
    tree.bind([*machine.rules, *rules, Rule(wanted["checkout"], "read")])
    tree.own(directory, wanted["disk"])
    tree.hide(os.path.join(os.path.realpath(wanted["checkout"]), ".git"))
    process = tree.pivot(names_threads=wanted["gpu"])
    # The caller's own could be changed by it: this one is on a mount that is read-only.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return process, namespaces.listen_on_loopback() if wanted["network"] == "proxy" else None


def _namespace_words(wanted: Mapping[str, Any]) -> str:
    return ", ".join(name for name in NAMESPACES if name != "net" or wanted["network"] != "open")


def _set_environment(
    variables: Mapping[str, str], places: Mapping[str, str], listener: Optional[socket.socket]
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    cache = os.path.join(places["home"], ".cache")
    os.environ.update(
        HOME=places["home"], TMPDIR=places["tmp"], XDG_CACHE_HOME=cache, TORCH_HOME=os.path.join(cache, "torch")
    )
    if listener is not None:
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            os.environ[name] = os.environ[name.lower()] = proxy
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = ""
    tempfile.tempdir = None


def _proc_rules(namespaced: bool, *, names_threads: bool) -> List[Rule]:
    own = f"/proc/{os.getpid()}"
    # libcuda gives its threads names by ``task/<tid>/comm``, and does not start where it cannot (driver 580.159).
    threads = [Rule(f"{own}/task", "write")] if names_threads else []
    if namespaced:
        return [Rule("/proc", "read"), *threads]  # this pid namespace's own
    # The system's: of processes no other than this one.
    return [Rule(own, "read"), *threads, *[Rule(path, "read") for path in _OWN_PROC if os.path.exists(path)]]


def _fewest(rules: Sequence[Rule]) -> List[Rule]:
    """The same, less what is below another one that gives as much."""
    whole = {os.path.realpath(rule.path) for rule in rules if rule.kind == "read"}
    kept: Dict[Rule, None] = {}
    for rule in rules:
        real = os.path.realpath(rule.path)
        if rule.kind in ("read", "list") and any(real != path and is_below(real, path) for path in whole):
            continue
        kept[Rule(real, rule.kind)] = None
    return list(kept)
