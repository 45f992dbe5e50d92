from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from isohub.errors import SourceUnavailableError
from isohub.repos.measure import measure
from isohub.repos.pins import Pin
from isohub.repos.reference import parse
from isohub.repos.sources import local, source_for
from isohub.repos.sources.local import DirectorySource, measure_directory
from tests.servers.git_repo import GitRepo


def pin_of(path: Path) -> Pin:
    return DirectorySource().resolve(parse(path))


def test_a_clean_clone_has_its_commits_tree(git_repo: Callable[..., GitRepo]) -> None:
    repo = git_repo()
    (repo.path / "link").symlink_to("nowhere")
    repo.commit({"hubconf.py": "1", "a/b.py": "2"})
    (repo.path / "a" / "__pycache__").mkdir()
    (repo.path / "a" / "__pycache__" / "b.pyc").write_text("x")
    pin = pin_of(repo.path)
    assert pin.commit == f"tree-{repo.tree()}"
    assert pin.ref_name is None
    assert pin.name == f"repo@{repo.tree()[:7]}"
    checkout = DirectorySource().checkout(pin)
    assert checkout.path == repo.path
    assert checkout.tree == repo.tree()
    assert checkout.commit == pin.commit
    assert checkout.reference == pin.reference


def test_every_change_gives_another_commit(tmp_path: Path) -> None:
    root = tmp_path / "d"
    root.mkdir()
    seen = set()
    for change in (
        lambda: (root / "a").write_text("1"),
        lambda: (root / "a").write_text("2"),
        lambda: (root / "a").rename(root / "b"),
        lambda: (root / "b").chmod(0o755),
        lambda: (root / "c").symlink_to("b"),
        lambda: (root / "d").mkdir() or (root / "d" / "e").touch(),
    ):
        change()
        seen.add(pin_of(root).commit)
    assert len(seen) == 6


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "RACY_NS", -(10**18))
    (tmp_path / "d").mkdir()
    for number in range(5):
        (tmp_path / "d" / str(number)).write_text("x")
    read: list[bytes] = []
    real = local.blob_id

    def counted(path: bytes, size: int, algorithm: str) -> bytes | None:
        read.append(path)
        return real(path, size, algorithm)

    monkeypatch.setattr(local, "blob_id", counted)
    first = pin_of(tmp_path / "d")
    assert len(read) == 5
    assert pin_of(tmp_path / "d") == first
    assert len(read) == 5
    (tmp_path / "d" / "0").write_text("yy")
    assert pin_of(tmp_path / "d") != first
    assert len(read) == 6


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "d" / "f"
    file.parent.mkdir()
    seen = set()
    for number in range(10):
        file.write_text(str(number))
        os.utime(file, ns=(10**18, 10**18))  # same size, same mtime
        seen.add(pin_of(file.parent).commit)
    assert len(seen) == 10


def test_a_change_after_the_pin_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("1")
    pin = pin_of(tmp_path / "d")
    (tmp_path / "d" / "f").write_text("2")
    with pytest.raises(SourceUnavailableError, match="has changed"):
        DirectorySource().checkout(pin)


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "d"
    root.mkdir()
    (root / "f").write_text("1")
    reference = parse(root)

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(root / "f"))

    with monkeypatch.context() as patched:
        patched.setattr(local, "blob_id", refuse)
        with pytest.raises(SourceUnavailableError, match=f"Permission denied.*{root / 'f'}"):
            measure_directory(reference)
    with monkeypatch.context() as patched:
        patched.setattr(local, "blob_id", lambda *_: None)
        with pytest.raises(SourceUnavailableError, match="changes while it is read"):
            measure_directory(reference)
    (root / "f").unlink()
    root.rmdir()
    with pytest.raises(SourceUnavailableError, match="no directory"):
        measure_directory(reference)


def test_submodules_and_lfs_pointers_are_named(tmp_path: Path) -> None:
    root = tmp_path / "d"
    (root / "third" / "party").mkdir(parents=True)
    (root / "just-empty").mkdir()
    (root / ".gitmodules").write_text('[submodule "x"]\n\tpath = third/party\n\turl = https://h/x\n')
    (root / "w.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    checkout = DirectorySource().checkout(pin_of(root))
    assert checkout.submodules == ("third/party",)
    assert checkout.lfs_pointers == ("w.bin",)


def test_gitmodules_that_is_no_file(tmp_path: Path) -> None:
    root = tmp_path / "d"
    (root / "sub").mkdir(parents=True)
    (root / "hubconf.py").touch()
    (tmp_path / "elsewhere").write_text('[submodule "x"]\n\tpath = sub\n\turl = https://h/x\n')
    for make in (
        lambda place: os.mkfifo(place),
        lambda place: place.symlink_to("../elsewhere"),
        lambda place: place.mkdir(),
    ):
        make(root / ".gitmodules")
        in_child = f"""
from pathlib import Path
from isohub.repos.reference import parse
from isohub.repos.sources.local import DirectorySource
source = DirectorySource()
print(source.checkout(source.resolve(parse(Path({str(root)!r})))).submodules)
"""
        # In a process of its own: a pipe that is waited for is waited for without end.
        done = subprocess.run([sys.executable, "-c", in_child], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "()\n"
        place = root / ".gitmodules"
        place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()
    (tmp_path / "elsewhere").rename(root / ".gitmodules")
    assert DirectorySource().checkout(pin_of(root)).submodules == ("sub",)


def test_copies_when_it_is_asked_to(tmp_path: Path) -> None:
    root, into = tmp_path / "d", tmp_path / "into"
    (root / "a" / "__pycache__").mkdir(parents=True)
    (root / "a" / "x").write_text("1")
    (root / "a" / "x").chmod(0o755)
    (root / "a" / "__pycache__" / "x.pyc").write_text("1")
    (root / "link").symlink_to("a")
    into.mkdir()
    pin = pin_of(root)
    source_for(pin.reference).fetch(pin, into)
    assert f"tree-{measure(into, algorithm='sha1').digest}" == pin.commit
