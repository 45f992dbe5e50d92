r"""Trees on disk: the one way to write one that somebody else made.

`TreeWriter` takes entries from an archive or from git objects and refuses every name, link or
amount that could reach outside its directory or harm the machine. Runs in the
caller; executes nothing.

Rules of `TreeWriter`:
  1. A path is relative, and each component is a plain name: not empty, ``.``, ``..`` or
     ``.git`` in any spelling, without ``/``, ``\``, NUL, and without a drive letter.
  2. Nothing is written twice, nor beside a name that differs in case or Unicode form only.
  3. Nothing is written below anything but a directory that this writer made.
  4. A symlink is relative and, with all other links followed, stays inside the tree.
  5. Bytes, entries and depth are counted as they are written.

Source: git's fsck and verify_path (read-cache.c), CVE-2014-9390, CVE-2018-11235, CVE-2021-21300.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isohub.errors import IntegrityError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["DEFAULT_LIMITS", "Limits", "TreeWriter"]

# Linux gives up after as many links in one lookup: path_resolution(7), MAXSYMLINKS.
_LINKS_IN_A_LOOKUP = 40
# All links' lookups together: seconds of work, where any repository needs thousands of steps.
_LINK_STEPS = 5_000_000
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class Limits:
    """How much a tree may hold.

    Attributes:
        total_bytes: GitHub asks for repositories below 5 GB.
        entries: Files, links and directories. The Linux kernel has 90,000.
        depth: Components in a path. git's own tests stop at a few dozen; PATH_MAX allows 2,048.
    """

    total_bytes: int = 5 << 30
    entries: int = 200_000
    depth: int = 128


DEFAULT_LIMITS = Limits()


class TreeWriter:
    """Writes a tree that somebody else made into an empty directory.

    Args:
        root: An empty directory of the caller's.
        origin: Where the tree comes from, for messages.
        limits: Bounds on what is written.
    """

    def __init__(self, root: Path, *, origin: str, limits: Limits = DEFAULT_LIMITS) -> None:
        self._root = str(root)
        self._origin = origin
        self._limits = limits
        # Folded path to (path as written, whether it is a directory).
        self._seen: dict[str, tuple[str, bool]] = {}
        # Folded path to (path as written, target).
        self._links: dict[str, tuple[str, str]] = {}
        self._files = 0
        self._bytes = 0

    def directory(self, path: str) -> None:
        """Make a directory, unless it is there; empty ones are how submodules are left.

        Args:
            path: Components joined by ``/``. Trust: the repo.
        """
        self._make_directories(path, self._components(path))

    def file(self, path: str, chunks: Iterable[bytes], *, executable: bool) -> None:
        """Write a file.

        Args:
            path: Components joined by ``/``. Trust: the repo.
            chunks: The content; counted as it comes. Trust: the repo.
            executable: Whether to set the x bits.
        """
        place = self._claim(path)
        # O_EXCL and O_NOFOLLOW: the rules above say that nothing is there, and the kernel agrees or fails.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(place, flags, 0o600)
        with open(descriptor, "wb", buffering=0) as stream:  # noqa: PTH123  # a descriptor, no path
            for chunk in chunks:
                self._bytes += len(chunk)
                if self._bytes > self._limits.total_bytes:
                    raise self.refusal(path, f"brings the tree over {self._limits.total_bytes} bytes")
                rest = memoryview(chunk)
                while rest:
                    rest = rest[stream.write(rest) :]
            os.fchmod(descriptor, 0o555 if executable else 0o444)
        self._files += 1

    def symlink(self, path: str, target: str) -> None:
        """Write a symlink; `finish` checks where it leads once all others are known.

        Args:
            path: Components joined by ``/``. Trust: the repo.
            target: What the link holds. Trust: the repo.
        """
        if not target or "\0" in target or len(os.fsencode(target)) > 4095:  # PATH_MAX with its NUL
            raise self.refusal(path, "is a symlink whose target is empty, overlong or holds a NUL")
        if target.startswith("/") or "\\" in target or _DRIVE.match(target):
            raise self.refusal(path, f"is a symlink to {printable(target, newlines=False)!r}, which is not relative")
        place = self._claim(path)
        os.symlink(target, place)  # noqa: PTH211  # both are the strings that were judged
        self._links[_fold(path)] = (path, target)
        self._files += 1

    def finish(self) -> None:
        """Check what only the whole can show.

        Raises:
            IntegrityError: A symlink leads out of the tree, or there is no file at all.
        """
        steps = 0
        for path, target in self._links.values():
            steps += self._follow(path, target)
            if steps > _LINK_STEPS:
                raise self.refusal(path, "is one of too many nested symlinks")
        if not self._files:
            raise IntegrityError(f"{self._origin} holds no files", url=self._origin)

    def refusal(self, path: str, why: str) -> IntegrityError:
        """The error that names an entry.

        Args:
            path: The entry as the repo spells it. Trust: the repo.
            why: What is wrong with it, as the rest of the sentence.
        """
        shown = printable(path, limit_chars=300, newlines=False)
        return IntegrityError(
            f"{self._origin}: entry {shown!r} {why}; nothing was kept",
            hint="look at the repository: no tool writes such an entry by accident",
            url=self._origin,
            got=shown,
        )

    def _components(self, path: str) -> list[str]:
        components = path.split("/")
        if len(components) > self._limits.depth:
            raise self.refusal(path, f"has {len(components)} components, more than {self._limits.depth}")
        for component in components:
            if component in ("", ".", ".."):
                raise self.refusal(path, f"has the component {component!r}, which names no file of its own")
            if "\0" in component or "\\" in component:
                raise self.refusal(path, "holds a NUL or a backslash")
            try:
                length_bytes = len(component.encode("utf-8"))
            except UnicodeEncodeError:
                raise self.refusal(path, "is not valid UTF-8") from None
            if length_bytes > 255:  # NAME_MAX
                raise self.refusal(path, "has a component of more than 255 bytes")
            if _is_git_directory(component):
                raise self.refusal(path, "would be read as a git directory")
        if _DRIVE.match(path):
            raise self.refusal(path, "starts with a drive letter")
        return components

    def _claim(self, path: str) -> str:
        """Reserve a new leaf and return its place on the disk."""
        components = self._components(path)
        parent = "/".join(components[:-1])
        if parent:
            self._make_directories(path, components[:-1])
        folded = _fold(path)
        if folded in self._seen:
            other = printable(self._seen[folded][0], newlines=False)
            why = "comes twice" if other == path else f"differs from {other!r} in case or Unicode form only"
            raise self.refusal(path, why)
        self._record(path, folded, is_directory=False)
        return f"{self._root}/{path}"

    def _make_directories(self, path: str, components: list[str]) -> None:
        whole = "/".join(components)
        known = self._seen.get(_fold(whole))
        if known == (whole, True):
            return
        for count in range(1, len(components) + 1):
            prefix = "/".join(components[:count])
            folded = _fold(prefix)
            known = self._seen.get(folded)
            if known is None:
                self._record(prefix, folded, is_directory=True)
                os.mkdir(f"{self._root}/{prefix}", 0o700)  # noqa: PTH102  # called for every directory
            elif known[0] != prefix:
                other = printable(known[0], newlines=False)
                raise self.refusal(path, f"differs from {other!r} in case or Unicode form only")
            elif not known[1]:
                raise self.refusal(path, f"lies below {printable(prefix, newlines=False)!r}, which is no directory")

    def _record(self, path: str, folded: str, *, is_directory: bool) -> None:
        if len(self._seen) >= self._limits.entries:
            raise self.refusal(path, f"is one more than {self._limits.entries} entries")
        self._seen[folded] = (path, is_directory)

    def _follow(self, path: str, target: str) -> int:
        """Walk a link as the kernel would, in the tree as it was written; returns the steps taken.

        Lexical normalisation is not enough: with ``link -> deep/dir``, ``link/..`` is ``deep``.
        """
        at = path.split("/")[:-1]
        pending = target.split("/")[::-1]
        followed = steps = 0
        while pending:
            name = pending.pop()
            steps += 1
            if name in ("", "."):
                continue
            if name == "..":
                if not at:
                    shown = printable(target, newlines=False)
                    raise self.refusal(path, f"is a symlink to {shown!r}, which leads out of the tree")
                at.pop()
                continue
            at.append(name)
            link = self._links.get(_fold("/".join(at))) if self._links else None
            if link is not None:
                followed += 1
                if followed > _LINKS_IN_A_LOOKUP:
                    break  # the kernel answers ELOOP here, so it leads nowhere
                at.pop()
                pending.extend(link[1].split("/")[::-1])
        return steps


def _fold(path: str) -> str:
    """What a file system that ignores case and Unicode form (HFS+, APFS, casefold ext4) compares."""
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def _is_git_directory(component: str) -> bool:
    """Whether some file system reads the name as ``.git``: CVE-2014-9390 and CVE-2019-1353."""
    if component.isascii():
        plain = component.lower().partition(":")[0].rstrip(". ")
    else:
        # HFS+ ignores invisible characters inside names.
        visible = "".join(c for c in component if unicodedata.category(c) != "Cf")
        plain = _fold(visible).partition(":")[0].rstrip(". ")
    return plain in (".git", "git~1")
