"""Small files of the store that say what lies beside them, each with its own checksum.

    {"sha256": "<of the record's JSON>", "record": {...}}

A record is there if it is whole: its types fit, and its checksum does, so that one flipped byte makes it
absent and never different. It is written beside and renamed, so that a reader sees the old one or the new.

Runs in the caller. Trust: the store's own files; they hold text that a repo or a network chose.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import IO, Literal, TypeVar

import msgspec

__all__ = ["CheckoutRecord", "Resolution", "Resolutions", "read_record", "write_record"]

_T = TypeVar("_T", bound=msgspec.Struct)
_LIMIT_BYTES = 16 << 20


class CheckoutRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """checkout.json.

    Attributes:
        format: 2: sealed by `isohub.repos.records`.
        reference: What it was first fetched for.
        commit: Its commit.
        extras: As in `Pin.extras`.
        ref_name: As in `Pin.ref_name`.
        validated: As in `Pin.validated`.
        tree: git's tree id of ``tree/`` in the SHA-256 object format.
        files: Files and symlinks.
        bytes: Their sizes together.
        submodules: Paths that were left empty.
        lfs_pointers: Paths of Git LFS pointer files, at most 100.
        url: Where it came from.
        created: UTC, ISO 8601.
    """

    format: Literal[2]
    reference: str
    commit: str
    extras: tuple[str, ...]
    ref_name: str | None
    validated: bool
    tree: str
    files: int
    bytes: int
    submodules: tuple[str, ...]
    lfs_pointers: tuple[str, ...]
    url: str
    created: str


class Resolution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a ref meant when a source was last asked.

    Attributes:
        commit: The commit.
        ref_name: As in `Pin.ref_name`.
        validated: As in `Pin.validated`.
        public: Whether it was told to somebody who had shown no credentials.
        time: UTC, ISO 8601.
    """

    commit: str
    ref_name: str | None
    validated: bool
    public: bool
    time: str


class Resolutions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """refs.json: last resolutions by the ref as it was written; empty for the remote's HEAD."""

    format: Literal[1]
    refs: dict[str, Resolution]


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    record: msgspec.Raw


def write_record(path: Path, record: msgspec.Struct) -> None:
    """Write a record, read-only, flushed, in one rename.

    Raises:
        OSError: The disk refused. What was there before is there still.
    """
    body = msgspec.json.encode(record)
    sealed = _Sealed(hashlib.sha256(body).hexdigest(), msgspec.Raw(body))
    staging = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with staging.open("xb") as stream:
            stream.write(msgspec.json.encode(sealed) + b"\n")
            stream.flush()
            os.fchmod(stream.fileno(), 0o444)
            os.fsync(stream.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def _opened(path: Path) -> IO[bytes]:
    # Neither what a link leads to nor a pipe that never ends: a process of this user's may have put it there.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_record(path: Path, kind: type[_T]) -> _T | None:
    """A record, or None where there is no whole one."""
    try:
        with _opened(path) as stream:
            sealed = msgspec.json.decode(stream.read(_LIMIT_BYTES), type=_Sealed)
        body = bytes(sealed.record)
        if hashlib.sha256(body).hexdigest() != sealed.sha256:
            return None
        return msgspec.json.decode(body, type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
