"""What this machine can give a worker, by trying it in a process of its own: ``isohub doctor``.

Side: caller. Trust: isohub's own code answers; it runs no repo's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import msgspec

from isohub.errors import ConfinementError
from isohub.sandbox.confine import BASE_LAYERS
from isohub.sandbox.policy import DEFAULT_REQUIRED, LAYERS
from isohub.session.request import worker_variables
from isohub.session.spawn import START

__all__ = ["Diagnosis", "Trial", "diagnose"]

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Trial:
    """Something that a confined process tried.

    Attributes:
        name: What.
        holds: Whether it went as it must: what is forbidden failed, what is allowed did not.
        outcome: "succeeded", or the kernel's words.
    """

    name: str
    holds: bool
    outcome: str


@dataclass(frozen=True)
class Diagnosis:
    """What this machine can give a worker.

    Attributes:
        machine: As ``uname -m`` has it.
        kernel: Its release.
        python: The interpreter's version.
        user: The effective user's number; 0 is root.
        landlock_abi: 0 where there is none.
        active: Layers that a worker gets.
        missing: Layers that it cannot get here.
        details: Of a layer: what it consists of, or why it is missing.
        trials: What a confined process tried.
        fault: Why a process could not be confined, or None.
    """

    machine: str
    kernel: str
    python: str
    user: int
    landlock_abi: int
    active: tuple[str, ...]
    missing: tuple[str, ...]
    details: dict[str, str]
    trials: tuple[Trial, ...]
    fault: str | None

    @property
    def default_holds(self) -> bool:
        """Whether untrusted repos run here: with what `Sandbox` requires by default."""
        return self._holds(DEFAULT_REQUIRED)

    @property
    def all_holds(self) -> bool:
        """Whether ``Sandbox(require="all")`` can be had here."""
        return self._holds(LAYERS)

    def _holds(self, required: tuple[str, ...]) -> bool:
        return self.fault is None and set(required) <= set(self.active) and all(trial.holds for trial in self.trials)

    def to_dict(self) -> dict[str, Any]:
        """For ``json``."""
        fields = msgspec.to_builtins(self)
        return {**fields, "default_holds": self.default_holds, "all_holds": self.all_holds}

    def __str__(self) -> str:
        """Lines for people."""
        user = "root" if self.user == 0 else f"user {self.user}"
        lines = [f"Linux {self.kernel} on {self.machine}, Python {self.python}, {user}", ""]
        for name in (*LAYERS,):
            word = "yes" if name in self.active else "NO "
            lines.append(f"{name:<12} {word}  {self.details.get(name, '')}".rstrip())
        lines.append(f"{'always':<12} yes  {', '.join(BASE_LAYERS)}")
        lines.append("")
        lines += [f"{'ok' if trial.holds else 'BAD':<4} {trial.name}: {trial.outcome}" for trial in self.trials]
        if self.fault is not None:
            lines.append(f"BAD  a process could not be confined: {self.fault}")
        lines.append("")
        if self.all_holds:
            lines.append('Untrusted repos run here, fully confined; Sandbox(require="all") holds.')
        elif self.default_holds:
            lines.append(f"Untrusted repos run here, without {' and '.join(self.missing)}.")
        else:
            lines.append("Untrusted repos are refused here; trusted ones run without what is missing.")
        return "\n".join(lines)


def diagnose(python: str = sys.executable) -> Diagnosis:
    """Confine a process as a worker is, and have it try what a worker must not do.

    Raises:
        ConfinementError: That process said nothing that can be read.
    """
    with tempfile.TemporaryDirectory(prefix="isohub-") as directory:
        done = subprocess.run(
            [python, "-I", str(START), "doctor", directory],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=worker_variables(),
            cwd=directory,
            timeout=_TIMEOUT_S,
            check=False,
        )
    try:
        said = msgspec.json.decode(done.stdout, type=dict[str, Any])
        trials = [
            {"name": name, "holds": holds, "outcome": outcome} for name, (holds, outcome) in said["trials"].items()
        ]
        return msgspec.convert({**said, "trials": trials}, Diagnosis)
    except (msgspec.MsgspecError, KeyError) as error:
        text = done.stderr.decode("utf-8", "replace").strip()
        raise ConfinementError(f"this machine could not be examined: {text or error}") from error
