"""The caller as a worker sees it: questions come, answers go, and in between the worker may ask for a download.

Rules:

1. One question is open at a time; an answer closes it.
2. While a question is open, any thread of this process may ask for something (``want``), one at a time; the
   caller answers at once or after a download (``give``). An answer waits until no want is open.
3. A wish has a number, and so has what is given for it. What comes for a wish that nobody waits for any more
   (something was raised in the middle) is dropped: it must never be taken for another's.
4. A fork of this process may not: it would answer in its parent's place.

Side: worker. Trust: what comes is the caller's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from isohub.sandbox.confine import Confined
from isohub.wire.arena import Claims
from isohub.wire.channel import Channel
from isohub.wire.known import Known
from isohub.wire.protocol import close_descriptors
from isohub.wire.tables import read_tables

__all__ = ["Caller", "dump"]

_write = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode  # json.dumps makes a new one each time


class Caller:
    """The worker's end of the conversation, once it is connected."""

    def __init__(self) -> None:
        self._channel: Channel
        self._speaking = threading.Lock()
        self._speaker = 0  # the thread that has the lock
        self._number = 0  # of the open question; 0 when none is
        self._wishes = 0
        self._pid = os.getpid()
        self._known = Known()  # questions that were asked before, by their text

    def connect(self, end: Any) -> None:
        """Speak by this socket from now on."""
        self._channel = Channel(end)

    def greet(self, confined: Confined, facts: Optional[Tuple[str, str, List[str]]]) -> None:
        """Say ready, and what confines this process; where the caller's proxy is to listen goes to the caller.

        Args:
            confined: What does.
            facts: Versions of Python and torch, and names of dtypes, if they are known.
        """
        layers = [list(confined.active), list(confined.missing)]
        listeners = [] if confined.listener is None else [confined.listener.fileno()]
        ready = {"event": "ready", "layers": layers, "details": confined.details, "facts": facts}
        self._channel.send(0, dump(ready), listeners)
        if confined.listener is not None:
            confined.listener.close()

    @property
    def number(self) -> int:
        """Of the open question; 0 when none is."""
        return self._number

    def hear(self) -> Tuple[Dict[str, Any], Sequence[int], Dict[str, Any]]:
        """The next question, the descriptors that came with it, and what the caller has let go before it."""
        gone: Dict[str, Any] = {}
        while True:
            frame = self._channel.receive()
            if not frame.number:
                gone = json.loads(frame.body)
                continue
            question = self._read(frame.body)
            if "wish" not in question:
                self._number = frame.number
                return question, frame.descriptors, gone
            close_descriptors(frame.descriptors)

    def _read(self, body: bytes) -> Dict[str, Any]:
        """What a body says, with its ``tables`` read. Nobody changes it: one call after another says the same."""
        known: Optional[Dict[str, Any]] = self._known.get(body)
        if known is None:
            known = json.loads(body)
            assert known is not None
            if "claims" in known:
                known["tables"] = tables = read_tables(
                    Claims(*known["claims"])._replace(devices=known.get("devices", ()))
                )
                # Of a call with tensors alone, in the order of the table, nothing has to be decoded.
                rows = [["T", number] for number in range(len(tables.rows))]
                alone = known["op"] == "call" and isinstance(known["args"][0], str)
                known["tensors_alone"] = alone and known["args"][1:] == [["t", *rows], ["d"]]
            self._known.keep(body, body, known)
        return known

    def answer(self, body: bytes, descriptors: List[int]) -> None:
        """Answer the open question. The descriptors are closed."""
        with self._speaking:
            number, self._number = self._number, 0
            self._channel.send(number, body, descriptors)
        if descriptors:
            close_descriptors(descriptors)

    def reachable(self) -> bool:
        """Whether this process, and no fork of it, may ask for something now."""
        return os.getpid() == self._pid and self._number != 0

    def want(self, request: Dict[str, Any]) -> Tuple[Dict[str, Any], List[int]]:
        """Ask the caller for something and wait for it.

        Args:
            request: ``what`` and the rest of `isohub.session.replies.Want`.

        Returns:
            Its reply, and descriptors that are the asker's.

        Raises:
            RuntimeError: No question is open, this is a fork, or this thread is in the middle of another wish.
        """
        if self._speaker == threading.get_ident():
            raise RuntimeError("a download was asked for within a download, by a signal handler or a finalizer")
        with self._speaking:
            if not self.reachable():
                raise RuntimeError("a download needs the caller, and the caller waits for nothing from this process")
            self._speaker = threading.get_ident()
            try:
                with _interruptions_later():
                    return self._exchange(request)
            finally:
                self._speaker = 0

    def _exchange(self, request: Dict[str, Any]) -> Tuple[Dict[str, Any], List[int]]:
        self._wishes += 1
        wish = self._wishes
        self._channel.send(self._number, dump({"event": "want", "wish": wish, **request}))
        while True:
            frame = self._channel.receive()
            reply: Dict[str, Any] = json.loads(frame.body)
            if reply["wish"] == wish:
                return reply, list(frame.descriptors)
            close_descriptors(frame.descriptors)


@contextlib.contextmanager
def _interruptions_later() -> Iterator[None]:
    """Hold Ctrl-C back until a frame is whole: half a frame read is a conversation lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted: List[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt("the caller was interrupted")


def dump(message: Dict[str, Any]) -> bytes:
    """A message as the wire takes it."""
    return _write(message).encode()
