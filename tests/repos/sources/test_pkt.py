from __future__ import annotations

import io
import itertools
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isohub.errors import SourceUnavailableError
from isohub.repos.sources import pkt as module
from isohub.repos.sources.pkt import Advertisement, PackRequest, PktStream, read_refs
from isohub.repos.sources.refs import Refs


def pkt(data: bytes) -> bytes:
    return b"%04x%s" % (len(data) + 4, data)


def advertisement(count: int) -> bytes:
    refs = (pkt(b"%040x refs/pull/%d/head\n" % (number, number)) for number in range(count))
    return b"".join([pkt(b"%040x HEAD\0caps\n" % 1), *refs, b"0000"])


def took_s(data: bytes) -> float:
    """The least of two: processor time of this thread alone, whatever else the machine does."""
    taken = []
    for _ in range(2):
        start = time.thread_time()
        read_refs(PktStream(iter([data])), "x")
        taken.append(time.thread_time() - start)
    return min(taken)


def test_many_refs_cost_what_they_are() -> None:
    """Four times as many take four times as long; sixteen times is what copying the rest at each line takes."""
    assert took_s(advertisement(200_000)) < 9 * took_s(advertisement(50_000))


@given(st.lists(st.one_of(st.none(), st.binary(max_size=50))), st.lists(st.integers(0, 60)), st.binary(max_size=20))
def test_how_it_is_cut_makes_no_difference(lines: list[bytes | None], cuts: list[int], rest: bytes) -> None:
    data = b"".join(b"0000" if line is None else pkt(line) for line in lines) + rest

    def chunks() -> Iterator[bytes]:
        at = 0
        for cut in cuts:
            yield data[at : at + cut]
            at += cut
        yield data[at:]

    stream = PktStream(chunks())
    assert [stream.pkt() for _ in lines] == lines
    assert b"".join(stream.rest()) == rest


def test_an_early_end() -> None:
    for data in (b"", b"00", b"0009ab"):
        with pytest.raises(ValueError, match="middle of a line"):
            PktStream(iter([data[:1], data[1:]])).pkt()


@pytest.mark.parametrize(
    ("start", "endless"),
    [
        (b"", pkt(b"shallow " + b"a" * 40)),
        (b"00000008NAK\n", pkt(b"\2" + b"x" * 1000)),
        (b"00000008NAK\n", pkt(b"\1")),
    ],
    ids=["shallow", "complaints", "nothing"],
)
def test_talk_without_end(start: bytes, endless: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TALK_LIMIT_BYTES", 100_000)
    said = Advertisement(Refs({}, None, None), {}, frozenset({"shallow", "side-band-64k"}), "https://h/o/r")
    request = PackRequest(said, ["a" * 40], depth=1, commits_only=False, limit_bytes=1000)
    chunks = itertools.chain([start], itertools.repeat(endless))
    with pytest.raises(SourceUnavailableError, match="more than 100000 bytes beside the pack"):
        request.read(PktStream(chunks), io.BytesIO())
    # The control: what belongs to the pack is not counted.
    body = b"0000" + pkt(b"NAK\n") + pkt(b"\1" + b"p" * 900) + pkt(b"\2x") + b"0000"
    into = io.BytesIO()
    request.read(PktStream(iter([body])), into)
    assert into.getvalue() == b"p" * 900
