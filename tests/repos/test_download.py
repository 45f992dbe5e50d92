from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import pty
import random
import signal
import struct
import subprocess
import sys
import termios
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isohub.errors import FetchError, IntegrityError, SourceUnavailableError
from isohub.repos import http
from isohub.repos.credentials import Credentials
from isohub.repos.download import Downloaded, Wanted, download, download_all
from isohub.repos.http import HttpClient
from tests.conftest import eventually, open_descriptors
from tests.servers.files import Fault, FileServer

SIZE = 1_000_000
CONTENT = random.Random(0).randbytes(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = random.Random(1).randbytes(SIZE - 1000)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as made:
        made.add("/file", CONTENT)
        yield made


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads" / "file.part"


def get(server: FileServer, into: Path, path: str = "/file", **options: Any) -> Downloaded:
    with HttpClient(Credentials(anonymous=True)) as client:
        return download(client, server.url + path, into, **{"name": "file", "limit_bytes": 10_000_000, **options})


def ranges(server: FileServer) -> list[str | None]:
    return [request.headers.get("Range") for request in server.requests]


def left(into: Path) -> list[str]:
    return sorted(path.name for path in into.parent.iterdir())


def partial(server: FileServer, into: Path, size: int = 393_216) -> None:
    """Leave a part of the file, as a call that failed does."""
    server.fail("file", Fault(reset=size), times=1)
    server.fail("file", Fault(status=404), times=1)
    with pytest.raises(SourceUnavailableError, match="404"):
        get(server, into)
    assert into.stat().st_size == size
    assert left(into) == ["file.part", "file.part.json"]
    server.behave()
    server.forget()


def test_a_file(server: FileServer, into: Path) -> None:
    done = get(server, into)
    assert into.read_bytes() == CONTENT
    assert (done.sha256, done.bytes, done.not_modified) == (SHA256, SIZE, False)
    assert (done.etag or "").startswith('"')
    assert done.last_modified == "Tue, 14 Nov 2023 22:13:20 GMT"
    assert left(into) == ["file.part"]
    assert server.requests[0].headers["Accept-Encoding"] == "identity"
    assert ranges(server) == [None]


def test_an_empty_file(server: FileServer, into: Path) -> None:
    server.add("/empty", b"")
    assert get(server, into, "/empty", limit_bytes=0).bytes == 0
    assert into.read_bytes() == b""
    assert left(into) == ["file.part"]


def test_a_file_of_one_byte_is_resumed(server: FileServer, into: Path) -> None:
    server.add("/one", b"1")
    server.fail("one", Fault(reset=0), times=2)
    assert get(server, into, "/one").bytes == 1


# --- continued within a call


@pytest.mark.parametrize("fault", [Fault(reset=851_968), Fault(truncate=851_968)])
def test_a_break_continues_where_it_was(server: FileServer, into: Path, fault: Fault) -> None:
    server.fail("file", fault, times=1)
    assert get(server, into, sha256=SHA256).sha256 == SHA256
    assert into.read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=851968-"]
    assert server.requests[1].headers["If-Range"].startswith('"')
    assert server.requests[1].headers["Accept-Encoding"] == "identity"


def test_a_stall_continues_where_it_was(server: FileServer, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 0.2)
    server.fail("file", Fault(stall=524_288), times=1)
    assert get(server, into).sha256 == SHA256
    assert ranges(server) == [None, "bytes=524288-"]


def test_progress_counts_the_tries_anew(server: FileServer, into: Path) -> None:
    server.fail("file", Fault(reset=65_536), times=9)
    assert get(server, into).sha256 == SHA256
    assert ranges(server) == [None, *(f"bytes={n * 65_536}-" for n in range(1, 10))]


def test_without_progress_it_ends(server: FileServer, into: Path) -> None:
    server.fail("file", Fault(reset=65_536), times=1)
    server.fail("file", Fault(reset=0))
    with pytest.raises(SourceUnavailableError, match="ended"):
        get(server, into)
    assert ranges(server) == [None, *["bytes=65536-"] * (http.TRIES - 1)]
    assert left(into) == ["file.part", "file.part.json"]


@pytest.mark.parametrize(
    ("served", "headers"),
    [
        ({"etag": "weak"}, {}),
        ({"etag": None, "last_modified": False}, {}),
        ({}, {"Accept-Ranges": "none"}),
        ({}, {"ETag": "no quotes", "Last-Modified": None}),
        ({}, {"ETag": '"\x7f"'}),
        ({}, {"ETag": f'"{"x" * 600}"'}),
        ({"etag": None}, {"Last-Modified": "yesterday"}),
        ({"etag": None}, {"Last-Modified": "Tue, 14 Nov 2999 22:13:20 GMT"}),  # younger than the answer
        ({"etag": None}, {"Date": None}),
        ({"etag": None}, {"Date": "today"}),
    ],
)
def test_what_cannot_be_continued_starts_anew(
    server: FileServer, into: Path, served: dict[str, Any], headers: dict[str, str]
) -> None:
    server.add("/file", CONTENT, **served)
    fault = server.fail("file", Fault(reset=851_968, headers=headers), times=2)
    assert get(server, into).sha256 == SHA256
    assert ranges(server) == [None, None, None]
    # What has no end that it advances to is ended by the count of tries, and leaves nothing.
    server.forget()
    server.fail("file", fault)
    with pytest.raises(SourceUnavailableError):
        get(server, into)
    assert server.count() == http.TRIES
    assert left(into) == []


def test_a_date_is_enough_where_there_is_no_etag(server: FileServer, into: Path) -> None:
    server.add("/file", CONTENT, etag=None)
    server.fail("file", Fault(reset=851_968), times=1)
    assert get(server, into).etag is None
    assert ranges(server) == [None, "bytes=851968-"]
    assert server.requests[1].headers["If-Range"] == "Tue, 14 Nov 2023 22:13:20 GMT"
    assert into.read_bytes() == CONTENT


def test_a_server_without_ranges(server: FileServer, into: Path) -> None:
    server.add("/file", CONTENT, ranges=False)
    server.fail("file", Fault(reset=851_968, headers={"Accept-Ranges": None}), times=2)
    assert get(server, into).sha256 == SHA256
    assert ranges(server) == [None, "bytes=851968-", "bytes=851968-"]


def test_a_file_that_changes_meanwhile(server: FileServer, into: Path) -> None:
    server.fail("file", Fault(reset=851_968, then=lambda: server.replace("/file", OTHER)), times=1)
    assert get(server, into).sha256 == hashlib.sha256(OTHER).hexdigest()
    assert into.read_bytes() == OTHER
    assert ranges(server) == [None, "bytes=851968-"]


def test_a_file_that_changes_at_each_try_is_given_up(server: FileServer, into: Path) -> None:
    contents = iter([OTHER, CONTENT] * 20)
    server.fail("file", Fault(reset=851_968, then=lambda: server.replace("/file", next(contents))))
    with pytest.raises(SourceUnavailableError):
        get(server, into)
    assert server.count() == http.TRIES


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=416),
        Fault(content_range="bytes 0-606783/1000000"),
        Fault(content_range="bytes 393217-999999/1000000"),
        Fault(content_range="bytes 393216-999998/1000000"),
        Fault(content_range="bytes 393216-999999/1000001"),
        Fault(content_range="bytes 393216-1000000/1000001"),
        Fault(content_range="bytes 393216-999999/*"),
        Fault(content_range="bytes 393216-1000000/1000001", chunked=True),
        Fault(content_range="bytes */1000000"),
        Fault(content_range="nonsense\x7f"),
        Fault(headers={"Content-Range": None}),
        Fault(headers={"ETag": '"another"'}),
        Fault(headers={"ETag": None}),
        Fault(headers={"Content-Encoding": "gzip"}),
        Fault(length=606_783),
        Fault(length=700_000),
        Fault(chunked=True, headers={"Content-Range": None}),
    ],
)
def test_parts_that_do_not_fit_are_refused(server: FileServer, into: Path, fault: Fault) -> None:
    partial(server, into)
    server.fail("file", fault, times=1)
    assert get(server, into).sha256 == SHA256
    assert into.read_bytes() == CONTENT
    assert ranges(server) == ["bytes=393216-", None]


def test_a_server_whose_parts_do_not_fit_is_asked_for_no_more_of_them(server: FileServer, into: Path) -> None:
    partial(server, into)
    server.fail("file", Fault(content_range="nonsense"), times=1)
    server.fail("file", Fault(reset=851_968), times=1)
    assert get(server, into).sha256 == SHA256
    assert ranges(server) == ["bytes=393216-", None, None]


def test_a_part_in_chunks_fits(server: FileServer, into: Path) -> None:
    partial(server, into)
    server.fail("file", Fault(chunked=True), times=1)
    assert get(server, into).sha256 == SHA256
    assert ranges(server) == ["bytes=393216-"]


def test_a_part_that_goes_on_too_long(server: FileServer, into: Path) -> None:
    partial(server, into)
    headers = {"Content-Range": "bytes 393216-999999/1000000", "ETag": f'"{SHA256[:16]}"'}
    server.fail("file", Fault(status=206, body=CONTENT[393_216:] + b"more", headers=headers, chunked=True), times=1)
    assert get(server, into).sha256 == SHA256
    assert into.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [206, 416])
def test_parts_that_nobody_asked_for(server: FileServer, into: Path, status: int) -> None:
    server.fail("file", Fault(status=status, body=b"x", headers={"Content-Range": "bytes 0-0/1"}))
    with pytest.raises(SourceUnavailableError, match="nobody asked for") as caught:
        get(server, into)
    assert caught.value.status == status
    assert server.count() == http.TRIES
    assert left(into) == []


# --- continued by a later call


def test_a_later_call_continues(server: FileServer, into: Path) -> None:
    partial(server, into)
    assert get(server, into, sha256=SHA256).bytes == SIZE
    assert into.read_bytes() == CONTENT
    assert ranges(server) == ["bytes=393216-"]
    assert left(into) == ["file.part"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_another_process_continues(server: FileServer, into: Path, number: signal.Signals) -> None:
    fault = server.fail("file", Fault(stall=589_824), times=1)
    code = (
        "import sys; from pathlib import Path\n"
        "from isohub.repos.credentials import Credentials\nfrom isohub.repos.download import download\n"
        "from isohub.repos.http import HttpClient\n"
        "with HttpClient(Credentials()) as client:\n"
        "    download(client, sys.argv[1], Path(sys.argv[2]), name='x', limit_bytes=10**7)\n"
    )
    arguments = [sys.executable, "-c", code, server.url + "/file", str(into)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE) as process:
        assert fault.stalled.wait(60)
        assert eventually(lambda: into.stat().st_size >= 524_288)
        process.send_signal(number)
        process.communicate()
    fault.resume.set()
    kept = into.stat().st_size
    assert 524_288 <= kept <= 589_824
    assert get(server, into).sha256 == SHA256
    assert ranges(server) == [None, f"bytes={kept}-"]
    assert into.read_bytes() == CONTENT


def test_a_whole_file_that_was_not_taken(server: FileServer, into: Path) -> None:
    partial(server, into)
    into.write_bytes(CONTENT)
    assert get(server, into).sha256 == SHA256
    assert ranges(server) == [f"bytes={SIZE - 1}-"]  # which shows that it is still the same
    assert into.read_bytes() == CONTENT


def test_a_part_of_what_has_changed_since(server: FileServer, into: Path) -> None:
    partial(server, into)
    server.replace("/file", OTHER)
    assert get(server, into).sha256 == hashlib.sha256(OTHER).hexdigest()
    assert into.read_bytes() == OTHER


@pytest.mark.parametrize("damage", ["record", "no record", "longer", "other address", "empty", "limit"])
def test_parts_that_are_not_trusted(server: FileServer, into: Path, damage: str) -> None:
    partial(server, into)
    record, path, options = into.with_name("file.part.json"), "/file", {}
    if damage == "record":
        record.chmod(0o644)
        record.write_bytes(record.read_bytes().replace(b"1000000", b"1000001"))
    elif damage == "no record":
        record.unlink()
    elif damage == "longer":
        into.write_bytes(CONTENT + b"x")
    elif damage == "other address":
        path = "/file?x"
    elif damage == "empty":
        into.write_bytes(b"")
    else:
        into.write_bytes(CONTENT)
        options = {"limit_bytes": 393_215}
        server.replace("/file", OTHER[:1000])
    done = get(server, into, path, **options)
    assert ranges(server) == [None]
    assert into.read_bytes() == (OTHER[:1000] if options else CONTENT)
    assert done.sha256 == hashlib.sha256(into.read_bytes()).hexdigest()


def test_a_damaged_part_is_found_and_removed(server: FileServer, into: Path) -> None:
    partial(server, into)
    into.write_bytes(b"\0" + CONTENT[1:393_216])
    with pytest.raises(IntegrityError, match="sha256") as caught:
        get(server, into, sha256=SHA256)
    assert "try again" in (caught.value.hint or "")
    assert left(into) == []
    assert get(server, into, sha256=SHA256).sha256 == SHA256


def test_a_refusal_keeps_the_part(server: FileServer, into: Path) -> None:
    partial(server, into)
    server.fail("file", Fault(status=503), times=3)
    with pytest.raises(SourceUnavailableError, match="503"):
        get(server, into)
    assert into.read_bytes() == CONTENT[:393_216]
    assert get(server, into).sha256 == SHA256
    assert ranges(server)[-1] == "bytes=393216-"


# --- what is whole, and what is too much


@pytest.mark.parametrize("prefix", ["", SHA256[:8], SHA256[:8].upper(), SHA256])
def test_hashes_that_fit(server: FileServer, into: Path, prefix: str) -> None:
    assert get(server, into, hash_prefix=prefix, sha256=SHA256.upper()).sha256 == SHA256


@pytest.mark.parametrize("options", [{"hash_prefix": "00"}, {"sha256": SHA256[:8]}, {"sha256": "0" * 64}])
def test_hashes_that_do_not(server: FileServer, into: Path, options: dict[str, str]) -> None:
    with pytest.raises(IntegrityError, match="expected") as caught:
        get(server, into, **options)
    assert caught.value.got == SHA256
    assert [caught.value.expected] == list(options.values())
    assert left(into) == []
    assert server.count() == 1


def test_a_length_that_is_too_short_is_the_servers_word_but_not_the_hashs(server: FileServer, into: Path) -> None:
    server.fail("file", Fault(length=1000))
    assert get(server, into).bytes == 1000
    with pytest.raises(IntegrityError):
        get(server, into, sha256=SHA256)


def test_a_length_that_is_too_long(server: FileServer, into: Path) -> None:
    server.add("/file", CONTENT, etag=None, last_modified=False)
    server.fail("file", Fault(length=SIZE + 1))
    with pytest.raises(SourceUnavailableError, match="ended"):
        get(server, into)
    assert left(into) == []
    server.behave()
    server.fail("file", Fault(length=SIZE + 1), times=1)
    assert get(server, into).sha256 == SHA256


@pytest.mark.parametrize("value", [None, "-1", "1e6", "many"])
def test_a_body_without_an_end_needs_a_hash(server: FileServer, into: Path, value: str | None) -> None:
    fault = server.fail("file", Fault(headers={"Content-Length": value}))
    with pytest.raises(SourceUnavailableError, match="does not say how long"):
        get(server, into)
    assert left(into) == []
    if value is None:
        assert get(server, into, hash_prefix=SHA256[:10]).sha256 == SHA256
        fault.truncate = 524_288
        with pytest.raises(IntegrityError):
            get(server, into, hash_prefix=SHA256[:10])
        assert left(into) == []


def test_chunks_have_an_end(server: FileServer, into: Path) -> None:
    server.fail("file", Fault(chunked=True), times=1)
    assert get(server, into).sha256 == SHA256
    server.fail("file", Fault(chunked=True, truncate=524_288), times=1)
    assert get(server, into).sha256 == SHA256
    assert (ranges(server)[-1] or "").startswith("bytes=")


@pytest.mark.parametrize("fault", [Fault(), Fault(chunked=True), Fault(gzip=True), Fault(gzip=True, chunked=True)])
def test_a_limit(server: FileServer, into: Path, fault: Fault) -> None:
    server.fail("file", fault)
    with pytest.raises(IntegrityError, match=r"has (more than )?\d+ bytes; at most 999999") as caught:
        get(server, into, limit_bytes=SIZE - 1)
    assert caught.value.expected == "at most 999999"
    assert left(into) == []
    assert server.count() == 1
    assert get(server, into, limit_bytes=SIZE).sha256 == SHA256


def test_a_limit_on_what_is_continued(server: FileServer, into: Path) -> None:
    server.fail("file", Fault(reset=393_216, chunked=True), times=1)
    with pytest.raises(IntegrityError, match="has 1000000 bytes"):
        get(server, into, limit_bytes=SIZE - 1)
    assert left(into) == []


def test_a_gzip_bomb(server: FileServer, into: Path) -> None:
    server.add("/bomb", bytes(100_000_000))
    server.fail("bomb", Fault(gzip=True))
    with pytest.raises(IntegrityError, match="more than 10000000"):
        get(server, into, "/bomb")
    assert left(into) == []


def test_what_unpacks_to_far_more_than_came(server: FileServer, into: Path) -> None:
    """Below the limit of what is wanted, and still nothing that anyone would compress."""
    server.add("/zeros", bytes(100_000_000))
    server.fail("zeros", Fault(gzip=True))
    with pytest.raises(IntegrityError, match=r"compressed, though that was not asked for.*more than 200 to 1"):
        get(server, into, "/zeros", limit_bytes=200_000_000)
    assert left(into) == []
    server.behave()
    assert get(server, into, "/zeros", limit_bytes=200_000_000).bytes == 100_000_000
    # Small files may, and so may large ones that shrink as files do.
    server.add("/small", bytes(10_000_000))
    server.add("/usual", hashlib.sha256(b"").digest() * 100 + os.urandom(200_000) + bytes(20_000_000))
    for path in ("/small", "/usual"):
        server.fail(path, Fault(gzip=True))
        assert get(server, into, path, limit_bytes=200_000_000).bytes >= 10_000_000


def test_what_ends_early_may_come_later(server: FileServer, into: Path) -> None:
    for fault in (Fault(truncate=100), Fault(reset=100), Fault(status=503)):
        server.behave()
        server.fail("file", fault)
        with pytest.raises(SourceUnavailableError) as caught:
            get(server, into)
        assert caught.value.passing is True


def test_what_is_compressed_all_the_same(server: FileServer, into: Path) -> None:
    server.fail("file", Fault(gzip=True, truncate=524_288), times=1)
    server.fail("file", Fault(gzip=True), times=1)
    assert get(server, into, sha256=SHA256).bytes == SIZE
    assert ranges(server) == [None, None]  # no part of it can be continued
    server.fail("file", Fault(headers={"Content-Encoding": "br"}), times=1)
    with pytest.raises(SourceUnavailableError, match="not asked for"):
        get(server, into)


def test_what_is_here_already(server: FileServer, into: Path) -> None:
    etag = get(server, into).etag
    into.unlink()
    done = get(server, into, if_none_match=etag)
    assert (done.not_modified, done.sha256, done.bytes, done.etag) == (True, "", 0, etag)
    assert left(into) == []
    server.replace("/file", OTHER)
    assert not get(server, into, if_none_match=etag).not_modified
    assert into.read_bytes() == OTHER
    server.fail("file", Fault(status=304, body=b""))
    with pytest.raises(SourceUnavailableError, match="304"):
        get(server, into)


def test_other_statuses_are_errors(server: FileServer, into: Path) -> None:
    for status in (300, 404, 500):
        server.fail("file", Fault(status=status), times=3)
        with pytest.raises(SourceUnavailableError, match=str(status)):
            get(server, into)
        assert left(into) == []
        server.behave()
    server.fail("file", Fault(status=500), times=1)
    assert get(server, into).sha256 == SHA256


def test_redirects(server: FileServer, into: Path) -> None:
    with FileServer("127.0.0.2") as other:
        other.add("/file", CONTENT)
        server.fail("from", Fault(redirect=other.url + "/file?signature=s3cret"))
        other.fail("file", Fault(reset=327_680), times=1)
        assert get(server, into, "/from").sha256 == SHA256
        assert ranges(server) == ranges(other) == [None, "bytes=327680-"]


# --- the disk


def test_only_the_file_itself_is_written(server: FileServer, into: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    into.symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links") as caught:
        get(server, into)
    assert caught.value.errno == errno.ELOOP
    assert (tmp_path / "mine").read_text() == "mine"
    assert into.is_symlink()
    into.unlink()
    into.mkdir()
    with pytest.raises(IsADirectoryError):
        get(server, into)
    with pytest.raises(FileNotFoundError):
        get(server, into.parent / "missing" / "file")
    assert server.count() == 0


FULL = """
import resource, sys
from pathlib import Path
from isohub.repos.credentials import Credentials
from isohub.repos.download import download
from isohub.repos.http import HttpClient
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
try:
    with HttpClient(Credentials()) as client:
        download(client, sys.argv[1], Path(sys.argv[2]), name="x", limit_bytes=10**7)
except OSError as error:
    print(type(error).__module__, error.errno)
"""


@pytest.mark.parametrize("resumable", [True, False])
def test_a_full_disk(server: FileServer, into: Path, resumable: bool) -> None:
    server.add("/file", CONTENT, etag="strong" if resumable else "weak")
    arguments = [sys.executable, "-c", FULL, server.url + "/file", str(into)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout == f"builtins {errno.EFBIG}\n"
    assert server.count() == 1
    assert left(into) == (["file.part", "file.part.json"] if resumable else [])
    assert get(server, into).sha256 == SHA256
    assert ranges(server)[1:] == (["bytes=600000-"] if resumable else [None])


def test_no_descriptor_stays(server: FileServer, into: Path) -> None:
    get(server, into)
    before = open_descriptors()
    for fault in (Fault(), Fault(reset=10), Fault(status=500)):
        server.fail("file", fault, times=3)
        try:
            get(server, into, sha256="0" * 64)
        except FetchError:
            server.behave()
    assert eventually(lambda: open_descriptors() <= before)  # the server's ends close when it notices


# --- what is shown


SHOWN = """
import sys
from pathlib import Path
from isohub.repos.credentials import Credentials
from isohub.repos.download import download
from isohub.repos.http import HttpClient
with HttpClient(Credentials()) as client:
    download(client, sys.argv[1], Path(sys.argv[2]), name="the\\x1b[31mfile", limit_bytes=10**7, progress=sys.argv[3] == "1")
"""


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_a_terminal(server: FileServer, into: Path, progress: bool) -> None:
    partial(server, into)
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    arguments = [sys.executable, "-c", SHOWN, server.url + "/file", str(into), str(int(progress))]
    shown = b""
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=terminal) as process:
        os.close(terminal)
        try:
            while piece := os.read(main, 4096):
                shown += piece
        except OSError:  # EIO: the other end is closed
            pass
        os.close(main)
        assert process.communicate() == (b"", None)
    assert process.returncode == 0
    assert (b"the\\x1b[31mfile" in shown) == progress
    assert b"the\x1b" not in shown
    if progress:
        assert b" 39%" in shown  # what was there counts as there
    else:
        assert shown == b""


def test_progress_is_not_shown_elsewhere(
    server: FileServer, into: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    get(server, into, progress=True)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", None)
    get(server, into, progress=True)


def test_queries_are_kept_nowhere(server: FileServer, into: Path) -> None:
    server.fail("file", Fault(reset=393_216), times=1)
    server.fail("file", Fault(reset=0))
    texts = []
    for options in ({}, {"sha256": "0" * 64}, {"limit_bytes": 1}):
        with pytest.raises(FetchError) as caught:
            get(server, into, "/file?signature=s3cret", **options)
        record = into.with_name("file.part.json")
        texts += [record.read_text()] if record.exists() else []
        lines = "".join(traceback.format_exception(caught.value)).splitlines()
        texts += [line for line in lines if not line.startswith("  ")]
        texts.append(repr(caught.value.fields))
        server.behave()
    assert any("url_sha256" in text for text in texts)
    assert "s3cret" not in "\n".join(texts)


# --- several at once


def several(server: FileServer, into: Path, count: int) -> list[Wanted]:
    wanted = []
    for number in range(count):
        url = server.add(f"/{number}", CONTENT[number:])
        wanted.append(Wanted(url, into.with_name(f"{number}.part"), str(number), SIZE))
    return wanted


def make_client() -> HttpClient:
    return HttpClient(Credentials(anonymous=True))


def test_several_at_once(server: FileServer, into: Path) -> None:
    wanted = several(server, into, 6)
    faults = [server.fail(f"/{number}$", Fault(stall=1000)) for number in range(3)]

    def resume_once_all_are_under_way() -> None:
        for fault in faults:
            fault.stalled.wait()
        for fault in faults:
            fault.resume.set()

    thread = threading.Thread(target=resume_once_all_are_under_way, daemon=True)
    thread.start()
    done = download_all(make_client, wanted, workers=3)
    thread.join()
    assert [one.bytes for one in done] == [SIZE - number for number in range(6)]
    assert [one.into.read_bytes() == CONTENT[number:] for number, one in enumerate(wanted)] == [True] * 6
    assert download_all(make_client, []) == []


def test_the_first_failure_ends_the_others(server: FileServer, into: Path) -> None:
    wanted = several(server, into, 6)
    fault = server.fail("/0", Fault(stall=1000))
    clients: list[HttpClient] = []

    def counted() -> HttpClient:
        clients.append(make_client())
        return clients[-1]

    server.fail("/1", Fault(status=404))
    # Without an end from there, the first would stall for READ_TIMEOUT_S.
    with pytest.raises(SourceUnavailableError, match="404"):
        download_all(counted, wanted, workers=2)
    fault.resume.set()
    assert len(clients) == 2
    assert all(client.aborted for client in clients)
    assert not any(one.into.exists() and one.into.read_bytes() == CONTENT for one in wanted)
    assert server.count("/5") == 0
    assert not [one for one in threading.enumerate() if one.name.startswith("isohub-download")]


def test_a_disk_that_refuses_ends_all(server: FileServer, into: Path) -> None:
    wanted = several(server, into, 3)
    wanted[1].into.mkdir()
    with pytest.raises(IsADirectoryError):
        download_all(make_client, wanted)
