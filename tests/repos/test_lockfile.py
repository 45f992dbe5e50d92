"""isohub.repos.lockfile and lock_format: what is locked comes or nothing does; reading fails closed; nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isohub.errors import InvalidReferenceError, LockMismatchError, SourceUnavailableError, TrustError
from isohub.repos.lock_format import (
    LIMIT_BYTES,
    LockedEnvironment,
    LockedPackage,
    LockedRepo,
    LockedWeights,
    decode_lock,
    encode_lock,
)
from isohub.repos.lockfile import Lockfile
from isohub.repos.pins import Checkout, Pin
from isohub.repos.reference import parse
from tests.servers.git_repo import GitRepo

A, B = "a" * 40, "b" * 40
TREE, OTHER_TREE = "1" * 64, "2" * 64
SHA, OTHER_SHA = "3" * 64, "4" * 64
URL = "https://example.org/files/model.pth"


def checkout(text: str | Path = "o/r:v1", commit: str = A, tree: str = TREE, **pin: object) -> Checkout:
    pin.setdefault("ref_name", "refs/tags/v1")
    return Checkout(Pin(parse(text), commit, **pin), Path("/nowhere"), tree)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "isohub.lock"


def test_nothing_is_locked_at_first(path: Path) -> None:
    lock = Lockfile(path)
    assert lock.pin(parse("o/r:v1")) is None
    assert lock.weights(parse("o/r:v1"), (), URL) is None
    assert lock.entries() == ()
    assert not path.exists()


def test_the_file_is_made_for_review(path: Path) -> None:
    lock = Lockfile(path)
    lock.check(checkout("o/r:v1"))
    lock.check(checkout("a/z", B, ref_name="refs/heads/main", extras=("lfs",), validated=False))
    for name in ("z.pth", "a.pth"):
        lock.check_weights(parse("o/r:v1"), (), f"https://example.org/{name}#part", SHA, 12)
    assert path.read_text() == (
        "# Which commits and weights were loaded. Written by isohub; commit it, and review its changes as code.\n"
        "version = 1\n\n"
        '[[repo]]\nreference = "a/z"\nextras = [\n    "lfs",\n]\n'
        f'commit = "{B}"\nref = "refs/heads/main"\nvalidated = false\ntree = "{TREE}"\n\n'
        f'[[repo]]\nreference = "o/r:v1"\ncommit = "{A}"\nref = "refs/tags/v1"\nvalidated = true\ntree = "{TREE}"\n\n'
        f'[[repo.weights]]\nurl = "https://example.org/a.pth"\nsha256 = "{SHA}"\nbytes = 12\n\n'
        f'[[repo.weights]]\nurl = "https://example.org/z.pth"\nsha256 = "{SHA}"\nbytes = 12\n'
    )


def test_what_is_locked_is_the_pin(path: Path) -> None:
    Lockfile(path).check(checkout(extras=("submodules",), validated=False))
    lock = Lockfile(path, frozen=True)
    reference = parse("https://github.com/o/r:v1")
    assert lock.pin(reference, ("submodules",)) == Pin(reference, A, "refs/tags/v1", False, ("submodules",))
    lock.check(checkout(extras=("submodules",), validated=True))
    with pytest.raises(LockMismatchError, match="o/r:v1 is not locked in .*, where there is o/r:v1 with submodules"):
        lock.pin(reference)


@pytest.mark.parametrize(
    ("what", "got", "found"), [("commit", B, checkout(commit=B)), ("tree", OTHER_TREE, checkout(tree=OTHER_TREE))]
)
def test_another_commit_or_tree_stops(path: Path, what: str, got: str, found: Checkout) -> None:
    lock = Lockfile(path)
    lock.check(checkout())
    lock.check(checkout())
    before = path.read_bytes()
    with pytest.raises(LockMismatchError) as raised:
        lock.check(found)
    error = raised.value
    assert (error.what, error.got, error.reference, error.lockfile) == (what, got, "o/r:v1", str(path))
    assert error.expected == (A if what == "commit" else TREE)
    assert error.expected in error.message
    assert got in error.message
    assert error.hint is not None
    assert f"isohub lock --upgrade o/r:v1 --lockfile {path}" in error.hint
    assert pickle.loads(pickle.dumps(error)).fields == error.fields
    assert path.read_bytes() == before


def test_other_weights_stop(path: Path) -> None:
    lock, reference = Lockfile(path), parse("o/r:v1")
    lock.check(checkout())
    lock.check_weights(reference, (), URL, SHA, 5)
    lock.check_weights(reference, (), URL, SHA, 5)
    assert lock.weights(reference, (), URL) == LockedWeights(URL, SHA, 5)
    for sha256, size in ((OTHER_SHA, 5), (SHA, 6)):
        with pytest.raises(LockMismatchError, match="weights sha256") as raised:
            lock.check_weights(reference, (), URL, sha256, size)
        assert raised.value.what == "weights"


def test_weights_of_a_repo_that_is_not_locked(path: Path) -> None:
    with pytest.raises(LockMismatchError, match="o/r:v1 is not locked"):
        Lockfile(path).check_weights(parse("o/r:v1"), (), URL, SHA, 5)
    assert not path.exists()


def test_environments(path: Path) -> None:
    lock, reference = Lockfile(path), parse("o/r:v1")
    auto = LockedEnvironment("auto", "3.11", "linux-x86_64", (LockedPackage("timm", "0.6.13", (SHA, OTHER_SHA)),))
    with pytest.raises(LockMismatchError, match="is not locked"):
        lock.add_environment(reference, (), auto)
    lock.check(checkout("o/r:v1"))
    assert lock.environment(reference, (), "auto") is None
    lock.add_environment(reference, (), auto)
    assert Lockfile(path).environment(reference, (), "auto") == auto
    assert Lockfile(path).environment(reference, (), "python 3.9") is None
    with pytest.raises(LockMismatchError) as caught:
        lock.add_environment(reference, (), LockedEnvironment("auto", "3.11", "linux-x86_64"))
    assert caught.value.what == "environment"
    with pytest.raises(LockMismatchError, match=r"environment python 3\.9, which o/r:v1 runs on, is not locked"):
        Lockfile(path, frozen=True).environment(reference, (), "python 3.9")
    # Weights and environments do not push each other out; an upgrade unlocks the latter.
    lock.check_weights(reference, (), URL, SHA, 12)
    assert Lockfile(path).environment(reference, (), "auto") == auto
    lock.update(checkout("o/r:v1"))
    assert Lockfile(path).environment(reference, (), "auto") is None
    assert lock.weights(reference, (), URL) is not None


def test_a_query_is_told_apart_and_kept_out(path: Path) -> None:
    lock, reference = Lockfile(path), parse("o/r:v1")
    lock.check(checkout())
    signed = [f"{URL}?signature=SECRET{number}" for number in (1, 2)]
    lock.check_weights(reference, (), URL, SHA, 1)
    lock.check_weights(reference, (), signed[0], OTHER_SHA, 2)
    assert "SECRET" not in path.read_text()
    assert (lock.weights(reference, (), URL) or 0).sha256 == SHA
    assert (lock.weights(reference, (), signed[0]) or 0).sha256 == OTHER_SHA
    assert lock.weights(reference, (), signed[1]) is None
    with pytest.raises(LockMismatchError) as raised:
        Lockfile(path, frozen=True).weights(reference, (), signed[1])
    assert "SECRET" not in str(raised.value) + repr(raised.value.fields)
    with pytest.raises(InvalidReferenceError) as refused:
        lock.check_weights(reference, (), "https://user:SECRET@example.org/x", SHA, 1)
    assert "SECRET" not in str(refused.value)


def test_frozen_adds_nothing(path: Path) -> None:
    lock = Lockfile(path, frozen=True)
    for ask in (
        lambda: lock.pin(parse("o/r:v1")),
        lambda: lock.check(checkout()),
        lambda: lock.update(checkout()),
        lambda: lock.weights(parse("o/r:v1"), (), URL),
        lambda: lock.check_weights(parse("o/r:v1"), (), URL, SHA, 1),
    ):
        with pytest.raises(LockMismatchError) as raised:
            ask()
        assert raised.value.what == "reference"
        assert raised.value.hint == f"isohub lock o/r:v1 --lockfile {path}"
        assert f"there is no lockfile {path}" in raised.value.message
    assert not path.exists()
    Lockfile(path).check(checkout())
    with pytest.raises(LockMismatchError, match="o/r:v3 is not locked in"):
        lock.pin(parse("o/r:v3"))
    with pytest.raises(LockMismatchError, match=re.escape("https://example.org/files/model.pth, which o/r:v1")):
        lock.weights(parse("o/r:v1"), (), URL)
    with pytest.raises(LockMismatchError, match="where there is o/r:v1"):
        lock.pin(parse("o/r:v2"))


def test_update_keeps_weights_of_the_same_commit_alone(path: Path) -> None:
    lock, reference = Lockfile(path), parse("o/r:v1")
    lock.check(checkout())
    lock.check_weights(reference, (), URL, SHA, 5)
    lock.update(checkout(tree=OTHER_TREE))
    entry = lock.find(reference)
    assert entry is not None
    assert (entry.tree, len(entry.weights)) == (OTHER_TREE, 1)
    lock.update(checkout(commit=B))
    entry = lock.find(reference)
    assert entry is not None
    assert (entry.commit, entry.weights) == (B, ())


def test_update_takes_other_weights_and_lets_go_of_some(path: Path) -> None:
    lock, reference = Lockfile(path), parse("o/r:v1")
    lock.check(checkout())
    signed = f"{URL}?signature=SECRET"
    for url in (URL, signed, "https://example.org/z.pth"):
        lock.check_weights(reference, (), url, SHA, 5)
    entry = lock.find(reference)
    assert entry is not None
    plain, unknown, other = entry.weights
    fresh = LockedWeights(URL, OTHER_SHA, 6)
    lock.update(checkout(), {plain.which: fresh, unknown.which: None})
    assert (lock.find(reference) or 0).weights == (fresh, other)
    lock.check_weights(reference, (), URL, OTHER_SHA, 6)
    with pytest.raises(LockMismatchError, match="weights sha256"):
        lock.compare_weights(reference, (), other, OTHER_SHA, 5)
    lock.compare_weights(reference, (), other, SHA, 5)
    lock.update(checkout(commit=B), {other.which: fresh})
    assert (lock.find(reference) or 0).weights == ()


def test_a_lockfile_that_has_to_be_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceUnavailableError, match=f"there is no lockfile {re.escape(str(path))}") as raised:
        Lockfile(path).require()
    assert raised.value.hint == f"isohub lock REPO --lockfile {path}"
    monkeypatch.chdir(path.parent)
    with pytest.raises(SourceUnavailableError) as raised:
        Lockfile("isohub.lock").require()
    assert raised.value.hint == "isohub lock REPO"
    Lockfile(path).check(checkout())
    Lockfile(path).require()


def test_a_lock_that_contradicts_its_reference(path: Path) -> None:
    lock = Lockfile(path)
    for text in (f"o/r:{B}", "o/r:bbbbbbb"):
        lock.check(checkout(text, A, ref_name=None))
        with pytest.raises(LockMismatchError) as raised:
            lock.pin(parse(text))
        assert raised.value.what == "commit"
    lock.check(checkout("o/r:abcd", B, ref_name="refs/heads/abcd"))
    assert (lock.pin(parse("o/r:abcd")) or 0).commit == B
    lock.check(checkout("o/r:aaaa", A, ref_name=None))
    assert (lock.pin(parse("o/r:aaaa")) or 0).commit == A


def test_local_paths_move_with_the_project(tmp_path: Path) -> None:
    project = tmp_path / "one" / "project é"
    clone = GitRepo(project / "clones" / "a:b@c")
    clone.commit({"hubconf.py": "", "sub/hubconf.py": ""})
    other = tmp_path / "other"
    other.mkdir()
    lock = Lockfile(project / "isohub.lock")
    texts = [
        str(project), str(clone.path), f"{clone.path}:main", f"{project}:HEAD", str(other), str(project / "clones")
    ]  # fmt: skip
    for text in texts:
        reference = parse(text)
        commit = A if reference.ref else "tree-" + A
        lock.check(Checkout(Pin(reference, commit, None), Path("/nowhere"), TREE))
    locked = {entry.reference for entry in lock.entries()}
    assert locked == {
        "./", "./clones/a:b@c", "git+file:./clones/a%3Ab%40c@main", "git+file:./@HEAD", str(other), "./clones"
    }  # fmt: skip
    moved = tmp_path / "two"
    (tmp_path / "one").rename(moved)
    lock = Lockfile(moved / "project é" / "isohub.lock", frozen=True)
    for entry in lock.entries():
        reference = lock.reference(entry)
        assert Path(reference.location).is_relative_to(moved) or reference.location == str(other)
        assert lock.find(reference) == entry
        pin = lock.pin(reference)  # of a directory it is the content that counts, when it is checked
        assert (pin is None) is (reference.ref is None)


def test_a_directory_that_changed(tmp_path: Path, path: Path) -> None:
    (tmp_path / "repo").mkdir()
    lock, reference = Lockfile(path), parse(tmp_path / "repo")
    lock.check(Checkout(Pin(reference, "tree-" + A), tmp_path, A))
    with pytest.raises(LockMismatchError) as raised:
        lock.check(Checkout(Pin(reference, "tree-" + B), tmp_path, B))
    assert (raised.value.what, raised.value.reference) == ("commit", "./repo")


def test_a_lock_of_a_directory_does_not_serve_for_a_commit(path: Path) -> None:
    Lockfile(path).check(checkout("o/r", "tree-" + A, ref_name=None))
    with pytest.raises(LockMismatchError, match="expected a commit"):
        Lockfile(path).pin(parse("o/r"))


def test_a_reference_that_is_not_canonical_is_not_silently_another(path: Path) -> None:
    lock = Lockfile(path)
    lock.check(checkout())
    path.write_text(path.read_text().replace('"o/r:v1"', '"https://github.com/o/r:v1"'))
    with pytest.raises(TrustError, match="is written o/r:v1"):
        lock.reference(lock.entries()[0])
    assert Lockfile(path).pin(parse("o/r:v1")) is None


GOOD = (
    f'version = 1\n\n[[repo]]\nreference = "o/r:v1"\ncommit = "{A}"\nref = "refs/tags/v1"\n'
    f'validated = true\ntree = "{TREE}"\n\n[[repo.weights]]\nurl = "{URL}"\nsha256 = "{SHA}"\nbytes = 12\n'
)
ENTRY = GOOD.partition("\n\n")[2]


@pytest.mark.parametrize("text", [GOOD, GOOD.replace("\n", "\r\n"), "# mine\n" + GOOD, "version = 1"])
def test_what_is_whole_is_read(path: Path, text: str) -> None:
    # The positive control of the damaged ones below.
    path.write_bytes(text.encode())
    found = Lockfile(path).entries()
    assert len(found) == text.count("[[repo]]")
    assert all((entry.reference, entry.commit, len(entry.weights)) == ("o/r:v1", A, 1) for entry in found)


DAMAGED = {
    "empty": "",
    "not UTF-8": b"\xff" + GOOD.encode(),
    "no version": ENTRY,
    "version 0": GOOD.replace("version = 1", "version = 0"),
    "version as text": GOOD.replace("version = 1", 'version = "1"'),
    "a key more": GOOD.replace("validated = true", "validated = true\nmore = 1"),
    "a table more": GOOD + "\n[other]\n",
    "a key less": GOOD.replace(f'tree = "{TREE}"\n', ""),
    "a key twice": GOOD.replace("validated = true", "validated = true\nvalidated = true"),
    "an entry twice": GOOD + "\n" + ENTRY,
    "weights twice": GOOD + "\n" + ENTRY.partition("\n\n")[2],
    "validated as a number": GOOD.replace("true", "1"),
    "commit in capitals": GOOD.replace(A, A.upper()),
    "commit short": GOOD.replace(A, A[:7]),
    "commit of 41": GOOD.replace(A, A + "a"),
    "tree short": GOOD.replace(TREE, TREE[1:]),
    "sha256 short": GOOD.replace(SHA, SHA[1:]),
    "bytes negative": GOOD.replace("bytes = 12", "bytes = -12"),
    "bytes huge": GOOD.replace("bytes = 12", "bytes = 999999999999999999"),
    "bytes as float": GOOD.replace("bytes = 12", "bytes = 12.0"),
    "reference empty": GOOD.replace('"o/r:v1"', '""'),
    "reference long": GOOD.replace('"o/r:v1"', '"' + "o" * 8193 + '"'),
    "reference with a credential": GOOD.replace('"o/r:v1"', '"https://user:hunter2@example.org/o/r"'),
    "ref none": GOOD.replace("refs/tags/v1", "a..b"),
    "escape": GOOD.replace("o/r", "o/\\u001b[2Jr"),
    "bidirectional": GOOD.replace("o/r", "o/\u202er"),
    "bidirectional in a comment": "# \u202e\n" + GOOD,
    "carriage return": GOOD.replace("o/r", "o/\rr"),
    "extras unknown": GOOD.replace("commit =", 'extras = [\n    "more",\n]\ncommit ='),
    "extras unsorted": GOOD.replace("commit =", 'extras = [\n    "submodules",\n    "lfs",\n]\ncommit ='),
    "literal string": GOOD.replace('"o/r:v1"', "'o/r:v1'"),
    "inline table": GOOD + "\nx = { a = 1 }",
    "dotted": GOOD + "\na" + ".a" * 20_000 + " = 1",
    "deep": "version = 1\nx = " + "[" * 50_000,
    "deep in lines": "version = 1\nx = [\n" + "[\n" * 50_000,
    "many digits": GOOD.replace("bytes = 12", "bytes = 1" + "0" * 5000),
    "url of a file": GOOD.replace(URL, "file:///etc/passwd"),
    "url with a password": GOOD.replace("https://", "https://user:hunter2@"),
    "url with a query": GOOD.replace(URL, URL + "?a=b"),
    "too large": GOOD + "#" * LIMIT_BYTES,
    "an environment twice": GOOD
    + (ENVIRONMENT := '\n[[repo.environment]]\nname = "auto"\npython = "3.11"\nplatform = "linux"\n') * 2,
    "an environment without a name": GOOD + ENVIRONMENT.replace('name = "auto"\n', ""),
    "an environment of Python 2": GOOD + ENVIRONMENT.replace("3.11", "2.7"),
    "a package twice": GOOD
    + ENVIRONMENT
    + (PACKAGE := f'\n[[repo.environment.package]]\nname = "timm"\nversion = "1"\nsha256 = [\n    "{SHA}",\n]\n') * 2,
    "a package without a hash": GOOD + ENVIRONMENT + PACKAGE.replace(f'[\n    "{SHA}",\n]', "[]"),
    "a package's hash short": GOOD + ENVIRONMENT + PACKAGE.replace(SHA, SHA[1:]),
    "a package that is an option": GOOD + ENVIRONMENT + PACKAGE.replace("timm", "--index-url"),
    "a version that is more": GOOD + ENVIRONMENT + PACKAGE.replace('"1"', '"1 --index-url=x"'),
    "a package at an address": GOOD + ENVIRONMENT + PACKAGE.replace('"1"', '"1 @ https://example.org"'),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_an_error_for_every_question(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before, lock = path.read_bytes(), Lockfile(path)
    for ask in (
        lock.entries,
        lambda: lock.pin(parse("o/r:v1")),
        lambda: lock.check(checkout()),
        lambda: lock.check(checkout("o/new")),
        lambda: lock.update(checkout()),
        lambda: lock.weights(parse("o/r:v1"), (), URL),
    ):
        with pytest.raises(TrustError, match="cannot be relied on") as raised:
            ask()
        assert "hunter2" not in str(raised.value)
        assert all(char == "\n" or char.isprintable() for char in str(raised.value))
    assert path.read_bytes() == before


def test_another_version_says_so(path: Path) -> None:
    path.write_text(GOOD.replace("version = 1", "version = 2\nnew = { grammar = [1] }"))
    with pytest.raises(TrustError, match="of format version 2, expected 1"):
        Lockfile(path).entries()


def test_what_is_no_file(path: Path, tmp_path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(TrustError, match="regular file"):
        Lockfile(path).entries()
    path.unlink()
    path.mkdir()
    with pytest.raises(TrustError, match="regular file"):
        Lockfile(path).entries()
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(SourceUnavailableError, match="cannot be read"):
        Lockfile(path).entries()


def test_what_cannot_be_locked(path: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "a\u202eb"
    hidden.mkdir()
    with pytest.raises(TrustError, match="invisible"):
        Lockfile(path).check(checkout(hidden, "tree-" + A, ref_name=None))
    with pytest.raises(TrustError, match="cannot be written"):
        Lockfile(path).check(checkout(commit="no commit"))
    assert not path.exists()


def test_a_directory_that_is_not_there_or_full_of_nothing(tmp_path: Path) -> None:
    lock = Lockfile(tmp_path / "missing" / "isohub.lock")
    assert lock.pin(parse("o/r")) is None
    with pytest.raises(SourceUnavailableError, match="cannot be written") as raised:
        lock.check(checkout())
    assert "--lockfile" in (raised.value.hint or "")


def test_a_disk_that_refuses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = path.with_name(".isohub.lock.lock")
    lock.mkdir()
    with pytest.raises(SourceUnavailableError, match="cannot be written"):
        Lockfile(path).check(checkout())
    lock.rmdir()

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as NFS without its lock daemon answers
    with pytest.raises(SourceUnavailableError, match="No locks available") as raised:
        Lockfile(path).check(checkout())
    assert "local disk" in (raised.value.hint or "")
    assert not path.exists()


def test_what_a_killed_writer_left_goes(path: Path) -> None:
    stale = path.with_name(".isohub.lock-0123456789abcdef")
    others = [path.with_name(".isohub.lock-mine"), path.with_name("isohub.lock-0123456789abcdef")]
    for each in (stale, *others):
        each.write_text("")
    Lockfile(path).check(checkout())
    assert not stale.exists()
    assert all(each.exists() for each in others)


def test_mode_and_links_are_kept(path: Path, tmp_path: Path) -> None:
    real = tmp_path / "real" / "locked.toml"
    real.parent.mkdir()
    path.symlink_to(real)
    Lockfile(path).check(checkout())
    assert path.is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(real.stat().st_mode) == 0o666 & ~umask
    real.chmod(0o640)
    Lockfile(path).check(checkout("o/more"))
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(each.name for each in real.parent.iterdir()) == [".locked.toml.lock", "locked.toml"]


def test_a_change_by_others_is_seen(path: Path) -> None:
    one, two = Lockfile(path), Lockfile(path)
    one.check(checkout())
    os.utime(path, ns=(0, 0))
    for _ in range(3):
        assert len(one.entries()) == len(two.entries()) == 1
    two.update(checkout(commit=B))
    assert (one.find(parse("o/r:v1")) or 0).commit == B
    path.unlink()
    assert one.entries() == ()


_WRITER = """
import sys
from pathlib import Path
from isohub.repos.lockfile import Lockfile
from isohub.repos.pins import Checkout, Pin
from isohub.repos.reference import parse
lock, number = Lockfile(sys.argv[1]), int(sys.argv[2])
for text in (f"o/r{number}", "o/shared"):
    lock.check(Checkout(Pin(parse(text), "a" * 40, "refs/heads/main"), Path("/nowhere"), "1" * 64))
lock.check_weights(parse("o/shared"), (), f"https://example.org/{number}.pth", "3" * 64, 1)
"""


def test_32_writers_lose_nothing(path: Path) -> None:
    Lockfile(path).check(checkout())
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(number)]) for number in range(32)]
    assert [writer.wait(100) for writer in writers] == [0] * 32
    found = {entry.reference: entry for entry in Lockfile(path).entries()}
    assert set(found) == {"o/r:v1", "o/shared", *(f"o/r{number}" for number in range(32))}
    assert len(found["o/shared"].weights) == 32


_URL = st.from_regex(r"\Ahttps://[a-z]{1,8}\.example/[A-Za-z0-9_.%/-]{0,20}\Z")
_WEIGHTS = st.builds(
    LockedWeights,
    _URL,
    st.binary().map(lambda data: hashlib.sha256(data).hexdigest()),
    st.integers(0, 1 << 53),
    st.none() | st.from_regex(r"\A[0-9a-f]{40}\Z"),
)
_TEXT = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20).filter(
    lambda text: "://" not in text
)
_REPO = st.builds(
    LockedRepo,
    reference=_TEXT,
    commit=st.sampled_from([A, B, "c" * 64, "tree-" + A]),
    validated=st.booleans(),
    tree=st.sampled_from([TREE, A]),
    extras=st.sampled_from([(), ("lfs",), ("submodules",), ("lfs", "submodules")]),
    ref=st.none() | st.sampled_from(["refs/heads/main", "refs/heads/ünï/co'de\"x"]),
    weights=st.lists(_WEIGHTS, max_size=3, unique_by=lambda each: each.which).map(
        lambda weights: tuple(sorted(weights, key=lambda each: each.which))
    ),
)


@given(st.lists(_REPO, max_size=4))
def test_what_is_written_is_read(repos: list[LockedRepo]) -> None:
    entries = {(repo.reference, repo.extras): repo for repo in repos}
    assert decode_lock(encode_lock(entries)) == entries


@given(st.text() | st.text(alphabet='abc=[]".# \n\\u01').map(lambda text: "version = 1\n" + text))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        decode_lock(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        assert all(char.isprintable() for char in str(error))
