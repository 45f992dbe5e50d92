"""torch for the caller's own process, imported while other things are waited for.

A handle is a ``torch.nn.Module``, so a load brings torch here, which takes most of a second. A zygote imports it at
the same time, and references are resolved and code is fetched. Whoever needs torch says ``import torch`` and waits for
what is left of it; Python lets one thread import a module.

Side: caller.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading

__all__ = ["import_torch"]

_once = threading.Lock()  # taken for good by the one thread there ever is


def import_torch() -> None:
    """Begin to import torch in another thread, unless it is there. Returns at once."""
    if "torch" not in sys.modules and _once.acquire(blocking=False):
        # No daemon: a program that ends earlier waits for it, as for an import of its own.
        threading.Thread(target=_import_torch, name="isohub-import-torch").start()


def _import_torch() -> None:
    collecting = gc.isenabled()
    gc.disable()  # modules are no garbage: looking for some among them takes a tenth of the import
    try:
        with contextlib.suppress(Exception):  # whoever needs it gets the same error
            import torch  # noqa: F401
    finally:
        if collecting:
            # What is young becomes old without being looked at, unless somebody keeps objects apart for good.
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()
