"""Where the bytecode of a checkout is kept: beside its tree, one file for each version of Python.

    <commit>/bytecode-<version of Python>    32 bytes of SHA-256, and what they are of

Rules:

1. It is a copy of nothing: without it a load is slower and else the same. What cannot be written is not there.
2. It is written by one rename, and read whole or not at all: its checksum tells damage.
3. It is for stored checkouts alone, whose trees do not change. It goes with its checkout.
4. What is in it is a worker's word, and is looked at by workers of the same checkout alone (`isohub.worker.bytecode`).

Runs in the caller. Trust: the store's own files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isohub.repos.pins import Checkout

__all__ = ["BYTECODE_NAME", "Shelf"]

#: Names of such files, and of what a killed writer leaves.
BYTECODE_NAME = re.compile(r"\.?bytecode-[0-9.]{3,20}(?:-[0-9a-f]{16})?")
_SEAL_BYTES = hashlib.sha256().digest_size
_LIMIT_BYTES = 128 << 20


class Shelf:
    """The place of one checkout's bytecode for one version of Python.

    Args:
        checkout: Whose it is.
        python: The version, such as "3.11.7".

    Raises:
        OSError: It is no checkout of a store's, or is gone.
    """

    def __init__(self, checkout: Checkout, python: str) -> None:
        if checkout.root is None:
            raise FileNotFoundError("a directory of the user's has none")
        self._name = f"bytecode-{python}"
        # The directory itself: under its name another tree may be put meanwhile.
        self._directory = os.open(checkout.root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Shelf:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the directory go."""
        os.close(self._directory)

    def read(self) -> bytes | None:
        """What is there, if it is whole."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with os.fdopen(os.open(self._name, flags, dir_fd=self._directory), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    return None
                sealed = file.read(_LIMIT_BYTES)
        except OSError:
            return None
        body = sealed[_SEAL_BYTES:]
        return body if sealed[:_SEAL_BYTES] == hashlib.sha256(body).digest() else None

    def write(self, body: bytes) -> None:
        """Put it there.

        Raises:
            OSError: The disk refused; nothing of it is left.
        """
        if len(body) > _LIMIT_BYTES - _SEAL_BYTES:
            return
        staging = f".{self._name}-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(staging, flags, 0o444, dir_fd=self._directory), "wb") as file:
                file.write(hashlib.sha256(body).digest())
                file.write(body)
            os.rename(staging, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(staging, dir_fd=self._directory)
            raise
