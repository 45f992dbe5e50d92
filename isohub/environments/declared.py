"""What files ask for, before anybody has decided what to do about it.

Side: caller. Trust: texts are a repo's, or the caller's for a file of his; each was parsed, and `where` is printable.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from isohub.errors import EnvironmentBuildError, printable
from isohub.repos.naming import has_hidden

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["LIMIT_BYTES", "MOST_ENTRIES", "Asked", "Declared", "Indexes", "Unusable", "read_text"]

#: A list of requirements is a page or two of text.
LIMIT_BYTES = 256 << 10
MOST_ENTRIES = 2_000


@dataclass(frozen=True)
class Asked:
    """One requirement.

    Attributes:
        text: As PEP 508 has it, without an address.
        where: File and line, for people.
        hashes: sha256 that its file must have; none are no condition.
        import_name: For an entry of hubconf's ``dependencies``: what has to be importable.
    """

    text: str
    where: str
    hashes: tuple[str, ...] = ()
    import_name: str | None = None


@dataclass(frozen=True)
class Unusable:
    """What was asked for and is not installed on a repo's word: an address, a path.

    Attributes:
        text: As it was written, without credentials; printable.
        where: File and line.
        why: What it is.
        name: The package, if that can be told.
    """

    text: str
    where: str
    why: str
    name: str | None = None


@dataclass(frozen=True)
class Indexes:
    """Where a requirements file of the caller's looks for packages, beside his settings.

    Attributes:
        default: In place of the default index.
        extra: More of them.
        find_links: Directories and pages of files.
        no_index: Whether no index is asked.
        prereleases: Whether any package may come as a pre-release.
    """

    default: str | None = None
    extra: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    no_index: bool = False
    prereleases: bool = False


@dataclass
class Declared:
    """What some files ask for, in order.

    Attributes:
        asked: What to install.
        constraints: Versions to keep to, of what is installed for whatever reason.
        unusable: What cannot be installed as it is written.
        remarks: What was not honoured or not read, for people.
        indexes: Of the caller's own file alone.
        requires_python: Versions of Python that the project is for, if it says so.
    """

    asked: list[Asked] = field(default_factory=list)
    constraints: list[Asked] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    indexes: Indexes = field(default_factory=Indexes)
    requires_python: str | None = None

    def ask(
        self, requirement: Requirement, where: str, *, hashes: tuple[str, ...] = (), constraint: bool = False
    ) -> None:
        """Add a requirement that was parsed, if it is a name and versions of it and nothing else."""
        text = str(requirement)
        if requirement.url is not None:
            self.unusable.append(Unusable(requirement.name, where, "an address", requirement.name))
        elif has_hidden(text):  # `===` takes any text
            shown = printable(text, limit_chars=200, newlines=False)
            self.unusable.append(Unusable(shown, where, "control or invisible characters", requirement.name))
        else:
            (self.constraints if constraint else self.asked).append(Asked(text, where, hashes))

    def extend(self, other: Declared) -> None:
        """Add what other files ask for."""
        self.asked += other.asked
        self.constraints += other.constraints
        self.unusable += other.unusable
        self.remarks += other.remarks
        self.requires_python = self.requires_python or other.requires_python


def read_text(path: Path, root: Path | None) -> str | None:
    """The text of a file; None if there is none of that name.

    Args:
        path: Which. Trust: the repo may have chosen it.
        root: The checkout that it must lie in, symlinks resolved; None for a file of the caller's.

    Raises:
        EnvironmentBuildError: It leads out of the checkout, is no regular file, is too large, or is no UTF-8.
    """
    shown = printable(str(path), limit_chars=300, newlines=False)
    if "\0" in str(path):
        raise EnvironmentBuildError(f"{shown} cannot be read: no file has such a name")
    real = Path(os.path.realpath(path))
    if root is not None and not real.is_relative_to(os.path.realpath(root)):
        raise EnvironmentBuildError(f"{shown} leads out of the checkout {root}; it is not read")
    try:
        # NONBLOCK: opening a FIFO would wait for its writer. NOFOLLOW: `real` is resolved.
        descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise EnvironmentBuildError(f"{shown} cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise EnvironmentBuildError(f"{shown} is no regular file; it is not read")
    with os.fdopen(descriptor, "rb") as stream:
        content = stream.read(LIMIT_BYTES + 1)
    if len(content) > LIMIT_BYTES:
        raise EnvironmentBuildError(
            f"{shown} is larger than {LIMIT_BYTES} bytes, which no list of packages needs to be"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EnvironmentBuildError(f"{shown} is not UTF-8: {error.reason} at byte {error.start}") from error
