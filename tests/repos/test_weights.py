from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from isohub.errors import IntegrityError, InvalidReferenceError, OfflineError, SourceUnavailableError
from isohub.repos import blobs as blobs_module
from isohub.repos import weights_entry
from isohub.repos.blobs import Blobs, Stamp
from isohub.repos.credentials import Credentials
from isohub.repos.disk import claim, remove_tree
from isohub.repos.inventory import claim_file
from isohub.repos.layout import weights_dir
from isohub.repos.weights import CALLER, Weights, WeightsFile
from tests.servers.files import Fault, FileServer, basic

PROJECT = Path(__file__).parents[2]
CONTENT = random.Random(1).randbytes(1 << 20)
SHA = hashlib.sha256(CONTENT).hexdigest()
ONE = ("github.com", "o", "one")
TWO = ("github.com", "o", "two")


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as opened:
        yield opened


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return Weights(tmp_path / "root")


def fetch(weights: Weights, url: str, scope: tuple[str, str, str] = ONE, **options: Any) -> WeightsFile:
    return weights.fetch(url, scope, **{"credentials": Credentials(anonymous=True), **options})


def blobs(weights: Weights) -> list[Path]:
    return sorted(path for path in (weights.root / "weights" / "blobs").rglob("*") if path.is_file())


def leftovers(weights: Weights) -> list[str]:
    places = [*weights.root.rglob(".*"), *(weights.root / "weights" / "partial").iterdir()]
    return sorted(path.name for path in places if path.suffix != ".lock")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is read whole in order to be trusted."""
    read: list[Path] = []
    real = blobs_module.hash_file
    for module in (blobs_module, weights_entry):
        monkeypatch.setattr(module, "hash_file", lambda path: read.append(path) or real(path))
    return read


# What is where


def test_a_file_is_brought_once(server: FileServer, weights: Weights, hashed: list[Path]) -> None:
    url = server.add("/models/resnet.pth", CONTENT)
    assert weights.lookup(url, ONE) is None
    file = fetch(weights, url)
    assert (file.url, file.scope, file.name, file.sha256, file.bytes) == (url, ONE, "resnet.pth", SHA, len(CONTENT))
    assert file.path == weights.root / "weights" / "urls" / "github.com" / "o" / "one" / file.key / "resnet.pth"
    assert file.path.read_bytes() == CONTENT
    assert file.path.samefile(weights.root / "weights" / "blobs" / SHA[:2] / SHA)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o444
    assert stat.S_IMODE(weights.root.stat().st_mode) == 0o700
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["entry.json", "resnet.pth"]
    assert leftovers(weights) == []
    assert weights.lookup(url, ONE) == fetch(weights, url) == fetch(weights, url + "#again") == file
    assert weights.entries() == [file]
    assert server.count() == 1
    assert hashed == []


def test_a_hit_is_noted_as_use(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    place = fetch(weights, url).path.parent
    os.utime(place, (0, 0))
    weights.lookup(url, ONE)
    assert place.stat().st_mtime > 0


def test_a_name_is_never_a_key(server: FileServer, weights: Weights) -> None:
    urls = [server.add(f"/{number}/model.pth", f"content {number}".encode()) for number in range(3)]
    urls += [server.url + "/0/model.pth?version=2"]
    server.add("/entry.json", b"an entry")
    server.add("/..%2F..%2Fx", b"up")
    urls += [server.url + "/entry.json", server.url + "/..%2F..%2Fx"]
    files = [fetch(weights, url) for url in urls]
    assert len({file.path for file in files}) == len(urls)
    assert [file.path.read_bytes() for file in files] == [
        b"content 0",
        b"content 1",
        b"content 2",
        b"content 0",
        b"an entry",
        b"up",
    ]
    assert {file.path.parent.parent for file in files} == {weights_dir(weights.root, ONE)}
    assert weights.entries() == sorted(files, key=lambda file: (file.url, file.key))


def test_repos_share_bytes_and_not_answers(server: FileServer, weights: Weights) -> None:
    url = server.add("/model.pth", CONTENT)
    one, two, caller = (fetch(weights, url, scope) for scope in (ONE, TWO, CALLER))
    assert len({one.path, two.path, caller.path}) == 3
    assert one.path.samefile(two.path)
    assert len(blobs(weights)) == 1
    assert [request.headers.get("If-None-Match") is not None for request in server.requests] == [False, True, True]
    # The server has other content now: the others keep what they got.
    server.replace("/model.pth", b"new")
    other = fetch(weights, url, ("host", "o", "r"))
    assert other.path.read_bytes() == b"new"
    assert weights.lookup(url, ONE) == one
    assert one.path.read_bytes() == CONTENT
    assert [file.scope for file in weights.entries()] == sorted([ONE, TWO, CALLER, ("host", "o", "r")])


@pytest.mark.parametrize("etag", ["weak", None])
def test_without_a_strong_etag_it_is_downloaded_again(
    server: FileServer, weights: Weights, etag: Any, hashed: list[Path]
) -> None:
    url = server.add("/model.pth", CONTENT, etag=etag)
    assert fetch(weights, url, ONE).path.samefile(fetch(weights, url, TWO).path)
    assert [request.headers.get("If-None-Match") for request in server.requests] == [None, None]
    assert len(blobs(weights)) == 1


def test_what_one_may_have_another_may_not(server: FileServer, weights: Weights) -> None:
    url = server.add(f"/model-{SHA[:8]}.pth", CONTENT)
    other = server.add("/other.pth", b"other")
    server.fail("/other", Fault(status=404))
    fetch(weights, url, ONE)
    # Neither the URL nor a hash opens another scope's file: its server decides.
    server.authorization = basic("user", "password")
    for asked in (url, other):
        for hashes in ({"hash_prefix": SHA[:8]}, {"hash_prefix": SHA}, {"sha256": SHA}, {}):
            with pytest.raises(SourceUnavailableError):
                fetch(weights, asked, TWO, **hashes)
    assert weights.entries() == [weights.lookup(url, ONE)]


def test_a_url_s_query_is_in_no_file_and_in_no_message(
    server: FileServer, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.add("/m.pth", CONTENT)
    url = server.url + "/m.pth?X-Amz-Signature=s3cret"
    server.fail("m.pth", Fault(truncate=300_000), times=1)
    server.fail("m.pth", Fault(status=404), times=1)
    with pytest.raises(SourceUnavailableError) as raised:
        fetch(weights, url)
    assert server.count("s3cret") == server.count() > 0
    messages = [str(raised.value), repr(raised.value.fields)]
    with pytest.raises(OfflineError) as offline:
        Weights(weights.root, offline=True).fetch(url, ONE, credentials=Credentials())
    messages += [str(offline.value), repr(offline.value.fields)]
    kept = [path for path in weights.root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".part" for path in kept)
    fetch(weights, url)
    (weights.lookup(url, ONE) or pytest.fail()).path.unlink()
    fetch(weights, url)
    # urllib3's own lines of level DEBUG hold whole URLs; they are not isohub's.
    messages += [record.getMessage() for record in caplog.records if record.name.startswith("isohub")]
    messages += [repr(weights.entries())]
    assert len(messages) > 6
    assert "s3cret" not in "".join(messages)
    for path in [*kept, *weights.root.rglob("*")]:
        assert "s3cret" not in str(path)
        assert not path.is_file() or b"s3cret" not in path.read_bytes()


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://h/m", "https://user:s3cret@h/m.pth", "m.pth", "", "http://h/a\nb"]
)
def test_what_is_no_url(weights: Weights, url: str) -> None:
    for act in (weights.lookup, lambda url, scope: fetch(weights, url, scope)):
        with pytest.raises(InvalidReferenceError) as raised:
            act(url, ONE)
        assert "s3cret" not in str(raised.value)
    assert not weights.root.exists()


# Damage


def damage(file: WeightsFile, how: str) -> None:
    file.path.chmod(0o644)
    status = file.path.stat()
    match how:
        case "flipped":
            with file.path.open("r+b") as stream:
                stream.seek(1000)
                stream.write(bytes([CONTENT[1000] ^ 1]))
            os.utime(file.path, ns=(status.st_atime_ns, status.st_mtime_ns))
        case "cut":
            os.truncate(file.path, 100)
        case "longer":
            with file.path.open("ab") as stream:
                stream.write(b"x")
        case "gone":
            file.path.unlink()
        case "a link":
            target = file.path.with_name("target")
            file.path.rename(target)
            file.path.symlink_to(target)
        case "a directory":
            file.path.unlink()
            file.path.mkdir()
        case "a pipe":
            file.path.unlink()
            os.mkfifo(file.path)
        case "entry":
            entry = file.path.parent / "entry.json"
            entry.chmod(0o644)
            content = entry.read_bytes()
            entry.write_bytes(content.replace(SHA[:4].encode(), b"0000", 2))
        case "no entry":
            (file.path.parent / "entry.json").unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "gone", "a link", "a pipe", "entry", "no entry"])
def test_a_damaged_file_is_absent_and_brought_again(server: FileServer, weights: Weights, how: str) -> None:
    url = server.add("/m.pth", CONTENT)
    damage(fetch(weights, url), how)
    assert weights.lookup(url, ONE) is None
    file = fetch(weights, url)
    assert file.path.read_bytes() == CONTENT
    assert not file.path.is_symlink()
    assert server.count() == 2
    assert server.requests[1].headers.get("If-None-Match") is None
    assert weights.lookup(url, ONE) == file
    assert [path.read_bytes() for path in blobs(weights)] == [CONTENT]


def test_damage_reaches_no_other_scope(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    one, two = fetch(weights, url, ONE), fetch(weights, url, TWO)
    damage(one, "flipped")  # one inode: both
    third = fetch(weights, url, CALLER)
    assert server.requests[-1].headers.get("If-None-Match") is None
    assert third.path.read_bytes() == CONTENT
    assert weights.lookup(url, TWO) is None
    assert fetch(weights, url, TWO).path == two.path
    assert two.path.read_bytes() == CONTENT


def test_damage_that_cannot_be_removed_is_told(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    damage(fetch(weights, url), "a directory")
    with pytest.raises(SourceUnavailableError, match="cannot be used"):
        fetch(weights, url)


def test_a_file_is_hashed_again_only_after_something_happened_to_it(
    server: FileServer, weights: Weights, hashed: list[Path]
) -> None:
    url = server.add("/m.pth", CONTENT)
    one = fetch(weights, url, ONE)
    fetch(weights, url, TWO)  # a new hard link changes the ctime of both
    assert hashed == []
    for _ in range(3):
        assert weights.lookup(url, ONE) == one
    assert hashed == [one.path]
    copy = one.path.with_name("copy")
    copy.write_bytes(CONTENT)
    copy.replace(one.path)  # as a restored backup is: another inode and date, the same bytes
    for _ in range(3):
        assert weights.lookup(url, ONE) == one
    assert hashed == [one.path, one.path]


def test_an_entry_counts_only_where_it_was_written(server: FileServer, weights: Weights) -> None:
    one, two = (server.add(f"/{name}.pth", name.encode()) for name in ("one", "two"))
    first, second = fetch(weights, one), fetch(weights, two)
    remove_tree(second.path.parent)
    first.path.parent.rename(second.path.parent)
    assert weights.lookup(two, ONE) is None
    assert weights.entries() == []
    assert fetch(weights, two).path.read_bytes() == b"two"


# Asking again


def conditions(server: FileServer) -> list[bool]:
    return [request.headers.get("If-None-Match") is not None for request in server.requests]


def test_what_is_here_is_asked_for_again_where_the_caller_says_so(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    file = fetch(weights, url, revalidate=True)
    assert fetch(weights, url, revalidate=True) == fetch(weights, url, revalidate=True) == file
    assert conditions(server) == [False, True, True]
    server.replace("/m.pth", b"new")
    assert fetch(weights, url) == file
    new = fetch(weights, url, revalidate=True)
    assert (new.path, new.path.read_bytes(), new.bytes) == (file.path, b"new", 3)
    assert weights.lookup(url, ONE) == new
    # Whoever has the old content's own name has the old content.
    assert file.blob.read_bytes() == CONTENT
    assert new.blob != file.blob
    assert server.count() == 4
    assert leftovers(weights) == []


@pytest.mark.parametrize("etag", ["weak", None])
def test_without_a_strong_etag_asking_again_is_downloading(server: FileServer, weights: Weights, etag: Any) -> None:
    url = server.add("/m.pth", CONTENT, etag=etag)
    file = fetch(weights, url)
    assert fetch(weights, url, revalidate=True) == file
    server.replace("/m.pth", b"new")
    assert fetch(weights, url, revalidate=True).path.read_bytes() == b"new"
    assert conditions(server) == [False] * 3
    assert leftovers(weights) == []


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(status=429), Fault(reset=0)], ids=["503", "429", "reset"])
def test_a_server_in_trouble_is_no_reason_to_stop(
    server: FileServer, weights: Weights, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    url = server.add("/m.pth", CONTENT, etag="strong" if fault.reset is None else None)
    file = fetch(weights, url + "?sig=s3cret")
    server.fail("/m.pth", fault)
    assert fetch(weights, url + "?sig=s3cret", revalidate=True) == file
    (warned,) = [record.getMessage() for record in caplog.records if record.name == "isohub.repos"]
    assert f"going on with what is here of {url}" in warned
    assert "s3cret" not in warned
    with pytest.raises(SourceUnavailableError):
        fetch(weights, url, TWO, revalidate=True)


def test_a_server_that_says_no_is_heard(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    file = fetch(weights, url)
    server.remove("/m.pth")
    with pytest.raises(SourceUnavailableError) as raised:
        fetch(weights, url, revalidate=True)
    assert raised.value.status == 404
    assert "look at the URL" in (raised.value.hint or "")
    assert weights.lookup(url, ONE) == file
    server.add("/m.pth", b"new")
    with pytest.raises(IntegrityError):
        fetch(weights, url, revalidate=True, hash_prefix=SHA[:8])
    assert weights.lookup(url, ONE) == file


def test_nobody_is_asked_where_no_answer_could_be_used(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    file = fetch(weights, url)
    server.forget()
    assert fetch(Weights(weights.root, offline=True), url, revalidate=True) == file
    assert fetch(weights, url, revalidate=True, sha256=SHA) == file
    assert server.count() == 0


def test_another_scope_s_file_shows_that_nothing_changed(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    fetch(weights, url, ONE)
    server.replace("/m.pth", b"new")
    fetch(weights, url, TWO)
    assert fetch(weights, url, ONE, revalidate=True).path.read_bytes() == b"new"
    assert fetch(weights, url, TWO, revalidate=True).path.read_bytes() == b"new"
    assert server.requests[-1].headers["If-None-Match"] != server.requests[-2].headers["If-None-Match"]


def test_what_was_of_no_use_is_forgotten(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", b"<!DOCTYPE html>")
    bad, other = fetch(weights, url, ONE), fetch(weights, url, TWO)
    weights.forget(url, ONE, sha256=SHA)  # of another content, which somebody would have brought meanwhile
    assert weights.lookup(url, ONE) == bad
    weights.forget(url, ONE, sha256=bad.sha256)
    assert weights.lookup(url, ONE) is None
    assert weights.lookup(url, TWO) == other
    assert bad.path.read_bytes() == b"<!DOCTYPE html>"  # for whoever uses it
    server.forget()
    # The bytes may have been cut or changed on the way: the server's ETag says nothing of them.
    assert fetch(weights, url, ONE) == bad
    assert fetch(weights, url, TWO, revalidate=True) == other
    assert conditions(server) == [False, True]  # the second by what the first has just brought
    server.replace("/m.pth", CONTENT)
    weights.forget(url, ONE)
    weights.forget(url, ONE)
    weights.forget(url + "?never=here", ONE)
    assert fetch(weights, url, ONE).path.read_bytes() == CONTENT
    assert leftovers(weights) == []
    with pytest.raises(InvalidReferenceError):
        weights.forget("m.pth", ONE)


def test_forgetting_makes_nothing(weights: Weights) -> None:
    weights.forget("https://host.invalid/m.pth", ONE)
    assert not weights.root.exists()


# What it is now


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's times count as old at once."""
    monkeypatch.setattr(blobs_module, "_SETTLED_NS", -(1 << 62))


@pytest.mark.usefixtures("settled")
def test_a_file_is_measured_once(server: FileServer, weights: Weights, hashed: list[Path]) -> None:
    file = fetch(weights, server.add("/m.pth", CONTENT))
    assert [weights.measured(file) for _ in range(3)] == [file] * 3
    assert hashed == [file.path]
    damage(file, "flipped")
    now = weights.measured(file)
    assert (now.sha256, now.bytes) == (hashlib.sha256(file.path.read_bytes()).hexdigest(), len(CONTENT))
    assert now.sha256 != SHA
    assert now.blob.name == now.sha256
    assert len(hashed) == 2


def test_an_entry_that_lies_is_found_out(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    file = fetch(weights, url)
    entry = weights_entry.read_entry(weights.root, file.path.parent)
    assert entry is not None
    file.path.unlink()
    file.path.write_bytes(b"other")
    lie = weights_entry.WeightsEntry(
        **{name: getattr(entry, name) for name in entry.__struct_fields__} | {"stamp": Stamp.of(file.path.lstat())}
    )
    weights_entry.write_record(file.path.parent / "entry.json", lie)
    found = fetch(weights, url)
    assert found.sha256 == SHA
    assert weights.measured(found).sha256 == hashlib.sha256(b"other").hexdigest()
    file.path.unlink()
    with pytest.raises(SourceUnavailableError):
        weights.measured(found)


# A content in use


def test_a_content_that_somebody_was_told_of_stays(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    file = fetch(weights, url)
    held = weights.hold_blob(file)
    assert held is not None
    server.replace("/m.pth", b"new")
    fetch(weights, url, revalidate=True)
    assert file.blob.read_bytes() == CONTENT
    assert file.blob.stat().st_nlink == 1
    with pytest.raises(BlockingIOError):
        claim_file(file.blob)
    os.close(held)
    claimed = claim_file(file.blob)
    assert claimed is not None
    os.close(claimed)


@pytest.mark.parametrize("what", ["gone", "another"])
def test_a_content_that_is_not_under_its_name_is_put_there(server: FileServer, weights: Weights, what: str) -> None:
    file = fetch(weights, server.add("/m.pth", CONTENT))
    file.blob.unlink()
    if what == "another":
        file.blob.write_bytes(b"another")
    descriptor = weights.hold_blob(file)
    assert descriptor is not None
    os.close(descriptor)
    assert file.blob.samefile(file.path)
    assert file.blob.read_bytes() == CONTENT


# Hashes


def test_hashes_are_checked_in_the_cache_too(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    file = fetch(weights, url, hash_prefix=SHA[:8])
    assert fetch(weights, url, sha256=SHA, hash_prefix=SHA[:3].upper()) == fetch(weights, url, hash_prefix="") == file
    assert server.count() == 1
    for wrong in ({"hash_prefix": "0" * 8}, {"sha256": "0" * 64}):
        with pytest.raises(IntegrityError) as raised:
            fetch(weights, url, **wrong)
        assert raised.value.got == SHA
        with pytest.raises(IntegrityError, match="the copy of"):
            Weights(weights.root, offline=True).fetch(url, ONE, credentials=Credentials(), **wrong)
    assert weights.lookup(url, ONE) == file
    with pytest.raises(InvalidReferenceError, match="no SHA-256"):
        fetch(weights, url, hash_prefix="zz")


def test_what_the_server_changed_is_brought_where_the_hash_says_so(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", b"old")
    fetch(weights, url)
    server.replace("/m.pth", CONTENT)
    assert fetch(weights, url).path.read_bytes() == b"old"
    assert fetch(weights, url, sha256=SHA).path.read_bytes() == CONTENT
    assert weights.lookup(url, ONE).sha256 == SHA  # type: ignore[union-attr]
    assert leftovers(weights) == []


def test_a_wrong_download_leaves_nothing(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    for options in ({"sha256": "0" * 64}, {"limit_bytes": 1000}):
        with pytest.raises(IntegrityError):
            fetch(weights, url, **options)
    assert weights.lookup(url, ONE) is None
    assert blobs(weights) == []
    assert leftovers(weights) == []


# torch.hub's files


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    directory = tmp_path / "torch" / "hub" / "checkpoints"
    directory.mkdir(parents=True)
    return directory


URL = f"https://host.invalid/a/resnet-{SHA[:8]}.pth"


@pytest.mark.parametrize("place", ["TORCH_HOME", "XDG_CACHE_HOME", "HOME"])
def test_a_file_of_torch_hub_is_copied(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    below = {"TORCH_HOME": "", "XDG_CACHE_HOME": "torch", "HOME": ".cache/torch"}[place]
    monkeypatch.setenv(place, str(tmp_path / "there"))
    directory = tmp_path / "there" / below / "hub" / "checkpoints"
    directory.mkdir(parents=True)
    (directory / f"resnet-{SHA[:8]}.pth").write_bytes(CONTENT)
    file = fetch(weights, URL)
    assert (file.sha256, file.path.read_bytes()) == (SHA, CONTENT)
    assert not file.path.samefile(directory / f"resnet-{SHA[:8]}.pth")
    assert leftovers(weights) == []
    (directory / f"resnet-{SHA[:8]}.pth").write_bytes(b"changed")
    assert fetch(weights, URL) == file
    assert file.path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "hashes"),
    [
        (f"m-{SHA}.pth", {}),
        (f"m-50.v1-{SHA[:10]}.pth", {}),
        ("m.pth", {"hash_prefix": SHA[:8]}),
        ("m.pth", {"sha256": SHA}),
        ("m-00000000.pth", {"sha256": SHA}),
        ("m%20n.pth", {"sha256": SHA}),
    ],
)
def test_what_is_known_of_its_content_is_enough(weights: Weights, hub: Path, name: str, hashes: Any) -> None:
    (hub / name).write_bytes(CONTENT)
    offline = Weights(weights.root, offline=True)
    assert fetch(offline, f"https://host.invalid/{name}", **hashes).sha256 == SHA


@pytest.mark.parametrize(
    ("name", "hashes"),
    [
        ("m.pth", {}),
        (f"m-{SHA[:7]}.pth", {}),
        ("m-00000000.pth", {}),
        ("m.pth", {"hash_prefix": SHA[:7]}),
        (f"m-{SHA[:8]}.pth", {"hash_prefix": "0" * 8}),
        (f"m-{SHA[:8]}.pth", {"sha256": "0" * 64}),
        (f"m-{SHA[:8]}.pth", {"limit_bytes": 1000}),
    ],
)
def test_what_is_not_known_is_not_used(weights: Weights, hub: Path, name: str, hashes: Any) -> None:
    (hub / name).write_bytes(CONTENT)
    with pytest.raises(OfflineError):
        fetch(Weights(weights.root, offline=True), f"https://host.invalid/{name}", **hashes)
    assert blobs(weights) == []


def test_only_a_regular_file_of_torch_hub_is_used(weights: Weights, hub: Path, tmp_path: Path) -> None:
    name = f"resnet-{SHA[:8]}.pth"
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    offline = Weights(weights.root, offline=True)
    for make in ("symlink_to", "mkdir", "mkfifo"):
        match make:
            case "symlink_to":
                (hub / name).symlink_to(tmp_path / "elsewhere")
            case "mkdir":
                (hub / name).mkdir()
            case "mkfifo":
                os.mkfifo(hub / name)
        with pytest.raises(OfflineError):
            fetch(offline, URL)
        remove_tree(hub / name)
    for url in ("https://host.invalid/..", "https://host.invalid/", "https://host.invalid/%00"):
        with pytest.raises(OfflineError):
            fetch(offline, url, sha256=SHA)


# Offline


def test_offline(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    offline = Weights(weights.root, offline=True)
    with pytest.raises(OfflineError, match="is not in the cache for github.com/o/one") as raised:
        fetch(offline, url)
    assert raised.value.url == url
    assert not weights.root.exists()
    file = fetch(weights, url)
    server.forget()
    assert fetch(offline, url) == offline.lookup(url, ONE) == file
    with pytest.raises(OfflineError, match="for the caller"):
        fetch(offline, url, CALLER)
    assert server.count() == 0


# Processes

FETCH = """
import sys
from pathlib import Path
from isohub.repos.credentials import Credentials
from isohub.repos.weights import Weights
url, root, repo = sys.argv[1:4]
file = Weights(Path(root)).fetch(url, ("h", "o", repo), credentials=Credentials(anonymous=True))
sys.stdout.write(file.sha256)
"""


def start(url: str, weights: Weights, repo: str = "r", before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + FETCH, url, str(weights.root), repo]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


def test_many_processes_make_one_download(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    stall = server.fail("m.pth", Fault(stall=1000), times=1)
    processes = [start(url, weights) for _ in range(6)]
    assert stall.stalled.wait(30)
    stall.resume.set()
    assert [process.communicate()[0] for process in processes] == [SHA] * 6
    assert server.count() == 1


def test_many_threads_and_repos(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    found: list[WeightsFile] = []

    def work(number: int) -> None:
        found.append(fetch(weights, url, ("h", "o", f"r{number % 4}")))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {file.path.read_bytes() for file in found} == {CONTENT}
    assert len(found) == 16
    assert server.count() == 4  # one a repo; three of them a 304
    assert len(blobs(weights)) == 1


def test_a_killed_download_is_resumed(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    stall = server.fail("m.pth", Fault(stall=700_000), times=1)
    process = start(url, weights)
    assert stall.stalled.wait(30)
    partial = weights.root / "weights" / "partial"
    while sum(path.stat().st_size for path in partial.glob("*.part")) < 500_000:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert weights.lookup(url, ONE) is None
    assert fetch(weights, url).path.read_bytes() == CONTENT
    assert int(server.requests[-1].headers["Range"].removeprefix("bytes=").removesuffix("-")) >= 500_000
    assert leftovers(weights) == []


# Forks a process for each step and ends it before the n-th call that changes its store.
KILL = """
import os, shutil, signal
def count(event, arguments):
    global left
    changes = event in ("os.rename", "os.link", "os.mkdir", "os.remove") or (
        event == "open" and len(arguments) > 2 and arguments[2] & os.O_CREAT)
    if changes and "store-" in str(arguments):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
step, status, template = 0, None, root
while status != 0:
    step += 1
    root = f"{template}/store-{step}"
    if os.path.exists(f"{template}/store"):
        shutil.copytree(f"{template}/store", root)
    child = os.fork()
    if child == 0:
        left = step
        sys.addaudithook(count)
        Weights(Path(root)).fetch(url, ("h", "o", repo), credentials=Credentials(anonymous=True))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_whatever_step_is_the_last(server: FileServer, tmp_path: Path, damaged: bool) -> None:
    """Killed before each step that changes the store, one after the other: a reader has all or nothing."""
    url = server.add("/m.pth", CONTENT)
    scope = ("h", "o", "r")
    if damaged:
        damage(fetch(Weights(tmp_path / "store"), url, scope), "flipped")
    program = FETCH.partition("file =")[0] + KILL
    subprocess.run([sys.executable, "-c", program, url, str(tmp_path), "r"], cwd=PROJECT, check=True)
    roots = sorted(tmp_path.glob("store-*"))
    assert len(roots) > 10
    for root in roots:
        weights = Weights(root)
        found = weights.lookup(url, scope)
        assert found is None or found.path.read_bytes() == CONTENT
        with ExitStack() as stack:
            streams = [stack.enter_context(path.open("rb")) for path in blobs(weights)]
            before = [os.fstat(stream.fileno()).st_mtime_ns for stream in streams]
            assert fetch(weights, url, scope).path.read_bytes() == CONTENT
            # No blob was written to, though a killed writer had given it its name and no more.
            assert [os.fstat(stream.fileno()).st_mtime_ns for stream in streams] == before
        assert [path.read_bytes() for path in blobs(weights) if path.name == SHA] == [CONTENT]
        # A staged link that its maker was killed beside is named by a dot and read by nobody.
        assert [name for name in leftovers(weights) if not name.startswith(".")] == []


# The disk


def test_a_scope_in_use_stays(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    directory = weights_dir(weights.root, ONE)
    with weights.held(ONE):
        fetch(weights, url)
        with pytest.raises(BlockingIOError):
            claim(directory)
    stall = server.fail("n.pth", Fault(stall=10), times=1)
    other = server.add("/n.pth", CONTENT)
    thread = threading.Thread(target=fetch, args=(weights, other))
    thread.start()
    assert stall.stalled.wait(30)
    with pytest.raises(BlockingIOError):
        claim(directory)
    stall.resume.set()
    thread.join()
    descriptor = claim(directory)
    assert descriptor is not None
    remove_tree(directory)
    os.close(descriptor)
    assert weights.lookup(url, ONE) is None
    assert fetch(weights, url).path.read_bytes() == CONTENT


def test_a_scope_that_is_being_removed_is_waited_for(server: FileServer, weights: Weights) -> None:
    url = server.add("/m.pth", CONTENT)
    directory = fetch(weights, url).path.parents[1]
    descriptor = claim(directory)
    assert descriptor is not None
    other = server.add("/n.pth", b"other")
    found: list[WeightsFile] = []
    thread = threading.Thread(target=lambda: found.append(fetch(weights, other)))
    thread.start()
    remove_tree(directory)
    os.close(descriptor)
    thread.join()
    assert found[0].path.read_bytes() == b"other"


def test_a_blob_that_somebody_clears_away_too_early(
    server: FileServer, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Blobs.link
    cleared = []

    def link(self: Blobs, sha256: str, target: Path) -> None:
        if not cleared:
            cleared.append(sha256)
            self.path(sha256).unlink()
        real(self, sha256, target)

    monkeypatch.setattr(Blobs, "link", link)
    file = fetch(weights, server.add("/m.pth", CONTENT))
    assert cleared == [SHA]
    assert file.path.samefile(blobs(weights)[0])


def test_a_file_system_without_links(server: FileServer, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    url = server.add("/m.pth", CONTENT)
    one, two = fetch(weights, url, ONE), fetch(weights, url, TWO)
    assert one.path.read_bytes() == two.path.read_bytes() == CONTENT
    assert weights.lookup(url, ONE) == one
    assert leftovers(weights) == []
    assert server.requests[1].headers.get("If-None-Match") is not None


def test_a_store_that_cannot_be_made(server: FileServer, tmp_path: Path) -> None:
    url = server.add("/m.pth", CONTENT)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceUnavailableError, match="cannot be used") as raised:
        fetch(Weights(tmp_path / "file" / "root"), url)
    assert "ISOHUB_HOME" in (raised.value.hint or "")
    assert server.count() == 0


def test_a_store_that_is_only_read(server: FileServer, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.add("/m.pth", CONTENT)
    file = fetch(weights, url)
    os.utime(file.path, (1, 1))  # so that it wants to write down that the file is whole

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("utime", "mkdir", "rename", "replace"):
        monkeypatch.setattr(os, name, refuse)
    with weights.held(ONE):
        assert weights.lookup(url, ONE) == fetch(weights, url) == file


def test_a_full_disk(server: FileServer, weights: Weights) -> None:
    """A limit on the size of files is refused as a full disk is, in the middle of a write."""
    url = server.add("/m.pth", CONTENT)
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
    )
    program = FETCH.replace("file =", "try:\n  file =").replace(
        "sys.stdout.write(file.sha256)",
        "except Exception as error: sys.stdout.write(f'{type(error).__name__} {error}')",
    )
    command = [sys.executable, "-c", limited + program, url, str(weights.root), "r"]
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.startswith("SourceUnavailableError the store at")
    assert "File too large" in done.stdout
    assert "hint:" in done.stdout
    assert weights.lookup(url, ("h", "o", "r")) is None
    assert fetch(weights, url, ("h", "o", "r")).path.read_bytes() == CONTENT


def test_a_file_system_without_locks(server: FileServer, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.add("/m.pth", CONTENT)
    file = fetch(weights, url)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert fetch(weights, url) == file
    with pytest.raises(SourceUnavailableError, match="No locks") as raised:
        fetch(weights, server.add("/n.pth", CONTENT))
    assert "local disk" in (raised.value.hint or "")


def test_credentials_are_the_ones_that_were_given(
    server: FileServer, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_SERVER_URL", server.url)
    monkeypatch.setenv("GITHUB_TOKEN", "t0ken")
    url = server.add("/o/r/releases/download/v1/m.pth", CONTENT)
    server.authorization = basic("x-access-token", "t0ken")
    with pytest.raises(SourceUnavailableError):
        fetch(weights, url, credentials=Credentials(anonymous=True))
    assert all("Authorization" not in request.headers for request in server.requests)
    assert fetch(weights, url, CALLER, credentials=Credentials()).sha256 == SHA
