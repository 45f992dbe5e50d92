"""What can be done to an object that lives here, beyond calls and attributes: iteration, awaiting, contexts, words.

Rules:

1. An iteration produces one item for one question, and nothing ahead.
2. Coroutines and async iterators run in one event loop of this worker's, in the thread that answers, and only while a
   question asks for them. Tasks that they leave behind go on whenever the loop runs again.
3. An iterator whose last reference is given back is closed by Python, as a local one; async ones by `Loop.tidy`.

Side: worker. Trust: what runs is the repo's.
"""

from __future__ import annotations

import builtins
import collections.abc
import contextlib
import io
import operator
import pickle  # noqa: TID251 - the caller's bytes: the more trusted side
import types
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

__all__ = ["OPERATIONS", "Loop", "Operations", "sort_of", "unpickled"]

_MAX_TEXT_CHARS = 2000


def _aiter(target: Any) -> Any:
    found = getattr(type(target), "__aiter__", None)
    return iter(target) if found is None else found(target)


def _swapped(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda target, other: function(other, target)


_TWO = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift", "and_", "or_", "xor")

#: Python's operations on numbers and their like, by name; ``r...`` are those with the operands swapped.
OPERATIONS: Dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in (*_TWO, "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert")},
    **{"r" + name: _swapped(getattr(operator, name)) for name in _TWO},
    **{"i" + name: getattr(operator, "i" + name.rstrip("_")) for name in _TWO},
    "int": int,
    "float": float,
    "round": round,
    "reversed": reversed,
    "aiter": _aiter,
}


def sort_of(kind: type) -> str:
    """What a handle to an object of this class can do: ``iterator``, ``stream``, ``awaitable`` or only ``object``."""
    if hasattr(kind, "__anext__"):
        return "stream"
    if issubclass(kind, (collections.abc.Awaitable, types.CoroutineType)):
        return "awaitable"
    return "iterator" if hasattr(kind, "__next__") else "object"


class Loop:
    """The event loop of this worker's, made when it is first needed."""

    def __init__(self) -> None:
        self._loop: Any = None

    def run(self, begin: Callable[[], Any]) -> Any:
        """Wait here for what this gives. An interruption ends it where it waits.

        It is begun within the loop: async generators take the loop's hooks when their first item is asked for.
        """
        import asyncio

        if self._loop is None:
            self._loop = asyncio.new_event_loop()

        async def wait() -> Any:
            return await begin()

        task = self._loop.create_task(wait())
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            if not task.done():
                task.cancel()
                self._loop.run_until_complete(asyncio.wait([task]))
                if not task.cancelled():
                    task.exception()  # seen: what is raised here is the interruption
            raise

    def tidy(self) -> None:
        """Let async generators that nobody holds any more run what is after their ``finally``."""
        import asyncio

        if self._loop is None:
            return
        for _ in range(2):  # Python's hook makes a task in the first round, which begins in the second
            self._loop.run_until_complete(asyncio.sleep(0))
        closing = [
            task for task in asyncio.all_tasks(self._loop) if type(task.get_coro()).__name__ == "async_generator_athrow"
        ]
        if closing:
            self._loop.run_until_complete(asyncio.wait(closing))


class Operations:
    """Those operations of a `Server`."""

    def __init__(self) -> None:
        self.loop = Loop()

    def do_next(self, target: Any) -> Tuple[bool, Any]:
        """Whether there was another item, and the item, or what the generator returned."""
        try:
            return True, next(target)
        except StopIteration as end:
            return False, end.value

    def do_anext(self, target: Any) -> Tuple[bool, Any]:
        """The same of an async iterator."""
        try:
            return True, self.loop.run(lambda: type(target).__anext__(target))
        except StopAsyncIteration:
            return False, None

    def do_await(self, target: Any) -> Any:
        """The result of a coroutine or another awaitable."""
        return self.loop.run(lambda: target)

    def do_tidy(self) -> None:
        """Nothing: what the caller gave back with this question has been let go."""

    def do_enter(self, target: Any, asynchronous: bool) -> Any:
        """Enter a context manager."""
        if asynchronous and not hasattr(type(target), "__enter__"):
            return self.loop.run(lambda: _special(target, "__aenter__")(target))
        return _special(target, "__enter__")(target)

    def do_exit(self, target: Any, asynchronous: bool, pickled: Optional[bytes], names: List[str], text: str) -> bool:
        """Leave it, with the exception that the caller raised, if there is one; whether that is taken care of."""
        error = _exception(pickled, names, text) if names else None
        arguments = (None, None, None) if error is None else (type(error), error, error.__traceback__)
        if asynchronous and not hasattr(type(target), "__exit__"):
            return bool(self.loop.run(lambda: _special(target, "__aexit__")(target, *arguments)))
        return bool(_special(target, "__exit__")(target, *arguments))

    def do_describe(self, target: Any) -> Tuple[str, Optional[str], Optional[List[Any]], Optional[str]]:
        """Name, docstring, parameters (name, kind, default and annotation as text), and what it returns."""
        import inspect

        import torch

        if isinstance(target, torch.nn.Module):
            target = target.forward
        name = getattr(target, "__name__", type(target).__name__)
        doc = inspect.getdoc(target)
        try:
            signature = inspect.signature(target)
        except (TypeError, ValueError):
            return str(name), doc, None, None
        empty = inspect.Parameter.empty
        rows = [
            (
                parameter.name,
                parameter.kind.name,
                None if parameter.default is empty else _shown(parameter.default, repr),
                None if parameter.annotation is empty else _shown(parameter.annotation, inspect.formatannotation),
            )
            for parameter in signature.parameters.values()
        ]
        returns = signature.return_annotation
        return (
            str(name),
            doc,
            rows,
            None if returns is inspect.Signature.empty else _shown(returns, inspect.formatannotation),
        )


def _shown(value: Any, show: Callable[[Any], str]) -> str:
    if isinstance(value, str) and show is not repr:
        return value[:_MAX_TEXT_CHARS]  # an annotation that is text already
    try:
        return str(show(value))[:_MAX_TEXT_CHARS]
    except Exception:
        return "..."


def _special(target: Any, name: str) -> Any:
    found = getattr(type(target), name, None)
    if found is None:
        kind = "asynchronous context manager" if name.startswith("__a") else "context manager"
        raise TypeError(f"{type(target).__name__!r} object does not support the {kind} protocol")
    return found


class _Unpickler(pickle.Unpickler):
    """Reads the caller's pickles, in which handles are the objects of this worker."""

    def __init__(self, data: bytes, objects: Dict[int, Tuple[Any, int]]) -> None:
        super().__init__(io.BytesIO(data))
        self._objects = objects

    def persistent_load(self, number: int) -> Any:
        return self._objects[number][0]


def unpickled(data: bytes, objects: Dict[int, Tuple[Any, int]]) -> Any:
    """What the caller pickled. It is the more trusted side; nothing is unpickled in the other direction.

    Args:
        data: The caller's bytes.
        objects: What lives here, by number.
    """
    try:
        return _Unpickler(data, objects).load()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cloudpickle":
            raise
        raise ModuleNotFoundError(
            "functions and classes of the caller's own come by cloudpickle, which this worker's environment does not "
            "have; what is installed in it comes without",
            name=error.name,
        ) from None


def _exception(pickled: Optional[bytes], names: Sequence[str], text: str) -> BaseException:
    """The caller's exception, or the nearest builtin one with its text, where this worker has no such class."""
    if pickled is not None:
        with contextlib.suppress(Exception):
            made = pickle.loads(pickled)
            if isinstance(made, BaseException):
                return made
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            with contextlib.suppress(Exception):
                return kind(text)
    return Exception(text)
