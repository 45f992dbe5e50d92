"""What a handle shows of the module that it stands for where Python and torch do not ask but look.

Rules:

1. The class of a module's handle bears the name of the remote class, where that is an identifier: harnesses print and
   compare ``type(model).__name__``, and Python's own errors quote it. It is a name, and nothing else of that class.
2. That class's ``forward`` has the signature of the remote class's, for who looks at classes for names of arguments.
3. ``_parameters``, ``_buffers`` and ``_modules`` are looks: who writes to them, as ``torch.func.functional_call`` and
   ``torch.nn.utils.prune`` do, would change nothing in the worker, and is told so.

Side: caller. Trust: the name is a worker's.
"""

from __future__ import annotations

import keyword
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from isohub.session.link import Remote

__all__ = ["Look", "example_of", "make_like"]

_LONGEST_NAME_CHARS = 100
#: By name of the worker, base and remote class: as long as there is a handle of it.
_classes: weakref.WeakValueDictionary[tuple[str, type, str], type] = weakref.WeakValueDictionary()


def make_like(base: type, remote: Remote) -> Any:
    """An instance of a subclass with the remote class's name, or of the class itself where that is no name.

    Args:
        base: Class of the handle.
        remote: What it stands for. Trust: its class's name is a worker's.
    """
    name = remote.class_name.rpartition(".")[2]
    if not name.isidentifier() or keyword.iskeyword(name) or len(name) > _LONGEST_NAME_CHARS:
        return base(remote)
    key = (remote.worker.name, base, remote.class_name)
    like = _classes.get(key)
    if like is None:
        like = _classes[key] = type(name, (base,), {"__module__": base.__module__, "__doc__": base.__doc__})
    made = like(remote)
    like._isohub_example = weakref.ref(made)  # type: ignore[attr-defined]
    return made


def example_of(kind: type) -> Any:
    """A handle of exactly this class that is alive; None for `base` itself, and where there is none."""
    known = kind.__dict__.get("_isohub_example")
    return None if known is None else known()


class Look(dict[str, Any]):
    """Copies or handles by name, which refuses to be written to.

    Args:
        rows: What is there now.
        worker_name: For the error.
    """

    def __init__(self, rows: dict[str, Any], worker_name: str) -> None:
        super().__init__(rows)
        self._worker_name = worker_name

    def _refuse(self, *names: Any, **named: Any) -> NoReturn:  # noqa: ARG002 - as dict's own methods take it
        what = repr(names[0]) if names and isinstance(names[0], str) else "this"
        raise RuntimeError(
            f"{what} is a copy of what the worker of {self._worker_name} has: replacing it here changes nothing there\n"
            "hint: h.run(fn, ...) works on the live module, with torch.func.functional_call or torch.nn.utils too; "
            "h.load_state_dict() sets values"
        )

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse
