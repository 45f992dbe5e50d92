from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest

from isohub.repos.records import read_record, write_record


class Thing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    count: int


class Other(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


def test_what_is_written_is_read(tmp_path: Path) -> None:
    place = tmp_path / "thing.json"
    for thing in (Thing("a", 1), Thing("ü\n\x00", -(2**63))):
        write_record(place, thing)
        assert read_record(place, Thing) == thing
    assert stat.S_IMODE(place.stat().st_mode) == 0o444
    assert os.listdir(tmp_path) == ["thing.json"]
    assert read_record(place, Other) is None
    assert read_record(tmp_path / "none.json", Thing) is None


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    place = tmp_path / "thing.json"
    write_record(place, Thing("hub", 7))
    whole = place.read_bytes()
    place.chmod(0o644)
    for index in range(len(whole) - 1):  # the last is the line's end, which says nothing
        for bit in (0x01, 0x20, 0x80):
            place.write_bytes(whole[:index] + bytes([whole[index] ^ bit]) + whole[index + 1 :])
            assert read_record(place, Thing) is None, (index, bit)
    for length in range(len(whole) - 1):
        place.write_bytes(whole[:length])
        assert read_record(place, Thing) is None


def test_a_refused_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "thing.json"
    write_record(place, Thing("a", 1))

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_record(place, Thing("b", 2))
    assert read_record(place, Thing) == Thing("a", 1)
    assert os.listdir(tmp_path) == ["thing.json"]


def test_what_is_no_file_is_no_record(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    write_record(tmp_path / "thing.json", Thing("a", 1))
    (tmp_path / "link.json").symlink_to(tmp_path / "thing.json")
    (tmp_path / "directory.json").mkdir()
    for name in ("fifo.json", "link.json", "directory.json"):
        assert read_record(tmp_path / name, Thing) is None
