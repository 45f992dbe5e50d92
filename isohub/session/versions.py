"""What two sides of different Python or torch cannot exchange, said before anything is sent.

The wire itself depends on neither. What does: compiled code (functions and classes of the caller's own), dtypes that
one torch lacks, and exported programs, whose format changes with torch's minor versions.

Side: caller. Trust: versions are what the worker said, of a closed form (`isohub.session.preparing`).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from isohub.errors import ValueNotTransferableError

if TYPE_CHECKING:
    from isohub.session.supervisor import Versions, Worker

__all__ = ["PYTHON", "check_export", "lacked_dtype", "minor_of", "other_python"]

#: This process's, as `minor_of` gives it.
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def minor_of(version: str) -> str:
    """Major and minor version: "3.9" of "3.9.18"."""
    return ".".join(version.split(".")[:2])


def other_python(versions: Versions) -> str:
    """A worker's Python if that does not read the compiled code of this process's; empty if it does.

    One of the same minor version does, and so does a worker that was not asked yet.
    """
    return "" if minor_of(versions.python) in ("", PYTHON) else versions.python


def lacked_dtype(name: str, worker: Worker, phase: str) -> ValueNotTransferableError:
    """The error for a dtype that a worker's torch does not have.

    Args:
        name: Of the dtype.
        worker: Where the value was to go.
        phase: What it was to go for, in words.
    """
    return ValueNotTransferableError(
        f"torch.{name} cannot go to {worker.name}: this process's torch {torch.__version__} has that dtype, and the "
        f"worker's torch {worker.versions.torch} does not",
        hint="convert it to a dtype that both have, such as with .to(torch.float32), or load the repo on a newer torch",
        reference=worker.name,
        commit=worker.commit,
        phase=phase,
    )


def check_export(worker: Worker) -> None:
    """Raise unless an exported program of a worker's torch can be opened by this process's.

    Raises:
        ValueNotTransferableError: Their versions differ.
    """
    own, other = str(torch.__version__), worker.versions.torch
    if minor_of(own) != minor_of(other):
        raise ValueNotTransferableError(
            f"an ExportedProgram of {worker.name} would be made by torch {other} and opened by torch {own}; its format "
            "is for one minor version of torch" + ("" if _exports(other) else f", and torch {other} makes none"),
            hint="torchscript() crosses versions, and so do calls and state_dict(); or load the repo on an environment "
            f"with torch {minor_of(own)}",
            reference=worker.name,
            commit=worker.commit,
            phase="exporting",
        )


def _exports(version: str) -> bool:
    numbers = [int(part) if part.isdigit() else 0 for part in minor_of(version).split(".")]
    return numbers >= [2, 1]
