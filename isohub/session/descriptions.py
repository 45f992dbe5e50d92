"""Signatures and docstrings of remote objects, as text: for `help`, `inspect.signature`, and whoever asks for both.

Defaults and annotations are texts that look like what they are. Nothing of them is evaluated.

Side: caller. Trust: names and texts are a worker's: names are checked, texts escaped.
"""

from __future__ import annotations

import functools
import inspect
import keyword
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isohub.errors import IsohubError, printable
from isohub.session.likeness import example_of

if TYPE_CHECKING:
    from isohub.session.link import Remote

__all__ = ["Described", "Description", "Signed", "describe"]

_KINDS = {
    kind.name: kind
    for kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    )
}
_LONGEST_TEXT_CHARS = 2000


class _Shown:
    """Where a default or an annotation would be: what it looks like."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = printable(text, limit_chars=_LONGEST_TEXT_CHARS, newlines=False)

    def __repr__(self) -> str:
        return self._text


@dataclass(frozen=True)
class Description:
    """What a remote object says of itself.

    Attributes:
        name: Its name.
        doc: Its docstring, or None.
        signature: Its signature, or None if it has none that can be told.
    """

    name: str
    doc: str | None
    signature: inspect.Signature | None


def describe(remote: Remote) -> Description:
    """Ask for it.

    Raises:
        ProtocolError: What came is no description.
    """
    phase = "describing itself"
    answer = remote.ask("describe", phase=phase)
    if not isinstance(answer, tuple) or len(answer) != 4:
        raise remote.refuse("a description", phase)
    name, doc, rows, returns = answer
    if type(name) is not str or not _is_text(doc) or not _is_text(returns) or type(rows) not in (list, type(None)):
        raise remote.refuse("a description", phase)
    signature = None
    if rows is not None:
        try:
            parameters = [_parameter(row) for row in rows]
            end = inspect.Signature.empty if returns is None else _Shown(returns)
            signature = inspect.Signature(parameters, return_annotation=end)
        except (ValueError, TypeError) as error:
            raise remote.refuse("a signature", phase) from error
    return Description(
        printable(name, limit_chars=_LONGEST_TEXT_CHARS, newlines=False),
        None if doc is None else printable(doc),
        signature,
    )


def _parameter(row: Any) -> inspect.Parameter:
    if not isinstance(row, tuple) or len(row) != 4:
        raise ValueError("a parameter that is none")
    name, kind, default, annotation = row
    if type(name) is not str or not name.isidentifier() or keyword.iskeyword(name) or kind not in _KINDS:
        raise ValueError("a parameter that is none")
    if not _is_text(default) or not _is_text(annotation):
        raise ValueError("a parameter that is none")
    return inspect.Parameter(
        name,
        _KINDS[kind],
        default=inspect.Parameter.empty if default is None else _Shown(default),
        annotation=inspect.Parameter.empty if annotation is None else _Shown(annotation),
    )


def _is_text(value: Any) -> bool:
    return value is None or type(value) is str


class Described:
    """A class attribute that is the remote object's own on a handle, and the class's on the class.

    Args:
        field: Of `Description`.
        own: What the class itself has.
    """

    def __init__(self, field: str, own: Any) -> None:
        self._field = field
        self._own = own

    def __get__(self, handle: Any, owner: type) -> Any:
        if handle is None:
            return self._own
        try:
            return getattr(describe(handle._isohub), self._field)
        except IsohubError:  # asked for by debuggers and by `help`, also of what is closed
            return self._own


class Signed:
    """A method of a handle's class that shows the remote object's signature and docstring on a handle.

    So it does on the class of a handle that is alive, with ``self``.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, handle: Any, owner: type) -> Any:
        if handle is not None:
            return _Bound(self._function, handle)
        example = example_of(owner)
        return self._function if example is None else _of_the_class(self._function, example)


def _of_the_class(function: Callable[..., Any], example: Any) -> Callable[..., Any]:
    """That method as the class's, a plain function, described by one handle of the class."""
    try:
        described = describe(example._isohub)
    except IsohubError:
        return function

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    method.__doc__ = described.doc
    if described.signature is not None and "self" not in described.signature.parameters:
        rows = list(described.signature.parameters.values())
        only = any(row.kind is inspect.Parameter.POSITIONAL_ONLY for row in rows)
        kind = inspect.Parameter.POSITIONAL_ONLY if only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = described.signature.replace(parameters=[inspect.Parameter("self", kind), *rows])
        method.__signature__ = signature  # type: ignore[attr-defined]
    return method


class _Bound:
    """That method of one handle."""

    __slots__ = ("__self__", "_function")

    __doc__ = Described("doc", __doc__)
    __signature__ = Described("signature", None)

    def __init__(self, function: Callable[..., Any], handle: Any) -> None:
        self.__self__ = handle
        self._function = function

    @property
    def _isohub(self) -> Remote:
        remote: Remote = self.__self__._isohub
        return remote

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self.__self__, *args, **kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> _Bound:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function.__get__(self.__self__), name)
