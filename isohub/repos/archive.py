"""Zip archives of a commit, unpacked without trusting a byte of them.

Reads the form that ``git archive`` and GitHub write: one directory at the top, regular files,
symlinks and directories, stored or deflated, the commit's id as the archive's comment. Names,
links and amounts are judged by `isohub.repos.tree.TreeWriter`; this module adds what only zip
can do wrong. Writes nothing outside the given directory and executes nothing. Runs in the caller.

Source: PKWARE's APPNOTE.TXT 6.3.10; git's archive-zip.c; D. Fifield, "A better zip bomb" (2019).
"""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from typing import IO, TYPE_CHECKING

from isohub.errors import IntegrityError, printable
from isohub.repos.tree import DEFAULT_LIMITS, Limits, TreeWriter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["RATIO_FREE_BYTES", "RATIO_LIMIT", "extract_zip"]

#: Of what is unpacked to what came. Apache POI refuses 100:1 and tar bombs start near deflate's own
#: 1032:1. Real files of zeros or of one repeated line pass 100:1, so small ones are let through
#: whatever their ratio.
RATIO_LIMIT = 200
RATIO_FREE_BYTES = 16 << 20
# 200,000 entries at 46 bytes and a name each. zipfile reads the whole directory into memory.
_DIRECTORY_LIMIT_BYTES = 64 << 20
_SYMLINK_LIMIT_BYTES = 4095
_CHUNK_BYTES = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_END = struct.Struct("<4s4H2LH")  # APPNOTE 4.3.16
_END64_LOCATOR = struct.Struct("<4sLQL")  # 4.3.15
_END64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14


def extract_zip(
    archive: IO[bytes], into: Path, *, origin: str, commit: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> bool:
    """Unpack an archive, its top directory removed.

    Args:
        archive: A seekable file. Trust: the network and the repo.
        into: An empty directory of the caller's.
        origin: Where the archive comes from, for messages.
        commit: What the comment must be, if it is a commit id at all.
        limits: Bounds on what is written.

    Returns:
        Whether the comment names the commit. It is the archive's own word.

    Raises:
        IntegrityError: It is no zip, is damaged, is of another commit, or holds what no archive of
            a commit may. What was written until then stays, for the caller to remove.
        OSError: The disk failed.
    """
    size_bytes = archive.seek(0, 2)
    try:
        _check_directory_size(archive, size_bytes, origin)
        with zipfile.ZipFile(archive) as opened:
            names_commit = _check_commit(opened.comment, commit, origin)
            _extract(opened, size_bytes, into, origin, limits)
            return names_commit
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, ValueError) as error:
        reason = printable(str(error), limit_chars=300, newlines=False)
        raise IntegrityError(
            f"{origin} is no sound zip archive ({size_bytes} bytes): {reason}",
            hint="try again; a proxy or a full disk may have cut it short",
            url=origin,
        ) from error


def _check_directory_size(archive: IO[bytes], size_bytes: int, origin: str) -> None:
    tail_bytes = min(size_bytes, _END.size + 0xFFFF + _END64_LOCATOR.size)
    archive.seek(size_bytes - tail_bytes)
    tail = archive.read(tail_bytes)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise zipfile.BadZipFile("it has no end of central directory")
    directory_bytes = _END.unpack_from(tail, at)[5]
    locator_at = at - _END64_LOCATOR.size
    if locator_at >= 0 and tail[locator_at:].startswith(b"PK\6\7"):
        offset = _END64_LOCATOR.unpack_from(tail, locator_at)[2]
        archive.seek(min(offset, size_bytes))
        record = archive.read(_END64.size)
        if len(record) < _END64.size:
            raise zipfile.BadZipFile("its zip64 record is cut off")
        directory_bytes = max(directory_bytes if directory_bytes != 0xFFFFFFFF else 0, _END64.unpack(record)[8])
    if directory_bytes > _DIRECTORY_LIMIT_BYTES:
        raise IntegrityError(
            f"{origin} has a directory of {directory_bytes} bytes; at most {_DIRECTORY_LIMIT_BYTES} are read",
            url=origin,
        )


def _check_commit(comment: bytes, commit: str | None, origin: str) -> bool:
    claimed_commit = comment.decode("ascii", "replace").strip()
    if commit is not None and _COMMIT.fullmatch(claimed_commit) and claimed_commit != commit:
        raise IntegrityError(
            f"{origin} says that it is of commit {claimed_commit}; asked for was {commit}",
            url=origin,
            expected=commit,
            got=claimed_commit,
        )
    return claimed_commit == commit


def _extract(opened: zipfile.ZipFile, size_bytes: int, into: Path, origin: str, limits: Limits) -> None:
    writer = TreeWriter(into, origin=origin, limits=limits)
    entries = opened.infolist()
    if len(entries) > limits.entries:
        raise IntegrityError(f"{origin} has {len(entries)} entries; at most {limits.entries} are unpacked", url=origin)
    if sum(info.compress_size for info in entries) > size_bytes:
        raise IntegrityError(f"{origin} has entries that overlap: they claim more bytes than there are", url=origin)
    claimed_bytes = sum(info.file_size for info in entries)
    if claimed_bytes > limits.total_bytes:
        raise IntegrityError(
            f"{origin} unpacks to {claimed_bytes} bytes; at most {limits.total_bytes} are unpacked", url=origin
        )
    top = entries[0].orig_filename.partition("/")[0] if entries else ""
    for info in entries:
        # zipfile cuts `filename` at a NUL; `orig_filename` is what the archive holds.
        name = info.orig_filename
        if name.startswith("/") or "\0" in name or "\\" in name:
            raise writer.refusal(name, "is absolute, or holds a NUL or a backslash")
        first, slash, path = name.partition("/")
        if first != top or not slash or first in ("", ".", "..") or re.match(r"[A-Za-z]:", first):
            raise writer.refusal(name, f"is not inside the one top directory {printable(top, newlines=False)!r}")
        _check_entry(info, name, writer)
        _write_entry(opened, info, name, path, writer)
    writer.finish()


def _check_entry(info: zipfile.ZipInfo, name: str, writer: TreeWriter) -> None:
    if info.flag_bits & 0x1:
        raise writer.refusal(name, "is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise writer.refusal(name, f"uses compression method {info.compress_type}; only stored and deflated are read")
    if info.file_size > RATIO_FREE_BYTES and info.file_size > RATIO_LIMIT * max(info.compress_size, 1):
        raise writer.refusal(
            name, f"unpacks {info.compress_size} bytes to {info.file_size}, more than {RATIO_LIMIT} to 1"
        )


def _write_entry(opened: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, path: str, writer: TreeWriter) -> None:
    # Only Unix (3) and Darwin (19) keep a mode there: APPNOTE 4.4.2.2. git writes 0 for plain files.
    mode = info.external_attr >> 16 if info.create_system in (3, 19) else 0
    kind = stat.S_IFMT(mode)
    if name.endswith("/"):
        if kind not in (0, stat.S_IFDIR) or info.file_size:
            raise writer.refusal(name, "is a directory by its name and something else by its mode or size")
        if path:
            writer.directory(path.removesuffix("/"))
    elif kind == stat.S_IFLNK:
        if info.file_size > _SYMLINK_LIMIT_BYTES:
            raise writer.refusal(name, f"is a symlink with a target of {info.file_size} bytes")
        target = b"".join(_content(opened, info, name, writer))
        try:
            writer.symlink(path, target.decode("utf-8"))
        except UnicodeDecodeError:
            raise writer.refusal(name, "is a symlink whose target is not UTF-8") from None
    elif kind in (0, stat.S_IFREG):
        writer.file(path, _content(opened, info, name, writer), executable=bool(mode & 0o100))
    else:
        raise writer.refusal(name, f"is no file, directory or symlink (mode {mode:o})")


def _content(opened: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, writer: TreeWriter) -> Iterator[bytes]:
    count = 0
    with opened.open(info) as stream:  # compares the entry's own header with the directory's, and the CRC at the end
        while chunk := stream.read(_CHUNK_BYTES):
            count += len(chunk)
            if count > info.file_size:
                break
            yield chunk
    if count != info.file_size:
        raise writer.refusal(name, f"holds {count} bytes where the archive's directory says {info.file_size}")
