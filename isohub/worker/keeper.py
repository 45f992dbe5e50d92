"""What stands around a zygote where the kernel gives it namespaces: two small processes, and one for each worker.

    caller ── outer ── keeper (pid 1) ─┬─ zygote (imports torch; forks workers)
                                       └─ init, init ... (pid 1 of one worker's namespace each)

Rules:

1. The outer process enters a user and a pid namespace, forks the keeper, waits for it, and ends as it ended.
2. The keeper is the first process of the pid namespace: when it ends the kernel kills all that is in it, whatever
   that did to get away. It ends when the zygote does, and by the kernel when the outer process does.
3. On request it makes an init: the first process of a pid namespace for one worker, which reaps what the worker
   leaves behind. The zygote gets its pidfd, forks the worker into that namespace, and kills the init when the worker
   has ended, and with it everything that the worker started.
4. None of them has imported torch or runs a repo's code; each has one thread.
5. The zygote is executed anew within the user namespace, so that its memory belongs to that: the caller may look at
   its workers (``/proc/<pid>/smaps``) although they are not dumpable.

Side: worker. Source: pid_namespaces(7), user_namespaces(7), prctl(2); ``mm->user_ns`` in kernel/ptrace.c. A pid
namespace has a ``pid_max`` of its own since Linux 6.14.
"""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import sys
from typing import List, NoReturn, Optional, Tuple

from isohub.sandbox import namespaces
from isohub.sandbox.kernel import ARCHITECTURES, architecture, keep_capabilities, system_call
from isohub.sandbox.processes import close_all_but, die_with_parent, remove_tree

__all__ = ["Inits", "surround"]

_PIDFD_OPEN, _PIDFD_SEND_SIGNAL = 434, 424  # the same on every architecture
# A namespace's pid_max cannot be less: RESERVED_PIDS + 1 in kernel/pid_namespace.c.
_LEAST_PID_MAX = 301
_OWN_PID_MAX = (6, 14)
_WORD_BYTES = 64


def surround(arguments: List[str], control: int, directory: str) -> Optional[str]:
    """Put namespaces around the zygote that `arguments` start, and become the outer process.

    Args:
        arguments: Command line of the zygote, to which the descriptor of its `Inits` is added.
        control: Descriptor that the zygote inherits.
        directory: Empty, for trying.

    Returns:
        Why this machine has no namespaces, in words; where it has them this does not return.
    """
    machine = architecture()
    if machine not in ARCHITECTURES:
        return f"{machine} is not supported"
    place = os.path.join(directory, "root")
    os.makedirs(place, 0o700, exist_ok=True)  # there already for a zygote that starts anew
    reason = namespaces.fault(place, machine)
    if reason is not None:
        return reason
    namespaces.become_own_user(namespaces.NEW_PID)
    pid = os.fork()
    if pid == 0:
        _keep(arguments, control)
    close_all_but([])
    _, status = os.waitpid(pid, 0)
    remove_tree(directory)  # a zygote that was killed could not
    return _end_as(status)


def _end_as(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        os._exit(128 + os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _keep(arguments: List[str], control: int) -> NoReturn:
    """The keeper's whole life."""
    code = 1
    try:
        die_with_parent(0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        zygote = os.fork()
        if zygote == 0:
            ours.close()
            os.set_inheritable(control, True)
            theirs.set_inheritable(True)
            keep_capabilities()  # by which it makes namespaces for workers
            os.execv(sys.executable, [sys.executable, *arguments, str(theirs.fileno())])  # noqa: S606
        theirs.close()
        close_all_but([ours.fileno()])
        _serve(ours, zygote)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _serve(zygote_end: socket.socket, zygote: int) -> NoReturn:
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    poll = select.poll()
    poll.register(zygote_end.fileno(), select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if wake_read in ready:
            os.read(wake_read, 4096)
            _reap(zygote)
        if zygote_end.fileno() in ready:
            word = zygote_end.recv(_WORD_BYTES)
            if not word:  # its end; how it ended is told by SIGCHLD
                poll.unregister(zygote_end.fileno())
                continue
            _make_init(zygote_end, own, int(word))


def _reap(zygote: int) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            os._exit(1)
        if pid == 0:
            return
        if pid == zygote:
            _end_as(status)


def _make_init(zygote_end: socket.socket, own: int, processes: int) -> None:
    try:
        namespaces.unshare(namespaces.NEW_PID)
        try:
            pid = os.fork()
            if pid == 0:
                _reap_for_ever(processes)
        finally:
            # Later children are this namespace's again, also where there was no fork: a second unshare would be EINVAL.
            namespaces.enter(own, namespaces.NEW_PID)
        descriptor = system_call("pidfd_open", _PIDFD_OPEN, pid, 0)
    except OSError as error:
        zygote_end.send(f"{type(error).__name__}: {error}".encode())
        return
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
    zygote_end.sendmsg([b"ok"], [rights])
    os.close(descriptor)


def _reap_for_ever(processes: int) -> NoReturn:
    """The first process of a worker's namespace: what loses its parent there becomes its child."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        close_all_but([])
        if _kernel() >= _OWN_PID_MAX:  # before, it is the machine's, and root's to change
            try:
                with open("/proc/sys/kernel/pid_max", "w") as file:
                    file.write(str(max(_LEAST_PID_MAX, processes)))
            except OSError:
                pass  # then RLIMIT_NPROC and the watchdog count
        while True:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                pass
            signal.sigwait([signal.SIGCHLD])
    finally:
        os._exit(1)


def _kernel() -> Tuple[int, ...]:
    """The kernel's version, as far as it is numbers."""
    numbers = []
    for word in os.uname().release.split("-")[0].split(".")[:2]:
        if not word.isdigit():
            break
        numbers.append(int(word))
    return tuple(numbers)


class Inits:
    """The keeper as a zygote sees it: it makes pid namespaces for workers.

    Args:
        end: The socket to the keeper.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def fork(self, processes: int) -> Tuple[int, int]:
        """Fork into a new pid namespace.

        Args:
            processes: The most processes and threads in it.

        Returns:
            In the parent the child's number in this namespace, and its init's pidfd; in the child zeros.

        Raises:
            OSError: There are no more.
        """
        self._end.send(str(processes).encode())
        word, ancillary, _, _ = self._end.recvmsg(4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        if word != b"ok":
            raise OSError(f"no pid namespace: {word.decode() or 'its keeper is gone'}")
        (init,) = array.array("i", ancillary[0][2])
        try:
            namespaces.enter(init, namespaces.NEW_PID)
            try:
                pid = os.fork()
            except OSError:
                namespaces.enter(self._own, namespaces.NEW_PID)
                raise
        except BaseException:
            self.end(init)
            raise
        if pid == 0:
            return 0, 0
        namespaces.enter(self._own, namespaces.NEW_PID)  # or the next fork would be this worker's sibling
        return pid, init

    def end(self, init: int) -> None:
        """End a namespace and all that is in it."""
        try:
            system_call("pidfd_send_signal", _PIDFD_SEND_SIGNAL, init, signal.SIGKILL, 0, 0)
        except OSError:
            pass
        os.close(init)
