"""What every process on the worker's side has, the small ones around a zygote too: variables, descriptors, an end.

Side: both. Light to import: the first process that a session starts waits for it. Source: prctl(2).
"""

from __future__ import annotations

import os
import signal
from typing import Sequence, Tuple

from isohub.sandbox.kernel import prctl

__all__ = ["PASSED_VARIABLES", "close_all_but", "die_with_parent", "remove_tree"]

#: The only variables of the caller's that a worker sees: locale, time zone, threads, processor and GPU choice.
PASSED_VARIABLES: Tuple[str, ...] = (
    "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "GOMP_CPU_AFFINITY", "GOMP_SPINCOUNT", "KMP_AFFINITY",
    "KMP_BLOCKTIME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "PATH",
    "TORCH_CPP_LOG_LEVEL", "TZ",
)  # fmt: skip

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end now if it has ended already.

    Args:
        parent: Its process number as this process sees it: 0 if it is outside of this pid namespace.
    """
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
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
    for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
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
    import shutil  # noqa: PLC0415

    try:
        shutil.rmtree(directory, ignore_errors=True)
    except RecursionError:
        import subprocess  # noqa: PLC0415

        # It recurses, and a repo can nest directories deeper than Python's stack; rm(1) does not.
        command = ["/bin/rm", "-rf", "--", directory]
        subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
