from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from isohub.repos import blobs as blobs_module
from isohub.repos.blobs import Blobs, Stamp, copy_into, hash_file, hash_known, open_regular
from isohub.repos.inventory import claim_file

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


def test_a_hash_is_remembered_while_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = written(tmp_path / "file"), []
    monkeypatch.setattr(blobs_module, "hash_file", lambda path: read.append(path) or hash_file(path))
    monkeypatch.setattr(blobs_module, "_known", {})
    monkeypatch.setattr(blobs_module, "_SETTLED_NS", 1 << 62)
    # A second change within a tick of the clock would not show: what has just changed is hashed each time.
    assert [hash_known(path) for _ in range(3)] == [(SHA, len(CONTENT))] * 3
    assert len(read) == 3
    monkeypatch.setattr(blobs_module, "_SETTLED_NS", -(1 << 62))
    assert [hash_known(path) for _ in range(3)] == [(SHA, len(CONTENT))] * 3
    assert len(read) == 4
    before = path.stat()
    with path.open("r+b") as stream:
        stream.write(b"y")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hash_known(path)[0] == hash_file(path)[0]
    assert len(read) == 5
    monkeypatch.setattr(blobs_module, "_KNOWN_LIMIT", 2)
    for number in range(5):
        assert hash_known(written(tmp_path / f"{number}", b"%d" % number))[1] == 1
    assert len(blobs_module._known) <= 2
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError):
        hash_known(tmp_path / "link")


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "file")

    def changing(path: Path) -> tuple[str, Stamp]:
        found = hash_file(path)
        path.write_bytes(b"other")
        return found

    monkeypatch.setattr(blobs_module, "_SETTLED_NS", -(1 << 62))
    monkeypatch.setattr(blobs_module, "hash_file", changing)
    hash_known(path)
    monkeypatch.setattr(blobs_module, "hash_file", hash_file)
    assert hash_known(path) == (hashlib.sha256(b"other").hexdigest(), 5)


def test_a_blob_in_use_is_nobody_s_to_remove(blobs: Blobs, tmp_path: Path) -> None:
    part = written(tmp_path / "part")
    blobs.add(part, SHA, move=True)
    one, two = blobs.hold(SHA, part), blobs.hold(SHA, part)
    assert one is not None
    assert two is not None
    for held in (one, two):
        with pytest.raises(BlockingIOError):
            claim_file(blobs.path(SHA))
        os.close(held)
    claimed = claim_file(blobs.path(SHA))
    assert claimed is not None
    assert blobs.hold(SHA, part) is None  # whoever keeps it for himself keeps it from being removed
    os.close(claimed)
    blobs.path(SHA).unlink()
    with pytest.raises(FileNotFoundError):
        claim_file(blobs.path(SHA))


def test_a_blob_that_is_removed_while_somebody_waits_comes_again(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = written(tmp_path / "part")
    blobs.add(part, SHA, move=True)
    claimed = claim_file(blobs.path(SHA))
    assert claimed is not None
    waits = threading.Event()
    monkeypatch.setattr(blobs_module.time, "sleep", lambda _: waits.set())
    monkeypatch.setattr(blobs_module, "_HOLD_TRIES", 1_000_000)
    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(blobs.hold(SHA, part)))
    thread.start()
    assert waits.wait(30)
    blobs.path(SHA).unlink()
    os.close(claimed)
    thread.join()
    assert found[0] is not None
    assert os.path.samestat(os.fstat(found[0]), blobs.path(SHA).stat())
    os.close(found[0])


def test_where_there_are_no_locks(blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    part = written(tmp_path / "part")
    assert blobs.hold(SHA, part) is None
    assert blobs.path(SHA).samefile(part)
