from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isohub.errors import IntegrityError
from isohub.repos.archive import extract_zip
from isohub.repos.tree import Limits
from tests.servers.git_repo import GitRepo

Entry = tuple[str, bytes, int]


def archive(*entries: Entry, comment: bytes = b"", compression: int = zipfile.ZIP_DEFLATED) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as opened:
        for name, content, mode in entries:
            info = zipfile.ZipInfo("placeholder")
            info.filename = info.orig_filename = name
            info.create_system = 3
            info.external_attr = mode << 16
            info.compress_type = compression
            opened.writestr(info, content)
        opened.comment = comment
    return buffer


def extract(data: io.BytesIO, into: Path, **options: object) -> None:
    into.mkdir(exist_ok=True)
    extract_zip(data, into, origin="https://server/x.zip", **options)  # type: ignore[arg-type]


FILE = stat.S_IFREG | 0o644
LINK = stat.S_IFLNK | 0o777
GOOD: Entry = ("top/hubconf.py", b"x = 1\n", FILE)


def test_what_git_archive_writes(git_repo: Callable[..., GitRepo], tmp_path: Path) -> None:
    repo = git_repo()
    (repo.path / "run.sh").write_text("#!/bin/sh\n")
    (repo.path / "run.sh").chmod(0o755)
    (repo.path / "link").symlink_to("pkg/a.py")
    files = {
        "hubconf.py": "x = 1\n",
        "pkg/a.py": "a\n",
        "pkg/empty": "",
        "d\u00e9j\u00e0/\u4e2d.txt": "u",
        "big": b"0" * 500_000,
    }
    sha = repo.commit(files)  # type: ignore[arg-type]
    repo.git("archive", "--format=zip", "--prefix=top/", "--output=../x.zip", sha)
    into = tmp_path / "into"
    into.mkdir()
    with (repo.path.parent / "x.zip").open("rb") as stream:
        extract_zip(stream, into, origin="x", commit=sha)
    for name, content in files.items():
        expected = content.encode() if isinstance(content, str) else content
        assert (into / name).read_bytes() == expected  # type: ignore[comparison-overlap]
    assert (into / "link").readlink() == Path("pkg/a.py")
    assert (into / "run.sh").stat().st_mode & 0o111
    assert not (into / "hubconf.py").stat().st_mode & 0o111


def test_directories_and_no_modes(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr("top/", b"")
        opened.writestr("top/sub/", b"")
        opened.writestr("top/f", b"1")
    extract(buffer, tmp_path / "into")
    assert (tmp_path / "into" / "f").read_bytes() == b"1"
    assert (tmp_path / "into" / "sub").is_dir()


@pytest.mark.parametrize(
    "entries",
    [
        [("/etc/x", b"", FILE)],
        [("top/../../x", b"", FILE)],
        [("../x", b"", FILE)],
        [("./x", b"", FILE)],
        [("top/a\\b", b"", FILE)],
        [("top\\a", b"", FILE)],
        [("C:/x", b"", FILE)],
        [("top/C:/x", b"", FILE)],
        [("top/a\0b", b"", FILE)],
        [GOOD, ("other/x", b"", FILE)],
        [("x", b"", FILE)],
        [GOOD, GOOD],
        [GOOD, ("top/HUBCONF.py", b"", FILE)],
        [("top/\u00e9", b"", FILE), ("top/e\u0301", b"", FILE)],
        [("top/.git/config", b"", FILE)],
        [("top/x", b"", stat.S_IFCHR | 0o644)],
        [("top/x", b"", stat.S_IFIFO | 0o644)],
        [("top/x", b"", stat.S_IFSOCK | 0o644)],
        [("top/x/", b"", LINK)],
        [("top/link", b"/etc/passwd", LINK)],
        [("top/link", b"../outside", LINK)],
        [("top/link", b"", LINK)],
        [("top/link", b"\xff\xfe", LINK)],
        [("top/link", b"x" * 5000, LINK)],
        [("top/link", b"sub", LINK), ("top/link/x", b"", FILE)],
        [("top/link", b"..", LINK), ("top/link/x", b"", FILE)],
        [("top/a/b/up", b"../..", LINK), ("top/out", b"a/b/up/../x", LINK)],
        [("top/", b"", stat.S_IFDIR | 0o755)],
        [],
    ],
    ids=lambda entries: ascii([e[0] for e in entries]),
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_evil_archives(tmp_path: Path, entries: list[Entry]) -> None:
    with pytest.raises(IntegrityError) as caught:
        extract(archive(*entries), tmp_path / "into")
    assert caught.value.message.isprintable()
    assert "https://server/x.zip" in caught.value.message
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("into", "home")] == []


def test_the_entry_is_named_without_its_escapes(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        extract(archive(("top/\x1b[2J/../x", b"", FILE)), tmp_path / "into")
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[2J" in str(caught.value)


def test_limits(tmp_path: Path) -> None:
    def refuse(data: io.BytesIO, match: str, **limits: int) -> None:
        with pytest.raises(IntegrityError, match=match):
            extract(data, tmp_path / f"into{len(list(tmp_path.iterdir()))}", limits=Limits(**limits))

    many = archive(*((f"top/{n}", b"", FILE) for n in range(20)))
    refuse(many, "20 entries", entries=10)
    refuse(archive(("top/a", b"x" * 2000, FILE)), "2000 bytes", total_bytes=1000)
    refuse(archive(("top/zeros", bytes(17 << 20), FILE)), "200 to 1")
    refuse(archive(GOOD, compression=zipfile.ZIP_BZIP2), "method 12")


def patched(data: io.BytesIO, name: bytes, offset: int, value: bytes) -> io.BytesIO:
    """Change a field of an entry's record in the central directory."""
    raw = bytearray(data.getvalue())
    at = raw.rindex(b"PK\1\2", 0, raw.rindex(name))
    raw[at + offset : at + offset + len(value)] = value
    return io.BytesIO(bytes(raw))


def test_claims_of_the_header_are_not_believed(tmp_path: Path) -> None:
    content = b"y" * 100_000
    data = archive(("top/lies", content, FILE))
    crc = struct.pack("<L", zlib.crc32(content[:10]))
    # The CRC of the part is right, so nothing but counting finds it.
    shorter = patched(patched(data, b"top/lies", 24, struct.pack("<L", 10)), b"top/lies", 16, crc)
    with pytest.raises(IntegrityError):
        extract(patched(data, b"top/lies", 24, struct.pack("<L", 200_000)), tmp_path / "longer")
    with pytest.raises(IntegrityError):
        extract(patched(data, b"top/lies", 16, b"\0\0\0\0"), tmp_path / "crc")
    with pytest.raises(IntegrityError):
        extract(patched(data, b"top/lies", 8, b"\1\0"), tmp_path / "encrypted")
    with pytest.raises(IntegrityError, match="overlap"):
        extract(patched(data, b"top/lies", 20, struct.pack("<L", 10_000_000)), tmp_path / "overlap")
    try:
        extract(shorter, tmp_path / "shorter")
    except IntegrityError:
        pass
    else:  # zipfile reads no further than the claim; then that is all there is
        assert (tmp_path / "shorter" / "lies").stat().st_size == 10


def test_a_huge_directory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0x7FFFFFFF, 0, 0)
    with pytest.raises(IntegrityError, match="directory of"):
        extract(io.BytesIO(bytes(1000) + end), tmp_path / "a")
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 10**9, 10**9, 10**10, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with pytest.raises(IntegrityError, match="directory of"):
        extract(io.BytesIO(record + locator + end), tmp_path / "b")


def test_the_comment_is_the_commit(tmp_path: Path) -> None:
    commit, other = "a" * 40, "b" * 40
    extract(archive(GOOD, comment=commit.encode()), tmp_path / "1", commit=commit)
    extract(archive(GOOD, comment=b"made by hand"), tmp_path / "2", commit=commit)
    extract(archive(GOOD), tmp_path / "3", commit=commit)
    with pytest.raises(IntegrityError) as caught:
        extract(archive(GOOD, comment=other.encode()), tmp_path / "4", commit=commit)
    assert (caught.value.expected, caught.value.got) == (commit, other)


@pytest.mark.parametrize("data", [b"", b"PK", b"<html>Not found</html>", b"PK\5\6", b"PK\5\6" + bytes(18)])
def test_no_zip_at_all(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(IntegrityError):
        extract(io.BytesIO(data), tmp_path / "into")


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_archives_are_integrity_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    raw = bytearray(archive(GOOD, ("top/link", b"hubconf.py", LINK), ("top/a/b", b"x" * 300, FILE)).getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    base = tmp_path_factory.mktemp("damaged")
    try:
        extract(io.BytesIO(bytes(raw)), base / "into")
    except IntegrityError:
        pass
    assert list(base.iterdir()) == [base / "into"]
