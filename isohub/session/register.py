"""What a session tells other processes of its user: one small file, which `isohub ps` reads.

Rules:

1. A file is rows of one size. The first says whose it is, the others are a worker each: what it is, which is
   written once, and what it does, which is written over at each question. Nobody has to be asked to read it.
2. Only the user's own: the directory is the user's with mode 0700, a file is a plain one of the user's with
   mode 0600 and one name. Whatever else lies there is neither read nor written, nor followed, nor removed.
3. Its session holds a lock on it for life. A file whose lock can be had, or whose process is gone, is stale and
   is removed by whoever comes by.
4. A session works without it: no room, no directory or somebody else's there is a line in the log.

Side: caller. Trust: files of the user's other processes; texts in them are a repo's, escaped where they are shown.
Source: XDG Base Directory Specification 0.8 for ``$XDG_RUNTIME_DIR``; flock(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import math
import os
import secrets
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from isohub.wire.protocol import close_descriptors

__all__ = ["Recorded", "Register", "Row", "recorded", "start_ticks"]

_log = logging.getLogger("isohub.session")

_ROW_BYTES = 4096
#: The end of a row, which is written over: a phase is shorter than a line of a terminal.
_STATE_BYTES = 1536
#: How it begins: calls, since when, and the length of what follows: what it does, in UTF-8; nothing when idle.
_STATE = struct.Struct("<QdH")
_MOST_ROWS = 4096
_MOST_TEXT_CHARS = 200
_SUFFIX = ".rows"


class _Owner(msgspec.Struct, frozen=True):
    pid: int
    ticks: int
    namespace: str


class _Worker(msgspec.Struct, frozen=True):
    name: str
    reference: str
    commit: str
    pid: int
    ticks: int
    active: tuple[str, ...]
    missing: tuple[str, ...]
    environment: str
    python: str
    torch: str


class _State(NamedTuple):
    calls: int
    doing: str | None
    since: float


class Recorded(msgspec.Struct, frozen=True):
    """A worker as its session's file has it.

    Attributes:
        session_pid: The session's process, in that process's pid namespace.
        here: Whether this process has the same numbers for processes.
        name: Such as ``org/repo@1a2b3c4``.
        reference: What was loaded.
        commit: Its commit.
        pid: Its process.
        ticks: When that started, as /proc/<pid>/stat has it: a number can become another process's.
        active: Layers of confinement that it has.
        missing: Those that it has not.
        environment: "host", or the key of the environment that it runs on.
        python: Version of its Python.
        torch: Version of its torch.
        calls: Questions that it was asked.
        doing: What it does, in words; None when idle.
        since: Since when, in seconds since the epoch.
    """

    session_pid: int
    here: bool
    name: str
    reference: str
    commit: str
    pid: int
    ticks: int
    active: tuple[str, ...]
    missing: tuple[str, ...]
    environment: str
    python: str
    torch: str
    calls: int
    doing: str | None
    since: float


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since the machine did; 0 if there is none. Source: proc(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - /proc by text
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


@functools.lru_cache(maxsize=256)
def _text(doing: str | None) -> bytes:
    return b"" if doing is None else doing[:_MOST_TEXT_CHARS].encode("utf-8", "backslashreplace")


class Row:
    """One worker's row. Never raises: a full disk must not end a call."""

    def __init__(self, register: Register, number: int) -> None:
        self._register = register
        self._number: int | None = number

    def write(self, calls: int, doing: str | None) -> None:
        """Say what the worker does now.

        Args:
            calls: Questions that it was asked.
            doing: In words; None when idle.
        """
        if self._number is None:
            return  # by now it may be another worker's
        text = _text(doing)
        self._register.put(self._number, _STATE.pack(calls, time.time(), len(text)) + text, _ROW_BYTES - _STATE_BYTES)

    def close(self) -> None:
        """The worker has ended."""
        number, self._number = self._number, None
        if number is not None:
            self._register.leave(number)


class Register:
    """The file of one session, made with its first worker. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptor = -1
        self._directory = -1
        self._name = ""
        self._tried = False
        self._free: list[int] = []
        self._rows = 1
        self._pid = os.getpid()

    def enter(
        self,
        *,
        name: str,
        reference: str,
        commit: str,
        pid: int,
        ticks: int,
        active: tuple[str, ...],
        missing: tuple[str, ...],
        environment: str,
        python: str,
        torch: str,
    ) -> Row:
        """A row for a worker; the parameters are the attributes of `Recorded`."""
        with self._lock:
            if not self._tried:
                self._tried = True
                self._open()
            if self._free:
                number = self._free.pop()
            else:
                number, self._rows = self._rows, self._rows + 1
        facts = {
            "name": name[:_MOST_TEXT_CHARS],
            "reference": reference[:_MOST_TEXT_CHARS],
            "commit": commit,
            "pid": pid,
            "ticks": ticks,
            "active": active,
            "missing": missing,
            "environment": environment,
            "python": python,
            "torch": torch,
        }
        row = Row(self, number)
        row.write(0, None)
        data = json.dumps(facts).encode().ljust(_ROW_BYTES - _STATE_BYTES)
        if len(data) == _ROW_BYTES - _STATE_BYTES:
            self.put(number, data, 0)
        return row

    def _open(self) -> None:
        try:
            self._directory = _directory()
            _sweep(self._directory)
            new, name = f".new-{secrets.token_hex(8)}", f"{self._pid}-{secrets.token_hex(8)}{_SUFFIX}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(new, flags, 0o600, dir_fd=self._directory)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = {"pid": self._pid, "ticks": start_ticks(self._pid), "namespace": _namespace()}
            self.put(0, json.dumps(owner).encode().ljust(_ROW_BYTES), 0)
            os.rename(new, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._name = name
        except OSError as error:
            _log.info("isohub ps will not show this session: %s", error)
            self._let_go()

    def put(self, number: int, data: bytes, offset: int) -> None:
        """Write a part of a row; what is too long is left out."""
        if self._descriptor < 0 or offset + len(data) > _ROW_BYTES or number >= _MOST_ROWS:
            return
        try:  # once a call, and twice as fast as `contextlib.suppress`
            os.pwrite(self._descriptor, data, number * _ROW_BYTES + offset)
        except OSError:
            pass

    def leave(self, number: int) -> None:
        """A worker has ended; its row is another's from now on."""
        self.put(number, bytes(_ROW_BYTES), 0)
        with self._lock:
            self._free.append(number)

    def close(self) -> None:
        """Remove the file, unless this is a fork of the process that made it."""
        with self._lock:
            if self._name and os.getpid() == self._pid:
                with contextlib.suppress(OSError):
                    os.unlink(self._name, dir_fd=self._directory)
            self._name = ""
            self._let_go()

    def _let_go(self) -> None:
        left, self._descriptor, self._directory = (self._descriptor, self._directory), -1, -1
        close_descriptors([descriptor for descriptor in left if descriptor >= 0])


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        return ""


def _places() -> Iterator[tuple[str, str]]:
    """Where the directory may be: its parent and its name."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):  # noqa: PTH117 - text of the environment's
        yield runtime, "isohub"
    yield tempfile.gettempdir(), f".isohub-{os.geteuid()}"


def _own(status: os.stat_result) -> bool:
    """Whether it is this user's, and nobody else may look into it or change it."""
    return status.st_uid == os.geteuid() and status.st_mode & 0o077 == 0


def _opened(parent: str, name: str) -> int:
    """A descriptor of a directory of the user's own.

    Raises:
        OSError: It is not there, or is somebody else's.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(os.path.join(parent, name), flags)  # noqa: PTH118
    if not _own(os.fstat(descriptor)):
        os.close(descriptor)
        raise PermissionError(f"{os.path.join(parent, name)} is not this user's alone (mode 0700)")  # noqa: PTH118
    return descriptor


def _directory() -> int:
    """A descriptor of the directory, made if need be."""
    refusal: OSError = FileNotFoundError("no directory for it")
    for parent, name in _places():
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.join(parent, name), 0o700)  # noqa: PTH102, PTH118
            return _opened(parent, name)
        except OSError as error:
            refusal = error
    raise refusal


def _sweep(directory: int) -> None:
    """Remove the files of sessions that are gone."""
    for _, name, descriptor in _files(directory):
        try:
            rows = _read(descriptor)
            if rows and _gone(rows[0], descriptor):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=directory)
        finally:
            os.close(descriptor)


def _files(directory: int) -> Iterator[tuple[int, str, int]]:
    """The user's own files in it: directory, name, a descriptor that the taker closes."""
    for name in sorted(os.listdir(directory)):
        if not name.endswith(_SUFFIX):
            continue
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=directory)
            status = os.fstat(descriptor)
            if _own(status) and stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                yield directory, name, descriptor
            else:
                os.close(descriptor)


def _read(descriptor: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        data = os.pread(descriptor, _MOST_ROWS * _ROW_BYTES, 0)
        return [data[start : start + _ROW_BYTES] for start in range(0, len(data), _ROW_BYTES)]
    return []


def _gone(first: bytes, descriptor: int) -> bool:
    """Whether the session of a file has ended."""
    try:
        # Shared: two who look at once do not take each other for the session.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _decoded(first, _Owner)
        # A fork of the session's process, which may outlive it, has the lock too.
        return owner is not None and owner.namespace == _namespace() and start_ticks(owner.pid) != owner.ticks
    except OSError:  # no locks on this file system
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


def _decoded(data: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def recorded() -> list[Recorded]:
    """The workers of all sessions of this user's on this machine. Asks none of them, and removes stale files."""
    found: list[Recorded] = []
    for parent, name in _places():
        try:
            directory = _opened(parent, name)
        except OSError:
            continue
        try:
            _sweep(directory)
            for _, _, descriptor in _files(directory):
                try:
                    found += _workers(_read(descriptor))
                finally:
                    os.close(descriptor)
        finally:
            os.close(directory)
    return found


def _workers(rows: list[bytes]) -> Iterator[Recorded]:
    owner = _decoded(rows[0], _Owner) if rows else None
    if owner is None:
        return
    here = owner.namespace == _namespace()
    for row in rows[1:]:
        worker = _decoded(row[: _ROW_BYTES - _STATE_BYTES], _Worker)
        state = _state(row[_ROW_BYTES - _STATE_BYTES :])
        if worker is None or (here and (not worker.ticks or start_ticks(worker.pid) != worker.ticks)):
            continue  # free, half written, or its process has ended
        yield Recorded(owner.pid, here, **msgspec.structs.asdict(worker), **state._asdict())


def _state(data: bytes) -> _State:
    if len(data) < _STATE.size:
        return _State(0, None, 0.0)
    calls, since, length = _STATE.unpack_from(data)
    text = data[_STATE.size : _STATE.size + min(length, 4 * _MOST_TEXT_CHARS)].decode("utf-8", "replace")
    return _State(calls, text or None, since if math.isfinite(since) else 0.0)
