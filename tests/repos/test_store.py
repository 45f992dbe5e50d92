from __future__ import annotations

import json
import logging
import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from isohub.errors import (
    IntegrityError,
    InvalidReferenceError,
    OfflineError,
    RefNotFoundError,
    SourceUnavailableError,
)
from isohub.repos import store as store_module
from isohub.repos.credentials import Credentials
from isohub.repos.disk import claim, remove_tree
from isohub.repos.measure import measure
from isohub.repos.pins import Checkout, Pin
from isohub.repos.reference import parse
from isohub.repos.store import Store
from tests.servers.git_repo import GitRepo
from tests.servers.github import Fault, GitHubServer

ARCHIVE = "/archive/"
PROJECT = Path(__file__).parents[2]


@pytest.fixture
def repo(github: GitHubServer, git_repo: Callable[..., GitRepo]) -> GitRepo:
    made = github.add("o", "r", git_repo("r"))
    made.commit({"hubconf.py": "one\n", "pkg/a.py": "a\n", "sub/dir/hubconf.py": "sub\n"}, "one")
    made.tag("v1")
    made.commit({"hubconf.py": "two\n"}, "two")
    return made


def load(store: Store, text: str, **options: bool) -> Checkout:
    return store.fetch(store.resolve(parse(text)), **options)


def leftovers(store: Store) -> list[str]:
    """What begins with a dot and is no lock, beside the checkouts."""
    hidden = store.root.glob("checkouts/*/*/*/.*")
    return sorted(p.name for p in hidden if p.name not in (".lock", ".refs.lock"))


def test_two_refs_side_by_side(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    one, two = load(store, "o/r:v1"), load(store, "o/r:main")
    assert (one.path / "hubconf.py").read_text() == "one\n"
    assert (two.path / "hubconf.py").read_text() == "two\n"
    assert one.commit == repo.sha("v1")
    assert one.path == store.root / "checkouts" / github.host.replace(":", "%3A") / "o" / "r" / one.commit / "tree"
    assert one.tree == measure(one.path).digest != two.tree
    assert one.pin.name == f"o/r@{one.commit[:7]}"
    assert (one.submodules, one.lfs_pointers) == ((), ())


def test_a_checkout_is_fetched_once_and_is_read_only(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    pin = store.resolve(parse("o/r:v1"))
    assert store.lookup(pin) is None
    checkout = store.fetch(pin)
    assert store.lookup(pin) == store.fetch(pin) == checkout
    assert github.count(ARCHIVE) == 1
    modes = {stat.S_IMODE(p.lstat().st_mode) & 0o222 for p in [checkout.path.parent, *checkout.path.parent.rglob("*")]}
    assert modes == {0}
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    record = json.loads((checkout.path.parent / "checkout.json").read_text())
    record = record["record"]
    assert record["format"] == 2
    assert (record["commit"], record["ref_name"]) == (pin.commit, "refs/tags/v1")
    assert (record["files"], record["bytes"]) == (3, 10)
    assert leftovers(store) == []


def test_a_stored_sha_needs_no_request(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    first = load(store, "o/r:v1")
    github.forget()
    again = load(store, f"o/r:{first.commit}")
    assert again.path == first.path
    assert load(store, f"o/r:{first.commit.upper()}").path == first.path
    assert github.count() == 0
    assert load(store, f"o/r:{repo.sha()}").commit == repo.sha()
    assert github.count() == 3  # refs, archive, and the commit that vouches for it


def test_an_unvalidated_commit_stays_unvalidated(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    fork = repo.orphan({"hubconf.py": "evil"}, parent=repo.sha())
    reference = parse(f"o/r:{fork}")
    store.fetch(store.resolve(reference, skip_validation=True))
    assert not store.resolve(reference, skip_validation=True).validated
    with pytest.raises(RefNotFoundError):
        store.resolve(reference)
    repo.ref("refs/heads/merged", fork)
    checkout = store.fetch(store.resolve(reference))
    assert (checkout.path / "hubconf.py").read_text() == "evil"
    github.forget()
    assert store.resolve(reference).validated
    assert github.count() == 0
    assert stat.S_IMODE(checkout.path.parent.stat().st_mode) == 0o555


def test_names_that_look_alike_do_not_meet(
    github: GitHubServer, git_repo: Callable[..., GitRepo], store: Store
) -> None:
    names = ["a_b/c", "a/b_c", "A/b_c", "a/.b", "a/b", "a/B"]
    for number, name in enumerate(names):
        made = github.add(*name.split("/"), git_repo(f"n{number}"))
        made.commit({"hubconf.py": name})
    for name in names:
        assert (load(store, name).path / "hubconf.py").read_text() == name


def test_subdirectories(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    checkout = load(store, "o/r:v1#subdirectory=sub/dir")
    assert (checkout.path / "hubconf.py").read_text() == "sub\n"
    with pytest.raises(InvalidReferenceError) as caught:
        load(store, "o/r:v1#subdirectory=sub/dri")
    assert "sub/dir" in (caught.value.hint or "")
    assert github.count(ARCHIVE) == 1


def test_what_an_archive_leaves_out_is_named(
    github: GitHubServer, git_repo: Callable[..., GitRepo], store: Store
) -> None:
    made = github.add("o", "parts", git_repo("parts"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    made.commit({"hubconf.py": "", **{f"w{n:03}.bin": pointer for n in range(120)}})
    made.git("update-index", "--add", "--cacheinfo", f"160000,{made.sha()},third/party")
    made.git("commit", "--quiet", "-m", "submodule")
    for checkout in (load(store, "o/parts"), load(store, f"{made.path}:main")):
        assert checkout.submodules == ("third/party",)
        assert len(checkout.lfs_pointers) == 100


def test_archives_and_git_give_the_same_tree(github: GitHubServer, repo: GitRepo, store: Store, tmp_path: Path) -> None:
    archive = load(store, "o/r:v1")
    clone = load(store, f"{repo.path}:v1")
    fetched = load(Store(tmp_path / "other"), f"git+{github.url}/o/r@v1")
    assert archive.tree == clone.tree == fetched.tree
    assert archive.commit == clone.commit == fetched.commit
    assert clone.pin.name == f"r@{clone.commit[:7]}"


def test_a_plain_directory_is_not_copied(store: Store, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "hubconf.py").write_text("1")
    pin = store.resolve(parse(tmp_path / "plain"))
    checkout = store.fetch(pin)
    assert checkout.path == tmp_path / "plain"
    assert store.lookup(pin) == checkout
    assert not (store.root / "checkouts").exists()


def test_forced_fetch_of_the_same_bytes_keeps_the_directory(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    first = load(store, "o/r:v1")
    inode = first.path.stat().st_ino
    again = store.fetch(store.resolve(parse("o/r:v1"), force_reload=True), force_reload=True)
    assert again.path.stat().st_ino == inode
    assert github.count(ARCHIVE) == 2
    assert leftovers(store) == []


@pytest.mark.parametrize("can_exchange", [True, False])
def test_forced_fetch_of_other_bytes_replaces_them(
    github: GitHubServer,
    repo: GitRepo,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    can_exchange: bool,
) -> None:
    if not can_exchange:
        monkeypatch.setattr(store_module, "exchange", lambda *_: False)
    first = load(store, "o/r:v1")
    other = repo.git("archive", "--format=zip", "--prefix=top/", "--output=../other.zip", repo.sha("main"))
    assert other == ""
    body = (repo.path.parent / "other.zip").read_bytes()
    github.fail(ARCHIVE, Fault(body=body, comment=first.commit.encode()))
    held = (first.path / "hubconf.py").open()
    with held, caplog.at_level(logging.WARNING, "isohub.repos"), pytest.raises(IntegrityError):
        # Its comment names another commit, and what is here stays.
        store.fetch(first.pin, force_reload=True)
    assert (first.path / "hubconf.py").read_text() == "one\n"
    import io
    import zipfile

    buffer = io.BytesIO(body)
    with zipfile.ZipFile(buffer, "a") as opened:
        opened.comment = first.commit.encode()
    github.behave()
    github.fail(ARCHIVE, Fault(body=buffer.getvalue()))
    assert store.fetch(first.pin, force_reload=True) == first  # the commit's own hash says that it lies
    github.fail("/git-upload-pack$", Fault(status=404))  # nobody says so
    with (first.path / "hubconf.py").open() as held, caplog.at_level(logging.WARNING, "isohub.repos"):
        second = store.fetch(first.pin, force_reload=True)
        assert held.read() == "one\n"
    assert (second.path / "hubconf.py").read_text() == "two\n"
    assert second.path == first.path
    assert "other bytes" in caplog.text
    assert leftovers(store) == []


def test_a_failed_fetch_leaves_nothing(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    pin = store.resolve(parse("o/r:v1"))
    for fault in (Fault(body=b"nonsense"), Fault(status=500), Fault(truncate=50)):
        github.behave()
        github.fail(ARCHIVE, fault)
        with pytest.raises((IntegrityError, SourceUnavailableError)):
            store.fetch(pin)
        assert store.lookup(pin) is None
        assert leftovers(store) == []
    github.behave()
    assert store.fetch(pin).commit == pin.commit


@pytest.mark.parametrize("damage", ["empty", "garbage", "other", "missing", "future"])
def test_a_checkout_without_its_record_is_none(github: GitHubServer, repo: GitRepo, store: Store, damage: str) -> None:
    pin = store.resolve(parse("o/r:v1"))
    place = store.fetch(pin).path.parent
    place.chmod(0o755)
    record = place / "checkout.json"
    text = record.read_text()
    record.unlink()
    content = {
        "empty": "",
        "garbage": "\x00\xff",
        "other": text.replace(pin.commit, "0" * 40),
        "future": text.replace('"format":2', '"format":3'),
    }
    if damage in content:
        record.write_text(content[damage], encoding="latin-1")
    assert store.lookup(pin) is None
    assert (store.fetch(pin).path / "hubconf.py").read_text() == "one\n"
    assert store.lookup(pin) is not None
    assert github.count(ARCHIVE) == 2


def test_what_dead_writers_left_is_removed_or_mended(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    pin = store.resolve(parse("o/r:v1"))
    place = store.fetch(pin).path.parent
    half = place.parent / ".staging-dead"
    (half / "tree").mkdir(parents=True)
    (half / "tree" / "hubconf.py").write_text("half")
    (half / "tree").chmod(0o555)
    place.rename(place.parent / f".trash-{pin.commit}-dead")
    assert store.lookup(pin) is None
    load(store, "o/r:main")
    assert leftovers(store) == []
    assert store.lookup(pin) is not None
    assert github.count(ARCHIVE) == 2


@pytest.mark.parametrize("obstacle", ["file", "below a file"])
def test_a_store_that_cannot_be(github: GitHubServer, repo: GitRepo, tmp_path: Path, obstacle: str) -> None:
    (tmp_path / "file").write_text("x")
    store = Store(tmp_path / "file" if obstacle == "file" else tmp_path / "file" / "below")
    pin = store.resolve(parse("o/r:v1"))
    with pytest.raises(SourceUnavailableError) as caught:
        store.fetch(pin)
    assert str(store.root) in caught.value.message
    assert "ISOHUB_HOME" in (caught.value.hint or "")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_a_full_or_read_only_disk(
    github: GitHubServer, repo: GitRepo, store: Store, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    pin = store.resolve(parse("o/r:v1"))

    def refuse(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("isohub.repos.tree.os.fchmod", refuse)
        with pytest.raises(SourceUnavailableError, match=str(error.strerror)) as caught:
            store.fetch(pin)
        assert "ISOHUB_HOME" in (caught.value.hint or "")
    assert leftovers(store) == []
    assert store.fetch(pin).commit == pin.commit


# Where nobody can be asked.


def test_offline_takes_what_is_here(
    github: GitHubServer, repo: GitRepo, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    online = {ref: load(store, f"o/r{ref}") for ref in ("", ":main", ":v1")}
    moved_from = repo.sha()
    repo.commit({"hubconf.py": "three\n"})
    github.forget()
    offline = Store(store.root, offline=True)
    for ref, checkout in online.items():
        with caplog.at_level(logging.WARNING, "isohub.repos"):
            caplog.clear()
            found = load(offline, f"o/r{ref}")
        assert found.path == checkout.path
        assert checkout.commit in caplog.text  # said, not silent
        assert "offline" in caplog.text
    # Other spellings of what was asked for, and the commit itself in short and in full.
    for text in ("o/r:refs/heads/main", "o/r:refs/tags/v1", f"o/r:{moved_from[:8]}", f"o/r:{moved_from}"):
        assert load(offline, text).commit in (moved_from, repo.sha("v1"))
    assert load(offline, "o/r:main", force_reload=True).commit == moved_from
    assert github.count() == 0
    assert load(store, "o/r:main").commit == repo.sha() != moved_from


@pytest.mark.parametrize("text", ["o/r:v2", "o/r:main", "o/r:0123456789", "o/other", "o/r:" + "0" * 40])
def test_offline_says_what_is_missing(github: GitHubServer, repo: GitRepo, store: Store, text: str) -> None:
    load(store, "o/r:v1")
    github.forget()
    with pytest.raises(OfflineError) as caught:
        load(Store(store.root, offline=True), text)
    assert f"isohub fetch {text}" in (caught.value.hint or "")
    assert github.count() == 0


def test_a_resolution_without_its_checkout_is_none(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    store.resolve(parse("o/r:v1"))
    with pytest.raises(OfflineError):
        Store(store.root, offline=True).resolve(parse("o/r:v1"))


def test_offline_is_for_remotes_alone(git_repo: Callable[..., GitRepo], store: Store) -> None:
    clone = git_repo("clone")
    clone.commit({"hubconf.py": "1"})
    offline = Store(store.root, offline=True)
    assert load(offline, str(clone.path)).path == clone.path
    assert load(offline, f"{clone.path}:main").commit == clone.sha()


@pytest.mark.parametrize("status", [None, 500, 503, 429, 403])
def test_a_server_in_trouble_is_no_reason_to_stop(
    github: GitHubServer, repo: GitRepo, store: Store, caplog: pytest.LogCaptureFixture, status: int | None
) -> None:
    before = load(store, "o/r:main")
    headers = {"Retry-After": "3600"} if status in (429, 403) else {}
    fault = Fault(truncate=5) if status is None else Fault(status=status, headers=headers)
    github.fail("/info/refs", fault)
    with caplog.at_level(logging.WARNING, "isohub.repos"):
        assert load(store, "o/r:main") == before
    assert before.commit in caplog.text
    with pytest.raises(SourceUnavailableError):  # who asks for the newest gets it or an error
        store.resolve(parse("o/r:main"), force_reload=True)
    with pytest.raises(SourceUnavailableError):  # and nothing is made up
        load(store, "o/r:v1")


@pytest.mark.parametrize("status", [401, 404, 410])
def test_a_repository_that_is_gone_is_not_conjured_up(
    github: GitHubServer, repo: GitRepo, store: Store, status: int
) -> None:
    load(store, "o/r:main")
    github.fail("/info/refs", Fault(status=status))
    with pytest.raises(SourceUnavailableError):
        load(store, "o/r:main")


def test_a_branch_that_is_gone_is_not_conjured_up(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    load(store, "o/r:v1")
    repo.git("tag", "-d", "v1")
    with pytest.raises(RefNotFoundError):
        load(store, "o/r:v1")


def test_a_damaged_record_of_refs_is_no_record(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    checkout = load(store, "o/r:v1")
    record = checkout.path.parents[1] / "refs.json"
    text = record.read_text()
    record.chmod(0o644)
    record.write_text(text.replace(checkout.commit, "0" * 40))
    offline = Store(store.root, offline=True)
    with pytest.raises(OfflineError):
        offline.resolve(parse("o/r:v1"))
    load(store, "o/r:v1")
    assert offline.resolve(parse("o/r:v1")).commit == checkout.commit


def test_many_resolve_at_once_and_none_is_lost(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    names = [f"b{number}" for number in range(12)]
    for name in names:
        repo.git("branch", name)
    load(store, "o/r:main")
    threads = [threading.Thread(target=lambda name=name: load(Store(store.root), f"o/r:{name}")) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    offline = Store(store.root, offline=True)
    assert {offline.resolve(parse(f"o/r:{name}")).commit for name in names} == {repo.sha()}


def test_without_credentials_only_what_is_public_is_found(
    github: GitHubServer, repo: GitRepo, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    github.token = "secret"
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    mine = load(store, "o/r:main")
    anonymous = {"credentials": Credentials(anonymous=True)}
    for offline in (False, True):
        for text in ("o/r:main", f"o/r:{mine.commit}", f"o/r:{mine.commit[:10]}"):
            with pytest.raises((SourceUnavailableError, OfflineError)):
                load(Store(store.root, offline=offline, **anonymous), text)
    github.token = None  # now it is public
    github.forget()
    assert load(Store(store.root, **anonymous), "o/r:main").path == mine.path
    assert not any("Authorization" in request.headers for request in github.requests)
    assert load(Store(store.root, offline=True, **anonymous), "o/r:main").path == mine.path


def test_a_store_that_can_only_be_read(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    """What a read-only disk refuses is refused here by an ordinary user's rights."""
    before = load(store, "o/r:v1")
    drop = "import os, isohub.errors, isohub.repos.sources.github\nos.setgid(65534); os.setuid(65534)\n"
    code = FETCH.replace('print("ready"', f'{drop}print("ready"')
    for place in [store.root, *store.root.parents][:-1]:
        place.chmod(0o755)
    if os.geteuid() != 0:
        code = FETCH
    directories = [path for path in (store.root, *store.root.rglob("*")) if path.is_dir() and not path.is_symlink()]
    modes = {path: path.stat().st_mode for path in directories}
    for path in directories:
        path.chmod(0o555)
    try:
        process = python(code, github, str(store.root), "o/r:v1")
        assert process.communicate("\n", timeout=60)[0] == "ready\none\n"
        process = python(
            code.replace(
                "checkout =",
                "import isohub\ntry:\n    store.fetch(store.resolve(parse('o/r')))"
                "\nexcept isohub.errors.SourceUnavailableError as error: print(error)\ncheckout =",
            ),
            github,
            str(store.root),
            "o/r:v1",
        )
        said = process.communicate("\n", timeout=60)[0]
        assert "Permission denied" in said
        assert "ISOHUB_HOME" in said
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert before.path.is_dir()


def test_locks_that_a_file_system_does_not_give(
    github: GitHubServer, repo: GitRepo, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    pin = store.resolve(parse("o/r:v1"))
    real = fcntl.flock
    for code in (37, 38, 95):  # ENOLCK, ENOSYS, EOPNOTSUPP

        def refuse(descriptor: int, operation: int, code: int = code) -> None:
            if operation & (fcntl.LOCK_EX | fcntl.LOCK_SH):
                raise OSError(code, os.strerror(code))
            real(descriptor, operation)

        with monkeypatch.context() as patched:
            patched.setattr(fcntl, "flock", refuse)
            with pytest.raises(SourceUnavailableError) as caught:
                store.fetch(pin)
            assert "local disk" in (caught.value.hint or "")
    checkout = store.fetch(pin)
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        assert store.fetch(pin) == checkout  # what is here needs no lock
        assert store.hold(checkout) is None


def test_a_clock_that_is_wrong(
    github: GitHubServer, repo: GitRepo, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for skew_s in (-20 * 365 * 86400, 20 * 365 * 86400):
        with monkeypatch.context() as patched:
            real = time.time
            patched.setattr(time, "time", lambda real=real, skew_s=skew_s: real() + skew_s)
            for ref in ("v1", "main"):
                assert whole(load(store, f"o/r:{ref}"))
    for ref in ("v1", "main"):
        assert load(Store(store.root, offline=True), f"o/r:{ref}").commit == repo.sha(ref)


def test_a_download_that_fails_forgets_nothing(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    before = load(store, "o/r:main")
    repo.commit({"hubconf.py": "three\n"})
    github.fail(ARCHIVE, Fault(status=500))
    github.fail("/git-upload-pack$", Fault(status=500))
    with pytest.raises(SourceUnavailableError):
        load(store, "o/r:main")
    assert load(Store(store.root, offline=True), "o/r:main") == before
    github.behave()
    assert load(store, "o/r:main").commit == repo.sha()
    assert load(Store(store.root, offline=True), "o/r:main").commit == repo.sha()


def test_offline_a_spelling_means_what_git_would_make_of_it(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    repo.git("branch", "both")
    repo.tag("both", "v1")
    for text in ("o/r:refs/heads/both", "o/r:refs/tags/both"):
        load(store, text)
    offline = Store(store.root, offline=True)
    assert load(offline, "o/r:both").commit == repo.sha("v1")
    old = load(store, "o/r:main").commit
    new = repo.commit({"hubconf.py": "three\n"})
    load(store, "o/r:refs/heads/main")  # whatever spelling asked last decides for all
    assert load(offline, "o/r:main").commit == new != old
    load(store, "o/r")
    assert load(offline, "o/r").commit == new


def test_a_commit_that_was_let_in_is_not_let_in_offline(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    fork = repo.orphan({"hubconf.py": "evil"}, parent=repo.sha())
    store.fetch(store.resolve(parse(f"o/r:{fork}"), skip_validation=True))
    offline = Store(store.root, offline=True)
    for text in (f"o/r:{fork}", f"o/r:{fork[:8]}"):
        with pytest.raises(OfflineError):
            offline.resolve(parse(text))
        assert offline.resolve(parse(text), skip_validation=True).commit == fork
    github.fail("/info/refs", Fault(status=503))
    with pytest.raises(SourceUnavailableError):
        store.resolve(parse(f"o/r:{fork[:8]}"))


def test_a_pull_request_s_commit_is_known_by_that_name_alone(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    head = repo.orphan({"hubconf.py": "theirs"}, parent=repo.sha())
    repo.ref("refs/pull/1/head", head)
    checkout = load(store, "o/r:pull/1")
    assert not checkout.pin.validated
    with pytest.raises(RefNotFoundError):
        store.resolve(parse(f"o/r:{head}"))
    offline = Store(store.root, offline=True)
    assert load(offline, "o/r:pull/1").path == checkout.path
    with pytest.raises(OfflineError):
        offline.resolve(parse(f"o/r:{head}"))
    repo.ref("refs/heads/merged", head)
    assert load(store, "o/r:merged").pin.validated
    github.forget()
    assert store.resolve(parse(f"o/r:{head}")).validated
    assert github.count() == 0


def test_a_lockfile_s_word_is_not_a_source_s(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    fork = repo.orphan({"hubconf.py": "evil"}, parent=repo.sha())
    lie = Pin(parse("o/r:main"), fork, "refs/heads/main", validated=True)
    shown = store.shown(lie)
    assert (shown.validated, shown.ref_name) == (False, None)
    store.fetch(shown)
    with pytest.raises(RefNotFoundError):
        store.resolve(parse(f"o/r:{fork}"))
    assert not store.shown(lie).validated
    true = store.shown(Pin(parse("o/r:main"), repo.sha("v1"), None, validated=True))  # the control
    assert true.validated
    github.forget()
    store.fetch(true)
    assert store.shown(replace(true, validated=False)).validated
    assert github.count("/info/refs") == 0


def test_people_behind_one_host_are_not_one(
    github: GitHubServer,
    git_repo: Callable[..., GitRepo],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """`alice@host:proj` and `bob@host:proj` are in two homes; so is nothing of https://host/proj."""
    for name in ("alice", "bob"):
        git_repo(f"{name}/proj").commit({"hubconf.py": name})
    fake = tmp_path / "ssh"
    fake.write_text(
        "#!/bin/sh\nfor last; do :; done\nwhile [ $# -gt 0 ]; do case $1 in -l) who=$2;; *@*) who=${1%%@*};; esac; shift; done\n"
        f'cd {tmp_path}/git/$who && eval "$last"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("GIT_SSH_COMMAND", str(fake))
    found = {name: load(store, f"{name}@host:proj@main") for name in ("alice", "bob")}
    assert {name: (checkout.path / "hubconf.py").read_text() for name, checkout in found.items()} == {
        "alice": "alice",
        "bob": "bob",
    }
    offline = Store(store.root, offline=True)
    for text in (
        "carol@host:proj@main",
        "ssh://alice@host/proj@main",
        "ssh://host/proj@main",
        "https://host/proj@main",
    ):
        with pytest.raises(OfflineError):
            offline.resolve(parse(text))
    assert load(offline, "alice@host:proj@main").path == found["alice"].path


# Who uses what.


def test_a_checkout_in_use_cannot_be_claimed(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    checkout = load(store, "o/r:v1")
    place = checkout.path.parent
    one, two = store.hold(checkout), store.hold(checkout)
    assert one is not None
    assert two is not None
    for descriptor in (one, two):
        with pytest.raises(BlockingIOError):
            claim(place)
        os.close(descriptor)
    claimed = claim(place)
    assert claimed is not None
    raised: list[BaseException] = []

    def late() -> None:
        try:
            store.hold(checkout)
        except FileNotFoundError as error:
            raised.append(error)

    waiting = threading.Thread(target=late)  # for somebody who removes it, or only looks
    waiting.start()
    remove_tree(place)
    os.close(claimed)
    waiting.join(30)
    assert len(raised) == 1
    with pytest.raises(FileNotFoundError):
        store.hold(checkout)


def test_a_checkout_that_is_removed_at_once_was_there(
    github: GitHubServer, repo: GitRepo, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = store.resolve(parse("o/r:v1"))
    real = store_module.locked

    @contextmanager
    def locked_and_pruned(directory: Path, *names: str) -> Iterator[None]:
        with real(directory, *names):
            yield
        remove_tree(directory / pin.commit)  # whoever prunes waits for the lock and then does this

    monkeypatch.setattr(store_module, "locked", locked_and_pruned)
    checkout = store.fetch(pin)
    with pytest.raises(FileNotFoundError):  # which its caller fetches again for
        store.hold(checkout)


def test_a_damaged_copy_is_replaced_by_a_forced_fetch(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    checkout = load(store, "o/r:v1")
    flipped = checkout.path / "hubconf.py"
    flipped.chmod(0o644)
    flipped.write_text("onE\n")
    assert store.measured(checkout).tree != checkout.tree
    again = load(store, "o/r:v1", force_reload=True)
    assert (again.path / "hubconf.py").read_text() == "one\n"
    assert store.measured(again).tree == checkout.tree


FETCH = """
import sys
from pathlib import Path
from isohub.repos.reference import parse
from isohub.repos.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
checkout = store.fetch(store.resolve(parse(sys.argv[2])))
print((checkout.path / "hubconf.py").read_text(), end="")
"""

# One import, then a fork for each line; a fork fetches and exits, or is killed after so many seconds. Who forks
# kills: until it waits, the number is nobody else's.
FORKS = """
import os, signal, sys, time
from pathlib import Path
from isohub.repos.reference import parse
from isohub.repos.sources import github
from isohub.repos.store import Store
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        store = Store(Path(sys.argv[1]))
        pin = store.resolve(parse(sys.argv[2]))
        store.fetch(pin, force_reload=line.split()[0] == "force")
        os._exit(0)
    time.sleep(float(line.split()[1]))
    os.kill(pid, signal.SIGKILL)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def python(code: str, github: GitHubServer, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=PROJECT,
        env={**os.environ, **github.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_thirty_two_processes_make_one_download(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    processes = [python(FETCH, github, str(store.root), "o/r:v1") for _ in range(32)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == ["one\n"] * 32
    assert [process.returncode for process in processes] == [0] * 32
    assert github.count(ARCHIVE) == 1
    assert leftovers(store) == []


def test_threads_make_one_download(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    pin = store.resolve(parse("o/r:v1"))
    found: list[Checkout] = []
    threads = [threading.Thread(target=lambda: found.append(Store(store.root).fetch(pin))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert github.count(ARCHIVE) == 1


def whole(checkout: Checkout) -> bool:
    return measure(checkout.path).digest == checkout.tree


def test_writers_killed_at_two_hundred_moments_leave_no_half_checkout(
    github: GitHubServer, git_repo: Callable[..., GitRepo], store: Store
) -> None:
    made = github.add("o", "many", git_repo("many"))
    made.commit({f"pkg{n % 20}/m{n}.py": f"x = {n}\n" * 20 for n in range(400)} | {"hubconf.py": "1"})
    pin = store.resolve(parse("o/many"))
    expected = store.fetch(pin).tree
    choose = random.Random(7)
    outcomes = {"killed": 0, "done": 0}
    process = python(FORKS, github, str(store.root), "o/many")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    def attempt(kind: str, delay_s: float) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        # The moment is what is random here; nothing is waited for.
        process.stdin.write(f"{kind} {delay_s}\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        outcomes["killed" if os.WIFSIGNALED(status) else "done"] += 1

    for number in range(200):
        if number % 2 == 0 and (found := store.lookup(pin)) is not None:
            remove_tree(found.path.parent)
            attempt("new", choose.uniform(0.0, 0.12))
        else:
            attempt("force", choose.uniform(0.0, 0.12))
        seen = store.lookup(pin)
        assert seen is None or (seen.tree == expected and whole(seen))
    assert outcomes["killed"] > 50
    process.stdin.close()
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert whole(store.fetch(pin))
    assert store.fetch(pin).tree == expected
    load(store, "o/many")
    with_lock = store.fetch(pin, force_reload=True)
    assert whole(with_lock)
    assert leftovers(store) == []


def test_a_writer_killed_in_the_middle_of_a_download(github: GitHubServer, repo: GitRepo, store: Store) -> None:
    fault = github.fail(ARCHIVE, Fault(stall=threading.Event()), times=1)
    process = python(FETCH, github, str(store.root), "o/r:v1")
    process.stdin.write("\n")  # type: ignore[union-attr]
    process.stdin.flush()  # type: ignore[union-attr]
    assert fault.stalled.wait(60)
    assert [name.partition("-")[0] for name in leftovers(store)] == [".staging"]
    pin = store.resolve(parse("o/r:v1"))
    assert store.lookup(pin) is None
    process.kill()
    process.communicate()
    assert whole(store.fetch(pin))
    assert leftovers(store) == []
