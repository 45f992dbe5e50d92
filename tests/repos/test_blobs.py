from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from isohub.repos.blobs import Blobs, Stamp, copy_into, hash_file, open_regular

CONTENT = os.urandom(3 << 20)
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path)


def written(path: Path, content: bytes = CONTENT) -> Path:
    path.write_bytes(content)
    return path


def test_a_blob_is_its_content_s_name(blobs: Blobs, tmp_path: Path) -> None:
    blobs.add(written(tmp_path / "part"), SHA, move=True)
    blob = blobs.path(SHA)
    assert blob == tmp_path / "weights" / "blobs" / SHA[:2] / SHA
    assert hash_file(blob) == (SHA, Stamp.of(blob.stat()))
    assert stat.S_IMODE(blob.stat().st_mode) == 0o444
    blobs.link(SHA, tmp_path / "model.pth")
    assert blob.samefile(tmp_path / "model.pth")
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_what_is_there_is_kept(blobs: Blobs, tmp_path: Path) -> None:
    blobs.add(written(tmp_path / "one"), SHA, move=True)
    inode = blobs.path(SHA).stat().st_ino
    blobs.add(written(tmp_path / "two"), SHA, move=True)
    blobs.add(blobs.path(SHA), SHA, move=False)
    assert blobs.path(SHA).stat().st_ino == inode


def test_a_damaged_blob_is_replaced(blobs: Blobs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blobs.path(SHA).parent.mkdir(parents=True)
    written(blobs.path(SHA), b"x" + CONTENT[1:])
    blobs.add(written(tmp_path / "part"), SHA, move=True)
    assert hash_file(blobs.path(SHA))[0] == SHA
    assert "damaged" in caplog.text


def test_a_name_is_replaced_in_one_step(blobs: Blobs, tmp_path: Path) -> None:
    blobs.add(written(tmp_path / "part"), SHA, move=True)
    target = written(tmp_path / "name", b"old")
    blobs.link(SHA, target)
    blobs.link(SHA, target)
    assert target.read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name", "part", "weights"]
    with pytest.raises(FileNotFoundError):
        blobs.link("00" * 32, target)
    assert target.read_bytes() == CONTENT


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "no links here")


def test_without_links_there_are_copies(blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What exFAT and some network file systems answer.
    monkeypatch.setattr(os, "link", no_links)
    kept = written(tmp_path / "kept")
    blobs.add(kept, SHA, move=False)
    assert kept.exists()
    blobs.path(SHA).unlink()
    blobs.add(kept, SHA, move=True)
    assert not kept.exists()
    blobs.link(SHA, tmp_path / "name")
    assert (tmp_path / "name").read_bytes() == CONTENT
    assert stat.S_IMODE((tmp_path / "name").stat().st_mode) == 0o444
    assert not blobs.path(SHA).samefile(tmp_path / "name")


@pytest.mark.parametrize("ranges", [True, False])
def test_copies_hold_no_more_than_was_asked(tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ranges:
        monkeypatch.setattr(os, "copy_file_range", no_links)
    source = os.open(written(tmp_path / "source"), os.O_RDONLY)
    copy_into(source, tmp_path / "copy", 2_000_000)
    os.close(source)
    assert (tmp_path / "copy").read_bytes() == CONTENT[:2_000_000]


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(written(tmp_path / "file"))
    for name in ("pipe", "link", ".", "nothing"):
        with pytest.raises(OSError):
            open_regular(tmp_path / name)
    os.close(open_regular(tmp_path / "file"))


def test_a_stamp_sees_what_the_times_hide(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    before = path.stat()
    path.write_bytes(b"y" + CONTENT[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_mtime_ns, before.st_size, before.st_ino) == (after.st_mtime_ns, after.st_size, after.st_ino)
    assert Stamp.of(before) != Stamp.of(after)
