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
    "Begun",
    "Confined",
    "Kind",
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
        if machine.seccomp:
            traits = machine.traits("none", namespaced=no_namespaces is None)
            if seccomp.is_everybodys(traits):
                seccomp.prepare(name, traits, os.getpid())
        return machine

    def seen(self) -> Tuple[Tuple[int, int], ...]:
        """Which file each of the rules' paths leads to now: device and inode, zeros for none."""
        return tuple(map(_place_of, (rule.path for rule in self.rules)))

    def traits(self, network: str, *, namespaced: bool) -> Traits:
        """What a worker's filter has to know."""
        return Traits(private=namespaced, scoped=self.landlock >= 6, network=network, truncation=self.landlock >= 3)


def _place_of(path: str) -> Tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


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


class Kind(NamedTuple):
    """What of a policy has to be known before the rest of it.

    Attributes:
        layered: Whether there is to be more than a process of its own.
        open_network: Whether it keeps the caller's network.
    """

    layered: bool
    open_network: bool

    @classmethod
    def of(cls, wanted: Mapping[str, Any]) -> Kind:
        """The kind of a caller's request (`confine`)."""
        return cls(wanted["level"] != "none", wanted["network"] == "open")


class Begun:
    """A process that has done what is the same for every policy of a kind, and nothing that cannot be added to.

    Args:
        machine: What there is.
        kind: What it will be.
        directory: The worker's own; beside it is ``root``.
        keep: Descriptors that stay open.

    Raises:
        OSError: A layer cannot be applied; the worker must not go on.
    """

    def __init__(self, machine: Machine, kind: Kind, directory: str, keep: Sequence[int]) -> None:
        close_all_but(keep)
        self.machine = machine
        self.kind = kind
        self.directory = directory
        self.tree: Optional[namespaces.Tree] = None
        self.ruleset: Optional[landlock.Ruleset] = None
        if kind.layered and machine.namespaces is None:
            namespaces.leave_host(network=kind.open_network)
            self.tree = namespaces.Tree(os.path.join(os.path.dirname(directory), "root"), machine.name)
            self.tree.bind(machine.rules)
            self.tree.show_processes()
        if kind.layered and machine.landlock:
            self.ruleset = landlock.Ruleset(machine.landlock, tcp=not kind.open_network)
            self.ruleset.allow(machine.fewest, "" if self.tree is None else self.tree.root)

    def finish(self, wanted: Mapping[str, Any], variables: Mapping[str, str], parent: int) -> Confined:
        """Do what one policy says, and make all of it final.

        Args:
            wanted: The caller's request, of this kind: ``sandbox`` of `isohub.session.request.worker_request`.
            variables: The whole environment, less the directories that are the worker's own.
            parent: As `die_with_parent` has it.

        Returns:
            What is active and what is missing.

        Raises:
            OSError: A layer cannot be applied; the worker must not go on.
        """
        machine, tree, layered = self.machine, self.tree, self.kind.layered
        if Kind.of(wanted) != self.kind:
            raise OSError(f"this process has begun as {self.kind}, and {Kind.of(wanted)} is asked for")
        active, details = [*BASE_LAYERS], {}
        listener: Optional[socket.socket] = None
        if layered and wanted["network"] == "proxy" and tree is None:
            # Without a network of its own it would have all of the caller's by TCP, or none.
            raise OSError(f"network= with names of hosts needs namespaces, and there are none: {machine.namespaces}")
        places: Dict[str, str] = {name: os.path.join(self.directory, name) for name in ("home", "tmp", "cwd")}
        private = [*places.values()]
        rules: List[Rule] = worker_rules(wanted, private) if layered else []  # beside the machine's
        process = -1
        if tree is not None:
            process = _close_tree(tree, wanted, self.directory, [rule for rule in rules if rule.path not in private])
            if wanted["network"] == "proxy":
                listener = namespaces.listen_on_loopback()
            rules += [Rule(namespaces.SHARED_MEMORY, "write"), Rule("/", "list")]  # the names of what the tree has
        for place in places.values():
            os.mkdir(place, 0o700)
        _set_environment(variables, places, listener)
        os.chdir(places["cwd"])
        os.umask(0o077)
        if tree is not None:
            namespaces.become_own_user(process=process)
            active.append("namespaces")
            details["namespaces"] = _namespace_words(wanted)
        die_with_parent(parent)
        if layered:
            details["limits"] = apply_limits(wanted, tree is not None)
            active.append("limits")
            if tree is not None and not wanted["gpu"]:  # whose threads' files would be root's
                # Its caller owns its zygote's user namespace and can look at it all the same. Elsewhere an ordinary
                # user could not (``smaps``), and other workers cannot in any case: they trace nobody, and of /proc see
                # themselves.
                prctl(_PR_SET_DUMPABLE, 0)
            drop_capabilities()
        prctl(_PR_SET_NO_NEW_PRIVS, 1)
        if self.ruleset is not None:
            rules += _proc_rules(tree is not None, names_threads=wanted["gpu"])
            self.ruleset.allow(_fewest(rules))
            self.ruleset.allow_connecting([] if listener is None else [listener.getsockname()[1]])
            self.ruleset.restrict()
            active.append("landlock")
            details["landlock"] = f"ABI {machine.landlock}"
        if layered and machine.seccomp:
            seccomp.install(machine.name, machine.traits(wanted["network"], namespaced=tree is not None), os.getpid())
            active.append("seccomp")
        return Confined(tuple(active), *_missing(machine, layered, active, details), listener)


def confine(
    machine: Machine,
    wanted: Mapping[str, Any],
    directory: str,
    variables: Mapping[str, str],
    keep: Sequence[int],
    parent: int,
) -> Confined:
    """Apply every layer that there is and that the policy wants: `Begun` and its `finish` in one.

    Args:
        machine: What there is.
        wanted: As `Begun.finish` has it.
        directory: The worker's own; ``home``, ``tmp`` and ``cwd`` are made in it, and below it ``root``.
        variables: As `Begun.finish` has it.
        keep: Descriptors that stay open.
        parent: As `die_with_parent` has it.

    Returns:
        What is active and what is missing.

    Raises:
        OSError: A layer cannot be applied; the worker must not go on.
    """
    return Begun(machine, Kind.of(wanted), directory, keep).finish(wanted, variables, parent)


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


def _close_tree(tree: namespaces.Tree, wanted: Mapping[str, Any], directory: str, rules: Sequence[Rule]) -> int:
    tree.bind([*rules, Rule(wanted["checkout"], "read")])
    tree.own(directory, wanted["disk"])
    tree.hide(os.path.join(os.path.realpath(wanted["checkout"]), ".git"))
    process = tree.pivot(names_threads=wanted["gpu"])
    # The caller's own could be changed by it: this one is on a mount that is read-only.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return process


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
