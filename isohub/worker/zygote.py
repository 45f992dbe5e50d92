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

5. After a load it makes a spare, one at most, which takes the next request that it fits; the others fork as they come
   (`isohub.worker.forks`). Nothing is done on time alone: an idle zygote waits.

One datagram of the caller's asks for one worker. With it come four descriptors: the worker's channel, its
status socket, and where its stdout and stderr go.

Side: worker. Trust: what comes on the control socket is the caller's.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any, Dict, Iterator, List, Mapping, NoReturn, Optional

from isohub.sandbox.confine import Machine
from isohub.sandbox.kernel import keep_capabilities
from isohub.sandbox.processes import remove_tree
from isohub.wire.protocol import close_descriptors
from isohub.worker.forks import Fork, adopt_orphans, receive, send
from isohub.worker.keeper import Inits
from isohub.worker.packages import import_ahead, shadowed

__all__ = ["main"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_START = os.path.join(_PACKAGE, "worker", "start.py")
_LOOK_S = 0.1
# How long nobody asks for a worker before a spare is made: a load that has just begun comes first.
_QUIET_MS = 5


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
    settings, descriptors = receive(control, socket.MSG_PEEK)
    caller = descriptors[0]  # a pidfd
    packages: List[str] = settings["packages"]
    if inits is None:
        adopt_orphans()
    zygote = Zygote(control, caller, directory, inits, packages)
    try:
        with _watching(caller, zygote):
            from isohub.worker import rehearsal, serve  # noqa: F401 - for the forks

            _extend_path(settings["site_directories"])
            if when == "ahead":
                import_ahead()
                if shadowed(packages):
                    _start_late(control_descriptor, directory, surroundings)
            close_descriptors(receive(control)[1])  # what was only looked at
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
        self._forks: Dict[int, Fork] = {}
        self._spare: Optional[Fork] = None  # one of them
        self._wanted: Optional[Mapping[str, Any]] = None  # the policy that the next spare is made for
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
            spare = self._spare
            if spare is not None:
                mounts = spare.fileno()
                poll.register(mounts, select.POLLPRI)
            ready = {descriptor for descriptor, _ in poll.poll(None if self._wanted is None else _QUIET_MS)}
            if spare is not None:
                poll.unregister(mounts)
                if mounts in ready:
                    self._end_spare()
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
                    request, descriptors = receive(self._control)
                except EOFError:
                    return
                self._serve(machine, request, descriptors)
            elif not ready:
                self._make_spare(machine)

    def _serve(self, machine: Machine, request: Dict[str, Any], descriptors: List[int]) -> None:
        channel, status, stdout, stderr = descriptors
        ours = (channel, stdout, stderr)
        self._wanted = request["sandbox"]
        try:
            spare = self._spare
            if spare is not None and spare.fits(request["sandbox"]):
                self._spare = None
                if spare.give(request, channel, status, stdout, stderr):
                    return
                spare.end()  # it takes nothing any more, whatever it still is
            fork = self._fork(machine, request["sandbox"], ahead=False)
            if not fork.give(request, channel, status, stdout, stderr):
                fork.end()
                raise OSError("it ended before it was asked")
        except OSError as error:
            with socket.socket(fileno=status) as end:
                send(end, {"failed": f"{type(error).__name__}: {error}"})
        finally:
            close_descriptors(ours)

    def _make_spare(self, machine: Machine) -> None:
        """Fork ahead of need, once a load: what cannot be made, or ends, is not made again before the next one."""
        wanted, self._wanted = self._wanted, None
        if wanted is None:
            return
        if self._spare is not None:
            if self._spare.fits(wanted):
                return
            self._end_spare()
        with contextlib.suppress(OSError):
            self._spare = self._fork(machine, wanted, ahead=True)

    def _end_spare(self) -> None:
        if self._spare is not None:
            self._spare.end()
            self._spare = None

    def _fork(self, machine: Machine, wanted: Mapping[str, Any], *, ahead: bool) -> Fork:
        self._count += 1
        directory = os.path.join(self._directory, f"w{self._count}")
        fork = Fork(machine, wanted, directory, self._inits, self._packages, ahead=ahead)
        self._forks[fork.pid] = fork
        return fork

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                self._kill_orphans()
                return
            fork = self._forks.pop(pid, None)
            if fork is not None:
                # What the worker left running is this process's child now (subreaper).
                self._kill_orphans()
                if fork is self._spare:
                    self._spare = None
                fork.bury(status)

    def _kill_orphans(self) -> None:
        for child in _children() if self._inits is None else ():  # each in a namespace that ends with its worker
            if child not in self._forks:
                _kill(child)

    def end(self, code: int) -> NoReturn:
        """Kill every descendant, remove every directory, and end."""
        signal.set_wakeup_fd(-1)
        for fork in self._forks.values():  # with it goes all that is in its namespace, whoever's child it is
            fork.end()
        while True:
            for child in _children() if self._inits is None else ():
                _kill(child)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        remove_tree(self._directory)
        sys.stderr.flush()
        os._exit(code)


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
