"""What may a worker touch? The caller's wish, typed and checked; nothing here asks the system anything.

1. What is empty allows nothing. What is open has a word of its own: ``network="open"``.
2. A `Sandbox` holds no secret and is a value: it can be compared, hashed and printed.
3. What hands a repo more than a confined worker has (`Sandbox.needs_trust`) is for trusted repos.

Side: caller. Trust: the caller's own words; a mistake is a `PolicyError`, at once.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, Mapping, Optional, Tuple, Union

from isohub.errors import PolicyError, printable
from isohub.sandbox.hosts import WEIGHT_HOSTS, HostPolicy

__all__ = ["DEFAULT_REQUIRED", "LAYERS", "NAMESPACES", "NONE", "Confinement", "Sandbox", "checked_sandbox"]

#: The layers that a policy can require, by name.
LAYERS: Tuple[str, ...] = ("landlock", "seccomp", "namespaces", "limits")
#: What every worker of an untrusted repo has, or it does not run.
DEFAULT_REQUIRED: Tuple[str, ...] = ("landlock", "seccomp")
#: What "namespaces" stands for, all of them or none.
NAMESPACES: Tuple[str, ...] = ("user", "pid", "mount", "net", "ipc", "uts")
#: The word for no confinement but a process, an environment and descriptors of its own.
NONE = "none"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)
_MOST_BYTES = 1 << 60
# Torch starts a thread for each processor and operator pool, and every DataLoader a process for each worker.
_PROCESSES = 1024
_OPEN_FILES = 4096
_DISK_BYTES = 4 << 30
_OUTPUT_BYTES = 256 << 20
# The smallest with which torch is imported and answers.
_MOST_GPUS = 1000
_LEAST_PROCESSES = 4
_LEAST_OPEN_FILES = 64
_LEAST_BYTES = 1 << 20

Size = Union[int, str]
Path = Union[str, "os.PathLike[str]"]


@dataclass(frozen=True)
class Sandbox:
    """What a worker may touch, and how much of it.

    Every worker has: its own environment, descriptors and directories; Landlock; a seccomp filter; and where the
    kernel lets us, user, pid, mount, net, ipc and uts namespaces with a minimal tree of files.

    Args:
        network: Hosts that the worker may reach, through a proxy of the caller's: ``"huggingface.co"``,
            ``"*.example.org"``, ``"example.org:8443"``, or an address. Needs namespaces. What torch.hub's functions
            download for it may come from these too. ``"open"`` is the caller's own network, for trusted repos.
        downloads: Hosts that torch.hub's download functions may fetch from for it, by the caller and without
            credentials; beside `network` and the server that the repo came from. None: the well-known hosts of
            weights (`isohub.sandbox.hosts.WEIGHT_HOSTS`), and what ``ISOHUB_DOWNLOAD_HOSTS`` names.
        read: Files and directories that the worker may read, beside its checkout and the interpreter.
        write: Those that it may change.
        memory: Bytes, or such as ``"8 GiB"``, for the worker and all its processes together. None: nine tenths of
            the machine's.
        cpu_time_s: Seconds of processor time for all its processes together. None: no limit.
        processes: The most processes and threads.
        open_files: The most descriptors of each process.
        disk: Bytes of its own directories; they are in memory where namespaces are active.
        file_size: Bytes of any one file, and of any one answer. None: no limit but `disk` and `max_reply_bytes`.
        output: Bytes that it may print in its life; each line counts for 64 more.
        gpu: Whether it sees the GPUs; or the number of one, or several, as this process numbers them. Weaker: their
            drivers are a large surface of the kernel's, and numbers are a choice, no wall between GPUs.
        require: Layers without which a worker does not start. ``"default"``: Landlock and seccomp, unless the repo is
            trusted. ``"all"``: namespaces and limits too, trusted or not. Or names of layers.
    """

    network: Union[str, Tuple[str, ...], Iterable[str]] = ()
    downloads: Union[Tuple[str, ...], Iterable[str], None] = None
    read: Union[Tuple[str, ...], Iterable[Path]] = ()
    write: Union[Tuple[str, ...], Iterable[Path]] = ()
    memory: Optional[Size] = None
    cpu_time_s: Optional[float] = None
    processes: int = _PROCESSES
    open_files: int = _OPEN_FILES
    disk: Size = _DISK_BYTES
    file_size: Optional[Size] = None
    output: Size = _OUTPUT_BYTES
    gpu: Union[bool, int, Tuple[int, ...], Iterable[int]] = False
    require: Union[str, Tuple[str, ...], Iterable[str]] = "default"

    def __post_init__(self) -> None:
        """Check everything, and give it its one form."""
        put: Any = object.__setattr__
        put(self, "network", self.network if self.network == "open" else _hosts("network", self.network))
        put(self, "downloads", None if self.downloads is None else _hosts("downloads", self.downloads))
        for name in ("read", "write"):
            put(self, name, _paths(name, getattr(self, name)))
        for name in ("memory", "file_size", "disk", "output"):
            value = getattr(self, name)
            if value is None and name in ("memory", "file_size"):
                continue
            put(self, name, _bytes(name, value))
        put(self, "cpu_time_s", None if self.cpu_time_s is None else _seconds("cpu_time_s", self.cpu_time_s))
        for name, least in (("processes", _LEAST_PROCESSES), ("open_files", _LEAST_OPEN_FILES)):
            _check_count(name, getattr(self, name), least)
        put(self, "gpu", _gpus(self.gpu))
        put(self, "require", _required(self.require))

    @property
    def required(self) -> Tuple[str, ...]:
        """The layers without which a worker does not start."""
        if self.require == "default":
            return DEFAULT_REQUIRED
        if self.require == "all":
            return LAYERS
        return tuple(self.require)

    @property
    def gpus(self) -> Tuple[int, ...]:
        """Numbers of the GPUs that were chosen; none where all or no GPU is seen."""
        return () if isinstance(self.gpu, bool) else tuple(self.gpu)  # type: ignore[arg-type]

    @property
    def download_hosts(self) -> Optional[HostPolicy]:
        """Where torch.hub's functions may fetch from for the worker; None for anywhere."""
        if self.network == "open":
            return None
        return HostPolicy((*(WEIGHT_HOSTS if self.downloads is None else self.downloads), *self.network))

    @property
    def proxy_hosts(self) -> Optional[HostPolicy]:
        """Which hosts the worker reaches through a proxy; None without one."""
        return None if self.network in ((), "open") else HostPolicy(tuple(self.network))

    @property
    def needs_trust(self) -> Tuple[str, ...]:
        """What of this is for trusted repos alone, in words."""
        return ("the caller's own network",) if self.network == "open" else ()


@dataclass(frozen=True)
class Confinement:
    """What a worker was to have, what it has, and what it has not, by name.

    Attributes:
        asked: The layers that were required.
        active: Those that were applied, in order.
        missing: Those that this machine does not have, or that were not to be applied.
        details: Of a layer: what it consists of, or why it is missing.
    """

    asked: Tuple[str, ...] = ()
    active: Tuple[str, ...] = ()
    missing: Tuple[str, ...] = ()
    details: Mapping[str, str] = field(default_factory=dict, hash=False)

    def to_dict(self) -> Dict[str, Any]:
        """For ``json``."""
        return {
            "asked": [*self.asked],
            "active": [*self.active],
            "missing": [*self.missing],
            "details": dict(self.details),
        }

    def __str__(self) -> str:
        """A line each: layer, whether it is active, details."""
        lines = []
        for name in (*self.active, *self.missing):
            word = "active" if name in self.active else "missing, and required" if name in self.asked else "missing"
            detail = self.details.get(name)
            lines.append(f"{name}: {word}" + (f" ({detail})" if detail else ""))
        return "\n".join(lines)


def _gpus(gpu: Any) -> Union[bool, Tuple[int, ...]]:
    if gpu is True or gpu is False:
        return bool(gpu)
    try:
        numbers = (gpu,) if isinstance(gpu, int) else () if isinstance(gpu, str) else tuple(gpu)
    except TypeError:
        numbers = ()
    whole = all(type(number) is int and 0 <= number < _MOST_GPUS for number in numbers)
    if not numbers or not whole or len(set(numbers)) != len(numbers):
        raise _mistake("gpu", gpu, "True, False, the number of a GPU, or several, each once")
    return numbers


def checked_sandbox(sandbox: Any) -> Union[Sandbox, str, None]:
    """A policy, "none", or None for whatever holds elsewhere.

    Raises:
        PolicyError: It is something else.
    """
    if sandbox is None or isinstance(sandbox, Sandbox) or (isinstance(sandbox, str) and sandbox == NONE):
        return sandbox
    raise _mistake("sandbox", sandbox, "an isohub.Sandbox, 'none' or None")


def _mistake(name: str, value: object, expected: str) -> PolicyError:
    text = printable(repr(value), limit_chars=200, newlines=False)
    return PolicyError(f"{name}={text}; expected {expected}", hint="help(isohub.Sandbox) says what each field takes")


def _texts(name: str, value: Any, what: str) -> Tuple[Any, ...]:
    """Several of something. One text alone would be taken letter by letter."""
    if isinstance(value, (str, bytes, os.PathLike)) or not isinstance(value, Iterable):
        raise _mistake(name, value, f"a list of {what}")
    return tuple(value)


def _hosts(name: str, value: Any) -> Tuple[str, ...]:
    hosts = _texts(name, value, "host names" + (", or 'open'" if name == "network" else ""))
    for host in hosts:
        if not isinstance(host, str):
            raise _mistake(name, value, "host names as str")
    HostPolicy(hosts)  # raises
    return hosts


def _paths(name: str, value: Any) -> Tuple[str, ...]:
    paths = []
    for path in _texts(name, value, "paths"):
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise _mistake(name, path, "paths as str or Path, none of them empty")
        text = os.fspath(path)
        if not isinstance(text, str) or "\0" in text:
            raise _mistake(name, path, "paths as str or Path, without NUL")
        paths.append(os.path.abspath(os.path.expanduser(text)))
    return tuple(paths)


def _bytes(name: str, value: Any) -> int:
    expected = "a number of bytes from 1 MiB on, or such as '8 GiB'"
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None:
            raise _mistake(name, value, expected)
        number = int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        raise _mistake(name, value, expected)
    if not _LEAST_BYTES <= number <= _MOST_BYTES:
        raise _mistake(name, value, expected)
    return number


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise _mistake(name, value, "seconds above 0, or None")
    return float(value)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
        raise _mistake(name, value, f"a whole number from {least} on")


def _required(value: Any) -> Union[str, Tuple[str, ...]]:
    if isinstance(value, str):
        if value in ("default", "all"):
            return value
    elif isinstance(value, Iterable):
        names = tuple(value)
        if names and all(name in LAYERS for name in names):
            return names
    raise _mistake("require", value, f"'default', 'all', or names among {', '.join(LAYERS)}")
