"""How much a process may use, as far as the kernel counts it for us: rlimits.

What it counts for a whole worker, and not for each of its processes, is the caller's watchdog's to look at
(`isohub.session.watchdog`), and the size of its directories their file system's (`isohub.sandbox.namespaces`).

Side: worker, in the fork. Source: setrlimit(2), proc(5) for ``VmData``; kernel commit 84638335900f ("mm: rework
virtual memory accounting", 4.7) for RLIMIT_DATA, which counts private writable memory since.
"""

from __future__ import annotations

import resource
from typing import Any, List, Mapping, Tuple

__all__ = ["apply_limits"]

# After the first the kernel sends SIGXCPU at each further second; after the second SIGKILL.
_CPU_GRACE_S = 2
_MEMLOCK_BYTES = 64 << 20
_MSGQUEUE_BYTES = 0


def apply_limits(wanted: Mapping[str, Any], namespaced: bool) -> str:
    """Set them.

    Args:
        wanted: ``memory``, ``cpu_time_s``, ``processes``, ``open_files``, ``file_size``, ``disk`` as `Sandbox` has
            them, numbers or None.
        namespaced: Whether this process is the only one of its user in its user namespace: the kernel counts a
            user's processes in each (Linux 5.14), and elsewhere all of the caller's would count.

    Returns:
        What was set, in words.

    Raises:
        OSError, ValueError: The kernel refused.
    """
    words: List[str] = []
    limits: List[Tuple[int, int, int]] = [
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, _MEMLOCK_BYTES, _MEMLOCK_BYTES),
        (resource.RLIMIT_MSGQUEUE, _MSGQUEUE_BYTES, _MSGQUEUE_BYTES),
        (resource.RLIMIT_NOFILE, wanted["open_files"], wanted["open_files"]),
    ]
    words += [f"{wanted['processes']} processes", f"{wanted['open_files']} open files"]
    if namespaced:
        limits.append((resource.RLIMIT_NPROC, wanted["processes"], wanted["processes"]))
        words.append(f"{wanted['disk']} bytes of disk")
    if wanted["memory"] is not None:
        data = wanted["memory"] + _data_bytes()
        limits.append((resource.RLIMIT_DATA, data, data))
        words.append(f"{wanted['memory']} bytes of memory")
    if wanted["file_size"] is not None:
        limits.append((resource.RLIMIT_FSIZE, wanted["file_size"], wanted["file_size"]))
        words.append(f"files of {wanted['file_size']} bytes")
    if wanted["cpu_time_s"] is not None:
        seconds = max(1, round(wanted["cpu_time_s"]))
        limits.append((resource.RLIMIT_CPU, seconds, seconds + _CPU_GRACE_S))
        words.append(f"{wanted['cpu_time_s']:g} s of processor time")
    for which, soft, hard in limits:
        most = resource.getrlimit(which)[1]
        if most != resource.RLIM_INFINITY:
            resource.setrlimit(which, (min(soft, most), min(hard, most)))
        else:
            resource.setrlimit(which, (soft, hard))
    return ", ".join(words)


def _data_bytes() -> int:
    """What a fork begins with: its zygote's heap, and the stacks of threads that it does not have."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) << 10
    return 0
