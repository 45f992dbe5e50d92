"""An environment's packages: where they stand on ``sys.path``, and which process imports torch, and when.

Rules:

1. What the caller's own interpreter has, its zygote imports ahead of need, as the caller itself would: torch, and
   numpy where there is one. A worker is a fork of that.
2. What isohub has installed, a repo may have asked for, under any name: a wheel called anything can hold a ``numpy``
   or a ``.pth``. No byte of it runs before a worker is confined, neither by an import nor by `site`. The zygote of a
   whole environment is started with ``-S`` and knows the standard library alone; each of its workers imports torch.
3. The directories of an environment stand behind the standard library and before the host's packages, from the fork
   on. If those of an overlay bring something that torch's import has brought already (another numpy), the zygote
   starts anew without torch, and each of its workers imports torch over the overlay.
4. ``.pth`` files among them are not read. They serve installations in place, which there are none of, and namespaces
   of old, whose parts Python finds without. A virtual environment's own are, by the worker.

Side: worker; `import_ahead` and `shadowed` in its zygote. Trust: paths are the caller's; the packages are whoever's
the requirements name. Source: site(1) as the ``site`` module of Python 3.8 to 3.14 has it.
"""

from __future__ import annotations

import gc
import os
import re
import sys
from typing import List, Sequence, Tuple

from isohub.wire.arena import storage_of

__all__ = ["import_ahead", "put_on_path", "shadowed", "take_in", "versions"]

#: The oldest torch whose storages, dtypes and autograd hooks the worker's side knows: docs/versions.md.
LEAST_TORCH = (1, 13)
_ENDS_OF_MODULES = (".py", ".so")


def import_ahead() -> None:
    """Import what every worker needs, so that each fork has it. In a zygote of the host's own packages alone.

    What is there then is never collected, here or in the forks: a collection writes to each object, and so copies every
    page of torch's modules. None is made before either: it takes a tenth of the import, and leaves holes among the
    pages for the forks to write to (Python's documentation of ``gc.freeze``).
    """
    gc.disable()
    import numbers  # noqa: F401
    import random  # noqa: F401

    _import_torch()
    gc.freeze()
    gc.enable()


def _import_torch() -> None:
    """Import torch and its like.

    Raises:
        ImportError: There is none, it cannot be loaded, or it is too old.
    """
    import torch

    version = str(torch.__version__)
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and (int(found.group(1)), int(found.group(2))) < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        raise ImportError(f"this interpreter has torch {version}; isohub's workers run on torch {least} or newer")
    try:
        import numpy.random  # noqa: F401 - seven shared libraries, which every worker's seeding would load
    except ImportError:
        pass
    # A tiny tensor each way: dispatch tables and lazy imports are filled once, and nothing runs in parallel.
    storage_of(torch.empty(0, dtype=torch.uint8))
    torch.frombuffer(bytearray(8), dtype=torch.uint8)


def _place() -> int:
    """Where on ``sys.path`` the standard library ends."""
    standard = os.path.dirname(os.path.abspath(os.__file__))
    own = (standard, os.path.join(standard, "lib-dynload"))
    return 1 + max((number for number, entry in enumerate(sys.path) if entry in own), default=-1)


def put_on_path(packages: Sequence[str]) -> None:
    """Put an environment's directories behind the standard library and before all else.

    Args:
        packages: The directories, first ones first.
    """
    place = _place()
    sys.path[place:place] = packages


def shadowed(packages: Sequence[str]) -> List[str]:
    """What an overlay brings that is imported already, from a place that the overlay's would come before.

    Args:
        packages: Its directories, not on ``sys.path`` yet.

    Returns:
        Names of modules.
    """
    standard = {os.path.realpath(entry) for entry in sys.path[: _place()]}
    found = []
    for name in _names_in(packages):
        file = getattr(sys.modules.get(name), "__file__", None)
        if not isinstance(file, str):
            continue  # not imported, built in, or a namespace, whose parts are looked for again when the path changes
        above = os.path.dirname(file)
        if os.path.basename(file).startswith("__init__."):
            above = os.path.dirname(above)
        if os.path.realpath(above) not in standard:
            found.append(name)
    return found


def _names_in(packages: Sequence[str]) -> List[str]:
    names = set()
    for directory in packages:
        for entry in os.listdir(directory):
            stem = entry.partition(".")[0]
            if stem == entry or entry.endswith(_ENDS_OF_MODULES):
                names.add(stem)
    return sorted(names)


def take_in(packages: Sequence[str]) -> None:
    """Have the environment's packages, and torch of them, in this process: a worker that is confined.

    Args:
        packages: Its directories.

    Raises:
        ImportError: There is no torch that workers can use.
    """
    if sys.flags.no_site:
        import site

        site.main()
    put_on_path(packages)
    if "torch" not in sys.modules:
        _import_torch()


def versions() -> Tuple[str, str]:
    """Of Python and of torch."""
    import torch

    return ".".join(map(str, sys.version_info[:3])), str(torch.__version__)
