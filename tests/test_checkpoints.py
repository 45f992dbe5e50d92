from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch

from isohub import checkpoints
from isohub.checkpoints import download_url_to_file, load_state_dict_from_url
from isohub.errors import IntegrityError, InvalidReferenceError, OfflineError, SourceUnavailableError
from isohub.repos import http
from tests.servers.files import Fault, FileServer, basic

PROJECT = Path(__file__).parents[1]
STATE = {"layer.weight": torch.arange(12.0).reshape(3, 4), "layer.bias": torch.ones(3)}
SUM = 69.0


def saved(value: object = STATE, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def zipped(content: bytes, name: str = "mnist.pth") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def total(state: dict[str, Any]) -> float:
    return float(sum(value.sum() for value in state.values()))


def digits(content: bytes, count: int = 8) -> str:
    return hashlib.sha256(content).hexdigest()[:count]


NEW, OLD = saved(), saved(old=True)


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = "GITHUB_SERVER_URL GITHUB_API_URL GITHUB_TOKEN GH_TOKEN TORCH_HOME XDG_CACHE_HOME ISOHUB_OFFLINE"
    for name in names.split():
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("ISOHUB_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(http, "BACKOFF_S", 0.001)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as opened:
        yield opened


@pytest.fixture
def place(tmp_path: Path) -> Path:
    made = tmp_path / "place"
    made.mkdir()
    return made


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# download_url_to_file


def test_a_url_to_a_file(server: FileServer, place: Path) -> None:
    url = server.add("/mnist_init_ones", NEW)
    download_url_to_file(url, str(place / "temp"), progress=False)
    assert total(torch.load(place / "temp")) == SUM
    assert names(place) == ["temp"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_is_as_of_any_new_file(server: FileServer, place: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        download_url_to_file(server.add("/m", NEW), place / "temp")
        (place / "reference").touch()
    finally:
        os.umask(before)
    assert (place / "temp").stat().st_mode == (place / "reference").stat().st_mode


def test_relative_and_home(server: FileServer, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.add("/m", NEW)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    download_url_to_file(url, "one")
    download_url_to_file(url, "~/two")
    assert names(place) == ["one", "two"]


def test_what_is_there_is_replaced(server: FileServer, place: Path) -> None:
    (place / "target").write_bytes(b"kept")
    (place / "m.pth").symlink_to(place / "target")
    download_url_to_file(server.add("/m", NEW), place / "m.pth")
    assert (place / "m.pth").read_bytes() == NEW
    assert not (place / "m.pth").is_symlink()
    assert (place / "target").read_bytes() == b"kept"


def test_the_hash(server: FileServer, place: Path) -> None:
    url = server.add("/m", NEW)
    download_url_to_file(url, place / "m", hash_prefix=digits(NEW))
    download_url_to_file(url, place / "m", digits(NEW, 64).upper(), False)
    download_url_to_file(url, place / "m", hash_prefix="")  # none, as torch.hub takes it
    (place / "m").write_bytes(b"before")
    with pytest.raises(IntegrityError) as raised:
        download_url_to_file(url, place / "m", hash_prefix="00000000")
    assert (raised.value.expected, raised.value.got) == ("00000000", digits(NEW, 64))
    with pytest.raises(InvalidReferenceError, match="no SHA-256"):
        download_url_to_file(url, place / "m", hash_prefix="sha256:00")
    assert (place / "m").read_bytes() == b"before"
    assert names(place) == ["m"]


@pytest.mark.parametrize(
    "fault",
    [Fault(status=404), Fault(status=500), Fault(truncate=0), Fault(reset=0), Fault(length=10_000_000)],
    ids=["404", "500", "cut", "reset", "length"],
)
def test_a_failure_leaves_what_was_there(server: FileServer, place: Path, fault: Fault) -> None:
    url = server.add("/m", NEW)
    (place / "m").write_bytes(b"before")
    server.fail("/m", fault)
    with pytest.raises(SourceUnavailableError):
        download_url_to_file(url, place / "m")
    assert (place / "m").read_bytes() == b"before"
    assert names(place) == ["m"]


def test_a_broken_transfer_continues(server: FileServer, place: Path) -> None:
    content = os.urandom(2_000_000)
    url = server.add("/m", content)
    server.fail("/m", Fault(reset=1_500_000), times=1)
    server.fail("/m", Fault(truncate=100_000), times=1)
    download_url_to_file(url, place / "m")
    assert (place / "m").read_bytes() == content
    assert [("Range" in request.headers) for request in server.requests] == [False, True, True]


def test_what_a_killed_download_left_is_removed_by_the_next(server: FileServer, place: Path) -> None:
    url = server.add("/m", NEW)
    stall = server.fail("/m", Fault(stall=100), times=1)
    program = "import sys; from isohub.checkpoints import download_url_to_file as d; d(sys.argv[1], sys.argv[2])"
    process = subprocess.Popen([sys.executable, "-c", program, url, str(place / "m")], cwd=PROJECT)
    assert stall.stalled.wait(30)
    (left,) = names(place)
    assert left.startswith(".isohub-")
    download_url_to_file(url, place / "n")
    assert names(place) == [left, "n"]
    process.kill()
    process.wait()
    download_url_to_file(url, place / "n")
    assert names(place) == ["n"]


def test_where_nothing_can_be_written(server: FileServer, place: Path) -> None:
    url = server.add("/m", NEW)
    with pytest.raises(FileNotFoundError) as raised:
        download_url_to_file(url, place / "no" / "m")
    assert raised.value.filename == str(place / "no")
    with pytest.raises(IsADirectoryError):
        download_url_to_file(url, place)
    assert server.count() == 0


@pytest.mark.parametrize("url", ["", "m.pth", "ftp://h/m", "https://user:s3cret@h/m", "file://user:s3cret@h/m", 3])
def test_what_is_no_url(place: Path, url: Any) -> None:
    for act in (lambda: download_url_to_file(url, place / "m"), lambda: load_state_dict_from_url(url)):
        with pytest.raises((ValueError, TypeError)) as raised:
            act()
        assert "s3cret" not in str(raised.value)
    assert names(place) == []


def test_offline_there_are_files_alone(server: FileServer, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOHUB_OFFLINE", "1")
    with pytest.raises(OfflineError):
        download_url_to_file(server.add("/m", NEW), place / "m")
    (place / "a b.pth").write_bytes(NEW)
    download_url_to_file((place / "a b.pth").as_uri(), place / "m")
    assert (place / "m").read_bytes() == NEW
    assert server.count() == 0


def test_file_urls(place: Path) -> None:
    (place / "a%b.pth").write_bytes(NEW)
    (place / "link").symlink_to(place / "a%b.pth")
    os.mkfifo(place / "pipe")
    for name in ("a%25b.pth", "link"):
        for host in ("", "localhost"):
            download_url_to_file(f"file://{host}{place}/{name}", place / "m", digits(NEW))
            assert (place / "m").read_bytes() == NEW
            assert not (place / "m").is_symlink()
    with pytest.raises(IntegrityError):
        download_url_to_file(f"file://{place}/link", place / "m", "00000000")
    for name in ("nothing", "pipe", ""):
        with pytest.raises(SourceUnavailableError, match="cannot be read"):
            download_url_to_file(f"file://{place}/{name}", place / "m")
    for url in ("file://elsewhere/m", "file:m", "file:///a%00b"):
        with pytest.raises(InvalidReferenceError):
            download_url_to_file(url, place / "m")
    assert names(place) == ["a%b.pth", "link", "m", "pipe"]


def test_the_caller_s_credentials_are_used(server: FileServer, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_SERVER_URL", server.url)
    monkeypatch.setenv("GITHUB_TOKEN", "t0ken")
    server.authorization = basic("x-access-token", "t0ken")
    url = server.add("/o/r/releases/download/v1/m.pth", NEW)
    download_url_to_file(url, place / "m")
    assert total(load_state_dict_from_url(url)) == SUM


# load_state_dict_from_url


@pytest.mark.parametrize("content", [NEW, OLD], ids=["zip of torch 1.6", "before"])
def test_a_checkpoint(server: FileServer, content: bytes) -> None:
    url = server.add("/mnist_init_ones", content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert total(load_state_dict_from_url(url)) == SUM
        assert total(load_state_dict_from_url(url, weights_only=True)) == SUM
        assert total(load_state_dict_from_url(url, None, "cpu", False, False, None, False)) == SUM
    assert server.count() == 1


def test_a_name_for_the_file(server: FileServer, place: Path) -> None:
    url = server.add("/mnist_init_ones", NEW)
    assert total(load_state_dict_from_url(url, model_dir=str(place / "a" / "b"), file_name="the_file_name")) == SUM
    assert (place / "a" / "b" / "the_file_name").read_bytes() == NEW
    assert total(load_state_dict_from_url(url, model_dir=place)) == SUM
    assert (place / "mnist_init_ones").read_bytes() == NEW
    assert total(load_state_dict_from_url(url, file_name="the_file_name")) == SUM
    for bad in ("", ".", "..", "a/b", "/etc/passwd", "a\0b"):
        with pytest.raises(InvalidReferenceError, match="file_name"):
            load_state_dict_from_url(url, model_dir=place, file_name=bad)
    with pytest.raises(InvalidReferenceError, match="ends in no file name"):
        load_state_dict_from_url(server.url + "/", model_dir=place)


@pytest.mark.parametrize("content", [NEW, OLD], ids=["new", "old"])
@pytest.mark.parametrize("in_a_directory", [False, True])
def test_a_legacy_zip(server: FileServer, place: Path, content: bytes, in_a_directory: bool) -> None:
    url = server.add("/mnist.zip", zipped(content, "../../mnist.pth"))
    options = {"model_dir": place} if in_a_directory else {}
    for _ in range(2):
        with pytest.warns(FutureWarning, match=r"before 1\.6") as caught:
            assert total(load_state_dict_from_url(url, **options)) == SUM
        assert caught[0].filename == __file__
    assert not (place.parent.parent / "mnist.pth").exists()
    assert names(place) == ([".mnist.zip.isohub", "mnist.zip"] if in_a_directory else [])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_legacy_zip_is_hostile_too(server: FileServer, place: Path) -> None:
    for name, content in (("bomb", bytes(64 << 20)), ("pickle", Evil.saved(place / "ran"))):
        with pytest.raises(IntegrityError):
            load_state_dict_from_url(server.add(f"/{name}.zip", zipped(content)))
    assert names(place) == []


def test_map_location(server: FileServer) -> None:
    url = server.add("/m.pth", NEW)
    assert load_state_dict_from_url(url, map_location=torch.device("meta"))["layer.bias"].is_meta
    assert total(load_state_dict_from_url(url, map_location={"cuda:0": "cpu"})) == SUM
    assert total(load_state_dict_from_url(url, map_location=lambda storage, _: storage)) == SUM
    with pytest.raises(RuntimeError, match="nonsense"):
        load_state_dict_from_url(url, map_location="nonsense")


class Evil:
    """Pickled code that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)

    @classmethod
    def saved(cls, path: Path) -> bytes:
        return saved(cls(path), old=True)


def test_weights_only_is_the_default(server: FileServer, place: Path) -> None:
    url = server.add("/m.pth", Evil.saved(place / "ran"))
    for options in ({}, {"model_dir": place / "models"}):
        with pytest.raises(IntegrityError, match="mkdir") as raised:
            load_state_dict_from_url(url, **options)
        assert "lets its author run code in this process" in (raised.value.hint or "")
        assert "Re-running" not in str(raised.value)
    assert not (place / "ran").exists()
    load_state_dict_from_url(url, weights_only=False)
    assert (place / "ran").is_dir()


def test_torch_s_own_switch_does_not_switch_it_off(
    server: FileServer, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(IntegrityError):
        load_state_dict_from_url(server.add("/m.pth", Evil.saved(place / "ran")))
    assert names(place) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "begins with b''"),
        (b"<!DOCTYPE html><html>", "<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs"),
        (b"\x1b[31m", "begins with"),
        (NEW[:-100], "central directory"),
        (OLD[:40], "too early|truncated"),
        (OLD[:-20], "corrupted|EOF"),
    ],
    ids=["empty", "html", "lfs", "escape", "cut", "old and cut", "old and short"],
)
def test_what_is_no_checkpoint(server: FileServer, content: bytes, reason: str) -> None:
    url = server.add("/m.pth", content)
    for weights_only in (True, False):
        with pytest.raises(IntegrityError, match="is no checkpoint that can be loaded") as raised:
            load_state_dict_from_url(url, weights_only=weights_only)
        assert re.search(reason, raised.value.message)
        assert raised.value.url == url
        assert "\x1b" not in str(raised.value)
        # Not what helps here.
        assert "weights_only=False" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("in_a_directory", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>",
        NEW[:-100],
        OLD[:40],
        OLD[:-20],
        zipped(b"<!DOCTYPE html>"),
        zipped(NEW)[:-30] + b"PK\5\6",
    ],
    ids=["html", "cut", "old and cut", "old and short", "html in a zip", "cut zip"],
)
def test_a_bad_answer_is_not_kept(server: FileServer, place: Path, content: bytes, in_a_directory: bool) -> None:
    options: dict[str, Any] = {"model_dir": place} if in_a_directory else {}
    url = server.add("/m.pth", content)
    for count in (1, 2):
        with pytest.raises(IntegrityError) as raised:
            load_state_dict_from_url(url, **options)
        assert "the next call asks the URL anew" in (raised.value.hint or "")
        assert server.count() == count
        assert server.requests[-1].headers.get("If-None-Match") is None
    server.replace("/m.pth", NEW)
    for _ in range(2):
        assert total(load_state_dict_from_url(url, **options)) == SUM
    assert server.count() == 3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_damaged_zip_is_not_kept(server: FileServer) -> None:
    content = bytearray(zipped(OLD))
    content[60] ^= 0xFF
    url = server.add("/m.zip", bytes(content))
    for count in (1, 2):
        with pytest.raises(IntegrityError, match="no sound zip file") as raised:
            load_state_dict_from_url(url)
        assert "anew" in (raised.value.hint or "")
        assert server.count() == count


def test_a_zip_of_something_else_is_not_kept(server: FileServer) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("one.txt", "two.txt"):
            archive.writestr(name, "no weights")
    url = server.add("/m.pth", buffer.getvalue())
    for count in (1, 2):
        with pytest.raises(IntegrityError, match=r"weights_only=True: file in archive is not in a subdir") as raised:
            load_state_dict_from_url(url)
        assert "anew" in (raised.value.hint or "")
        assert server.count() == count
    server.replace("/m.pth", NEW)
    assert total(load_state_dict_from_url(url)) == SUM


@pytest.mark.parametrize("in_a_directory", [False, True])
def test_what_another_answer_would_not_mend_is_kept(
    server: FileServer, place: Path, monkeypatch: pytest.MonkeyPatch, in_a_directory: bool
) -> None:
    options: dict[str, Any] = {"model_dir": place / "models"} if in_a_directory else {}
    page = b"<!DOCTYPE html>"
    program = server.add("/m.pth", Evil.saved(place / "ran"))
    named = server.add(f"/m-{digits(page)}.pth", page)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="mkdir") as raised:
            load_state_dict_from_url(program, **options)
        assert "anew" not in (raised.value.hint or "")
        with pytest.raises(IntegrityError, match="DOCTYPE"):
            load_state_dict_from_url(named, check_hash=True, **options)
    assert server.count() == 2
    url = server.add("/page.pth", page)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "fault_of", lambda *_, **__: None)
        with pytest.raises(UnpicklingError):  # so that it is kept, to be met offline
            load_state_dict_from_url(url, **options)
    monkeypatch.setenv("ISOHUB_OFFLINE", "1")
    for _ in range(2):
        with pytest.raises(IntegrityError, match="DOCTYPE") as raised:
            load_state_dict_from_url(url, **options)
        assert "anew" not in (raised.value.hint or "")


def test_a_bad_file_of_the_caller_s_own_is_kept(server: FileServer, place: Path) -> None:
    url = server.add("/m.pth", NEW)
    (place / "m.pth").write_bytes(b"mine")
    for given, options in ((url, {"model_dir": place}), ((place / "m.pth").as_uri(), {})):
        with pytest.raises(IntegrityError, match="begins with b'mine'") as raised:
            load_state_dict_from_url(given, **options)
        assert "anew" not in (raised.value.hint or "")
    assert server.count() == 0
    assert names(place) == ["m.pth"]


def test_a_bad_answer_in_a_store_that_is_only_read(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.add("/m.pth", b"<!DOCTYPE html>")

    def refuse(*_: object, **__: object) -> None:
        raise SourceUnavailableError("the store is only read")

    monkeypatch.setattr(checkpoints.Weights, "forget", refuse)
    with pytest.raises(IntegrityError, match="DOCTYPE") as raised:
        load_state_dict_from_url(url)
    assert "anew" not in (raised.value.hint or "")


def test_a_checkpoint_of_a_device_that_is_not_here(server: FileServer) -> None:
    content = OLD.replace(b"X\x03\x00\x00\x00cpu", b"X\x07\x00\x00\x00cuda:99")
    assert content != OLD
    url = server.add("/m.pth", content)
    for weights_only in (True, False):
        with pytest.raises(RuntimeError, match="Attempting to deserialize object on") as raised:
            load_state_dict_from_url(url, weights_only=weights_only)
        assert not isinstance(raised.value, IntegrityError)
        assert "hint: map_location='cpu'" in str(raised.value)
        with pytest.raises(RuntimeError) as raised:
            load_state_dict_from_url(url, map_location="cuda:98", weights_only=weights_only)
        assert "hint" not in str(raised.value)
    assert total(load_state_dict_from_url(url, map_location="cpu")) == SUM
    assert server.count() == 1


def test_a_file_that_is_not_there(server: FileServer, place: Path) -> None:
    for act in (
        lambda: load_state_dict_from_url(server.url + "/no.pth"),
        lambda: load_state_dict_from_url(server.url + "/no.pth", model_dir=place),
        lambda: download_url_to_file(server.url + "/no.pth", place / "m"),
    ):
        with pytest.raises(SourceUnavailableError, match="HTTP 404") as raised:
            act()
        assert raised.value.status == 404
        assert "look at the URL" in (raised.value.hint or "")


def test_a_full_disk_is_named(server: FileServer, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.add("/m.pth", NEW)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write(2) has it, without a name

    monkeypatch.setattr("isohub.repos.transfer._write", full)
    for act in (
        lambda: download_url_to_file(url, place / "m"),
        lambda: load_state_dict_from_url(url, model_dir=place, file_name="m"),
    ):
        with pytest.raises(OSError, match="No space left on device") as raised:
            act()
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(place / "m"))
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        (Fault(status=429, headers={"Retry-After": "9999"}), "wait"),
        (Fault(status=403, headers={"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "99999999999"}), "wait"),
        (Fault(status=300), "look at the URL"),
        (Fault(reset=0), "check the network and the proxy settings (HTTPS_PROXY)"),
    ],
    ids=["429", "403", "300", "reset"],
)
def test_a_hint_speaks_of_the_file_and_of_no_commit(server: FileServer, place: Path, fault: Fault, hint: str) -> None:
    url = server.add("/m.pth", b"content", etag=None)
    server.fail("/m.pth", fault)
    for act in (lambda: load_state_dict_from_url(url), lambda: download_url_to_file(url, place / "m")):
        with pytest.raises(SourceUnavailableError) as raised:
            act()
        assert (raised.value.hint or "").startswith(hint)
        assert "commit" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_a_program(server: FileServer) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), buffer)
    with pytest.raises(IntegrityError, match="weights_only=True") as raised:
        load_state_dict_from_url(server.add("/m.pt", buffer.getvalue()))
    assert "isohub.load" in (raised.value.hint or "")


# Hashes in names


@pytest.mark.parametrize("in_a_directory", [False, True])
def test_check_hash(server: FileServer, place: Path, in_a_directory: bool) -> None:
    options: dict[str, Any] = {"check_hash": True} | ({"model_dir": place} if in_a_directory else {})
    for name in (f"m-{digits(NEW)}.pth", f"model-50.v1-{digits(NEW, 12)}.pth", f"m-{digits(NEW, 64)}.pth"):
        assert total(load_state_dict_from_url(server.add(f"/{name}", NEW), **options)) == SUM
    plain = server.add("/download", NEW)
    assert total(load_state_dict_from_url(plain, file_name=f"m-{digits(NEW)}.pth", **options)) == SUM
    with pytest.raises(IntegrityError) as raised:
        load_state_dict_from_url(server.add("/m-00000000.pth", NEW), **options)
    assert (raised.value.expected, raised.value.got) == ("00000000", digits(NEW, 64))
    assert not (place / "m-00000000.pth").exists()


@pytest.mark.parametrize(
    "name", ["m.pth", "m-50.v1.pth", f"m-{digits(NEW, 7)}.pth", f"m-{digits(NEW)}", "model-v1.0.pth"]
)
def test_check_hash_with_nothing_to_check(server: FileServer, name: str) -> None:
    url = server.add(f"/{name}", NEW)
    with pytest.raises(InvalidReferenceError, match="nothing to check") as raised:
        load_state_dict_from_url(url, check_hash=True)
    assert isinstance(raised.value, ValueError)
    assert name in str(raised.value)
    assert server.count() == 0
    with pytest.raises(InvalidReferenceError, match="different hashes"):
        load_state_dict_from_url(url.replace(name, "m-00000000.pth"), file_name="m-11111111.pth", check_hash=True)


@pytest.mark.parametrize("in_a_directory", [False, True])
def test_check_hash_looks_at_what_is_here(server: FileServer, place: Path, in_a_directory: bool) -> None:
    options: dict[str, Any] = {"model_dir": place} if in_a_directory else {}
    name = f"m-{digits(NEW)}.pth"
    url = server.add(f"/{name}", saved({"other": torch.zeros(1)}))
    assert total(load_state_dict_from_url(url, **options)) == 0
    with pytest.raises(IntegrityError):
        load_state_dict_from_url(url, check_hash=True, **options)
    server.replace(f"/{name}", NEW)
    assert total(load_state_dict_from_url(url, check_hash=True, **options)) == SUM
    assert total(load_state_dict_from_url(url, **options)) == SUM


# A directory of the caller's


def test_two_urls_of_one_name_do_not_meet(server: FileServer, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = server.add("/one/model.pth", saved({"a": torch.ones(1)}))
    two = server.add("/two/model.pth", saved({"a": torch.ones(2)}))
    for _ in range(2):
        assert total(load_state_dict_from_url(one, model_dir=place)) == 1
        assert total(load_state_dict_from_url(two, model_dir=place)) == 2
    assert server.count() == 4
    assert f"is of {two}, not of {one}" in caplog.text
    assert len(caplog.messages) == 3  # each is said once
    caplog.clear()
    assert total(load_state_dict_from_url(two + "?signature=s3cret", model_dir=place)) == 2
    (said,) = caplog.messages
    assert f"is of {two}, not of this query" in said
    assert "s3cret" not in said
    assert total(load_state_dict_from_url(two, model_dir=place)) == 2
    server.forget()
    for _ in range(2):
        assert total(load_state_dict_from_url(one)) == 1
        assert total(load_state_dict_from_url(two)) == 2
        assert total(load_state_dict_from_url(two, model_dir=place)) == 2
    assert server.count() == 2
    assert names(place) == [".model.pth.isohub", "model.pth"]


def test_a_file_of_the_caller_s_own_is_used(server: FileServer, place: Path) -> None:
    name = f"model-{digits(NEW)}.pth"
    url = server.add(f"/{name}", NEW)
    (place / name).write_bytes(saved({"mine": torch.ones(5)}))
    assert total(load_state_dict_from_url(url, model_dir=place)) == 5
    with pytest.raises(IntegrityError, match="expected"):
        load_state_dict_from_url(url, model_dir=place, check_hash=True)
    assert total(load_state_dict_from_url(url, model_dir=place)) == 5
    (place / name).write_bytes(NEW)
    assert total(load_state_dict_from_url(url, model_dir=place, check_hash=True)) == SUM
    assert server.count() == 0
    assert names(place) == [name]
    os.replace(place / name, place / "elsewhere")
    (place / name).symlink_to("elsewhere")
    assert total(load_state_dict_from_url(url, model_dir=place, check_hash=True)) == SUM


def test_a_placed_file_that_the_caller_changed_is_his(server: FileServer, place: Path) -> None:
    url = server.add("/model.pth", NEW)
    load_state_dict_from_url(url, model_dir=place)
    (place / "model.pth").write_bytes(saved({"mine": torch.ones(5)}))
    assert total(load_state_dict_from_url(url, model_dir=place)) == 5
    assert server.count() == 1


def test_offline(server: FileServer, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, other = server.add("/model.pth", NEW), server.add("/other/model.pth", NEW)
    load_state_dict_from_url(url)
    load_state_dict_from_url(url, model_dir=place)
    server.forget()
    monkeypatch.setenv("ISOHUB_OFFLINE", "1")
    assert total(load_state_dict_from_url(url)) == total(load_state_dict_from_url(url, model_dir=place)) == SUM
    for options in ({}, {"model_dir": place}):
        with pytest.raises(OfflineError):
            load_state_dict_from_url(other, **options)
    assert (place / "model.pth").read_bytes() == NEW
    assert server.count() == 0


def test_many_loads_at_once(server: FileServer, place: Path) -> None:
    urls = [
        server.add("/one/m.pth", saved({"a": torch.ones(1)})),
        server.add("/two/m.pth", saved({"a": torch.ones(2)})),
    ]
    found: list[tuple[int, float]] = []

    def work(number: int) -> None:
        found.append((number % 2, total(load_state_dict_from_url(urls[number % 2], model_dir=place))))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(0, 1.0)] * 4 + [(1, 2.0)] * 4
    server.forget()
    url = server.add("/alone.pth", NEW)
    threads = [threading.Thread(target=load_state_dict_from_url, args=(url, place)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.count() == 1


@pytest.mark.parametrize("in_a_directory", [False, True])
def test_file_urls_are_read_where_they_are(place: Path, in_a_directory: bool) -> None:
    options: dict[str, Any] = {"model_dir": place / "models"} if in_a_directory else {}
    (place / f"m-{digits(NEW)}.pth").write_bytes(NEW)
    url = f"file://{place}/m-{digits(NEW)}.pth"
    assert total(load_state_dict_from_url(url, check_hash=True, **options)) == SUM
    with pytest.raises(SourceUnavailableError):
        load_state_dict_from_url(f"file://{place}/nothing", **options)


def test_nothing_is_said_on_stdout(
    server: FileServer, place: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load_state_dict_from_url(server.add("/m.pth", NEW) + "?sig=s3cret")
    load_state_dict_from_url(server.url + "/m.pth?sig=s3cret", model_dir=place)
    assert capfd.readouterr() == ("", "")
    assert "s3cret" not in caplog.text
    assert all(b"s3cret" not in path.read_bytes() for path in place.iterdir())


def test_downloading_needs_no_torch(server: FileServer, place: Path) -> None:
    url = server.add("/m.pth", NEW)
    program = (
        "import sys; from isohub.checkpoints import download_url_to_file as d; d(sys.argv[1], sys.argv[2])\n"
        "assert not {'torch', 'numpy', 'pickle'} & set(sys.modules) - {'pickle'}"
    )
    subprocess.run([sys.executable, "-c", program, url, str(place / "m")], cwd=PROJECT, check=True)
