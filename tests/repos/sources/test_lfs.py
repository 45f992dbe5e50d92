from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from isohub.errors import FetchError, IntegrityError, OfflineError, SourceUnavailableError
from isohub.repos.measure import measure
from isohub.repos.pins import Pin
from isohub.repos.reference import parse
from isohub.repos.sources import source_for
from isohub.repos.sources.lfs import Pointer, parse_pointer
from tests.servers.git_repo import GitRepo
from tests.servers.github import Fault, GitHubServer

BIG, TOOL = b"weights" * 1000, b"#!/bin/sh\necho tool\n"
STORAGE = "/lfs-storage/"


@pytest.fixture
def repo(github: GitHubServer, git_repo: Callable[..., GitRepo]) -> GitRepo:
    """o/r: two paths with one object, an executable, and files that are nearly pointers."""
    made = github.add("o", "r", git_repo("r"))
    (made.path / "tool").write_bytes(github.add_lfs("o", "r", TOOL))
    (made.path / "tool").chmod(0o755)
    pointer = github.add_lfs("o", "r", BIG)
    made.commit({"hubconf.py": "", "a.bin": pointer, "deep/b.bin": pointer, "near.bin": pointer + b"more\n"})
    return made


@pytest.fixture
def other() -> Iterator[GitHubServer]:
    with GitHubServer() as server:
        yield server


def fetch(text: str, tmp_path: Path, name: str = "into", extras: tuple[str, ...] = ("lfs",)) -> Path:
    reference = parse(text)
    source = source_for(reference)
    pin = source.resolve(reference)
    into = tmp_path / "staging" / name
    into.mkdir(parents=True)
    source.fetch(Pin(reference, pin.commit, pin.ref_name, pin.validated, extras), into)
    assert [entry.name for entry in into.parent.iterdir() if entry.name.startswith(".")] == []
    return into


def check(into: Path) -> None:
    assert (into / "a.bin").read_bytes() == (into / "deep" / "b.bin").read_bytes() == BIG
    assert (into / "tool").read_bytes() == TOOL
    assert (into / "tool").stat().st_mode & 0o111
    assert not (into / "a.bin").stat().st_mode & 0o111
    assert (into / "near.bin").read_bytes().endswith(b"more\n")


def test_pointers() -> None:
    oid = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    head = b"version https://git-lfs.github.com/spec/v1\n"
    good = head + b"oid sha256:" + oid.encode() + b"\nsize 12345\n"
    assert parse_pointer(good) == Pointer(oid, 12345)
    assert parse_pointer(good.replace(b"oid", b"ext-0-foo sha256:xyz\noid", 1)) == Pointer(oid, 12345)
    for bad in (
        b"",
        good[:-1],
        good + b"x",
        good + b"\n",
        good.replace(b"\n", b"\r\n"),
        good.replace(b"spec/v1", b"spec/v2"),
        good.replace(b"sha256", b"sha512"),
        good.replace(oid.encode(), oid.upper().encode()),
        good.replace(oid.encode(), b"../../etc/passwd"),
        good.replace(b"12345", b"-1"),
        good.replace(b"12345", b"012"),
        good.replace(b"12345", b"9" * 30),
        head + b"size 1\noid sha256:" + oid.encode() + b"\n",
        b"ext-0-a b\n" * 200 + good,
        head + b"ext-0-a b\n" * 200 + good.removeprefix(head),
    ):
        assert parse_pointer(bad) is None, bad


@pytest.mark.parametrize("form", ["o/r", "git+{url}/o/r", "git+{url}/o/r.git"])
def test_content_takes_the_place_of_pointers(github: GitHubServer, repo: GitRepo, tmp_path: Path, form: str) -> None:
    into = fetch(form.format(url=github.url), tmp_path)
    check(into)
    assert measure(into).lfs_pointers == ("near.bin",)
    assert github.count(STORAGE) == 2  # one object, two paths
    assert github.count("/objects/batch") == 1


def test_without_asking_pointers_stay(github: GitHubServer, repo: GitRepo, tmp_path: Path) -> None:
    into = fetch("o/r", tmp_path, extras=())
    assert measure(into).lfs_pointers == ("a.bin", "deep/b.bin", "near.bin", "tool")
    assert github.count("lfs") == 0


def test_batches(github: GitHubServer, git_repo: Callable[..., GitRepo], tmp_path: Path) -> None:
    made = github.add("o", "many", git_repo("many"))
    made.commit({f"f{n}": github.add_lfs("o", "many", b"%d" % n) for n in range(230)})
    into = fetch("o/many", tmp_path)
    assert all((into / f"f{n}").read_bytes() == b"%d" % n for n in range(230))
    assert github.count("/objects/batch") == 3  # the server asserts that none is above 100


def test_credentials_go_to_the_batch_api_alone(
    github: GitHubServer, other: GitHubServer, repo: GitRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "home" / ".netrc"
    netrc.parent.mkdir()
    netrc.write_text("machine 127.0.0.1 login me password s3cret\n")
    netrc.chmod(0o600)
    github.token = "s3cret"
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret")
    other.lfs_objects = github.lfs_objects
    for storage in (None, other.url):
        github.lfs_storage = storage
        check(fetch("o/r", tmp_path, str(storage is None)))
    stored = [request for request in github.requests + other.requests if STORAGE in request.path]
    assert len(stored) == 4
    assert [request.headers.get("Authorization") for request in stored] == [None] * 4
    assert {request.headers.get("X-Lfs") for request in stored} == {"ticket"}
    batches = [request for request in github.requests if "batch" in request.path]
    assert all("Authorization" in request.headers for request in batches)


def test_a_header_of_the_servers_stays_with_its_address(
    github: GitHubServer, other: GitHubServer, repo: GitRepo, tmp_path: Path
) -> None:
    oid = hashlib.sha256(TOOL).hexdigest()
    other.lfs_objects = github.lfs_objects
    href = f"{github.url}{STORAGE}{oid}?signature=s3cret"
    given = {"X-Lfs": "ticket", "Authorization": "RemoteAuth given"}
    github.lfs_errors[oid] = {"actions": {"download": {"href": href, "header": given}}}
    github.fail(f"{STORAGE}{oid}", Fault(redirect=other.url + "{path}"))
    check(fetch("o/r", tmp_path))
    assert [r.headers.get("Authorization") for r in github.requests if oid in r.path] == ["RemoteAuth given"]
    assert [r.headers.get("Authorization") for r in other.requests] == [None]


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (Fault(body=b"x" * len(BIG)), IntegrityError, "sha256"),
        (Fault(body=BIG + b"x"), IntegrityError, "at most"),
        (Fault(body=BIG[:-1]), IntegrityError, "sha256"),
        (Fault(status=404), SourceUnavailableError, "404"),
        (Fault(status=403), SourceUnavailableError, "403"),
        (Fault(truncate=100), SourceUnavailableError, "early|bytes"),
        (Fault(redirect="file:///etc/passwd"), SourceUnavailableError, "adapters"),
    ],
)
def test_objects_that_are_not_given(
    github: GitHubServer, repo: GitRepo, tmp_path: Path, fault: Fault, kind: type[FetchError], said: str
) -> None:
    github.fail(STORAGE + hashlib.sha256(BIG).hexdigest(), fault)
    with pytest.raises(kind, match=said) as caught:
        fetch("o/r", tmp_path)
    assert "'a.bin'" in caught.value.message or "'deep/b.bin'" in caught.value.message
    assert "s3cret" not in str(caught.value) + repr(caught.value.fields)  # the signature of an address


def test_stumbles_are_retried(github: GitHubServer, repo: GitRepo, tmp_path: Path) -> None:
    github.fail(STORAGE, Fault(status=503, headers={"Retry-After": "0"}), times=2)
    check(fetch("o/r", tmp_path))


@pytest.mark.parametrize(
    "answer",
    [
        {"error": {"code": 410, "message": "Object\x1b[2J removed"}, "actions": {}},
        {"actions": {}},
        {"actions": []},
        {"actions": {"download": {"href": 5}}},
        {"size": 1},
        {"oid": "0" * 64},
    ],
)
def test_errors_per_object_are_named(
    github: GitHubServer, repo: GitRepo, tmp_path: Path, answer: dict[str, object]
) -> None:
    github.lfs_errors[hashlib.sha256(TOOL).hexdigest()] = answer
    with pytest.raises(SourceUnavailableError, match=r"does not give 1 of its Git LFS files: 'tool'") as caught:
        fetch("o/r", tmp_path)
    assert caught.value.message.isprintable()
    assert github.count(STORAGE) == 0


@pytest.mark.parametrize(
    "href",
    [
        "http://example.org/x",
        "file:///etc/passwd",
        "ftp://example.org/x",
        "https://user:pass@example.org/x",
        "/etc/passwd",
        "https:///x",
    ],
)
def test_addresses_that_are_not_followed(github: GitHubServer, repo: GitRepo, tmp_path: Path, href: str) -> None:
    github.lfs_errors[hashlib.sha256(TOOL).hexdigest()] = {"actions": {"download": {"href": href}}}
    with pytest.raises(SourceUnavailableError, match="expected an https address"):
        fetch("o/r", tmp_path)


@pytest.mark.parametrize(
    "header", [{"Host": "evil"}, {"X": "a\r\nb: c"}, {"a b": "c"}, {"Content-Length": "5"}, {"X": 5}, [], "x"]
)
def test_headers_that_are_not_sent(github: GitHubServer, repo: GitRepo, tmp_path: Path, header: object) -> None:
    oid = hashlib.sha256(TOOL).hexdigest()
    action = {"href": f"{github.url}{STORAGE}{oid}?signature=s3cret", "header": header}
    github.lfs_errors[oid] = {"actions": {"download": action}}
    with pytest.raises(SourceUnavailableError):
        fetch("o/r", tmp_path)
    assert github.count(STORAGE) == 0


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000, b"{}", b'{"objects": [1], "transfer": "tus"}'])
def test_answers_that_are_no_batch(github: GitHubServer, repo: GitRepo, tmp_path: Path, body: bytes) -> None:
    github.fail("/objects/batch", Fault(body=body))
    with pytest.raises(SourceUnavailableError, match="batch|JSON"):
        fetch("o/r", tmp_path)


def test_a_server_without_lfs(github: GitHubServer, git_repo: Callable[..., GitRepo], tmp_path: Path) -> None:
    pointer = github.add_lfs("o", "else", b"x")
    made = github.add("o", "none", git_repo("none"))
    made.commit({"x": pointer, ".lfsconfig": f"[lfs]\n\turl = {github.url}/o/else.git/info/lfs\n"})
    with pytest.raises(SourceUnavailableError, match="no Git LFS server") as caught:
        fetch("o/none", tmp_path)
    assert ".lfsconfig" in (caught.value.hint or "")
    assert github.count("/o/else") == 0


def test_too_much_is_refused_before_it_is_asked_for(
    github: GitHubServer, git_repo: Callable[..., GitRepo], tmp_path: Path
) -> None:
    made = github.add("o", "huge", git_repo("huge"))
    pointer = github.add_lfs("o", "huge", b"x").replace(b"size 1\n", b"size %d\n" % (6 << 30))
    made.commit({"x": pointer})
    with pytest.raises(IntegrityError, match="at most"):
        fetch("o/huge", tmp_path)
    assert github.count("lfs") == 0


def test_a_clones_own_objects_come_first(github: GitHubServer, repo: GitRepo, tmp_path: Path) -> None:
    repo.git("clone", "--quiet", ".", str(tmp_path / "clone"))
    clone = tmp_path / "clone"
    GitRepo.git(repo, "-C", str(clone), "remote", "set-url", "origin", f"http://me:pw@{github.host}/o/r.git")
    oid = hashlib.sha256(BIG).hexdigest()
    place = clone / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4] / oid
    place.parent.mkdir(parents=True)
    place.write_bytes(BIG)
    check(fetch(f"{clone}:main", tmp_path))
    assert github.count(STORAGE) == github.count(hashlib.sha256(TOOL).hexdigest()) == 1
    assert all("Authorization" not in request.headers for request in github.requests)  # what git's config holds stays
    place.write_bytes(b"x" + BIG[1:])
    with pytest.raises(IntegrityError, match="damaged"):
        fetch(f"{clone}:main", tmp_path, "damaged")
    place.unlink()
    GitRepo.git(repo, "-C", str(clone), "remote", "set-url", "origin", str(repo.path))
    with pytest.raises(SourceUnavailableError, match="neither the clone nor a server"):
        fetch(f"{clone}:main", tmp_path, "alone")


def test_a_clone_gives_credentials_to_its_own_commits_alone(
    github: GitHubServer, repo: GitRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret")
    github.token = "s3cret"
    repo.git("remote", "add", "origin", f"{github.url}/o/r.git")
    repo.ref("refs/pull/1/head", repo.orphan({"w.bin": github.add_lfs("o", "r", b"theirs")}, parent=repo.sha()))
    with pytest.raises(SourceUnavailableError):
        fetch(f"{repo.path}:refs/pull/1/head", tmp_path)
    assert ["Authorization" in request.headers for request in github.requests] == [False]
    check(fetch(f"{repo.path}:main", tmp_path, "own"))
    # ssh has no other credentials than the user's.
    repo.git("remote", "set-url", "origin", "git@example.org:o/r.git")
    with pytest.raises(SourceUnavailableError, match="your keys"):
        fetch(f"{repo.path}:refs/pull/1/head", tmp_path, "ssh")


def test_a_clone_offline(github: GitHubServer, repo: GitRepo, tmp_path: Path) -> None:
    repo.git("remote", "add", "origin", f"{github.url}/o/r.git")
    reference = parse(f"{repo.path}:main")
    source = source_for(reference, offline=True)
    pin = replace(source.resolve(reference), extras=("lfs",))
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(OfflineError, match=r"'(a\.bin|tool)' is in Git LFS.*network may not be used") as caught:
        source.fetch(pin, into)
    assert "git lfs fetch" in (caught.value.hint or "")
    for content in (BIG, TOOL):
        oid = hashlib.sha256(content).hexdigest()
        place = repo.path / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4] / oid
        place.parent.mkdir(parents=True)
        place.write_bytes(content)
    (tmp_path / "whole").mkdir()
    source.fetch(pin, tmp_path / "whole")
    check(tmp_path / "whole")
    assert github.count() == 0


def test_what_passes_is_said(github: GitHubServer, repo: GitRepo, tmp_path: Path) -> None:
    cases = (("/objects/batch", 503, True), ("/objects/batch", 501, True), ("/objects/batch", 404, False))
    for number, (path, status, passing) in enumerate((*cases, (STORAGE, 503, True), (STORAGE, 403, False))):
        github.behave()
        github.fail(path, Fault(status=status))
        with pytest.raises(SourceUnavailableError) as caught:
            fetch("o/r", tmp_path, str(number))
        assert (caught.value.status, caught.value.passing) == (status, passing)
