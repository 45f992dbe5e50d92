"""isohub.repos.verify: it finds one flipped byte anywhere, and nothing in a store that is whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isohub.repos import http
from isohub.repos.blobs import Stamp
from isohub.repos.disk import remove_tree
from isohub.repos.inventory import Inventory
from isohub.repos.layout import weights_dir
from isohub.repos.placing import PlacedRecord
from isohub.repos.records import CheckoutRecord, read_record, write_record
from isohub.repos.reference import parse
from isohub.repos.removal import carry_out, plan_repair
from isohub.repos.store import Store
from isohub.repos.verify import verify
from tests.repos.filled import Filled, fill
from tests.servers.files import FileServer
from tests.servers.github import GitHubServer


@pytest.fixture
def filled(tmp_path: Path, github: GitHubServer) -> Filled:
    with FileServer() as files:
        return fill(tmp_path / "isohub-home", github, files, tmp_path / "git")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """One store for many examples, each of which mends what it damages."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, GitHubServer() as github, FileServer() as files:
        patch.setattr(http, "BACKOFF_S", 0.001)
        patch.setenv("HOME", str(directory / "home"))
        for name, value in github.environment.items():
            patch.setenv(name, value)
        yield fill(directory / "store", github, files, directory / "git")


def found(root: Path) -> list[tuple[str, str]]:
    return [(str(damage.path.relative_to(root)).rpartition("/")[2], damage.what) for damage in verify(root)]


def writable(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o200)


def test_a_whole_store(filled: Filled) -> None:
    before = {path: path.lstat().st_mtime_ns for path in filled.root.rglob("*")}
    assert verify(filled.root) == []
    assert {path: path.lstat().st_mtime_ns for path in filled.root.rglob("*")} == before
    assert verify(filled.root / "nowhere") == []


def flip(path: Path, place: int, change: int) -> bytes:
    """Change one byte in place, modes and names as they were; returns what was there."""
    content = path.read_bytes()
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(bytes([content[place] ^ change]))
    path.chmod(mode)
    return content


def put_back(path: Path, content: bytes) -> None:
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as stream:
        stream.write(content)
    path.chmod(mode)


def test_a_placed_file(filled: Filled) -> None:
    file = filled.root / "checkpoints" / "placed.pth"
    content = file.read_bytes()
    flip(file, 7, 1)
    (damage,) = verify(filled.root)
    assert (damage.path, damage.what, damage.unit) == (file, "content", None)
    # It may be what its user wants: it is told, and stays.
    kept = carry_out(filled.root, plan_repair(Inventory(filled.root), [damage])).kept
    assert [(each.path, each.reason) for each in kept] == [(file, "only its user can mend it")]
    # A disk that loses bytes changes no time.
    record = read_record(file.with_name(".placed.pth.isohub"), PlacedRecord)
    assert record is not None
    stamp = Stamp.of(file.lstat())
    write_record(file.with_name(".placed.pth.isohub"), msgspec.structs.replace(record, stamp=stamp))
    damages = verify(filled.root)
    assert [each.unit for each in damages] == [file]
    carry_out(filled.root, plan_repair(Inventory(filled.root), damages))
    assert not file.exists()
    assert verify(filled.root) == []
    file.write_bytes(content)
    assert verify(filled.root) == []
    # One that has no record is nobody's but its user's.
    (filled.root / "checkpoints" / "mine.pth").write_bytes(b"mine")
    assert verify(filled.root) == []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_flipped_byte_anywhere(whole: Filled, data: st.DataObject) -> None:
    files = sorted(path for path in whole.root.rglob("*") if path.is_file() and not path.is_symlink())
    files = [path for path in files if path.stat().st_size]
    assert len(files) > 15
    path = data.draw(st.sampled_from(files))
    size = path.stat().st_size
    place = data.draw(st.sampled_from([0, size - 1, size // 2]) | st.integers(0, size - 1))
    content = flip(path, place, data.draw(st.integers(1, 255)))
    try:
        damages = verify(whole.root)
        assert damages
        names = {path, *(other for other in files if other.samefile(path))}
        tree = {damage.path for damage in damages}
        assert any(each in tree or any(parent in tree for parent in each.parents) for each in names)
    finally:
        put_back(path, content)
    assert verify(whole.root) == []


@pytest.mark.parametrize(
    "name",
    [
        "checkout.json",
        "refs.json",
        "entry.json",
        "hubconf.py",
        "own.pth",
        "trust.json",
        "net.py",
        "placed.pth",
        ".placed.pth.isohub",
    ],
)
def test_every_byte_of_each_kind_of_file(whole: Filled, name: str) -> None:
    path = next(path for path in sorted(whole.root.rglob(name)) if path.stat().st_size < 3000 or name == "own.pth")
    size = path.stat().st_size
    places = range(size) if size < 400 else [*range(0, size, max(1, size // 60)), size - 1]
    for place in places:
        content = flip(path, place, 1 + place % 255)
        assert verify(whole.root), place
        put_back(path, content)
    assert verify(whole.root) == []


def test_what_is_missing_or_too_much_or_of_another_kind(filled: Filled) -> None:
    tree, place = filled.one.path, filled.one.path.parent
    for path in (tree, tree / "models", place):
        path.chmod(0o755)

    def check(*expected: tuple[str, str]) -> None:
        assert sorted({each for each in found(filled.root) if each[1] != "mode"}) == sorted(expected)

    check()
    (tree / "run.sh").rename(tree / "run2.sh")
    check(("tree", "content"))
    (tree / "run2.sh").rename(tree / "run.sh")
    (tree / "run.sh").chmod(0o444)
    check(("tree", "content"))
    (tree / "run.sh").chmod(0o555)
    (tree / "more.py").write_text("")
    check(("tree", "content"), ("tree", "size"))
    (tree / "more.py").unlink()
    (tree / "empty").mkdir()
    check(("tree", "content"))
    (tree / "empty").rmdir()
    os.mkfifo(tree / "models" / "pipe")
    check(("pipe", "kind"))
    (tree / "models" / "pipe").unlink()
    (tree / "link").unlink()
    (tree / "link").symlink_to("models")
    check(("tree", "content"), ("tree", "size"))
    (tree / "link").unlink()
    (tree / "link").symlink_to("hubconf.py")
    check()
    (place / "stranger").write_text("")
    check(("stranger", "unexpected"))
    (place / "stranger").unlink()
    (place / "checkout.json").rename(place.parent / "kept")
    check(("checkout.json", "missing"), ("kept", "unexpected"))


def likely(filled: Filled) -> set[str]:
    found = {path for damage in verify(filled.root) for path in damage.likely}
    return {path.relative_to(filled.one.path).as_posix() for path in found}


def test_what_was_changed_after_the_checkout_was_made_is_likely(filled: Filled) -> None:
    tree = filled.one.path
    content = flip(tree / "hubconf.py", 0, 1)
    assert likely(filled) == {"hubconf.py"}
    flip(tree / "models" / "net.py", 1, 1)
    assert likely(filled) == {"hubconf.py", "models/net.py"}
    put_back(tree / "hubconf.py", content)
    tree.chmod(0o755)
    (tree / "run.sh").unlink()
    tree.chmod(0o555)
    assert likely(filled) == {".", "hubconf.py", "models/net.py"}
    # Once its record is written anew, the time that it tells counts.
    store = Store(filled.root)
    place = tree.parent
    record = read_record(place / "checkout.json", CheckoutRecord)
    assert record is not None
    os.utime(place)
    place.chmod(0o755)
    write_record(place / "checkout.json", msgspec.structs.replace(record, created="2020-01-01T00:00:00Z"))
    place.chmod(0o555)
    assert likely(filled) == set()  # all of it is later, as in a store that was copied
    assert store.lookup(filled.one.pin) is not None


@pytest.mark.parametrize("kind", ["pipe", "link", "directory"])
def test_records_and_blobs_of_another_kind_are_damage_and_hang_nobody(filled: Filled, kind: str) -> None:
    place = filled.one.path.parent
    place.chmod(0o755)
    record = place / "checkout.json"
    paths = [record, place.parent / "refs.json", filled.own.path.parent / "entry.json", filled.own.blob]
    for path in paths:
        outside = filled.root.parent / f"outside-{path.name}"
        path.rename(outside)
        if kind == "pipe":
            os.mkfifo(path, 0o444)
        elif kind == "link":
            path.symlink_to(outside)
        else:
            path.mkdir(0o555)
    place.chmod(0o555)
    Inventory(filled.root).leftovers()
    damaged = {damage.path for damage in verify(filled.root)}
    assert damaged >= set(paths)
    assert carry_out(filled.root, plan_repair(Inventory(filled.root), verify(filled.root))).kept == ()
    assert verify(filled.root) == []


def test_what_may_be_written_is_damage(filled: Filled) -> None:
    writable(filled.one.path / "hubconf.py")
    writable(filled.one.path / "models")
    writable(filled.one.path.parent)
    writable(filled.one.path.parent / "checkout.json")
    writable(filled.own.path)
    (filled.two.path / "run.sh").chmod(0o4555)
    assert {(name, what) for name, what in found(filled.root)} == {
        ("hubconf.py", "mode"),
        ("models", "mode"),
        (filled.one.commit, "mode"),
        ("checkout.json", "mode"),
        (filled.own.name, "mode"),
        (filled.own.sha256, "mode"),
        ("run.sh", "mode"),
    }
    damage = next(each for each in verify(filled.root) if each.path.name == "run.sh")
    assert (damage.expected, damage.got, damage.unit) == ("0555", "4555", filled.two.path.parent)


def test_a_checkout_under_another_name(filled: Filled) -> None:
    place = filled.one.path.parent
    place.rename(place.with_name("0" * 40))
    assert found(filled.root) == [("checkout.json", "record")]
    (place.with_name("0" * 40)).rename(place.with_name(f"{filled.one.commit}+lfs"))
    assert found(filled.root) == [("checkout.json", "record")]


def test_weights(filled: Filled) -> None:
    root, blob = filled.root, filled.root / "weights" / "blobs" / filled.own.sha256[:2] / filled.own.sha256
    blob.rename(blob.with_name(filled.shared.sha256[:2] + "0" * 62))
    assert (filled.own.sha256, "missing") in found(root)
    assert {what for _, what in found(root)} <= {"missing", "content", "unexpected"}
    blob.with_name(filled.shared.sha256[:2] + "0" * 62).rename(blob)
    assert found(root) == []
    content = filled.own.path.read_bytes()
    filled.own.path.unlink()
    assert found(root) == [(filled.own.name, "kind")]
    filled.own.path.write_bytes(content)  # a copy, as where links are not possible
    filled.own.path.chmod(0o444)
    assert found(root) == []
    filled.own.path.chmod(0o644)
    filled.own.path.write_bytes(content[:-1] + b"X")
    filled.own.path.chmod(0o444)
    assert found(root) == [(filled.own.name, "content")]
    place = filled.shared.path.parent
    place.rename(place.with_name("0" * 40))
    assert ("entry.json", "record") in found(root)


@pytest.mark.parametrize(
    "name",
    [
        "checkouts/file", "checkouts/%zz/", "checkouts/h/file", "checkouts/h/o/file", "checkouts/h/o/r/file",
        "checkouts/h/o/r/short/", "weights/file", "weights/blobs/file", "weights/blobs/aa/file",
        "weights/urls/h/o/file", "weights/urls/h/o/r/file", "weights/partial/file", "weights/partial/short.part",
    ],
)  # fmt: skip
def test_strangers(filled: Filled, name: str) -> None:
    path = filled.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("/"):
        path.mkdir()
    else:
        path.write_text("?")
    assert found(filled.root) == [(path.name, "unexpected")]
    plan = plan_repair(Inventory(filled.root), verify(filled.root))
    assert [removal.path for removal in plan.removals] == [path]
    assert carry_out(filled.root, plan).kept == ()
    assert found(filled.root) == []


def test_links_are_strangers_and_not_followed(filled: Filled, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    for name in ("checkouts/host", "weights/blobs/aa", "weights/urls/host"):
        (filled.root / name).symlink_to(outside)
    assert {what for _, what in found(filled.root)} == {"unexpected"}
    carry_out(filled.root, plan_repair(Inventory(filled.root), verify(filled.root)))
    assert found(filled.root) == []
    assert (outside / "kept").read_text() == "kept"


def test_leftovers_are_no_damage(filled: Filled) -> None:
    repo_dir, partial = filled.one.path.parent.parent, filled.root / "weights" / "partial"
    (repo_dir / ".staging-1" / "tree").mkdir(parents=True)
    (repo_dir / ".trash-1").mkdir()
    (partial / f"{'0' * 40}.part").write_bytes(b"x")
    (filled.own.path.parent / ".0011").write_bytes(b"x")
    (filled.root / "weights" / "blobs" / filled.own.sha256[:2] / ".0011").write_bytes(b"x")
    assert found(filled.root) == []


def test_a_lock_file_with_something_in_it(filled: Filled) -> None:
    (filled.one.path.parent.parent / ".refs.lock").write_text("?")
    assert found(filled.root) == [(".refs.lock", "unexpected")]


def test_what_cannot_be_read_is_damage(filled: Filled) -> None:
    deep = filled.one.path
    deep.chmod(0o755)
    for _ in range(510):  # deeper than a tree is read
        deep /= "d"
        deep.mkdir()
    for path in sorted(filled.one.path.rglob("*")):
        path.chmod(path.lstat().st_mode & 0o555, follow_symlinks=True)
    filled.one.path.chmod(0o555)
    assert {what for _, what in found(filled.root)} == {"unreadable"}
    carry_out(filled.root, plan_repair(Inventory(filled.root), verify(filled.root)))
    assert found(filled.root) == []


def test_while_others_write(filled: Filled, github: GitHubServer) -> None:
    code = (
        "import sys; from pathlib import Path; from isohub.repos.store import Store; "
        "from isohub.repos.reference import parse\n"
        "store = Store(Path(sys.argv[1]))\n"
        "for _ in range(12): store.fetch(store.resolve(parse('o/other'), force_reload=True), force_reload=True)"
    )
    repo = github._repos["o/other"]
    repo.commit({f"many/file{number}.py": "x\n" for number in range(100)})
    writer = subprocess.Popen([sys.executable, "-c", code, str(filled.root)])
    while writer.poll() is None:
        assert verify(filled.root) == []
    assert writer.returncode == 0
    remove_tree(filled.one.path.parent)
    store = Store(filled.root)
    store.fetch(store.resolve(parse("o/r:v1")))
    assert verify(filled.root) == []


def test_a_scope_whose_names_are_hostile(filled: Filled) -> None:
    place = weights_dir(filled.root, ("../..", "/", "\x1b[2J")) / ("0" * 40)
    place.mkdir(parents=True)
    (place / "entry.json").write_text("{}")
    damages = verify(filled.root)
    assert {damage.what for damage in damages} <= {"record", "mode"}
    assert all(damage.path.is_relative_to(filled.root / "weights" / "urls") for damage in damages)
