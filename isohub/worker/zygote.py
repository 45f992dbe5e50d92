"""A process that has imported torch, where that is the host's own, and does nothing but fork.

Rules:

1. It is a fresh interpreter, never a fork of the caller, and knows no secret of the caller's.
2. It has one thread of its own, has run no parallel operator (a fork after OpenMP's first parallel region hangs) and
   no repo's code, nor a package's that a repo may have asked for (`isohub.worker.packages`).
3. It ends when its caller ends, however that happens: it watches a pidfd of the caller, and the control
   socket's end. Ending kills every descendant: with namespaces (`isohub.worker.keeper`) the kernel does that, and
   without, it is the subreaper of orphans (prctl(2)).
4. A worker's end is told on the worker's own status socket, with its wait status; the socket's end says
   that the zygote itself is gone.

One datagram of the caller's asks for one worker. With it come four descriptors: the worker's channel, its
status socket, and where its stdout and stderr go.

Side: worker. Trust: what comes on the control socket is the caller's.
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
from typing import Any, Dict, Iterator, List, NoReturn, Optional, Sequence, Tuple

from isohub.sandbox.confine import UNCONFINED, Machine, confine
from isohub.sandbox.kernel import keep_capabilities
from isohub.sandbox.processes import die_with_parent, remove_tree
from isohub.wire.protocol import close_descriptors
from isohub.worker.keeper import Inits
from isohub.worker.packages import import_ahead, shadowed, take_in

__all__ = ["main"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_START = os.path.join(_PACKAGE, "worker", "start.py")
_MESSAGE_BYTES = 1 << 17
_PR_SET_CHILD_SUBREAPER = 36
_LOOK_S = 0.1
_SYS_PIDFD_OPEN = 434  # the same on every architecture since Linux 5.3


def main(
    control_descriptor: int, directory: str, when: str, surroundings: str, no_namespaces: Optional[str]
) -> NoReturn:
    """Import torch if it is to be imported here, then fork on request until the caller is gone.

    Args:
        control_descriptor: Of the socket to the caller.
        directory: For workers' directories.
        when: ``ahead`` or ``late``: whether this process imports torch, or each worker does.
        surroundings: ``plain``, ``outer``, or the descriptor of the keeper's socket.
        no_namespaces: Why ``outer`` has none.
    """
    inits: Optional[Inits] = None
    if surroundings == "plain":
        no_namespaces = "they were not asked for"
    elif surroundings != "outer":
        inits = Inits(socket.socket(fileno=int(surroundings)))
    control = socket.socket(fileno=control_descriptor)
    settings, descriptors = _receive(control, socket.MSG_PEEK)
    caller = descriptors[0]  # a pidfd
    packages: List[str] = settings["packages"]
    if inits is None:
        _adopt_orphans()
    zygote = Zygote(control, caller, directory, inits, packages)
    try:
        with _watching(caller, zygote):
            from isohub.worker import serve  # noqa: F401 - for the forks

            _extend_path(settings["site_directories"])
            if when == "ahead":
                import_ahead()
                if shadowed(packages):
                    _start_late(control_descriptor, directory, surroundings)
            close_descriptors(_receive(control)[1])  # what was only looked at
        zygote.run(Machine.look(_PACKAGE, packages, no_namespaces))
    except BaseException:
        traceback.print_exc()
        zygote.end(1)
    zygote.end(0)


def _arguments(control: int, directory: str, when: str) -> List[str]:
    """Of this interpreter, for a zygote like this one; its surroundings are added."""
    flags = ["-I", "-S"] if sys.flags.no_site else ["-I"]
    return [*flags, _START, "zygote", str(control), directory, when]


def _start_late(control: int, directory: str, surroundings: str) -> NoReturn:
    """Start anew, without torch. What the caller said first is there to be read again."""
    signal.setitimer(signal.ITIMER_REAL, 0)  # it would outlive this program
    kept = [control] if surroundings in ("plain", "outer") else [control, int(surroundings)]
    for descriptor in kept:
        os.set_inheritable(descriptor, True)
    keep_capabilities()
    os.execv(sys.executable, [sys.executable, *_arguments(control, directory, "late"), surroundings])  # noqa: S606


def _extend_path(directories: List[str]) -> None:
    import site

    for directory in directories:
        site.addsitedir(directory)


def _adopt_orphans() -> None:
    """Become the parent of whatever a descendant leaves running. Not inherited by forks: prctl(2)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextlib.contextmanager
def _watching(caller: int, zygote: Zygote) -> Iterator[None]:
    """End if the caller ends while torch is being imported, which can take seconds."""

    def look(*_: object) -> None:
        if select.select([caller], [], [], 0)[0]:
            zygote.end(0)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_S, _LOOK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


class Zygote:
    """The loop, and the table of who is alive."""

    def __init__(
        self, control: socket.socket, caller: int, directory: str, inits: Optional[Inits], packages: List[str]
    ) -> None:
        self._packages = packages
        self._control = control
        self._caller = caller
        self._directory = directory
        self._inits = inits
        self._workers: Dict[int, Tuple[socket.socket, str, int]] = {}  # status socket, directory, init
        self._count = 0
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def run(self, machine: Machine) -> None:
        """Serve until the caller is gone.

        Args:
            machine: What workers can be given here.
        """
        poll = select.poll()
        for descriptor in (self._control.fileno(), self._caller, self._wake_read):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._caller in ready:
                return
            if self._wake_read in ready:
                try:
                    os.read(self._wake_read, 4096)
                except BlockingIOError:
                    pass
                self._reap()
            if self._control.fileno() in ready:
                try:
                    request, descriptors = _receive(self._control)
                except EOFError:
                    return
                self._fork(machine, request, descriptors)

    def _fork(self, machine: Machine, request: Dict[str, Any], descriptors: List[int]) -> None:
        channel, status, stdout, stderr = descriptors
        self._count += 1
        directory = os.path.join(self._directory, f"w{self._count}")
        zygote, init = os.getpid(), 0
        try:
            os.mkdir(directory, 0o700)
            if self._inits is None:
                pid = os.fork()
            else:
                zygote = 0  # outside of what the worker sees
                pid, init = self._inits.fork(request["sandbox"]["processes"])
        except OSError as error:
            _send(status, {"failed": f"{type(error).__name__}: {error}"})
            for descriptor in descriptors:
                os.close(descriptor)
            return
        if pid == 0:
            _become_worker(machine, zygote, self._packages, request, directory, channel, stdout, stderr)
        for descriptor in (channel, stdout, stderr):
            os.close(descriptor)
        pidfd = _pidfd_open(pid)
        known = [descriptor for descriptor in (pidfd, init or None) if descriptor is not None]
        _send(status, {"pid": pid}, known)
        if pidfd is not None:
            os.close(pidfd)
        self._workers[pid] = socket.socket(fileno=status), directory, init

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                self._kill_orphans()
                return
            worker = self._workers.pop(pid, None)
            if worker is not None:
                # What the worker left running is this process's child now (subreaper).
                self._kill_orphans()
                end, directory, init = worker
                _send(end.fileno(), {"exit": status})
                end.close()
                if self._inits is not None:
                    self._inits.end(init)
                remove_tree(directory)

    def _kill_orphans(self) -> None:
        for child in _children() if self._inits is None else ():  # each in a namespace that ends with its worker
            if child not in self._workers:
                _kill(child)

    def end(self, code: int) -> NoReturn:
        """Kill every descendant, remove every directory, and end."""
        signal.set_wakeup_fd(-1)
        if self._inits is not None:  # first: with it goes all that is in a worker's namespace, whoever's child it is
            for _, _, init in self._workers.values():
                self._inits.end(init)
        while True:
            for child in _children() if self._inits is None else list(self._workers):
                _kill(child)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        remove_tree(self._directory)
        sys.stderr.flush()
        os._exit(code)


def _become_worker(
    machine: Machine,
    zygote: int,
    packages: List[str],
    request: Dict[str, Any],
    directory: str,
    channel: int,
    stdout: int,
    stderr: int,
) -> NoReturn:
    """What a fork does; it never returns to the zygote's loop."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent(zygote)
        if zygote:  # with namespaces its init has them
            _adopt_orphans()  # so that what reaches the zygote is a dead worker's for certain
        os.setsid()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        # A worker is killed when it is no longer needed: what waited in a buffer would be lost.
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        try:
            confined = confine(machine, request["sandbox"], directory, request["variables"], [channel], zygote)
        except (OSError, ValueError) as error:
            os.write(2, f"{error}\n".encode("utf-8", "backslashreplace"))
            os._exit(UNCONFINED)
        from isohub.worker.serve import serve

        serve(socket.socket(fileno=channel), confined, lambda: take_in(packages))
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _receive(control: socket.socket, flags: int = 0) -> Tuple[Dict[str, Any], List[int]]:
    numbers = array.array("i")
    data, ancillary, _, _ = control.recvmsg(
        _MESSAGE_BYTES, socket.CMSG_SPACE(4 * numbers.itemsize), socket.MSG_CMSG_CLOEXEC | flags
    )
    if not data:
        raise EOFError
    for _, _, rights in ancillary:
        numbers.frombytes(rights)
    return json.loads(data), list(numbers)


def _send(end: int, message: Dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    status = socket.socket(fileno=os.dup(end))
    try:
        status.sendmsg([json.dumps(message).encode()], rights, socket.MSG_DONTWAIT)
    except OSError:
        pass  # nobody listens any more
    finally:
        status.close()


def _pidfd_open(pid: int) -> Optional[int]:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(ctypes.c_long(_SYS_PIDFD_OPEN), ctypes.c_int(pid), ctypes.c_uint(0)))
    return descriptor if descriptor >= 0 else None


def _children() -> List[int]:
    """This process's children, dead ones too, where no pid namespace gives them other numbers in ``/proc``."""
    try:
        with open("/proc/thread-self/children") as listing:
            return [int(pid) for pid in listing.read().split()]
    except OSError:
        return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
