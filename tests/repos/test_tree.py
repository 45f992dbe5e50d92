from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isohub.errors import IntegrityError
from isohub.repos.disk import exchange, freeze, remove_tree
from isohub.repos.measure import measure
from isohub.repos.tree import Limits, TreeWriter
from tests.servers.git_repo import GitRepo


@pytest.fixture
def writer(tmp_path: Path) -> TreeWriter:
    (tmp_path / "tree").mkdir()
    return TreeWriter(tmp_path / "tree", origin="test")


def test_writes_files_modes_and_links(writer: TreeWriter, tmp_path: Path) -> None:
    writer.file("a/b/plain", [b"12", b"", b"3"], executable=False)
    writer.file("run.sh", [b"#!/bin/sh\n"], executable=True)
    writer.symlink("a/up", "../run.sh")
    writer.symlink("dir", "a/b")
    writer.symlink("dangling", "a/missing")
    writer.directory("a/empty")
    writer.directory("a/empty")
    writer.finish()
    tree = tmp_path / "tree"
    assert (tree / "a/b/plain").read_bytes() == b"123"
    assert stat.S_IMODE((tree / "a/b/plain").stat().st_mode) == 0o444
    assert stat.S_IMODE((tree / "run.sh").stat().st_mode) == 0o555
    assert (tree / "a/up").read_bytes() == b"#!/bin/sh\n"
    assert (tree / "dir/plain").is_file()
    assert list((tree / "a/empty").iterdir()) == []


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "../a",
        "a/../../b",
        "a/./b",
        "a\\b",
        "a\0b",
        "C:/a",
        "c:a",
        ".git/config",
        "a/.GIT/config",
        ".git",
        ".git./x",
        ".git::$INDEX_ALLOCATION/x",
        ".g\u200cit/x",
        "git~1/x",
        "x" * 256,
        "a/" * 200 + "b",
        "a\udcff",
    ],
)
def test_refuses_names(writer: TreeWriter, tmp_path: Path, path: str) -> None:
    for write in (
        lambda: writer.file(path, [b"x"], executable=False),
        lambda: writer.symlink(path, "y"),
        lambda: writer.directory(path),
    ):
        with pytest.raises(IntegrityError) as caught:
            write()
        assert caught.value.message.isprintable()
    assert list(tmp_path.rglob("*")) == [tmp_path / "tree"]


def test_git_like_names_are_allowed(writer: TreeWriter) -> None:
    for path in (".gitignore", ".gitmodules", ".github/x", "agit", "ab:c", "\u00e9\u200d\u4e2d"):
        writer.file(path, [b""], executable=False)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a", "a"),
        ("a/b", "a"),
        ("a", "a/b"),
        ("README", "readme"),
        ("Dir/x", "dir/y"),
        ("\u00e9", "e\u0301"),
        ("a/\u00c9", "a/\u00e9"),
    ],
)
def test_refuses_duplicates(writer: TreeWriter, first: str, second: str) -> None:
    writer.file(first, [b"1"], executable=False)
    with pytest.raises(IntegrityError, match=r"twice|case or Unicode|no directory"):
        writer.file(second, [b"2"], executable=False)


def test_refuses_files_below_links(writer: TreeWriter, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    writer.symlink("link", "somewhere")
    for path in ("link/x", "LINK/x", "link"):
        with pytest.raises(IntegrityError):
            writer.file(path, [b"x"], executable=False)
    with pytest.raises(IntegrityError):
        writer.directory("link")


@pytest.mark.parametrize("target", ["/etc/passwd", "", "a\0b", "..\\x", "c:\\x", "x" * 4096])
def test_refuses_targets(writer: TreeWriter, target: str) -> None:
    with pytest.raises(IntegrityError):
        writer.symlink("link", target)


@pytest.mark.parametrize(
    "links",
    [
        {"a": ".."},
        {"a": "b/../../c"},
        {"d/a": "../../x"},
        # Each looks as if it stayed inside; together they do not.
        {"x/y/up": "../..", "out": "x/y/up/../secret"},
        {"one": "two", "two": "three/..", "three": "d"} | {"four": "one/.."},
    ],
)
def test_refuses_links_that_lead_out(writer: TreeWriter, links: dict[str, str]) -> None:
    writer.file("d/f", [b"x"], executable=False)
    for path, target in links.items():
        writer.symlink(path, target)
    with pytest.raises(IntegrityError, match="leads out of the tree"):
        writer.finish()


def test_loops_lead_nowhere_and_are_kept(writer: TreeWriter, tmp_path: Path) -> None:
    writer.symlink("self", "self")
    writer.symlink("a", "b")
    writer.symlink("b", "a/x")
    writer.finish()
    with pytest.raises(OSError, match="symbolic links"):
        (tmp_path / "tree" / "self").stat()


def test_nested_links_cost_bounded_work(writer: TreeWriter) -> None:
    for number in range(4000):
        writer.symlink(f"l{number}", "/".join(["."] * 1500) + f"/l{number + 1}")
    with pytest.raises(IntegrityError, match="too many nested"):
        writer.finish()


def test_counts_what_it_writes(tmp_path: Path) -> None:
    def writer(**limits: int) -> TreeWriter:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        root.mkdir()
        return TreeWriter(root, origin="test", limits=Limits(**limits))

    with pytest.raises(IntegrityError, match="over 10 bytes"):
        writer(total_bytes=10).file("a", (b"123" for _ in range(1_000_000)), executable=False)
    small = writer(entries=3)
    with pytest.raises(IntegrityError, match="more than 3 entries"):
        small.file("a/b/c/d", [b""], executable=False)
    with pytest.raises(IntegrityError, match="components"):
        writer(depth=2).directory("a/b/c")


def test_a_tree_without_files_is_refused(writer: TreeWriter) -> None:
    writer.directory("a")
    with pytest.raises(IntegrityError, match="no files"):
        writer.finish()


COMPONENT = st.sampled_from(["a", "A", "b", "..", ".", "link", ".git", "\u00e9", "e\u0301", ""])
PATH = st.lists(COMPONENT, min_size=1, max_size=4).map("/".join)


@given(st.lists(st.tuples(st.sampled_from("fsd"), PATH, PATH), max_size=12))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_leads_out_whatever_is_written(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, str, str]]
) -> None:
    base = tmp_path_factory.mktemp("case")
    root = base / "tree"
    root.mkdir()
    writer = TreeWriter(root, origin="test")
    try:
        for kind, path, target in operations:
            try:
                if kind == "f":
                    writer.file(path, [b"x"], executable=False)
                elif kind == "s":
                    writer.symlink(path, target)
                else:
                    writer.directory(path)
            except IntegrityError:
                pass
        writer.finish()
    except IntegrityError:
        pass
    else:
        for directory, names, files in os.walk(root):
            for name in [*names, *files]:
                try:
                    real = os.path.realpath(f"{directory}/{name}", strict=True)
                except FileNotFoundError:
                    real = os.path.realpath(f"{directory}/{name}")
                except OSError as error:
                    # A loop leads nowhere; realpath's guess at one is no path the kernel takes.
                    assert error.errno in (errno.ELOOP, errno.ENOTDIR)
                    continue
                assert real == str(root) or real.startswith(f"{root}/")
    assert list(base.iterdir()) == [root]


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
def test_measures_as_git_does(git_repo: Callable[..., GitRepo], algorithm: str) -> None:
    repo = git_repo(object_format=algorithm)
    (repo.path / "link").symlink_to("a/b")
    (repo.path / "run").write_text("x")
    (repo.path / "run").chmod(0o755)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    # "a.b" sorts before the directory "a", as if the latter were "a/".
    repo.commit({"a/b": "1", "a.b": "2", "a0": "3", "\u00e9": "4", "w.bin": pointer, "large": b"z" * 3_000_000})
    (repo.path / "a" / "empty").mkdir()
    measured = measure(repo.path, algorithm=algorithm, skip=frozenset({b".git"}))
    assert measured.digest == repo.tree()
    assert measured.files == 8
    assert measured.bytes == 3 + 1 + 3 + 1 + len(pointer) + 3_000_000
    assert measured.empty == ("a/empty",)
    assert measured.lfs_pointers == ("w.bin",)
    (repo.path / "a" / "b").chmod(0o755)
    assert measure(repo.path, algorithm=algorithm, skip=frozenset({b".git"})).digest != measured.digest


def test_pipes_and_sockets_do_not_count_nor_hang(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    before = measure(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert measure(tmp_path).digest == before.digest


def test_an_ordinary_user_can_remove_a_frozen_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "tree"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "f").write_text("x")
    (root / "run").write_text("x")
    (root / "run").chmod(0o755)
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o500)
    (root / "a" / "link").symlink_to(outside)
    freeze(root)
    assert stat.S_IMODE((root / "a" / "b" / "f").stat().st_mode) == 0o444
    assert stat.S_IMODE((root / "run").stat().st_mode) == 0o555
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o555
    monkeypatch.chdir(tmp_path)  # the directories above are another user's
    if os.geteuid() == 0:  # root could remove anything, so become somebody who could not
        for path in [tmp_path, *tmp_path.rglob("*")]:
            os.lchown(path, 65534, 65534)
        as_user = _Identity(65534)
    else:
        as_user = _Identity(os.geteuid())
    with as_user:
        # The control: without the chmod that remove_tree does, it fails.
        with pytest.raises(PermissionError):
            Path("tree/a/b/f").unlink()
        remove_tree(Path("tree"))
    assert not root.exists()
    assert stat.S_IMODE(outside.stat().st_mode) == 0o500


class _Identity:
    """The effective user of the process, for a while."""

    def __init__(self, user: int) -> None:
        self.user, self.before = user, os.geteuid()

    def __enter__(self) -> None:
        os.seteuid(self.user)

    def __exit__(self, *_: object) -> None:
        os.seteuid(self.before)


def test_exchange(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "1").touch()
    if exchange(one, other):
        assert [p.name for p in other.iterdir()] == ["1"]
    with pytest.raises(OSError, match="No such file"):
        exchange(one, tmp_path / "missing")
