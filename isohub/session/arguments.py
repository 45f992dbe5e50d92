"""Arguments outside of the closed set, for a worker: pickled, and what a worker cannot import by value.

Rules:

1. What comes from the caller's own files goes by value, functions and classes alike, with what they refer to. What is
   installed is imported there.
2. A handle within a function or an object is the object in the worker, if it is that worker's.
3. A module of the caller's own goes with those of its attributes that the functions which go name, and that can go.
4. Tensors that require a gradient are told to whoever asks: no gradient comes back for what goes by pickle.
5. Compiled code, which functions and classes of the caller's own go with, is for one minor version of Python; what is
   imported there is not.
6. What lives in this process alone (files, sockets, locks, threads, generators, other workers' objects) is refused, by
   the name of the argument.

Side: caller, which is the more trusted one; only this direction pickles.
"""

from __future__ import annotations

import contextlib
import io
import os
import site
import sys
import sysconfig
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import torch

from isohub.errors import ValueNotTransferableError

__all__ = ["pickled", "place_of"]

_registry_lock = threading.RLock()  # cloudpickle's list is the process's
_own: dict[str, bool] = {}  # whether a module is the caller's own, by name
_mine: list[str] = []  # names of those that are
_MOST_PLACES = 100_000

#: What lives in one process, and what it is called.
_LIVE_KINDS: tuple[tuple[type, str], ...] = (
    (io.IOBase, "an open file"),
    (type(threading.Lock()), "a lock"),
    (type(threading.RLock()), "a lock"),
    (threading.Condition, "a lock"),
    (threading.Semaphore, "a lock"),
    (threading.Event, "a lock"),
    (threading.Thread, "a thread"),
    (threading.local, "a thread's own storage"),
    (types.GeneratorType, "a generator"),
    (types.CoroutineType, "a coroutine"),
    (types.AsyncGeneratorType, "an async generator"),
    (types.FrameType, "a frame"),
    (types.TracebackType, "a traceback"),
    (memoryview, "a memoryview"),
)
#: The same by the names of their classes, for modules that need not be imported.
_LIVE_NAMES = {
    ("socket", "socket"): "a socket",
    ("_socket", "socket"): "a socket",
    ("mmap", "mmap"): "mapped memory",
    ("subprocess", "Popen"): "a process",
    ("sqlite3", "Connection"): "a database connection",
    ("concurrent.futures._base", "Future"): "a future",
    ("concurrent.futures.thread", "ThreadPoolExecutor"): "an executor",
    ("concurrent.futures.process", "ProcessPoolExecutor"): "an executor",
    ("_asyncio", "Future"): "a future",
    ("_asyncio", "Task"): "a task",
    ("isohub.hub", "Session"): "a session",
}


_Handle = Callable[[Any], int | None]


class _LiveError(Exception):
    """An object that cannot leave this process."""


class _CodeError(Exception):
    """Code for a worker whose Python cannot read it; the name of what it is of."""


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc] # it has no types
    """cloudpickle's, which knows handles and modules of the caller's own, and refuses what is alive.

    Args:
        file: Takes the bytes.
        handle: As for `pickled`.
        names: Names that functions have used, so far; what this one meets is added.
        other_python: As for `pickled`.
        within: The one that tries whether an attribute can go.
    """

    def __init__(
        self, file: Any, handle: _Handle | None, names: set[str], other_python: str, within: _Pickler | None = None
    ) -> None:
        super().__init__(file)
        self._other_python = other_python
        self._handle = handle
        self.differentiable: dict[int, torch.Tensor] = {}  # by id: each once
        self._names = names
        self._wanted: frozenset[str] = frozenset(names) if within is None else within._wanted
        # Names of each own module's attributes that can go, by the module's name; filled as it is found out.
        self.modules: dict[str, list[str]] = {} if within is None else within.modules

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                self.differentiable[id(value)] = value
            return None
        return None if self._handle is None else self._handle(value)

    def reducer_override(self, value: Any) -> Any:
        words = _live(value)
        if words is not None:
            raise _LiveError(words)
        if isinstance(value, types.ModuleType) and _is_own(value.__name__, value):
            return self._module(value)
        if isinstance(value, types.CodeType) and self._other_python:
            raise _CodeError(value.co_name)
        if isinstance(value, types.FunctionType):
            self._names.update(_used(value.__code__))
        return super().reducer_override(value)

    def _module(self, module: types.ModuleType) -> Any:
        """Not cloudpickle's own way, which cannot go where a module leads back to itself, nor without one attribute."""
        known = self.modules.get(module.__name__)
        if known is None:
            known = self.modules[module.__name__] = []  # what leads back here, meanwhile, is nothing
            known.extend(name for name, value in vars(module).copy().items() if self._can_go(name, value))
        state = {name: value for name, value in vars(module).copy().items() if name in known}
        return types.ModuleType, (module.__name__, module.__doc__), state

    def _can_go(self, name: str, value: Any) -> bool:
        if name not in self._wanted:
            return False
        try:
            _Pickler(io.BytesIO(), self._handle, self._names, self._other_python, self).dump(value)
        except Exception:  # noqa: BLE001 - whatever it is, the attribute cannot go
            return False
        return True


def pickled(
    value: Any,
    handle: _Handle | None = None,
    differentiable: list[torch.Tensor] | None = None,
    *,
    other_python: str = "",
) -> bytes:
    """A value for a worker. The caller is the more trusted side: this direction may pickle.

    Args:
        value: Anything.
        handle: The number of the object that a handle of this worker's stands for; None for what is no handle.
        differentiable: Takes the tensors in it that require a gradient.
        other_python: The worker's version of Python, if that reads no code of this one.

    Raises:
        ValueNotTransferableError: It is, or holds, something that cannot leave this process, or not for that Python.
    """
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    try:
        words = _live(value)
        if words is not None:
            raise ValueNotTransferableError(f"{words} cannot be sent to a worker", hint=_HINT, where=kind)
        with _own_modules():
            data, found = _dumped(value, handle, other_python)
    except ValueNotTransferableError:
        raise
    except _CodeError as error:
        here = ".".join(map(str, sys.version_info[:3]))
        raise ValueNotTransferableError(
            f"a {kind} cannot be sent to a worker of another Python: the code of {error} is compiled for Python {here} "
            f"here, and the worker has Python {other_python}",
            hint="call methods of the remote object, or pass functions that are installed there (torch.relu), by which "
            f"no code goes; or load the repo on Python {sys.version_info.major}.{sys.version_info.minor}",
            where=kind,
        ) from None
    except _LiveError as error:
        raise ValueNotTransferableError(
            f"a {kind} cannot be sent to a worker: it holds {error}", hint=_HINT, where=kind
        ) from None
    except Exception as error:
        raise ValueNotTransferableError(
            f"a {kind} cannot be sent to a worker: {error}", hint=_HINT, where=kind
        ) from error
    if differentiable is not None:
        differentiable.extend(found)
    return data


def _dumped(value: Any, handle: _Handle | None, other_python: str) -> tuple[bytes, list[torch.Tensor]]:
    names: set[str] = set()
    while True:
        file, before = io.BytesIO(), len(names)
        pickler = _Pickler(file, handle, names, other_python)
        pickler.dump(value)
        if not pickler.modules or len(names) == before:
            return file.getvalue(), list(pickler.differentiable.values())
        # Once more: an own module goes with what was named meanwhile.


def _used(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _used(constant)


_HINT = "pass plain values and tensors, or use h.run(fn, ...) and make the object there"


def _live(value: Any) -> str | None:
    """What a thing of this process alone is called, None for all others."""
    # Files of memory are values, and cloudpickle sends the streams by what they are.
    if isinstance(value, (io.StringIO, io.BytesIO)) or value is sys.stdout or value is sys.stderr:
        return None
    for kind, words in _LIVE_KINDS:
        if isinstance(value, kind):
            return words
    for base in type(value).__mro__:
        known = _LIVE_NAMES.get((base.__module__, base.__name__))
        if known is not None:
            return known
    return None


@contextlib.contextmanager
def _own_modules() -> Iterator[None]:
    """Have all modules of the caller's own pickled by value: a worker cannot import them."""
    with _registry_lock:
        known = cloudpickle.list_registry_pickle_by_value()
        for name in sys.modules.keys() - _own.keys():
            _is_own(name, sys.modules.get(name))
        mine = [sys.modules.get(name) for name in _mine]
        own = [module for module in mine if isinstance(module, types.ModuleType) and module.__name__ not in known]
        for module in own:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in own:
                cloudpickle.unregister_pickle_by_value(module)


def _is_own(name: str, module: Any) -> bool:
    known = _own.get(name)
    if known is None:
        known = _own[name] = _lies_outside(name, module)
        if known:
            _mine.append(name)
    return known


def _lies_outside(name: str, module: Any) -> bool:
    """Whether a module lies outside of what is installed."""
    file = getattr(module, "__file__", None)
    if not isinstance(module, types.ModuleType) or module.__name__ != name or not isinstance(file, str):
        return False
    if name == "__main__" or name.partition(".")[0] == "isohub":
        return False
    return not os.path.realpath(file).startswith(_installed())


def _installed() -> tuple[str, ...]:
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    users = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []  # which a zygote is given too
    return tuple({os.path.realpath(path) + os.sep for path in (*map(sysconfig.get_path, kinds), *users)})


# Which argument it was.


def place_of(value: Any, op: str, args: Any) -> str | None:
    """Where a value is among the arguments of a question, in words.

    Args:
        value: The object itself.
        op: The question's operation.
        args: Its arguments.
    """
    positional, keywords = _given(op, args)
    for number, argument in enumerate(positional, start=1):
        path = _path(value, argument)
        if path is not None:
            return f"argument {number}{path and f', at {path}'}"
    for name, argument in keywords.items():
        path = _path(value, argument)
        if path is not None:
            return f"argument {name}={path and f', at {path}'}"
    if op == "run" and args and args[0] is value:
        return "the function"
    return None


def _given(op: str, args: Any) -> tuple[Any, dict[str, Any]]:
    """What the caller gave as arguments: the last two are those, where there are any."""
    if op in ("call", "build", "run") and len(args) >= 2 and isinstance(args[-1], dict):
        return args[-2], args[-1]
    return (args[1] if op == "operate" and len(args) == 2 else ()), {}


def _path(value: Any, root: Any) -> str | None:
    """The way from an argument to what it holds, as Python writes it; empty if it is that itself."""
    left, seen = [("", root)], 0
    while left and seen < _MOST_PLACES:
        path, item = left.pop()
        seen += 1
        if item is value:
            return path
        if len(path) > 200:
            continue
        if isinstance(item, dict):
            left.extend((f"{path}[{key!r:.40}]", inner) for key, inner in item.items())
        elif isinstance(item, (list, tuple)):
            left.extend((f"{path}[{number}]", inner) for number, inner in enumerate(item))
    return None
