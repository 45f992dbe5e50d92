"""A checkpoint in a zip of its own: what people made by hand before torch.save wrote zips itself.

torch.hub still reads the form. It is a zip of one file, under any name; torch's own format has several.
The name is not used, and what is written is bounded. Runs in the caller. Trust: the network.

Source: PKWARE's APPNOTE.TXT 6.3.10, 4.3.16; torch.hub 2.13's documentation of ``load_state_dict_from_url``.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import IO, TYPE_CHECKING

from isohub.errors import IntegrityError, printable

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["is_legacy_zip", "unzip_legacy"]

_END = struct.Struct("<4s4H2LH")  # APPNOTE 4.3.16
# One entry: its fixed part, and a name, an extra field and a comment of 65,535 bytes each (4.3.12).
_DIRECTORY_LIMIT_BYTES = 46 + 3 * 0xFFFF
_CHUNK_BYTES = 1 << 20
# What isohub.repos.archive allows an entry, for the same reasons.
_RATIO_LIMIT = 200
_RATIO_FREE_BYTES = 16 << 20


def is_legacy_zip(path: Path) -> bool:
    """Whether a file is a zip of one file; reads no more than its end.

    Zips beyond 4 GiB (zip64) are not taken for it: a directory that another record describes is not bounded.
    """
    with path.open("rb") as stream:
        size_bytes = stream.seek(0, 2)
        stream.seek(max(0, size_bytes - _END.size - 0xFFFF))
        tail = stream.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size or tail[max(0, at - 20) : at].startswith(b"PK\6\7"):
        return False
    *_, entries, directory_bytes, _, comment_bytes = _END.unpack_from(tail, at)
    return (
        entries == 1 and directory_bytes <= _DIRECTORY_LIMIT_BYTES and len(tail) - at == _END.size + int(comment_bytes)
    )


def unzip_legacy(path: Path, into: IO[bytes], *, origin: str, limit_bytes: int) -> None:
    """Write the one file of a zip.

    Args:
        path: A file that `is_legacy_zip`.
        into: An empty file, left at its beginning.
        origin: Where the zip comes from, for messages.
        limit_bytes: The most that is written.

    Raises:
        IntegrityError: The zip is damaged, or larger inside than it may be.
        OSError: The disk failed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _write(archive, into, path.stat().st_size, limit_bytes)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, ValueError) as error:
        reason = printable(str(error), limit_chars=300, newlines=False)
        raise IntegrityError(f"{origin} is no sound zip file: {reason}", url=origin) from error
    into.seek(0)


def _write(archive: zipfile.ZipFile, into: IO[bytes], zip_bytes: int, limit_bytes: int) -> None:
    entries = archive.infolist()
    if len(entries) != 1 or entries[0].is_dir():
        raise zipfile.BadZipFile("it holds no single file")
    entry = entries[0]
    if entry.flag_bits & 0x1:
        raise zipfile.BadZipFile("it is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"it uses compression method {entry.compress_type}; only stored and deflated are read")
    # The claim is checked against the zip's real size: the entry's own says what its author likes.
    if entry.file_size > _RATIO_FREE_BYTES and entry.file_size > _RATIO_LIMIT * zip_bytes:
        raise zipfile.BadZipFile(f"it unpacks {zip_bytes} bytes to {entry.file_size}, more than {_RATIO_LIMIT} to 1")
    if entry.file_size > limit_bytes:
        raise zipfile.BadZipFile(f"it unpacks to {entry.file_size} bytes; at most {limit_bytes} are unpacked")
    count = 0
    with archive.open(entry) as content:  # the CRC is compared at the end
        while chunk := content.read(_CHUNK_BYTES):
            count += len(chunk)
            if count > entry.file_size:
                break
            into.write(chunk)
    if count != entry.file_size:
        raise zipfile.BadZipFile(f"it holds {count} bytes where its directory says {entry.file_size}")
