"""What one would use instead: a spawned process and a pipe, a pool, torch's own queues, a fresh interpreter.

Everything that a spawned process imports is here. Each peer holds one process, started once.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["PICKLE", "Absent", "Ponger", "Pool", "Queued", "Spawned", "fresh_process", "load_here"]

PICKLE = "unpickles in the caller; no confinement"


class Absent(Exception):  # noqa: N818 - the page says it
    """A peer that is not in this run; the text says why."""


_spawn = multiprocessing.get_context("spawn")


def load_here(hub: str, model: str, *args: Any) -> Any:
    """``torch.hub.load`` in this process."""
    import torch

    return torch.hub.load(hub, model, *args, source="local", verbose=False)


def _serve(connection: Any, hub: str) -> None:
    """A spawned process: (what, arguments) in, an answer out. Holds at most one model."""
    import torch

    model: Any = None
    connection.send("ready")
    while True:
        what, *args = connection.recv()
        if what == "stop":
            return
        if what == "load":
            model = load_here(hub, *args)
            connection.send(None)
        elif what == "call":
            with torch.no_grad():
                connection.send(model(args[0]))
        elif what == "call_array":
            connection.send(model(torch.from_numpy(args[0])).numpy())
        elif what == "save":
            torch.save(model.state_dict(), args[0])
            connection.send(None)
        elif what == "save_safetensors":
            import safetensors.torch

            safetensors.torch.save_file(model.state_dict(), args[0])
            connection.send(None)
        elif what == "drop":
            model = None
            connection.send(None)


class Spawned:
    """``multiprocessing.Process`` by spawn, and a ``Pipe``. Tensors travel as torch.multiprocessing has it."""

    def __init__(self, hub: Path) -> None:
        import torch.multiprocessing  # noqa: F401 - registers how tensors are pickled for a pipe

        self._connection, theirs = _spawn.Pipe()
        self.process = _spawn.Process(target=_serve, args=(theirs, str(hub)), daemon=True)
        self.process.start()
        theirs.close()
        self._connection.recv()

    def ask(self, what: str, *args: Any) -> Any:
        """Send, and wait for the answer."""
        self._connection.send((what, *args))
        return self._connection.recv()

    def close(self) -> None:
        """End the process."""
        self._connection.send(("stop",))
        self.process.join()
        self._connection.close()


_pooled: list[Any] = []  # in the pool's process: its model


def _pool_load(hub: str, model: str) -> None:
    _pooled[:] = [load_here(hub, model)]


def _pool_call(x: Any) -> Any:
    return _pooled[0](x)


class Pool:
    """``ProcessPoolExecutor`` with one process, by spawn."""

    def __init__(self, hub: Path, model: str) -> None:
        import torch.multiprocessing  # noqa: F401 - as in `Spawned`

        self._pool = ProcessPoolExecutor(1, mp_context=_spawn)
        self._pool.submit(_pool_load, str(hub), model).result()

    def call(self, x: Any) -> Any:
        """One call, and its result."""
        return self._pool.submit(_pool_call, x).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _serve_queue(questions: Any, answers: Any, hub: str) -> None:
    import torch

    model: Any = None
    answers.put("ready")
    while True:
        what, *args = questions.get()
        if what == "stop":
            return
        if what == "load":
            model = load_here(hub, *args)
            answers.put(None)
        elif what == "call":
            with torch.no_grad():
                answers.put(model(args[0]))
        elif what == "state_dict":
            answers.put(model.state_dict())
        elif what == "drop":
            model = None
            answers.put(None)


class Queued:
    """A spawned process and two queues of ``torch.multiprocessing``."""

    def __init__(self, hub: Path) -> None:
        import torch.multiprocessing

        context = torch.multiprocessing.get_context("spawn")
        self._questions, self._answers = context.Queue(), context.Queue()
        self._process = context.Process(target=_serve_queue, args=(self._questions, self._answers, str(hub)))
        self._process.daemon = True
        self._process.start()
        self._answers.get()

    def ask(self, what: str, *args: Any) -> Any:
        """Put, and get the answer."""
        self._questions.put((what, *args))
        return self._answers.get()

    def close(self) -> None:
        """End the process."""
        self._questions.put(("stop",))
        self._process.join()
        for queue in (self._questions, self._answers):
            queue.close()
            queue.join_thread()


_PONG = """\
import os, socket, sys
s = socket.socket(fileno=int(sys.argv[1]))
if sys.argv[2]:
    os.sched_setaffinity(0, [int(sys.argv[2])])
while (b := s.recv(64)):
    s.send(b)
"""


class Ponger:
    """A bare socketpair and a process that sends back what it gets: what the kernel alone costs.

    Args:
        apart: Whether the process and this thread keep to a processor each, so that each message wakes one that
            is idle. Else the scheduler may put both on one, which saves the wake-up, and where they wait for each
            other costs nothing.

    Raises:
        Absent: There is one processor.
    """

    def __init__(self, apart: bool) -> None:
        self._everywhere = os.sched_getaffinity(0)
        self._here: set[int] = set()
        there = ""
        if apart:
            if len(self._everywhere) < 2:
                raise Absent("there is one processor")
            first, second, *_ = sorted(self._everywhere)
            self._here, there = {first}, str(second)
        self._end, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PONG, str(theirs.fileno()), there], pass_fds=[theirs.fileno()]
            )
        self.call()

    def begin(self) -> None:
        """Keep this thread to its processor, if it is to."""
        if self._here:
            os.sched_setaffinity(0, self._here)

    def rest(self) -> None:
        """Let this thread go where it likes again."""
        os.sched_setaffinity(0, self._everywhere)

    def call(self, data: bytes = b"1234") -> bytes:
        """There and back."""
        self._end.send(data)
        return self._end.recv(64)

    def close(self) -> None:
        """End the process."""
        self._end.close()
        self._process.wait()


def fresh_process(
    code: str, *args: str, environment: dict[str, str] | None = None, look: Callable[[int], None] | None = None
) -> tuple[float, float]:
    """Run Python code in a fresh interpreter.

    Args:
        code: Prints one line when it is ready.
        *args: Its arguments.
        environment: Variables beside this process's own.
        look: Called with the process's id once it is ready; it goes on when this returns.

    Returns:
        Milliseconds from the start until the line, and until the process's end.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = time.perf_counter()
        if look is not None and line:
            look(process.pid)
        process.stdin.close()
        process.wait()
        end = time.perf_counter()
    if not line or process.returncode:
        raise RuntimeError(f"a benchmark's process ended with {process.returncode} before it was ready:\n{code}")
    return (ready - start) * 1e3, (end - start) * 1e3
