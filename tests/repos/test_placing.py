from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from isohub.repos import placing
from isohub.repos.placing import Origin, directory_lock, origin_of, place, reject, workspace

PROJECT = Path(__file__).parents[2]


def origin(content: bytes, key: str = "one") -> Origin:
    return Origin(key * 5, f"https://h/{key}.pth", hashlib.sha256(content).hexdigest())


def put(directory: Path, content: bytes, key: str = "one") -> Path:
    with workspace(directory) as space:
        (space / "part").write_bytes(content)
        place(space / "part", directory / "m.pth", origin(content, key))
    return directory / "m.pth"


def test_where_a_file_came_from(tmp_path: Path) -> None:
    path = put(tmp_path, b"content")
    assert path.read_bytes() == b"content"
    assert origin_of(path) == origin(b"content")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.pth.isohub", "m.pth"]


def test_a_file_that_is_the_user_s_own(tmp_path: Path) -> None:
    (tmp_path / "m.pth").write_bytes(b"mine")
    assert origin_of(tmp_path / "m.pth") is None
    path = put(tmp_path, b"content")
    path.write_bytes(b"changed")
    assert origin_of(path) is None
    put(tmp_path, b"other", "two")
    assert origin_of(path) == origin(b"other", "two")
    (tmp_path / ".m.pth.isohub").chmod(0o600)
    (tmp_path / ".m.pth.isohub").write_bytes(b"{}")
    assert origin_of(path) is None


def test_what_is_only_touched_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, b"content")
    hashed = []
    real = placing.hash_file
    monkeypatch.setattr(placing, "hash_file", lambda path: hashed.append(path) or real(path))
    path.chmod(0o600)
    assert origin_of(path) == origin_of(path) == origin(b"content")
    assert len(hashed) == 1


@pytest.mark.parametrize("step", range(1, 8))
def test_whatever_ends_between_two_steps(tmp_path: Path, step: int) -> None:
    """Killed before each of the calls that change anything: the file is one or the other, and says which."""
    path = put(tmp_path, b"first")
    program = """
import os, signal, sys
from pathlib import Path
from tests.repos.test_placing import put
left = int(sys.argv[2])
def count(event, arguments):
    global left
    if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") and "isohub" in str(arguments):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
put(Path(sys.argv[1]), b"second", "two")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), str(step)], cwd=PROJECT, check=False)
    assert done.returncode == -9
    content = path.read_bytes()
    assert origin_of(path) == (origin(b"first") if content == b"first" else origin(b"second", "two"))
    put(tmp_path, b"third", "thr")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.pth.isohub", "m.pth"]


def test_a_workspace_goes_with_its_writer(tmp_path: Path) -> None:
    (tmp_path / ".isohub-0123456789abcdef").mkdir()
    (tmp_path / ".isohub-0123456789abcdef" / "part").write_bytes(b"left by a killed writer")
    kept = [".isohub-0123456789abcde", ".isohub-0123456789abcdeg", ".isohub-fedcba9876543210"]
    (tmp_path / kept[0]).mkdir()
    (tmp_path / kept[1]).mkdir()
    (tmp_path / kept[2]).write_bytes(b"no directory")
    with workspace(tmp_path) as first, workspace(tmp_path) as second:
        assert first.is_dir()
        assert second.is_dir()
        assert first.stat().st_mode & 0o777 == 0o700
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, first.name, second.name])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    with pytest.raises(KeyError), workspace(tmp_path) as space:
        (space / "part").write_bytes(b"")
        raise KeyError
    assert not space.exists()


def test_readers_share_and_a_writer_waits(tmp_path: Path) -> None:
    written = threading.Event()

    def write() -> None:
        with directory_lock(tmp_path, exclusive=True):
            written.set()

    with directory_lock(tmp_path, exclusive=False), directory_lock(tmp_path, exclusive=False):
        thread = threading.Thread(target=write)
        thread.start()
        descriptor = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        assert not written.is_set()
    thread.join()
    assert written.is_set()
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with directory_lock(tmp_path, exclusive=True), directory_lock(tmp_path, exclusive=True):
        assert origin_of(put(tmp_path, b"content")) == origin(b"content")


def test_a_file_that_was_of_no_use(tmp_path: Path) -> None:
    path = put(tmp_path, b"a page")
    assert reject(path)
    assert path.read_bytes() == b"a page"
    for _ in range(2):
        found = origin_of(path)
        assert found is not None
        assert (found.key, found.rejected) == (origin(b"a page").key, True)
    put(tmp_path, b"content")
    assert origin_of(path) == origin(b"content")
    assert reject(path)
    path.write_bytes(b"mine")  # the user's own, whatever was there before
    assert origin_of(path) is None
    assert not reject(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.pth.isohub", "m.pth"]
