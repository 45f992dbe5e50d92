"""A file that grows by one line for each finished piece of work, and from which the work goes on after any end.

Rules:

1. Each line is one JSON object. The first says what the work is; another work's file is refused, never overwritten.
2. A line is written by one ``write`` as soon as it is known: the end of this process loses nothing. It is brought to
   the disk (``fdatasync``) once a second and at the end: the loss of power costs the last second or so.
3. A last line that was not written whole is cut off, and so are zeros that a loss of power left. Damage before that is
   an error, and the file is left as it is. Each line ends with a checksum of itself, so that no damage is taken for a
   result. A file that does not begin as one of this kind is somebody else's, and is left as it is.
4. One process has the file: others are refused by a lock (flock) that ends with the process, however it ends.

Side: caller. Trust: the file is the caller's own; its values are checked by who reads them. Source: write(2), flock(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import threading
import time
import zlib
from pathlib import Path
from typing import Any

from isohub.errors import ResultsError

__all__ = ["Journal"]

_SYNC_S = 1.0
_SEALED = re.compile(rb'(\{.*),"crc32":"([0-9a-f]{8})"\}', re.DOTALL)


class Journal:
    """An open file of results.

    Args:
        path: The file; made if there is none.
        kind: What it holds, such as ``isohub evaluation``.
        header: What the work is, as JSON has it. A part of a list that is None in the file was not known: any is well.

    Attributes:
        lines: What was there already, after the header.

    Raises:
        ResultsError: It is another work's, in use, damaged, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, header: dict[str, Any]) -> None:
        self.path = Path(path).expanduser().absolute()
        self.lines: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._synced = time.monotonic()
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._refused(f"cannot be opened: {error.strerror}", "its directory has to be there") from error
        try:
            self._begin(kind, json.loads(json.dumps(header)))
        except OSError as error:
            os.close(self._descriptor)
            raise self._refused(f"cannot be read or written: {error.strerror}") from error
        except BaseException:
            os.close(self._descriptor)
            raise

    def _begin(self, kind: str, header: dict[str, Any]) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise self._refused("is no regular file", "give one that can be read back")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refused("is in use already", "let that end, or give another file") from None
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            content = file.read()
        whole, rows = self._read(content)
        start = f'{{"kind":{json.dumps(kind)},'.encode()
        if not rows and not (content.startswith(start) or start.startswith(content.rstrip(b"\0"))):
            raise self._refused("is damaged or is no file of results: line 1 cannot be read", "give another file")
        if whole < len(content):
            os.ftruncate(self._descriptor, whole)
        if not rows:
            self._append({"kind": kind, **header})
            os.fdatasync(self._descriptor)
            return
        first = rows[0]
        if first.get("kind") != kind:
            raise self._refused(f"holds no {kind}", "give another file")
        for name, value in header.items():
            self._compare(name, first.get(name), value)
        self.lines = rows[1:]

    def _read(self, content: bytes) -> tuple[int, list[dict[str, Any]]]:
        """How many bytes are whole lines, and those."""
        rows: list[dict[str, Any]] = []
        at = 0
        content = content.rstrip(b"\0")
        while at < len(content):
            end = content.find(b"\n", at)
            row = None if end < 0 else _unsealed(content[at:end])
            if row is None:
                if end < 0 or not content[end:].strip(b"\0\n"):
                    return at, rows
                raise self._refused(
                    f"is damaged or is no file of results: line {len(rows) + 1} cannot be read",
                    "remove the file, or that line and those that follow",
                )
            rows.append(row)
            at = end + 1
        return at, rows

    def _compare(self, name: str, before: Any, now: Any) -> None:
        if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
            for number, (one, other) in enumerate(zip(before, now, strict=True)):
                if one is not None:  # a part that was not known
                    self._compare(f"{name}[{number}]", one, other)
        elif before != now:
            raise self._refused(
                f"is another question's: {name} was {json.dumps(before):.200}, and is {json.dumps(now):.200} now",
                "give another file, or ask what was asked before",
            )

    def append(self, row: dict[str, Any]) -> None:
        """Write one line. Thread-safe.

        Raises:
            ResultsError: The disk did not take it.
        """
        with self._lock:
            try:
                self._append(row)
                if time.monotonic() - self._synced > _SYNC_S:
                    os.fdatasync(self._descriptor)
                    self._synced = time.monotonic()
            except OSError as error:
                raise self._refused(
                    f"cannot be written: {error.strerror}", "what it holds is kept; the same call goes on from there"
                ) from error

    def _append(self, row: dict[str, Any]) -> None:
        data = _sealed(json.dumps(row, separators=(",", ":"), allow_nan=False).encode()) + b"\n"
        before = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)  # no half a line for what follows to be put behind
            raise

    def close(self) -> None:
        """Bring it to the disk, and let others have it."""
        with self._lock:
            if self._descriptor >= 0:
                try:
                    os.fdatasync(self._descriptor)
                except OSError:
                    pass  # a pipe or a full disk: what was written is written
                os.close(self._descriptor)
                self._descriptor = -1

    def _refused(self, words: str, hint: str | None = None) -> ResultsError:
        return ResultsError(f"{self.path} {words}", hint=hint, path=str(self.path))


def _sealed(line: bytes) -> bytes:
    """An object's JSON with a checksum of it as the last member."""
    return b'%s,"crc32":"%08x"}' % (line[:-1], zlib.crc32(line))


def _unsealed(line: bytes) -> dict[str, Any] | None:
    """The object of such a line; None if it is not as it was written."""
    found = _SEALED.fullmatch(line)
    if found is None or zlib.crc32(found[1] + b"}") != int(found[2], 16):
        return None
    try:
        row = json.loads(found[1] + b"}")
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
