from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from isohub.errors import IntegrityError
from isohub.repos.legacy_zip import is_legacy_zip, unzip_legacy

LIMIT_BYTES = 1 << 30


def zipped(path: Path, *entries: tuple[str, bytes], comment: bytes = b"", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
        archive.comment = comment
    return path


def content_of(path: Path, limit_bytes: int = LIMIT_BYTES) -> bytes:
    into = io.BytesIO()
    unzip_legacy(path, into, origin="https://h/m.zip", limit_bytes=limit_bytes)
    return into.read()


@pytest.mark.parametrize("name", ["model.pth", "../../model.pth", "/etc/passwd", "a/b"])
def test_the_one_file_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "m.zip", (name, b"weights"), comment=b"a comment")
    assert is_legacy_zip(path)
    assert content_of(path) == b"weights"
    assert [p.name for p in tmp_path.rglob("*")] == ["m.zip"]


def test_what_is_none(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "new.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    zipped(tmp_path / "two.zip", ("a", b""), ("b", b""))
    zipped(tmp_path / "none.zip")
    whole = zipped(tmp_path / "whole.zip", ("a", b"x" * 100)).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-5])
    (tmp_path / "longer.zip").write_bytes(whole + b"?")
    (tmp_path / "empty").write_bytes(b"")
    # A directory that a zip64 record describes, and one that says it is larger than one entry's can be.
    end = whole.rindex(b"PK\5\6")
    (tmp_path / "zip64.zip").write_bytes(whole[:end] + struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1) + whole[end:])
    forged = bytearray(whole)
    forged[end + 12 : end + 16] = struct.pack("<L", 1 << 30)
    (tmp_path / "forged.zip").write_bytes(forged)
    for path in tmp_path.iterdir():
        assert is_legacy_zip(path) == (path.name == "whole.zip"), path.name


def damaged(path: Path, how: str) -> Path:
    content = bytearray(zipped(path, ("a", b"x" * 100_000), method=zipfile.ZIP_STORED).read_bytes())
    central = content.rindex(b"PK\1\2")
    match how:
        case "flipped":
            content[5000] ^= 1
        case "encrypted":
            content[6] |= 1
            content[central + 8] |= 1
        case "method":
            content[8] = content[central + 10] = 99
        case "size":
            content[central + 24 : central + 28] = struct.pack("<L", 50)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("how", ["flipped", "encrypted", "method", "size"])
def test_damaged(tmp_path: Path, how: str) -> None:
    path = damaged(tmp_path / "m.zip", how)
    assert is_legacy_zip(path)
    with pytest.raises(IntegrityError, match="no sound zip"):
        content_of(path)


def test_bombs(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "bomb.zip", ("a", bytes(64 << 20)))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(IntegrityError, match="200 to 1"):
        content_of(bomb)
    with pytest.raises(IntegrityError, match="at most 99 "):
        content_of(zipped(tmp_path / "large.zip", ("a", bytes(100))), limit_bytes=99)
    with pytest.raises(IntegrityError, match="no single file"):
        content_of(zipped(tmp_path / "directory.zip", ("a/", b"")))
