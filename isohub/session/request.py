"""What a zygote is told of one worker: the policy in numbers and paths, and the variables that it may see.

Side: caller. Trust: the caller's policy; paths of the store.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isohub.errors import PolicyError
from isohub.sandbox.policy import NONE, Sandbox
from isohub.sandbox.processes import PASSED_VARIABLES

__all__ = ["Placement", "gpu_variables", "memory_limit_bytes", "worker_request", "worker_variables"]

# After a parallel region libgomp's threads spin for milliseconds before they sleep. With few processors, a
# worker's and the caller's then spin against each other: on two, a 600 kB call between operators of the caller's
# took 4.2 ms by default and 1.1 ms with this, for 5% of a convolution's time (docs/performance.md). It says
# nothing of results: the number of threads, and so the order of sums, stays.
_FEW_PROCESSORS = 4
_GOMP_SPINCOUNT = "20000"
# Of the machine's memory, for a policy that names none: what is left lets the caller say what happened. The watchdog
# asks ten times a second.
_DEFAULT_MEMORY_BYTES = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.9)
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# With fewer torch does not start its threads.
_LEAST_FILES = 64


@dataclass(frozen=True)
class Placement:
    """What one worker is confined to.

    Attributes:
        policy: A `Sandbox`, or "none".
        checkout: Root of the tree whose code it runs.
        granted: Directories of the store that are its repo's own, read-only.
        store: Root of the store, if there is one: no worker may change anything in it.
    """

    policy: Sandbox | str
    checkout: Path
    granted: tuple[Path, ...] = ()
    store: Path | None = None


def memory_limit_bytes(policy: Sandbox) -> int:
    """The most memory that a worker and its processes may have together."""
    if policy.memory is not None:
        return int(policy.memory)
    return _DEFAULT_MEMORY_BYTES


def worker_variables() -> dict[str, str]:
    """The caller's variables that every worker may see."""
    passed = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
    if len(os.sched_getaffinity(0)) <= _FEW_PROCESSORS and "OMP_WAIT_POLICY" not in passed:
        passed.setdefault("GOMP_SPINCOUNT", _GOMP_SPINCOUNT)
    return passed


def gpu_variables(policy: Sandbox) -> dict[str, str]:
    """What a worker that sees some of the GPUs has in its environment for it.

    Raises:
        PolicyError: The caller's own choice has fewer.
    """
    if isinstance(policy.gpu, bool):
        return {}
    own = os.environ.get(_VISIBLE)
    if own is None:
        return {_VISIBLE: ",".join(map(str, policy.gpus))}
    seen = [name.strip() for name in own.split(",") if name.strip()]
    missing = [number for number in policy.gpus if number >= len(seen)]
    if missing:
        raise PolicyError(
            f"gpu={policy.gpu!r}, and {_VISIBLE}={own!r} leaves {len(seen)} to this process",
            hint=f"isohub.Sandbox(gpu=...) numbers them from 0 within {_VISIBLE}, as torch does",
        )
    return {_VISIBLE: ",".join(seen[number] for number in policy.gpus)}


def worker_request(placement: Placement) -> dict[str, Any]:
    """The message.

    Raises:
        PolicyError: A path of the policy's is not there.
    """
    policy = Sandbox() if isinstance(placement.policy, str) else placement.policy
    _check_nesting(placement, policy)
    network = policy.network if policy.network == "open" else "proxy" if policy.network else "none"
    return {
        "variables": {**worker_variables(), **gpu_variables(policy)},
        "sandbox": {
            "level": NONE if placement.policy == NONE else "full",
            "network": network,
            "checkout": str(placement.checkout),
            "read": [*_present("read", policy.read), *map(str, placement.granted)],
            "write": _present("write", policy.write),
            # CUDA maps more private memory than it uses: there the watchdog alone counts.
            "memory": memory_limit_bytes(policy) if policy.gpu is False else None,
            "cpu_time_s": policy.cpu_time_s,
            "processes": policy.processes,
            "open_files": _open_files(policy),
            "disk": policy.disk,
            "file_size": policy.file_size,
            "gpu": policy.gpu is not False,
        },
    }


def _open_files(policy: Sandbox) -> int:
    """Descriptors in flight count for all of a user's processes, against the sender's limit: unix(7).

    With as many as the caller has, a worker could keep the caller from sending any.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return policy.open_files if soft < 0 else min(policy.open_files, max(_LEAST_FILES, soft * 3 // 4))


def _check_nesting(placement: Placement, policy: Sandbox) -> None:
    """Refuse what lies within a ``write=`` path: a worker could put a link in its place, for the next to be given.

    So with the store, and with what is in it: what one worker wrote there another one would run.

    Raises:
        PolicyError: Something does.
    """
    from isohub.sandbox.grants import is_below

    writable = [str(path) for path in policy.write]
    store = None if placement.store is None else os.path.realpath(placement.store)
    for path in writable:
        real = os.path.realpath(path)
        if store is not None and (is_below(store, real) or is_below(real, store)):
            raise PolicyError(
                f"write={path!r} would let the worker change isohub's own cache, {str(placement.store)!r}",
                hint="name a directory that is neither in the cache nor around it",
            )
    named = [("read", str(path)) for path in policy.read] + [("write", path) for path in writable]
    for name, path in [*named, ("checkout", str(placement.checkout))]:
        for above in writable:
            inside = (is_below(path, above) and path != above) or (
                is_below(os.path.realpath(path), os.path.realpath(above))
                and os.path.realpath(path) != os.path.realpath(above)
            )
            if inside:
                raise PolicyError(
                    f"{name} {path!r} lies within write={above!r}, where a worker could put another thing in its place",
                    hint="name the outer path alone, or one that does not lie within another",
                )


def _present(name: str, paths: Any) -> Sequence[str]:
    for path in paths:
        if not os.path.exists(path):  # noqa: PTH110 - the policy holds text
            raise PolicyError(f"{name}={path!r} is not there", hint="make it, or leave it out of isohub.Sandbox")
    return list(paths)
