"""What a worker may say, as closed types: the shape of every reply, checked by msgspec while it is read.

A reply's ``value`` is a tree of JSON that `wire.codec.Decoder` then checks against the closed set of values.

Side: caller. Trust: worker. Refuses: unknown fields, wrong types, missing fields, anything after the end.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import msgspec

from isohub.errors import ProtocolError, printable
from isohub.wire.arena import Claims
from isohub.wire.known import Known
from isohub.wire.protocol import MAX_PARTS
from isohub.wire.tables import Tables, read_tables

__all__ = ["Answer", "Fault", "Ready", "Replies", "Reply", "Want", "read_reply", "read_status"]


class _Message(msgspec.Struct, tag_field="event", forbid_unknown_fields=True, frozen=True):
    pass


class Ready(_Message, tag="ready", frozen=True):
    """The first word of a worker, before any code of the repo's: the layers of confinement that it has and has not.

    `facts` has what the question ``prepare`` asks for, where that is known already.
    """

    layers: tuple[list[str], list[str]]
    details: dict[str, str]
    facts: tuple[str, str, list[str]] | None = None


class Answer(_Message, tag="value", frozen=True, dict=True):
    """An answer, and the tables of what lies where in the shared memory that `via` names.

    `devices` has the storages that are a GPU's; `took` is the GPU whose arenas were offered and mapped. `recorded` has
    the rows of tensors that require a gradient, of a call that was recorded.
    """

    value: Any
    claims: tuple[list[tuple[int, int]], list[tuple[int, str, int, list[int], list[int]]]]
    via: Literal["none", "outbox", "parcel"]
    kept: bool
    devices: list[tuple[int, str, bool]] = []
    took: str | None = None
    recorded: list[int] = []

    @cached_property
    def tables(self) -> Tables:
        """What `claims` and `devices` say, each number checked; raises `ProtocolError`."""
        return read_tables(Claims(*self.claims, self.devices))


class Fault(_Message, tag="error", frozen=True):
    """An exception of the repo's, as text, or a refusal of the worker's own."""

    kind: Literal["raised", "no_entrypoint", "too_large"]
    details: list[str]
    type: str
    bases: list[str]
    message: str
    traceback: str
    kept: bool
    took: str | None = None


class Want(_Message, tag="want", frozen=True):
    """Something to be brought: a file of weights by its URL, or a repository by torch.hub's short form."""

    wish: int
    what: Literal["file", "repo"]
    address: str
    hash_prefix: str | None
    progress: bool


Reply = Ready | Answer | Fault | Want

#: What is shown of msgspec's reasons; those that hold no name of the worker's are shorter.
_LONGEST_REASON_CHARS = 300

_reply_decoder: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


class _Status(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    pid: int | None = None
    exit: int | None = None
    failed: str | None = None


_status_decoder = msgspec.json.Decoder(_Status)


class Replies:
    """Reads what one worker says. A text that it has said before is read and checked once; it means the same."""

    def __init__(self) -> None:
        self._known = Known()

    def read(self, body: bytes) -> Reply:
        """One frame's body; raises as `read_reply` does."""
        known: Reply | None = self._known.get(body)
        if known is None:
            known = read_reply(body)
            self._known.keep(body, body, known)
        return known


def read_reply(body: bytes) -> Reply:
    """One frame's body.

    Raises:
        ProtocolError: It is none of them.
    """
    # Counted before any is built: a parsed value takes thirty times its text.
    if body.count(b",") + body.count(b"[") > MAX_PARTS:
        raise ProtocolError(f"a reply of more than {MAX_PARTS} parts")
    try:
        return _reply_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # Not `from error`: that quotes names and values of the worker's, however long, for a terminal to obey.
        told = printable(str(error), limit_chars=_LONGEST_REASON_CHARS, newlines=False)
        raise ProtocolError(f"a reply that is none: {told}") from None


def read_status(body: bytes) -> _Status:
    """What a zygote says of one worker. Trust: the zygote, which runs no repo's code."""
    try:
        return _status_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a status that is none: {error}") from error
