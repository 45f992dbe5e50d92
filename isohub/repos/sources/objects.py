"""Git objects, each checked against its id as it is read, and trees written from them.

dulwich finds and inflates; this module believes no index: whatever is used is hashed first, so
that a commit's id vouches for every byte below it, and for all of its history. Writes through
`TreeWriter` only. Runs in the caller.

Source: gitformat-pack(5), Documentation/technical/hash-function-transition, git-fsck(1).
"""

from __future__ import annotations

import hashlib
import re
import stat
import zlib
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from dulwich.errors import ApplyDeltaError, ChecksumMismatch, FileFormatException
from dulwich.pack import UnresolvedDeltas

from isohub.errors import IntegrityError, SourceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from isohub.repos.tree import TreeWriter

__all__ = ["DAMAGE", "ObjectStore", "Objects"]

_KINDS = {1: "commit", 2: "tree", 3: "blob", 4: "tag"}  # gitformat-pack(5), object types
_HEADER_LINE = re.compile(rb"(tree|parent|object) ([0-9a-f]{40}(?:[0-9a-f]{24})?)")
_PARENT_LINE = re.compile(rb"parent ([0-9a-f]{40}(?:[0-9a-f]{24})?)\n")
_TAGS_NESTED = 16
_MODE = re.compile(rb"[0-7]{5,6}")
#: What dulwich raises on bytes that are no sound git data.
DAMAGE = (
    *(ApplyDeltaError, ChecksumMismatch, FileFormatException, UnresolvedDeltas),
    *(zlib.error, ValueError, AssertionError, EOFError, IndexError, KeyError),
)


class ObjectStore(Protocol):
    """The part of dulwich's object stores that is used here; its own types for ids differ by version."""

    def get_raw(self, name: Any, /) -> tuple[int, bytes]:
        """Type number and content of an object."""
        ...

    def iter_prefix(self, prefix: Any, /) -> Iterator[bytes]:
        """Ids that start with hex digits."""
        ...


class Objects:
    """Reads a repository's objects.

    Args:
        store: dulwich's. Trust: the repo wrote it.
        where: The repository, for messages.
        algorithm: ``sha1`` or ``sha256``.
    """

    def __init__(self, store: ObjectStore, *, where: str, algorithm: str = "sha1") -> None:
        self._store = store
        self._where = where
        self._algorithm = algorithm
        self._id_bytes = 20 if algorithm == "sha1" else 32

    def read(self, sha: str) -> tuple[str, bytes]:
        """Kind and content of an object.

        Raises:
            KeyError: There is none.
            IntegrityError: It is damaged, or is not what its id says.
        """
        try:
            number, data = self._store.get_raw(sha.encode("ascii"))
        except KeyError:
            raise KeyError(sha) from None
        except DAMAGE as error:
            raise IntegrityError(f"{self._where}: object {sha} is damaged: {error}", url=self._where) from error
        kind = _KINDS.get(number, "unknown")
        digest = hashlib.sha1(usedforsecurity=False) if self._algorithm == "sha1" else hashlib.sha256()
        digest.update(b"%s %d\0" % (kind.encode("ascii"), len(data)))
        digest.update(data)
        if digest.hexdigest() != sha:
            raise IntegrityError(
                f"{self._where}: object {sha} is not what its id says",
                hint="git fsck names what is damaged",
                url=self._where,
                expected=sha,
                got=digest.hexdigest(),
            )
        return kind, data

    def peel(self, sha: str) -> str | None:
        """The commit behind an object: itself, or what a tag leads to; None for trees and blobs.

        Raises:
            KeyError: An object on the way is missing.
        """
        for _ in range(_TAGS_NESTED):
            kind, data = self.read(sha)
            if kind == "commit":
                return sha
            target = _header(data, b"object") if kind == "tag" else None
            if target is None:
                return None
            sha = target
        return None

    def commits_like(self, prefix: str) -> tuple[list[str], list[str]]:
        """Commits whose ids start with hex digits; and those that a tag with such an id leads to."""
        found: dict[str, None] = {}
        tagged: dict[str, None] = {}
        for raw_name in self._store.iter_prefix(prefix.lower().encode("ascii")):
            name = raw_name.decode("ascii")
            commit = self.peel(name)
            if commit is not None:
                (found if commit == name else tagged)[commit] = None
        return list(found), list(tagged)

    def reachable(self, tips: Iterable[str]) -> Iterator[str]:
        """Commits that tips lead to, each once.

        The nearest come first. Every step is a parent's id in a commit that was hashed, so what is only
        in the store, without a way to it from a tip, is not among them. The walk ends where an object
        is not here.

        Args:
            tips: Ids of commits, and of tags, which are peeled. Trust: the network.
        """
        seen: set[str] = set()
        pending: deque[str] = deque()
        for tip in tips:
            try:
                commit = self.peel(tip)
            except KeyError:
                continue  # a tag of a file or a directory, which a pack of commits does not hold
            if commit is not None and commit not in seen:
                seen.add(commit)
                pending.append(commit)
        while pending:
            commit = pending.popleft()
            try:
                parents = self._parents(commit)
            except KeyError:
                continue
            yield commit
            for parent in parents:
                if parent not in seen:
                    seen.add(parent)
                    pending.append(parent)

    def write_tree(
        self,
        commit: str,
        writer: TreeWriter,
        *,
        prefix: str = "",
        set_aside: Callable[[str, bytes, bool], bool] | None = None,
    ) -> dict[str, str]:
        """Write a commit's tree, without the writer's `finish`.

        Submodules are left as empty directories, which is also what ``git archive`` does.

        Args:
            commit: Its id.
            writer: What to write it with.
            prefix: Before all paths; empty or ending in a slash.
            set_aside: Asked for every file with its path, content and x bit; True if it is not to be
                written, because its asker will.

        Returns:
            The submodules: path to commit.

        Raises:
            IntegrityError: An object is damaged or missing, or the tree may not be written.
        """
        submodules: dict[str, str] = {}
        pending = [(self.tree(commit), prefix)]
        while pending:
            tree, above = pending.pop()
            for mode, raw_name, sha in self._entries(tree):
                # surrogateescape keeps what is no UTF-8 apart; the writer then refuses it by name.
                path = above + raw_name.decode("utf-8", "surrogateescape")
                if "/" in path[len(above) :]:
                    raise writer.refusal(path, "is one name with a slash in it")
                kind_bits = stat.S_IFMT(mode)
                if kind_bits == stat.S_IFDIR:
                    writer.directory(path)
                    pending.append((sha, path + "/"))
                elif mode == 0o160000:
                    writer.directory(path)
                    submodules[path] = sha
                elif kind_bits == stat.S_IFLNK:
                    target = self._blob(sha, path).decode("utf-8", "surrogateescape")
                    writer.symlink(path, target)
                elif kind_bits == stat.S_IFREG:
                    content, executable = self._blob(sha, path), bool(mode & 0o100)
                    if set_aside is None or not set_aside(path, content, executable):
                        writer.file(path, [content], executable=executable)
                else:
                    raise writer.refusal(path, f"has the mode {mode:o}, which git does not have")
        return submodules

    def top_file(self, commit: str, name: str) -> bytes | None:
        """Content of a regular file at the top of a commit's tree; None if there is no such one."""
        for mode, raw_name, sha in self._entries(self.tree(commit)):
            if raw_name == name.encode("utf-8") and stat.S_ISREG(mode):
                return self._blob(sha, name)
        return None

    def tree(self, commit: str) -> str:
        """The tree that a commit names.

        Raises:
            IntegrityError: It is damaged, or no commit.
            SourceUnavailableError: It is not here.
        """
        kind, data = self._required(commit)
        root = _header(data, b"tree") if kind == "commit" else None
        if root is None:
            raise IntegrityError(f"{self._where}: object {commit} is a {kind} and no commit", url=self._where)
        return root

    def _parents(self, commit: str) -> list[str]:
        kind, data = self.read(commit)
        if kind != "commit":
            raise IntegrityError(f"{self._where}: {commit} is a {kind} where a commit was expected", url=self._where)
        # The grammar of a commit: one tree, then its parents, then the rest. Source: git-fsck(1).
        parents: list[str] = []
        at = data.find(b"\n") + 1
        while match := _PARENT_LINE.match(data, at):
            parents.append(match[1].decode("ascii"))
            at = match.end()
        return parents

    def _blob(self, sha: str, path: str) -> bytes:
        kind, data = self._required(sha)
        if kind != "blob":
            raise IntegrityError(f"{self._where}: {path!r} is a {kind} where a file was expected", url=self._where)
        return data

    def _required(self, sha: str) -> tuple[str, bytes]:
        try:
            return self.read(sha)
        except KeyError:
            raise SourceUnavailableError(
                f"{self._where} lacks object {sha}",
                hint="it may be a partial or shallow clone; git fetch --unshallow --refetch brings the rest",
                url=self._where,
            ) from None

    def _entries(self, tree: str) -> Iterator[tuple[int, bytes, str]]:
        kind, data = self._required(tree)
        if kind != "tree":
            raise IntegrityError(f"{self._where}: object {tree} is a {kind} and no tree", url=self._where)
        at = 0
        while at < len(data):
            space = data.find(b" ", at)
            nul = data.find(b"\0", space)
            end = nul + 1 + self._id_bytes
            if space < 0 or nul < 0 or end > len(data) or not _MODE.fullmatch(data[at:space]):
                raise IntegrityError(f"{self._where}: tree {tree} is malformed", url=self._where)
            yield int(data[at:space], 8), data[space + 1 : nul], data[nul + 1 : end].hex()
            at = end


def _header(data: bytes, key: bytes) -> str | None:
    """The id in the first line of a commit or tag."""
    match = _HEADER_LINE.fullmatch(data.partition(b"\n")[0])
    return match[2].decode("ascii") if match is not None and match[1] == key else None
