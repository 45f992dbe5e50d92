"""What can be said of a worker without asking it: frozen, so that it can be printed, kept and compared.

Side: caller. Trust: numbers are the kernel's; names are the caller's and the repo's, escaped where they are shown.
Source: proc(5); psutil's ``memory_full_info`` for pss and uss.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from isohub.sandbox.policy import Confinement
from isohub.session.register import Recorded, recorded

if TYPE_CHECKING:
    from isohub.session.supervisor import Worker

__all__ = ["WorkerInfo", "all_workers", "info_of"]


@dataclass(frozen=True)
class WorkerInfo:
    """A worker at one moment. Two of one worker are equal, whenever they were taken.

    Attributes:
        name: Such as ``org/repo@1a2b3c4``.
        reference: What was loaded first.
        commit: The commit whose code it runs.
        environment: "host", or the key of the environment that it runs on.
        python: Version of its Python, as it said; so is `torch`.
        torch: Version of its torch.
        pid: Its process.
        session_pid: The process that loaded it.
        ticks: When it started, in the kernel's ticks: a number can become another process's.
        age_s: Seconds since it started.
        calls: Questions that it was asked: calls, and reading of state, attributes and the like.
        state: "idle" or "busy".
        doing: What it does, in words; None when idle.
        state_s: Seconds that it has been idle, or with this question.
        cpu_s: Processor time, user and kernel.
        rss_bytes: Resident memory, shared pages counted whole. None, here and below, where the kernel does not tell.
        pss_bytes: Resident memory, each shared page divided among those that share it.
        uss_bytes: Memory that would come back if it ended.
        confinement: The layers that it has and has not.
    """

    name: str
    reference: str
    commit: str
    environment: str
    python: str
    torch: str
    pid: int
    session_pid: int
    ticks: int
    age_s: float = field(compare=False)
    calls: int = field(compare=False)
    state: str = field(compare=False)
    doing: str | None = field(compare=False)
    state_s: float = field(compare=False)
    cpu_s: float | None = field(compare=False)
    rss_bytes: int | None = field(compare=False)
    pss_bytes: int | None = field(compare=False)
    uss_bytes: int | None = field(compare=False)
    confinement: Confinement = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        plain = asdict(self)
        del plain["ticks"]
        plain["confinement"] = {"active": [*self.confinement.active], "missing": [*self.confinement.missing]}
        return plain


def _used(pid: int) -> dict[str, Any]:
    """Processor time and memory of a process, as far as the kernel tells this user."""
    import psutil

    found: dict[str, Any] = dict.fromkeys(("cpu_s", "rss_bytes", "pss_bytes", "uss_bytes"))
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        found.update(cpu_s=times.user + times.system, rss_bytes=process.memory_info().rss)
        memory = process.memory_full_info()  # refused for a process that is not dumpable, unless by root
        found.update(pss_bytes=memory.pss, uss_bytes=memory.uss)
    except psutil.Error:
        pass
    return found


def info_of(worker: Worker, reference: str) -> WorkerInfo:
    """A worker of this process's.

    Args:
        worker: It.
        reference: What was loaded first.
    """
    doing, now = worker.doing, time.monotonic()
    return WorkerInfo(
        name=worker.name,
        reference=reference,
        commit=worker.commit,
        environment=worker.runtime.key,
        python=worker.versions.python,
        torch=worker.versions.torch,
        pid=worker.pid,
        session_pid=os.getpid(),
        ticks=worker.ticks,
        age_s=now - worker.started,
        calls=worker.calls,
        state="idle" if doing is None else "busy",
        doing=doing,
        state_s=max(0.0, now - (worker.used if doing is None else worker.asked)),
        confinement=worker.confinement,
        **_used(worker.pid),
    )


def all_workers() -> list[WorkerInfo]:
    """The workers of all of this user's sessions on this machine, the oldest first. None of them is asked."""
    found = [_of_record(record) for record in recorded()]
    return sorted(found, key=lambda info: (info.session_pid, -info.age_s))


def _of_record(record: Recorded) -> WorkerInfo:
    used = _used(record.pid) if record.here else dict.fromkeys(("cpu_s", "rss_bytes", "pss_bytes", "uss_bytes"))
    since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    return WorkerInfo(
        name=record.name,
        reference=record.reference,
        commit=record.commit,
        environment=record.environment,
        python=record.python,
        torch=record.torch,
        pid=record.pid,
        session_pid=record.session_pid,
        ticks=record.ticks,
        age_s=max(0.0, since_boot_s - record.ticks / os.sysconf("SC_CLK_TCK")),
        calls=record.calls,
        state="idle" if record.doing is None else "busy",
        doing=record.doing,
        state_s=max(0.0, time.time() - record.since),
        confinement=Confinement(active=record.active, missing=record.missing),
        **used,
    )
