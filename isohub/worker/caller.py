"""The caller as a worker sees it: questions come, answers go, and in between the worker may ask for a download.

Rules:

1. One question is open at a time; an answer closes it.
2. While a question is open, any thread of this process may ask for something (``want``), one at a time; the
   caller answers at once or after a download (``give``). An answer waits until no want is open.
3. A fork of this process may not: it would answer in its parent's place.

Side: worker. Trust: what comes is the caller's.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any, Dict, List, Sequence, Tuple

from isohub.wire.channel import Channel

__all__ = ["Caller", "dump"]

_write = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode  # json.dumps makes a new one each time


class Caller:
    """The worker's end of the conversation."""

    def __init__(self, end: Any) -> None:
        self._channel = Channel(end)
        self._speaking = threading.Lock()
        self._number = 0  # of the open question; 0 when none is
        self._pid = os.getpid()

    def greet(self, layers: Sequence[Sequence[str]]) -> None:
        """Say ready, and what confines this process."""
        self._channel.send(dump({"event": "ready", "number": 0, "layers": [list(names) for names in layers]}))

    def hear(self) -> Tuple[Dict[str, Any], Sequence[int]]:
        """The next question, and the descriptors that came with it."""
        frame = self._channel.receive()
        question: Dict[str, Any] = json.loads(frame.body)
        self._number = question["number"]
        return question, frame.descriptors

    def answer(self, body: bytes, descriptors: List[int]) -> None:
        """Answer the open question. The descriptors are closed."""
        with self._speaking:
            self._number = 0
            self._channel.send(body, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

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
            RuntimeError: No question is open, or this is a fork.
        """
        with self._speaking:
            if not self.reachable():
                raise RuntimeError("a download needs the caller, and the caller waits for nothing from this process")
            interrupted: List[int] = []
            mine = threading.current_thread() is threading.main_thread()
            if mine:
                # Half a frame read is a conversation lost: an interruption waits until the frame is whole.
                before = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
            try:
                self._channel.send(dump({"event": "want", "number": self._number, **request}))
                frame = self._channel.receive()
            finally:
                if mine:
                    signal.signal(signal.SIGINT, before)
        if interrupted:
            for descriptor in frame.descriptors:
                os.close(descriptor)
            raise KeyboardInterrupt("the caller was interrupted")
        reply: Dict[str, Any] = json.loads(frame.body)
        return reply, list(frame.descriptors)


def dump(message: Dict[str, Any]) -> bytes:
    """A message as the wire takes it."""
    return _write(message).encode()
