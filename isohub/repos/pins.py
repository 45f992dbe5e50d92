"""A Reference with its commit, and a commit with its directory: the two frozen stages.

A Pin exists only after a source has resolved the reference; a Checkout only after the store
has verified the tree. Neither does I/O. Runs in the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from isohub.repos.reference import Reference

__all__ = ["TREE_PREFIX", "Checkout", "Pin"]

#: Before the hash of a local directory's content, which stands where a commit id stands elsewhere.
TREE_PREFIX = "tree-"


@dataclass(frozen=True)
class Pin:
    """A Reference and its commit.

    Attributes:
        reference: What was asked for.
        commit: 40 hex digits, or 64 in a SHA-256 repository; ``tree-`` and 40 hex digits of the
            content for a local directory.
        ref_name: Full name of the ref that matched, such as ``refs/heads/main``; None for a SHA
            or a directory.
        validated: False if the commit was accepted on ``skip_validation`` alone, without being
            shown to belong to the repository.
        extras: What else of the commit is to be brought: ``lfs`` (the files behind Git LFS pointers)
            and ``submodules`` (at the commits that the tree names), sorted.
    """

    reference: Reference
    commit: str
    ref_name: str | None = None
    validated: bool = True
    extras: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For logs: ``owner/repo@abc1234``, or ``clone@abc1234`` for local ones."""
        short = self.commit.removeprefix(TREE_PREFIX)[:7]
        repo = self.reference.repo
        if self.reference.source != "local" and self.reference.owner:
            repo = f"{self.reference.owner}/{repo}"
        return f"{repo}@{short}"


@dataclass(frozen=True)
class Checkout:
    """A Pin and its verified directory.

    Attributes:
        pin: What it is of.
        path: Directory that should hold ``hubconf.py``; the reference's subdirectory is applied.
        tree: Hex digest over the content. For a stored checkout the git tree id in the SHA-256
            object format; for a local directory the SHA-1 one, as in `pin.commit`.
        submodules: Paths that were left empty.
        lfs_pointers: Paths of Git LFS pointer files, at most 100.
        root: The whole tree, which `path` is in; None for `path` itself. Its worker may read that. It is the
            store's word and is never reckoned from `path`, in which the repo's symlinks are resolved.
    """

    pin: Pin
    path: Path
    tree: str
    submodules: tuple[str, ...] = ()
    lfs_pointers: tuple[str, ...] = ()
    root: Path | None = None

    @property
    def whole(self) -> Path:
        """The directory of the whole tree."""
        return self.path if self.root is None else self.root

    @property
    def commit(self) -> str:
        """The Pin's commit."""
        return self.pin.commit

    @property
    def reference(self) -> Reference:
        """The Pin's reference."""
        return self.pin.reference
