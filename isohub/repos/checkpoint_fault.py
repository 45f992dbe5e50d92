"""What is wrong with a file that torch.load refuses: told from what torch says, and from the file's outer form.

torch says of a cut file, of a page of HTML and of a program much the same, and begins with the advice to switch
its protection off. A file that is no checkpoint is the server's fault and may be asked for again; one that holds
more than weights is as its author made it.

It reads forms: beginnings, the end of a zip, the opcodes of pickles. Nothing of the file is run or built. Runs in
the caller. Trust: the file is the network's.

Source: torch 2.13's ``torch/serialization.py``; PKWARE's APPNOTE.TXT 6.3.10, 4.3.16; pickletools.
"""

from __future__ import annotations

import pickletools
import re
from dataclasses import dataclass
from itertools import islice
from typing import IO

from isohub.errors import printable

__all__ = ["Fault", "fault_of"]

# How files of torch.save begin: as a zip, or before 1.6 as a pickle of protocol 2 or later.
_ZIP, _PICKLE = b"PK\3\4", b"\x80"
_HEAD_BYTES = 40
# The last record of a zip and the longest comment behind it.
_TAIL_BYTES = 22 + 0xFFFF
# Before 1.6: a number that says so, the protocol's version, the machine's kind, the object, the storages' keys.
_PICKLES = 5
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
# About two seconds of reading. Who has that many is not cut short by a server.
_OPCODES_LIMIT = 1_000_000
# Words of torch.load's RuntimeErrors that are about the file.
_REFUSED = "weights_only"
_OF_THE_FILE = (
    _REFUSED,
    "PytorchStreamReader",
    "inline_container",
    "The file might be corrupted",
    "Invalid magic number",
)
# What comes before torch's words where one of its own checks fails: a place in its source.
_CHECK = re.compile(r"\A\[enforce fail at [^\]]*\]\s*\.?\s*")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file.

    Attributes:
        reason: In words, printable.
        hint: What helps, or None.
        damaged: Whether it is no checkpoint, and never will be. Else ``weights_only`` refused it.
    """

    reason: str
    hint: str | None
    damaged: bool


def fault_of(error: Exception, stream: IO[bytes], *, weights_only: bool) -> Fault | None:
    """What is wrong with the file, or None if the error is about something else: devices, say.

    Args:
        error: What torch.load raised.
        stream: The file; read from its beginning.
        weights_only: As torch.load was told.

    Raises:
        OSError: It cannot be read.
    """
    from pickle import UnpicklingError  # noqa: PLC0415, TID251 - the name of torch.load's error alone

    text = _CHECK.sub("", str(error))
    if isinstance(error, RuntimeError) and not any(words in str(error) for words in _OF_THE_FILE):
        return None
    stream.seek(0)
    head = stream.read(_HEAD_BYTES)
    whole = _is_whole(head, stream)
    if whole and not isinstance(error, (UnpicklingError, RuntimeError, EOFError)):
        return None
    # torch's message begins with advice to switch the protection off; what is wrong is in the one before.
    reason = printable(
        str(error.__context__ or text.partition(". ")[0]) or "it ends too early", limit_chars=300, newlines=False
    )
    if weights_only and ((isinstance(error, UnpicklingError) and whole) or _is_refusal(error)):
        hint = (
            "a file that holds more than weights is a program: weights_only=False lets its author run code in "
            "this process; isohub.load runs it in a worker instead"
        )
        return Fault(reason, hint, damaged=False)
    if not head.startswith((_ZIP, _PICKLE)):
        hint = "torch.save did not write it: look at what the URL answers, a page or an LFS pointer perhaps"
        return Fault(f"it begins with {head!r}", hint, damaged=True)
    return Fault(reason if whole or isinstance(error, RuntimeError) else "it ends too early", None, damaged=True)


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and _REFUSED in str(error)


def _is_whole(head: bytes, stream: IO[bytes]) -> bool:
    """Whether the form that a file begins with also ends."""
    if head.startswith(_ZIP):
        size_bytes = stream.seek(0, 2)
        stream.seek(max(0, size_bytes - _TAIL_BYTES))
        return b"PK\5\6" in stream.read()
    if not head.startswith(_PICKLE):
        return False
    stream.seek(0)
    try:
        return _has_pickles(stream)
    except (ValueError, OverflowError, MemoryError):  # what pickletools says of what is cut or is none
        return False


def _has_pickles(stream: IO[bytes]) -> bool:
    left = _OPCODES_LIMIT
    for number in range(_PICKLES):
        first = None
        for opcode, argument, _ in islice(pickletools.genops(stream), left):
            left -= 1
            if first is None and opcode.name != "PROTO":
                first = argument
        if number == 0 and first != _MAGIC_NUMBER:
            break  # one of pickle.dump's
        if not left:
            break
    return True
