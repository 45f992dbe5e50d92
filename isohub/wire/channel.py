"""Frames over a Unix stream socket.

Side: both. The worker blocks; the caller gives a `wait` that knows deadlines and deaths.
Source: unix(7), recvmsg(2), cmsg(3).
"""

from __future__ import annotations

import array
import fcntl
import select
import socket
import threading
from typing import Callable, List, Optional, Sequence

from isohub.errors import ProtocolError
from isohub.wire.patience import Patience
from isohub.wire.protocol import MAX_DESCRIPTORS, Frame, FrameReader, close_descriptors, pack

__all__ = ["Channel", "ChannelClosed", "discard"]

# SCM_MAX_FD (net/core/scm.c): all that one message can bring. What finds no room the kernel closes, in this thread.
_ANCILLARY_BYTES = socket.CMSG_SPACE(253 * array.array("i").itemsize)
# linux/fcntl.h; the fcntl module has it from Python 3.9 on.
_F_GET_SEALS = 1034
# A close that waits for nothing takes microseconds.
_CLOSE_PATIENCE_S = 1.0
_READ_BYTES = 1 << 18
# Holds a small frame whole, header and all: one system call for most answers.
_FIRST_READ_BYTES = 1 << 13
# linux/socket.h. Python has the name on all systems that have the flag.
_FLAGS = socket.MSG_CMSG_CLOEXEC


class ChannelClosed(Exception):  # noqa: N818 - a signal between layers; each side says what it means
    """The other side closed its end, or is gone."""


class Channel:
    """One end of a conversation.

    Args:
        end: A connected Unix stream socket; owned by the channel from here on.
        wait: Called with ``select.POLLIN`` or ``POLLOUT`` when nothing can be read or written, and before each
            further read of one frame; returns when it may be tried again, or raises. None makes the socket block.
    """

    def __init__(self, end: socket.socket, wait: Optional[Callable[[int], None]] = None) -> None:
        self._end = end
        self._wait = wait
        self._reader = FrameReader()
        self._patience = Patience(end.fileno()) if wait is None else None
        end.setblocking(wait is None)

    def fileno(self) -> int:
        """The socket's descriptor, -1 once closed."""
        return self._end.fileno()

    def send(self, number: int, body: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send one frame. The descriptors stay the sender's.

        Args:
            number: The question's.
            body: JSON.
            descriptors: What goes with it.

        Raises:
            ChannelClosed: Nobody reads the other end.
            ProtocolError: The frame is too long; nothing was sent.
        """
        data = memoryview(pack(number, body, len(descriptors)))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        while data:
            try:
                sent = self._end.sendmsg([data], ancillary) if ancillary else self._end.send(data)
            except BlockingIOError:
                assert self._wait is not None
                self._wait(select.POLLOUT)
                continue
            except (BrokenPipeError, ConnectionResetError) as error:
                raise ChannelClosed from error
            data = data[sent:]
            ancillary = []

    def receive(self) -> Frame:
        """The next frame. Its descriptors are the receiver's.

        Raises:
            ChannelClosed: The other end closed, between frames or within one.
            ProtocolError: What came is no frame.
        """
        while True:
            frame = self._reader.next()
            if frame is not None:
                return frame
            begun = self._reader.begun
            size = min(max(self._reader.wanted(), _FIRST_READ_BYTES), _READ_BYTES) if begun else _FIRST_READ_BYTES
            if self._wait is not None and begun:
                self._wait(select.POLLIN)  # though there may be more to read: drips are no way past a deadline
            slept = self._patience is not None and not begun and not self._patience.look()
            try:
                data, ancillary, flags, _ = self._end.recvmsg(size, _ANCILLARY_BYTES, _FLAGS)
            except BlockingIOError:
                assert self._wait is not None
                self._wait(select.POLLIN)
                continue
            except ConnectionResetError as error:
                raise ChannelClosed from error
            if slept:
                assert self._patience is not None
                self._patience.slept()
            if data and not ancillary and not flags & socket.MSG_CTRUNC:
                frame = self._reader.whole(data)
                if frame is not None:
                    return frame
                continue
            self._reader.feed(data, _descriptors(ancillary))
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError(f"more than {MAX_DESCRIPTORS} descriptors with one frame")
            if not data:
                raise ChannelClosed

    @property
    def begun(self) -> bool:
        """Whether a part of a frame has come, and not yet all of it."""
        return self._reader.begun

    def quiet(self) -> bool:
        """Whether nothing has come that nobody asked for."""
        if self._reader.begun:
            return False
        try:
            return not self._end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return True  # the next read or write says so

    def close(self) -> None:
        """Close the socket and every descriptor that no frame took; the caller's waits no longer than `discard`."""
        if self._wait is None or self.fileno() < 0 or self.quiet():
            self._close()
        else:
            _soon(self._close)
        self._wait = None  # its owner's method: without this the two would keep each other until a collection

    def _close(self) -> None:
        self._reader.close()
        self._end.close()


def discard(descriptors: Sequence[int]) -> None:
    """Close what a worker sent, whatever it is, and do not wait for long. Side: caller.

    Closing can wait for others: a TCP socket lingers for as long as its owner has set (SO_LINGER, socket(7)), a file
    of FUSE waits for its server. Memory waits for nobody; all else is closed by a thread, which may stay behind.
    """
    others = [descriptor for descriptor in descriptors if not _is_memory(descriptor)]
    close_descriptors([descriptor for descriptor in descriptors if descriptor not in others])
    if others:
        _soon(lambda: close_descriptors(others))


def _is_memory(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, _F_GET_SEALS)
    except OSError:
        return False
    return True


def _soon(close: Callable[[], None]) -> None:
    thread = threading.Thread(target=close, name="isohub-close", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads, or the interpreter ends
        close()
    else:
        thread.join(_CLOSE_PATIENCE_S)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> List[int]:
    found: List[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            found.extend(numbers)
    return found
