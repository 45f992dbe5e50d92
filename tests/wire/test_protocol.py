"""Frames and turns, without I/O."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isohub.errors import ProtocolError
from isohub.wire import protocol
from isohub.wire.protocol import HEADER, TURNS, Conversation, Event, FrameReader, State, pack


def test_the_table_names_every_state_and_every_event():
    assert {state for state, _ in TURNS} == set(State)
    assert {event for _, event in TURNS} == set(Event)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_what_is_not_in_the_table_is_refused(state, event):
    conversation = Conversation()
    conversation.state = state
    conversation.number = 7
    if (state, event) in TURNS:
        if event is Event.REQUEST:
            assert conversation.ask() == 8
        else:
            conversation.hear(event, 7)
        assert conversation.state is TURNS[state, event]
    else:
        with pytest.raises(ProtocolError, match="expected one of"):
            if event is Event.REQUEST:
                conversation.ask()
            else:
                conversation.hear(event, 7)


@pytest.mark.parametrize("number", [0, 2, -1, 10**30])
def test_an_answer_to_another_question_is_refused(number):
    conversation = Conversation()
    conversation.hear(Event.READY, 0)
    conversation.ask()
    with pytest.raises(ProtocolError, match="while question 1 is open"):
        conversation.hear(Event.VALUE, number)


@given(st.lists(st.binary(max_size=300), max_size=6), st.randoms())
def test_frames_come_out_as_they_went_in_however_the_bytes_are_cut(bodies, random):
    stream = b"".join(pack(7, body) for body in bodies)
    reader, frames = FrameReader(), []
    while stream:
        size = random.randint(1, len(stream))
        reader.feed(stream[:size])
        stream = stream[size:]
        while (frame := reader.next()) is not None:
            frames.append(frame.body)
    assert frames == bodies


@given(st.binary(max_size=200))
def test_any_bytes_give_frames_or_an_error(data):
    reader = FrameReader()
    try:
        reader.feed(data)
        while reader.next() is not None:
            assert reader.wanted() > 0
    except ProtocolError:
        pass
    finally:
        reader.close()


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(b"xx", 2, 0, 5, 7),
        HEADER.pack(b"ih", 1, 0, 5, 7),
        HEADER.pack(b"ih", 2, 0, protocol.MAX_FRAME_BYTES + 1, 7),
        HEADER.pack(b"ih", 2, 0, 10 << 30 & 0xFFFFFFFF, 7),
        HEADER.pack(b"ih", 2, protocol.MAX_DESCRIPTORS + 1, 5, 7),
    ],
)
def test_a_header_that_lies_is_refused_before_its_body_comes(header):
    reader = FrameReader()
    reader.feed(header)
    with pytest.raises(ProtocolError):
        reader.next()


def test_a_body_that_is_too_long_is_not_sent():
    with pytest.raises(ProtocolError, match="the wire takes"):
        pack(7, b"x" * (protocol.MAX_FRAME_BYTES + 1))


def pipes(count):
    descriptors = []
    for _ in range(count):
        read, write = os.pipe()
        os.close(write)
        descriptors.append(read)
    return descriptors


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_descriptors_go_to_the_frame_that_claims_them():
    first, second, third = pipes(3)
    reader = FrameReader()
    reader.feed(pack(7, b"a", 2), [first, second])
    assert reader.next().descriptors == (first, second)
    reader.feed(pack(7, b"b"))
    assert reader.next().descriptors == ()
    reader.feed(pack(7, b"c", 1), [third])
    assert reader.next().descriptors == (third,)
    protocol.close_descriptors([first, second, third])
    assert not any(map(is_open, [first, second, third]))
    protocol.close_descriptors([first])


@pytest.mark.parametrize(("claimed", "sent"), [(0, 1), (1, 0), (2, 1), (1, 2), (4, 3)])
def test_descriptors_that_do_not_match_the_claim_are_refused_and_closed(claimed, sent):
    descriptors = pipes(sent)
    reader = FrameReader()
    reader.feed(pack(7, b"x", claimed), descriptors)
    with pytest.raises(ProtocolError, match="descriptors"):
        reader.next()
    reader.close()
    assert not any(map(is_open, descriptors))


def test_too_many_descriptors_are_refused_and_closed():
    descriptors = pipes(protocol.MAX_DESCRIPTORS + 1)
    reader = FrameReader()
    with pytest.raises(ProtocolError, match="in flight"):
        reader.feed(b"", descriptors)
    reader.close()
    assert not any(map(is_open, descriptors))
