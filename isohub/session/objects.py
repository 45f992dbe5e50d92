"""Handles to what is no module: tokenizers, decoders, functions, generators, coroutines, context managers.

Rules:

1. What can be asked of a handle is asked of the object. A handle adds no names to those of the object, but a function's
   has `submit`, `map`, `call_async` and `options`.
2. ``==`` and ``hash`` are the handle's: it equals itself alone, and one object has one handle. Order and arithmetic
   are the object's.
3. An iteration takes one item with each question, so the worker is never ahead. An iterator that nobody holds any more
   is given back at once, and what it has after ``finally`` runs in the worker.

Refuses to: be pickled, be used after a fork.
Side: caller. Trust: what comes back is checked for its form here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from isohub.errors import IsohubError, ValueNotTransferableError, printable
from isohub.session.arguments import pickled
from isohub.session.descriptions import Described
from isohub.session.link import Remote, refuse_pickle
from isohub.session.options import awaited, options, pipelined
from isohub.session.versions import other_python

__all__ = [
    "Container",
    "RemoteCoroutine",
    "RemoteFunction",
    "RemoteIterator",
    "RemoteObject",
    "RemoteStream",
    "is_a_protocol",
    "names_of",
    "object_handle",
    "shown",
]


class Container:
    """What Python looks up on the class and not on the object: a remote container's items, length and truth."""

    _isohub: Remote

    def __getitem__(self, key: Any) -> Any:
        return self._isohub.operate("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._isohub.operate("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._isohub.operate("delitem", key)

    def __len__(self) -> int:
        length = self._isohub.operate("len")
        if type(length) is not int or length < 0:
            raise self._isohub.refuse("a length", "telling its length")
        return length

    def __contains__(self, item: Any) -> bool:
        return bool(self._isohub.operate("contains", item))

    def __iter__(self) -> Iterator[Any]:
        made: Iterator[Any] = _iterator(self._isohub, "iter")
        return made

    def __reversed__(self) -> Iterator[Any]:
        made: Iterator[Any] = _iterator(self._isohub, "reversed")
        return made

    def __bool__(self) -> bool:
        return bool(self._isohub.operate("bool"))


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: self._isohub.operate(name, *others)


class _Operators:
    """Order and arithmetic, in the worker."""

    __array_ufunc__ = None  # numpy lets these have their turn

    for _name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "lshift",
        "rshift",
        "and_",
        "or_",
        "xor",
    ):
        for _prefix in ("", "r", "i"):
            locals()[f"__{_prefix}{_name.rstrip('_')}__"] = _operator(_prefix + _name)
    for _name in ("lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "round"):
        locals()[f"__{_name}__"] = _operator(_name)
    del _name, _prefix

    _isohub: Remote

    def __int__(self) -> int:
        return int(_of_type(self._isohub, "int", int))

    def __float__(self) -> float:
        return float(_of_type(self._isohub, "float", float))


def _of_type(remote: Remote, operation: str, kind: type) -> Any:
    value = remote.operate(operation)
    if type(value) is not kind:
        raise remote.refuse(f"a number as {kind.__name__}", "telling its value")
    return value


class RemoteObject(_Operators, Container):
    """An object that lives in a worker and is no module: a tokenizer, a decoder, a function, a generator.

    Calls, attributes, items, iteration, ``len``, ``in``, ``with``, arithmetic, ``dir``, ``help`` and ``repr`` are the
    remote object's. ``==`` and ``hash`` are the handle's: one object has one handle, which equals itself.
    """

    __doc__ = Described("doc", __doc__)
    __signature__ = Described("signature", None)

    def __init__(self, remote: Remote) -> None:
        object.__setattr__(self, "_isohub", remote)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the remote object."""
        remote = self._isohub
        words = f"{remote.called}()" if remote.sort == "function" and remote.called else f"a {remote.class_name}"
        return remote.ask("call", "", args, kwargs, phase=f"calling {words}", record=True)

    def __getattr__(self, name: str) -> Any:
        if is_a_protocol(name):
            raise AttributeError(name)
        return self._isohub.operate("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._isohub.operate("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        self._isohub.operate("delattr", name)

    def __dir__(self) -> list[str]:
        return sorted(names_of(self._isohub))

    def __repr__(self) -> str:
        remote = self._isohub
        return f"<{remote.class_name} of {remote.worker.name}: {shown(remote, 'summary')}>"

    def __str__(self) -> str:
        return printable(str(self._isohub.operate("str")))

    def __aiter__(self) -> AsyncIterator[Any]:
        made: AsyncIterator[Any] = _iterator(self._isohub, "aiter")
        return made

    # Contexts: entered and left in the worker.

    def __enter__(self) -> Any:
        return self._isohub.ask("enter", False, phase="entering a context", record=True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return _left(self._isohub, False, error)

    async def __aenter__(self) -> Any:
        remote = self._isohub
        return await awaited(remote.link, lambda: remote.ask("enter", True, phase="entering a context", record=True))

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        remote = self._isohub
        result: bool = await awaited(remote.link, lambda: _left(remote, True, error))
        return result

    def __deepcopy__(self, memo: object) -> NoReturn:
        refuse_pickle(self._isohub)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle(self._isohub)


class RemoteFunction(RemoteObject):
    """A function or a method that lives in a worker; ``help`` and ``inspect.signature`` show the remote one's."""

    __doc__ = Described("doc", __doc__)
    __name__ = Described("name", "RemoteFunction")

    def __get__(self, instance: object, owner: type | None = None) -> RemoteFunction:
        """Itself: it is bound already. That it is there makes `help` take this for a routine."""
        return self

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call it in the background; calls that were submitted earlier come first."""
        return self._isohub.link.submit(lambda: self(*args, **kwargs))

    def map(self, *iterables: Iterable[Any], ahead: int = 2) -> Iterator[Any]:
        """As `RemoteModule.map`, with this function."""
        return pipelined(self._isohub.link, self, iterables, ahead)

    async def call_async(self, *args: Any, **kwargs: Any) -> Any:
        """As `RemoteModule.call_async`, with this function."""
        return await awaited(self._isohub.link, lambda: self(*args, **kwargs))

    def options(self, *, timeout_s: float | None) -> AbstractContextManager[None]:
        """As `RemoteModule.options`."""
        return options(self._isohub.link, timeout_s)


class RemoteIterator(RemoteObject):
    """An iterator that lives in a worker: a generator above all. Each item is one question."""

    __doc__ = Described("doc", __doc__)
    _OP = "next"

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        there, item = self._take()
        if not there:
            raise StopIteration(item)
        return item

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        there, item = await awaited(self._isohub.link, self._take)
        if not there:
            raise StopAsyncIteration
        return item

    def _take(self) -> tuple[bool, Any]:
        remote = self._isohub
        phase = "taking the next item"
        answer = remote.ask(self._OP, phase=phase, record=True)
        if not isinstance(answer, tuple) or len(answer) != 2 or type(answer[0]) is not bool:
            raise remote.refuse("an item", phase)
        if not answer[0]:
            remote.prompt = False  # it has ended: there is nothing to run after a `finally`
        return answer


class RemoteStream(RemoteIterator):
    """An async iterator that lives in a worker, for ``async for``, and for ``for`` too."""

    __doc__ = Described("doc", __doc__)
    _OP = "anext"

    def close(self) -> None:
        """End it now: what an async generator has after ``finally`` runs in the worker."""
        closing = self.aclose()
        if isinstance(closing, RemoteCoroutine):
            closing.result()


class RemoteCoroutine(RemoteObject, Coroutine[Any, Any, Any]):
    """A coroutine, or something else to be awaited, that lives in a worker and runs there once it is awaited here."""

    __doc__ = Described("doc", __doc__)

    def result(self) -> Any:
        """Wait for it without an event loop."""
        return self._isohub.ask("await", phase=f"awaiting a {self._isohub.class_name}", record=True)

    async def _wait(self) -> Any:
        return await awaited(self._isohub.link, self.result)

    def _inner(self) -> Coroutine[Any, Any, Any]:
        if "_coroutine" not in self.__dict__:
            self.__dict__["_coroutine"] = self._wait()
        inner: Coroutine[Any, Any, Any] = self.__dict__["_coroutine"]
        return inner

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner().__await__()

    def send(self, value: Any) -> Any:
        """As a local coroutine's."""
        return self._inner().send(value)

    def throw(self, *error: Any) -> Any:
        """As a local coroutine's."""
        return self._inner().throw(*error)

    def close(self) -> None:
        """As a local coroutine's."""
        self._inner().close()


_HANDLES = {
    "function": RemoteFunction,
    "iterator": RemoteIterator,
    "stream": RemoteStream,
    "awaitable": RemoteCoroutine,
}


def object_handle(remote: Remote) -> RemoteObject:
    """The handle for an object of this sort."""
    made: RemoteObject = _HANDLES.get(remote.sort, RemoteObject)(remote)
    return made


def _iterator(remote: Remote, operation: str) -> Any:
    iterator = remote.operate(operation)
    if not isinstance(iterator, RemoteIterator):
        raise remote.refuse("an iterator", "starting an iteration")
    return iterator


def _left(remote: Remote, asynchronous: bool, error: BaseException | None) -> bool:
    """Leave a context in the worker; whether the error is taken care of."""
    phase = "leaving a context"
    data: bytes | None = None
    if error is not None:
        try:
            data = pickled(error, other_python=other_python(remote.worker.versions))
        except ValueNotTransferableError:
            pass  # the nearest builtin class and the text do
    names = [] if error is None else [base.__name__ for base in type(error).__mro__]
    answer = remote.ask("exit", asynchronous, data, names, str(error), phase=phase)
    if type(answer) is not bool:
        raise remote.refuse("the end of a context", phase)
    return answer


def shown(remote: Remote, operation: str) -> str:
    """What a remote object says of itself; something in any case, since debuggers ask for it unasked."""
    try:
        return printable(str(remote.operate(operation)))
    except IsohubError as error:
        return f"({remote.class_name}; its repr failed: {error.message.splitlines()[0]})"


def is_a_protocol(name: str) -> bool:
    """Whether Python, torch or a notebook asks of its own accord, and never the remote object.

    What a notebook is given by ``_repr_html_`` and the like it shows unescaped: a worker's page, with its scripts.
    """
    return (name.startswith("__") and name.endswith("__")) or name.startswith(("_repr_", "_ipython_"))


def names_of(remote: Remote) -> list[str]:
    """The remote object's attributes."""
    claimed = remote.operate("dir")
    if not isinstance(claimed, list):
        raise remote.refuse("names", "listing its attributes")
    return [printable(name, newlines=False) for name in claimed if isinstance(name, str)]
