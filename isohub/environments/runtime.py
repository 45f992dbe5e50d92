"""What a zygote is started on: an interpreter, and package directories in front of its own.

Side: caller. Trust: made by isohub alone, from the caller's wishes and what was built in the store.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

__all__ = ["HOST", "Runtime"]


@dataclass(frozen=True)
class Runtime:
    """The interpreter and packages of an environment, ready to be started.

    Attributes:
        key: "host", or the content key of a built environment; equal keys share a zygote.
        python: Path of the interpreter.
        packages: Directories to put in front of its own site-packages, first ones first: an overlay's. Workers
            may read them.
    """

    key: str
    python: str
    packages: tuple[str, ...] = ()


#: The caller's own interpreter and packages.
HOST = Runtime("host", sys.executable)
