"""Zygotes as the caller sees them: started once an environment, asked for workers, ended with everything in them.

A zygote is started by command line, never by import or fork: it runs none of the caller's modules and holds
none of its memory. It watches a pidfd of this process, so it ends whatever ends the caller.

Side: caller. Source: pidfd_open(2), unix(7), prctl(2) PR_SET_CHILD_SUBREAPER.
"""

from __future__ import annotations

import array
import contextlib
import json
import logging
import os
import site
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isohub.environments.runtime import HOST, Runtime
from isohub.errors import WorkerStartError, printable
from isohub.sandbox.processes import remove_tree
from isohub.session.background import Background, Output
from isohub.session.request import Placement, worker_request, worker_variables
from isohub.wire.channel import ChannelClosed
from isohub.wire.protocol import close_descriptors

if TYPE_CHECKING:
    from isohub.session.supervisor import Worker
    from isohub.session.watchdog import Watchdog

__all__ = ["START", "Zygote"]

START = Path(__file__).resolve().parent.parent / "worker" / "start.py"
# Where the kernel gives huge pages to who asks for them, malloc does (glibc 2.35 and later; others pass it over): a
# large result costs a fault for two megabytes, not for four kilobytes. Forks have it of their zygote.
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_STOP_TIMEOUT_S = 5.0
_EXIT_NOTICE_S = 1.0


class Zygote:
    """One zygote process: the parent of one environment's workers.

    Starting returns at once; the first worker waits for torch's import.

    Args:
        runtime: The environment's interpreter and packages.
        background: Reads what it prints.
        confined: Whether its workers get namespaces, where this machine has them.
    """

    def __init__(self, runtime: Runtime, background: Background, *, confined: bool = True) -> None:
        self._runtime = runtime
        self._background = background
        try:
            self._directory = tempfile.mkdtemp(prefix="isohub-")
        except OSError as error:
            raise WorkerStartError(
                f"no directory for workers could be made: {error}",
                hint="make room, or point TMPDIR at a directory that can be written to",
                phase="starting",
            ) from error
        try:
            ours, theirs, output_read, output_write = _socketpair_and_pipe(socket.SOCK_SEQPACKET)
        except OSError as error:
            remove_tree(self._directory)
            raise _no_descriptors(error) from error
        self._control = ours
        arguments = [str(START), "zygote", str(theirs.fileno()), self._directory]
        # Of another interpreter than the caller's own nothing is run here but its standard library.
        how, when = (["-I"], "ahead") if runtime.python == HOST.python else (["-I", "-S"], "late")
        self._output = Output(output_read, logging.getLogger("isohub.zygote"), logging.INFO)
        try:
            self._process = subprocess.Popen(
                [runtime.python, *how, *arguments, when, "outer" if confined else "plain"],
                stdin=subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                pass_fds=[theirs.fileno()],
                env={**worker_variables(), "GLIBC_TUNABLES": _HUGE_PAGES},
                cwd=self._directory,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            os.close(output_read)
            remove_tree(self._directory)
            raise WorkerStartError(
                f"the interpreter {runtime.python} could not be started: {error}", phase="starting"
            ) from error
        finally:
            theirs.close()
            os.close(output_write)
        try:
            background.watch(self._output)
            background.start()
            caller = os.pidfd_open(os.getpid())
            try:
                own = _site_directories() if runtime.python == HOST.python else []
                _send_datagram(ours, {"site_directories": own, "packages": [*runtime.packages]}, [caller])
            finally:
                os.close(caller)
        except BaseException as error:
            # A Ctrl-C too: the process is there, and nobody else knows of it yet.
            told = self._gone() if isinstance(error, OSError) else None
            self.close()
            if told is not None:
                raise told from error
            raise

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it can still make workers."""
        return self._process.poll() is None

    def spawn(
        self, name: str, commit: str, timeout_s: float | None, placement: Placement, watchdog: Watchdog
    ) -> Worker:
        """A new worker, which has said what confines it; the packages of its environment are not there yet.

        Args:
            name: For log lines and messages, such as ``org/repo@1a2b3c4``.
            commit: The whole commit.
            timeout_s: Seconds until it must be ready.
            placement: What it is confined to.
            watchdog: Will look at what it uses.

        Raises:
            PolicyError, ConfinementError: It cannot be confined as the policy says.
            WorkerStartError: It could not be made.
            WorkerTimeoutError: It was not ready in time.
        """
        request = worker_request(placement)
        with contextlib.ExitStack() as undo:
            try:
                channel, their_channel, out_read, out_write = _socketpair_and_pipe(socket.SOCK_STREAM)
                undo.callback(channel.close)
                undo.callback(their_channel.close)
                undo.callback(close_descriptors, [out_read, out_write])
                status, their_status, err_read, err_write = _socketpair_and_pipe(socket.SOCK_SEQPACKET)
            except OSError as error:
                raise _no_descriptors(error) from error
            undo.pop_all()
        logger = logging.getLogger(f"isohub.worker.{printable(name, newlines=False)}")
        outputs = (Output(out_read, logger, logging.INFO), Output(err_read, logger, logging.INFO))
        try:
            _send_datagram(
                self._control,
                request,
                [their_channel.fileno(), their_status.fileno(), out_write, err_write],
            )
        except OSError as error:
            channel.close()
            status.close()
            close_descriptors([out_read, err_read])
            raise self._gone() from error
        finally:
            their_channel.close()
            their_status.close()
            close_descriptors([out_write, err_write])
        for output in outputs:
            self._background.watch(output)
        try:
            from isohub.session.supervisor import Worker  # this process needs torch from here on

            worker = Worker(
                name, commit, channel, status, outputs, self._background, placement, watchdog, self._runtime
            )
        except BaseException:
            channel.close()  # which ends the worker
            status.close()
            for output in outputs:
                self._background.forget(output)
            raise
        try:
            worker.greet(timeout_s)
        except ChannelClosed as error:
            worker.close()
            raise self._gone() from error
        return worker

    def _gone(self) -> WorkerStartError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_NOTICE_S)
        self._output.drain()
        from isohub.session.preparing import could_not_start

        words = f"the process that makes workers, of {self._runtime.python}, ended"
        words += f" ({_exit_words(self._process.returncode)}) before it was asked to"
        return could_not_start(words, self._runtime, self._output.tail())

    def begin_to_close(self) -> None:
        """Have it end, with every process that it is an ancestor of, and do not wait; `close` is to follow."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # a forked child of the caller's may hold a copy of it

    def close(self) -> None:
        """End it and every process that it is an ancestor of; does not return before they are gone."""
        self.begin_to_close()
        self._control.close()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        remove_tree(self._directory)
        self._background.forget(self._output)


def _socketpair_and_pipe(kind: socket.SocketKind) -> tuple[socket.socket, socket.socket, int, int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    try:
        return ours, theirs, *os.pipe2(os.O_CLOEXEC)
    except OSError:
        ours.close()
        theirs.close()
        raise


def _no_descriptors(error: OSError) -> WorkerStartError:
    return WorkerStartError(
        f"no descriptors are left for a worker: {error}",
        hint="close handles or files that are not needed, or raise the limit: ulimit -n",
        phase="starting",
    )


def _site_directories() -> list[str]:
    """Package directories of the caller's that ``python -I`` leaves out: the user's own, where it is in use."""
    return [site.getusersitepackages()] if site.ENABLE_USER_SITE and Path(site.getusersitepackages()).is_dir() else []


def _send_datagram(end: socket.socket, message: dict[str, Any], descriptors: Sequence[int]) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    end.sendmsg([json.dumps(message).encode()], [rights])


def _exit_words(returncode: int | None) -> str:
    if returncode is None:
        return "still running"
    return f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
