"""A worker's process: by its pidfd, so that no other one can be hit, and by what the zygote tells of it.

Side: caller. Trust: the zygote, which runs no code of a repo's. Source: pidfd_open(2), pidfd_send_signal(2), unix(7).
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import threading
import time

from isohub.session.register import start_ticks
from isohub.session.replies import read_status
from isohub.wire.channel import ChannelClosed

__all__ = ["DeadlinePassed", "NotMade", "Process", "milliseconds", "status_words"]


class DeadlinePassed(Exception):  # noqa: N818 - a signal to whoever waits
    """There was no time left."""


class NotMade(Exception):  # noqa: N818 - likewise
    """The zygote could not make it, for this reason."""


class Process:
    """One process. Thread-safe once it has been met.

    Args:
        status: The socket on which the zygote tells its beginning and its end.

    Attributes:
        pid: Its number, as this process sees it.
        ticks: When it started, in the kernel's ticks.
        init_pid: The first process of its pid namespace, which has what it leaves behind; 0 without one.
    """

    def __init__(self, status: socket.socket) -> None:
        self.pid = 0
        self.ticks = 0
        self.init_pid = 0
        self._status = status
        self._pidfd = -1
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """What becomes readable when the zygote has something to tell."""
        return self._status.fileno()

    @property
    def met(self) -> bool:
        """Whether there is a process, as far as was told, and its end has not been seen to."""
        return self._pidfd >= 0

    def meet(self, deadline: float | None) -> None:
        """Learn who it is.

        Raises:
            DeadlinePassed: The zygote did not say in time.
            NotMade: It could not make one.
            ChannelClosed: The zygote is gone.
        """
        poll = select.poll()
        poll.register(self._status.fileno(), select.POLLIN)
        while not poll.poll(milliseconds(deadline)):
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlinePassed
        data, ancillary, _, _ = self._status.recvmsg(1 << 12, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise ChannelClosed
        status = read_status(data)
        if status.failed is not None or status.pid is None:
            raise NotMade(str(status.failed))
        rights = array.array("i")
        for _, _, raw in ancillary:
            rights.frombytes(raw)
        if not rights:
            raise ChannelClosed
        self._pidfd = rights[0]
        self.pid = max(_number_of(self._pidfd), 0) or status.pid
        self.ticks = start_ticks(self.pid)
        if len(rights) > 1:
            self.init_pid = _number_of(rights[1])
            os.close(rights[1])

    def ended(self) -> bool:
        """Whether the kernel has told its end."""
        with self._lock:
            return self._pidfd < 0 or _readable(self._pidfd)

    def exit_status(self, timeout_s: float) -> int | None:
        """The wait status that the zygote tells, or None when it does not."""
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        if self._status.fileno() < 0:
            return None
        poll.register(self._status.fileno(), select.POLLIN)
        while True:
            if not poll.poll(milliseconds(deadline)):
                return None
            data = self._status.recv(1 << 12)
            if not data:
                return None
            status = read_status(data)
            if status.exit is not None:
                return status.exit

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """A signal, if it lives."""
        with self._lock:  # the number must not become another process's between the look and the call
            if self._pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Kill it and forget it."""
        self.kill()
        self._status.close()
        with self._lock:
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1


def _number_of(pidfd: int) -> int:
    """A process's number in this process's pid namespace: 0 if it has none, -1 if it has ended."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return 0


def _readable(descriptor: int) -> bool:
    """Whether there is something to read; of a pidfd, whether its process has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def milliseconds(deadline: float | None) -> float | None:
    """What poll(2) takes for a deadline of ``time.monotonic()``."""
    # Rounded up: a poll of 0 ms just before the deadline would spin. poll(2) takes a C int; waiters look again.
    return None if deadline is None else min(max(0.0, (deadline - time.monotonic()) * 1000 + 1), 2.0**31 - 1)


def status_words(status: int | None) -> tuple[str | None, int | None, str]:
    """Signal's name, exit code, and the clause for a message."""
    if status is None:
        return None, None, "is gone, and so is the process that started it"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in signal.valid_signals() and number < 32 else f"signal {number}"
        why = " (out of memory?)" if number == signal.SIGKILL else ""
        return name, None, f"was ended by {name} ({number}){why}"
    code = os.WEXITSTATUS(status)
    return None, code, f"ended itself with exit code {code}"
