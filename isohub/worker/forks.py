"""A zygote's forks: each begins to confine itself, is given one request, and becomes the worker of that.

Rules:

1. What is the same for every policy of a kind (`isohub.sandbox.confine.Begun`) is done before the request is there,
   the rest after. So a fork can be made ahead of need: a spare. It is given one request in its life.
2. A spare runs no byte of a repo's, nor of packages that isohub installed. It waits in one recvmsg(2).
3. A spare shows its worker the files that were there when it was made. It is current as long as the zygote's mounts
   and the files of the machine's rules are the same; one that is not is ended. When mounts change that is at once: it
   has a copy of each, which would keep alive what was unmounted.
4. It ends with its zygote as a worker does: by the kernel, by its init, and by the end of its socket.

Side: worker; `Fork` in its zygote. Trust: requests are the caller's. Source: ``mounts_poll`` in fs/proc_namespace.c:
poll(2) tells a change of the mounts to whoever has the file open.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any, Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple

from isohub.sandbox.confine import UNCONFINED, Begun, Kind, Machine
from isohub.sandbox.processes import die_with_parent, remove_tree
from isohub.wire.protocol import close_descriptors
from isohub.worker.keeper import Inits
from isohub.worker.packages import take_in

__all__ = ["Fork", "adopt_orphans", "receive", "send"]

_MESSAGE_BYTES = 1 << 17
_MOST_DESCRIPTORS = 4
_PR_SET_CHILD_SUBREAPER = 36
_SYS_PIDFD_OPEN = 434  # the same on every architecture since Linux 5.3


class Fork:
    """One of a zygote's children, from before it knows what it serves.

    Args:
        machine: What it can be given.
        wanted: The policy of a request whose like it will be given.
        directory: Its own, which is not there yet.
        inits: What makes its pid namespace; None without one.
        packages: Of the environment.
        ahead: Whether no request waits for it: then it ends in silence if it cannot be confined.

    Attributes:
        pid: Its number.
        status: Where its end is told; None while it has no request.

    Raises:
        OSError: There was no room for it.
    """

    def __init__(
        self,
        machine: Machine,
        wanted: Mapping[str, Any],
        directory: str,
        inits: Optional[Inits],
        packages: Sequence[str],
        *,
        ahead: bool,
    ) -> None:
        self.status: Optional[socket.socket] = None
        self._machine = machine
        self._inits = inits
        self._directory = directory
        self._traits = _traits(wanted)
        self._current = True
        self._init = 0
        kind, zygote = Kind.of(wanted), os.getpid()
        with contextlib.ExitStack() as undo:
            self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, self._mounts)
            self._seen = machine.seen()
            self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._end.close)
            undo.callback(theirs.close)
            os.mkdir(directory, 0o700)
            undo.callback(remove_tree, directory)
            if inits is None:
                self.pid = os.fork()
            else:
                zygote = 0  # outside of what the worker sees
                self.pid, self._init = inits.fork(wanted["processes"])
            undo.pop_all()
        if self.pid == 0:
            _become_worker(machine, kind, directory, zygote, packages, theirs, ahead=ahead)
        theirs.close()
        self._pidfd = _pidfd_open(self.pid)

    def fileno(self) -> int:
        """What poll(2) gives POLLPRI for when the zygote's mounts have changed; of a fork without a request."""
        return self._mounts

    def fits(self, wanted: Mapping[str, Any]) -> bool:
        """Whether it can become a worker with this policy that differs from none made now."""
        changed = select.poll()
        changed.register(self._mounts, select.POLLPRI)
        if changed.poll(0) or self._seen != self._machine.seen():  # a change of mounts is told once
            self._current = False
        return self._current and self._traits == _traits(wanted)

    def give(self, request: Dict[str, Any], channel: int, status: int, stdout: int, stderr: int) -> bool:
        """Give it its request, and tell the caller who it is; whether it took it.

        Args:
            request: The caller's.
            channel: The worker's; like its output it stays the giver's to close.
            status: Where its beginning and end are told; its own if it took the request.
            stdout: The worker's.
            stderr: The worker's.
        """
        if not send(self._end, request, [channel, stdout, stderr]):
            return False
        self.status = socket.socket(fileno=status)
        known = [descriptor for descriptor in (self._pidfd, self._init or None) if descriptor is not None]
        send(self.status, {"pid": self.pid}, known)
        self._let_go()
        return True

    def _let_go(self) -> None:
        self._end.close()
        for descriptor in (self._mounts, self._pidfd):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._mounts, self._pidfd = -1, None

    def end(self) -> None:
        """End all that is in its pid namespace, if it has one, or the process alone: it is to be reaped."""
        if self._inits is not None and self._init:
            self._inits.end(self._init)
            self._init = 0
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)

    def bury(self, status: int) -> None:
        """See to it that nothing is left, and tell its end.

        Args:
            status: As wait(2) gave it.
        """
        if self.status is None:
            self._let_go()
        else:
            send(self.status, {"exit": status})
            self.status.close()
        if self._inits is not None and self._init:
            self._inits.end(self._init)
        remove_tree(self._directory)


def _traits(wanted: Mapping[str, Any]) -> Tuple[Kind, int]:
    """What two policies must have in common for one fork to serve either."""
    return Kind.of(wanted), wanted["processes"]


def adopt_orphans() -> None:
    """Become the parent of whatever a descendant leaves running. Not inherited by forks: prctl(2)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _become_worker(
    machine: Machine,
    kind: Kind,
    directory: str,
    zygote: int,
    packages: Sequence[str],
    end: socket.socket,
    *,
    ahead: bool,
) -> NoReturn:
    """What a fork does; it never returns to the zygote's loop."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent(zygote)
        if zygote:  # with namespaces its init has them
            adopt_orphans()  # so that what reaches the zygote is a dead worker's for certain
        os.setsid()
        fault: Optional[OSError] = None
        begun: Optional[Begun] = None
        try:
            begun = Begun(machine, kind, directory, [end.fileno()])
        except OSError as error:
            fault = error
        from isohub.worker.caller import Caller
        from isohub.worker.rehearsal import rehearse
        from isohub.worker.serve import make_server, serve

        caller, server = Caller(), None
        if not packages and "torch" in sys.modules:  # else what torch is would be somebody's whom nobody has confined
            take_in(packages)
            server = make_server(caller)
            if ahead:
                rehearse(server)
        # Who waits is told of a fault. If nobody does, the next load tries anew.
        request, descriptors = receive(end, socket.MSG_DONTWAIT if fault is not None and ahead else 0)
        end.close()
        channel, stdout, stderr = descriptors
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        close_descriptors([stdout, stderr])
        # A worker is killed when it is no longer needed: what waited in a buffer would be lost.
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        try:
            if begun is None:
                raise fault or OSError("not confined")
            confined = begun.finish(request["sandbox"], request["variables"], zygote)
        except (OSError, ValueError) as error:
            os.write(2, f"{error}\n".encode("utf-8", "backslashreplace"))
            os._exit(UNCONFINED)
        caller.connect(socket.socket(fileno=channel))
        serve(caller, confined, server, lambda: take_in(packages))
        code = 0
    except (EOFError, BlockingIOError):
        code = UNCONFINED  # a spare that nobody needs any more, or that could not be confined
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def receive(end: socket.socket, flags: int = 0) -> Tuple[Dict[str, Any], List[int]]:
    """One message and the descriptors that came with it.

    Raises:
        EOFError: There are no more.
    """
    numbers = array.array("i")
    data, ancillary, _, _ = end.recvmsg(
        _MESSAGE_BYTES, socket.CMSG_SPACE(_MOST_DESCRIPTORS * numbers.itemsize), socket.MSG_CMSG_CLOEXEC | flags
    )
    if not data:
        raise EOFError
    for _, _, rights in ancillary:
        numbers.frombytes(rights)
    return json.loads(data), list(numbers)


def send(end: socket.socket, message: Dict[str, Any], descriptors: Sequence[int] = ()) -> bool:
    """Send one message, without waiting; whether somebody listens."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    try:
        end.sendmsg([json.dumps(message).encode()], rights, socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True


def _pidfd_open(pid: int) -> Optional[int]:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(ctypes.c_long(_SYS_PIDFD_OPEN), ctypes.c_int(pid), ctypes.c_uint(0)))
    return descriptor if descriptor >= 0 else None
