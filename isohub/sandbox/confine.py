"""What is taken from a worker before it runs a byte of a repo's code, in order.

This is the seam where Landlock, seccomp and namespaces go. Until they are here, `MISSING` names them in
every report: a worker has an environment, descriptors and directories of its own and cannot outlive its
zygote, but it may still read what its user may read and open sockets. SECURITY.md says the same.

Side: worker, in the fork, before any thread. Source: prctl(2), setrlimit(2), close_range(2).
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

__all__ = [
    "LAYERS",
    "MISSING",
    "PASSED_VARIABLES",
    "Layers",
    "close_all_but",
    "confine",
    "die_with_parent",
    "remove_tree",
]

#: Names of what `confine` applies, in order.
LAYERS: Tuple[str, ...] = (
    "descriptors",
    "environment",
    "private home, tmp and cwd",
    "no_new_privs",
    "no core dumps",
    "dies with its caller",
)
#: What DESIGN asks for and no worker has yet.
MISSING: Tuple[str, ...] = ("landlock", "seccomp", "namespaces", "limits")

#: The only variables of the caller's that a worker sees: locale, time zone, threads, processor and GPU choice.
PASSED_VARIABLES: Tuple[str, ...] = (
    "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "GOMP_CPU_AFFINITY", "GOMP_SPINCOUNT", "KMP_AFFINITY",
    "KMP_BLOCKTIME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "PATH",
    "TORCH_CPP_LOG_LEVEL", "TZ",
)  # fmt: skip

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38


class Layers(NamedTuple):
    """What a worker got and did not get, in words."""

    active: Tuple[str, ...]
    missing: Tuple[str, ...]


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end now if it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def close_all_but(keep: Sequence[int]) -> None:
    """Close every descriptor above standard error that is not in `keep`."""
    low = 3
    for descriptor in [*sorted(set(keep)), None]:
        high = (1 << 31) - 1 if descriptor is None else descriptor
        if descriptor is None or descriptor > low:
            _close_range(low, high)
        if descriptor is not None:
            low = max(low, descriptor + 1)


def _close_range(low: int, high: int) -> None:
    """Close low <= descriptor < high, by what there is rather than by what there may be."""
    try:
        present: List[int] = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        present = list(range(low, min(high, resource.getrlimit(resource.RLIMIT_NOFILE)[0])))
    for descriptor in present:
        if low <= descriptor < high:
            try:
                os.close(descriptor)
            except OSError:
                pass  # the listing's own descriptor


def remove_tree(directory: str) -> None:
    """Remove a worker's directory, whatever the worker made of it."""
    try:
        os.rmdir(directory)  # often empty, and this needs no descriptor where none is left
    except OSError:
        pass
    else:
        return
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except RecursionError:
        # It recurses, and a repo can nest directories deeper than Python's stack; rm(1) does not.
        command = ["/bin/rm", "-rf", "--", directory]
        subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def confine(directory: str, variables: Mapping[str, str], keep: Sequence[int]) -> Layers:
    """Apply every layer there is.

    Args:
        directory: The worker's own; ``home``, ``tmp`` and ``cwd`` are made in it.
        variables: The whole environment, less the directories that are the worker's own. Trust: caller.
        keep: Descriptors that stay open.

    Returns:
        What is active and what is missing.

    Raises:
        OSError: A layer cannot be applied; the worker must not go on.
    """
    close_all_but(keep)
    places: Dict[str, str] = {name: os.path.join(directory, name) for name in ("home", "tmp", "cwd")}
    for place in places.values():
        os.mkdir(place, 0o700)
    os.environ.clear()
    os.environ.update(variables)
    cache = os.path.join(places["home"], ".cache")
    os.environ.update(
        HOME=places["home"], TMPDIR=places["tmp"], XDG_CACHE_HOME=cache, TORCH_HOME=os.path.join(cache, "torch")
    )
    tempfile.tempdir = None
    os.chdir(places["cwd"])
    os.umask(0o077)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return Layers(LAYERS, MISSING)
