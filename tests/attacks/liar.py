"""A worker that speaks raw frames: a real process, a real socket, and no rule kept."""

from __future__ import annotations

import array
import json
import logging
import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import isohub.session.supervisor as supervisor
from isohub.repos.pins import Checkout, Pin
from isohub.repos.reference import parse
from isohub.sandbox.policy import Sandbox
from isohub.session.background import Background, Output
from isohub.session.handles import make_handle
from isohub.session.link import Link
from isohub.session.pool import Pool
from isohub.session.request import Placement
from isohub.session.watchdog import Watchdog
from isohub.wire.protocol import pack

COMMIT = "0" * 40
PLACEMENT = Placement(Sandbox(), Path("/nowhere"))
READY = {"event": "ready", "number": 0, "layers": [[], []], "details": {}}


def frame(message: Any, descriptors: int = 0) -> bytes:
    """A frame of this JSON, whose `number` goes into the header, or of these bytes as its body."""
    if isinstance(message, bytes):
        return pack(1, message, descriptors)
    number = message.get("number", 1)
    body = {name: held for name, held in message.items() if name != "number"}
    return pack(number, json.dumps(body).encode(), descriptors)


def value(tree: Any, number: int = 1, **changes: Any) -> dict[str, Any]:
    """An answer, as an honest worker would put it but for `changes`."""
    return {
        "event": "value",
        "number": number,
        "value": tree,
        "claims": [[], []],
        "via": "none",
        "kept": False,
        **changes,
    }


class Open:
    """A gate that opens everything, and remembers what it was given."""

    def __init__(self) -> None:
        self.opened: list[bytes] = []

    def check(self, form: str) -> None:
        pass

    def open(self, form: str, data: bytes) -> Any:
        self.opened.append(data)
        return data


class Liar:
    """One worker that answers each question with what the test gives it.

    Args:
        greeting: What it says first.
        descriptors: What comes with that.

    Attributes:
        link: What a handle would be made with.
        process: The process that is killed when a rule is broken.
    """

    def __init__(self, greeting: bytes = frame(READY), descriptors: Sequence[int] = ()) -> None:
        self.background = Background()
        self.background.start()
        self.pool = Pool()
        self.process = subprocess.Popen(["sleep", "600"])
        channel, self.end = socket.socketpair()
        status, self.status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pidfd = os.pidfd_open(self.process.pid)
        self.status.sendmsg(
            [json.dumps({"pid": self.process.pid}).encode()],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))],
        )
        os.close(pidfd)
        reads = [os.pipe() for _ in range(2)]
        for _, write in reads:
            os.close(write)
        outputs = tuple(Output(read, logging.getLogger("isohub.worker.liar"), logging.INFO) for read, _ in reads)
        self.worker = supervisor.Worker(
            "liar@0000000", COMMIT, channel, status, outputs, self.background, PLACEMENT, Watchdog()
        )  # type: ignore[arg-type]
        self.say(greeting, descriptors)
        try:
            self.worker.greet(10)
        except BaseException:
            self.close()
            raise
        checkout = Checkout(Pin(parse("org/liar"), COMMIT), path=None, tree="")  # type: ignore[arg-type]
        self.link = Link(self.worker, self.pool, checkout, Open(), make_handle, 10, 1 << 30)
        # What a zygote does: reap, and tell the wait status.
        threading.Thread(target=self._reap, daemon=True).start()

    def _reap(self) -> None:
        status = self.process.wait()
        try:
            self.status.send(json.dumps({"exit": -status if status < 0 else status << 8}).encode())
            self.end.close()
        except OSError:
            pass

    def say(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send bytes as they are."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            sent = self.end.sendmsg([data], rights)
            while sent < len(data):
                sent += self.end.send(data[sent:])
        except OSError:
            pass  # the caller has hung up: what this is all about

    def answer(self, *messages: bytes, descriptors: Sequence[int] = ()) -> Any:
        """Ask something, answer it with this, and give what the caller made of it."""
        thread = self.later(*messages, descriptors=descriptors)
        try:
            return self.link.ask("run", phase="being lied to")
        finally:
            thread.join(10)

    def later(self, *messages: bytes, descriptors: Sequence[int] = ()) -> threading.Thread:
        """Answer the next question with this, whoever asks it."""

        def speak() -> None:
            try:
                self.end.recvmsg(1 << 20, 1 << 10)
            except OSError:
                return
            for number, message in enumerate(messages):
                self.say(message, descriptors if number == 0 else ())

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        return thread

    def dead(self) -> bool:
        """Whether the caller has killed it."""
        try:
            return self.process.wait(10) == -9
        except subprocess.TimeoutExpired:
            return False

    def close(self) -> None:
        """End what is left."""
        self.process.kill()
        self.process.wait()
        self.worker.close()
        self.end.close()
        self.status.close()
        self.pool.close()
        self.background.close()

    def __enter__(self) -> Liar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
