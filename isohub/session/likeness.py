"""What a handle shows of the module that it stands for where Python and torch do not ask but look.

Rules:

1. The class of a module's handle bears the name of the remote class, where that is an identifier: harnesses print and
   compare ``type(model).__name__``, and Python's own errors quote it. It is a name, and nothing else of that class.
2. ``_parameters``, ``_buffers`` and ``_modules`` are looks: who writes to them, as ``torch.func.functional_call`` and
   ``torch.nn.utils.prune`` do, would change nothing in the worker, and is told so.

Side: caller. Trust: the name is a worker's.
"""

from __future__ import annotations

import functools
import keyword
from typing import Any, NoReturn

__all__ = ["Look", "class_like"]

_LONGEST_NAME_CHARS = 100
#: Classes that are kept; a worker that invents names gets new ones, which go with their handles.
_MOST_CLASSES = 512


@functools.lru_cache(_MOST_CLASSES)
def class_like(base: type, class_name: str) -> type:
    """A subclass with the last part of this name; the class itself where that is no name for a class.

    Args:
        base: Class of the handle.
        class_name: The remote class, dotted. Trust: worker.
    """
    name = class_name.rpartition(".")[2]
    if not name.isidentifier() or keyword.iskeyword(name) or len(name) > _LONGEST_NAME_CHARS:
        return base
    return type(name, (base,), {"__module__": base.__module__, "__doc__": base.__doc__})


class Look(dict[str, Any]):
    """Copies or handles by name, which refuses to be written to.

    Args:
        rows: What is there now.
        worker_name: For the error.
    """

    def __init__(self, rows: dict[str, Any], worker_name: str) -> None:
        super().__init__(rows)
        self._worker_name = worker_name

    def _refuse(self, *names: Any, **named: Any) -> NoReturn:
        what = repr(names[0]) if names and isinstance(names[0], str) else "this"
        raise RuntimeError(
            f"{what} is a copy of what the worker of {self._worker_name} has: replacing it here changes nothing there\n"
            "hint: h.run(fn, ...) works on the live module, with torch.func.functional_call or torch.nn.utils too; "
            "h.load_state_dict() sets values"
        )

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse  # type: ignore[assignment]
