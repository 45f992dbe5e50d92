"""The history between two commits: who follows whom, who wrote it, and what they said. No file is read.

Rules:

1. Of a clone on this machine the objects that are there are walked. Of a remote, commits alone are fetched where the
   server can leave files out, a few first and more if these do not lead from one commit to the other.
2. Each commit's id vouches for its parents and its words: every object is hashed as it is read.

Runs in the caller. Trust: the texts are the repo's, as they are. Source: git-fsck(1) and git-commit-tree(1) for the
form of a commit, gitprotocol-pack(5) for ``deepen`` and ``filter``.
"""

from __future__ import annotations

import datetime as dt
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isohub.errors import SourceUnavailableError
from isohub.repos.credentials import Credentials
from isohub.repos.sources.git import clone_url, opened
from isohub.repos.sources.objects import Objects
from isohub.repos.sources.packs import HISTORY_LIMIT_BYTES, PACK_LIMIT_BYTES, connected, received

if TYPE_CHECKING:
    from isohub.repos.reference import Reference

__all__ = ["Commit", "commits_between", "read_commit"]

#: How many commits of each line of history are asked for first; None is all. Commits take 235 bytes each in a pack;
#: with their files, where the server cannot leave those out, some 100 kB.
_DEPTHS = (1_000, 20_000, None)
_DEPTHS_WITH_FILES = (100, 1_000, 20_000, None)
_LINE = re.compile(rb"(?P<key>[a-z]+) (?P<value>[^\n]*)\n")
_SIGNED = re.compile(rb"(?P<who>.*?) ?<(?P<mail>[^<>]*)> (?P<seconds>-?\d{1,15}) (?P<zone>[+-]\d{4})")
_TEXT_LIMIT_BYTES = 1 << 16


@dataclass(frozen=True)
class Commit:
    """One commit.

    Attributes:
        id: Its hex digits.
        parents: Ids of those that it follows; of a merge, the first is the branch that was merged into.
        author: Name and address. Trust: the repo.
        date: When its author wrote it, ISO 8601; empty if that is no date.
        message: All of it, up to 64 KiB. Trust: the repo.
    """

    id: str
    parents: tuple[str, ...]
    author: str
    date: str
    message: str

    @property
    def subject(self) -> str:
        """The first line of its message."""
        return self.message.strip().partition("\n")[0]


def read_commit(objects: Objects, sha: str) -> Commit:
    """One commit.

    Raises:
        KeyError: It is not here.
        IntegrityError: It is damaged.
    """
    kind, data = objects.read(sha)
    if kind != "commit":
        raise KeyError(sha)
    parents: list[str] = []
    author, date = "", ""
    at = 0
    while match := _LINE.match(data, at):
        at = match.end()
        if match["key"] == b"parent":
            parents.append(match["value"].decode("ascii", "replace"))
        elif match["key"] == b"author":
            author, date = _signed(match["value"])
            break
    message = data.partition(b"\n\n")[2][:_TEXT_LIMIT_BYTES].decode("utf-8", "replace")
    return Commit(sha, tuple(parents), author, date, message)


def _signed(line: bytes) -> tuple[str, str]:
    match = _SIGNED.fullmatch(line)
    if match is None:
        return line[:1000].decode("utf-8", "replace"), ""
    who = f"{match['who'].decode('utf-8', 'replace')} <{match['mail'].decode('utf-8', 'replace')}>"[:1000]
    hours, minutes = int(match["zone"][1:3]), int(match["zone"][3:])
    offset = dt.timedelta(hours=hours, minutes=minutes) * (-1 if match["zone"][:1] == b"-" else 1)
    try:
        when = dt.datetime.fromtimestamp(int(match["seconds"]), dt.timezone(offset))
    except (ValueError, OverflowError, OSError):
        return who, ""
    return who, when.isoformat(sep=" ")


def commits_between(
    reference: Reference, good: str, bad: str, credentials: Credentials | None = None
) -> Mapping[str, Commit]:
    """Commits by id: at least all that lead to `bad` and not to `good`, their parents, and these two.

    Args:
        reference: Of the repo; its ref does not matter.
        good: A commit of it.
        bad: Another one.
        credentials: Whom to ask as; the user unless given.

    Raises:
        SourceUnavailableError: The history is not all there, or cannot be brought.
        PackTooLargeError: It is larger than is taken.
    """
    found: dict[str, Commit] = {}
    for objects in _stores(reference, good, bad, credentials or Credentials()):
        found = _walked(objects, good, bad)
        if _is_enclosed(found, good, bad):
            return found
    raise SourceUnavailableError(
        f"{reference.location} lacks a part of the history between {good[:12]} and {bad[:12]}",
        hint="a shallow clone: git fetch --unshallow brings the rest" if reference.source == "local" else None,
        reference=str(reference),
        url=reference.location,
    )


def _stores(reference: Reference, good: str, bad: str, credentials: Credentials) -> Iterator[Objects]:
    """Stores of more and more of the history, each to be read before the next is asked for."""
    if reference.source == "local":
        with opened(reference) as (_, objects):
            yield objects
        return
    number = 0
    while True:
        with _received(reference, good, bad, credentials, number) as (objects, more):
            yield objects
        if not more:
            return
        number += 1


@contextmanager
def _received(
    reference: Reference, good: str, bad: str, credentials: Credentials, number: int
) -> Iterator[tuple[Objects, bool]]:
    """The commits at the depth of that number, and whether there is a further one."""
    with (
        tempfile.TemporaryDirectory(prefix="isohub-") as scratch,
        connected(clone_url(reference), credentials) as remote,
    ):
        able = remote.advertisement.capabilities
        depths = _DEPTHS if "filter" in able else _DEPTHS_WITH_FILES
        depth = depths[number] if "shallow" in able else None
        wants = list(dict.fromkeys(want for commit in (bad, good) for want in remote.advertisement.wants(commit)[0]))
        limit_bytes = HISTORY_LIMIT_BYTES if "filter" in able else PACK_LIMIT_BYTES
        only = received(remote, wants, Path(scratch), depth=depth, commits_only=True, limit_bytes=limit_bytes)
        with only as (objects, _):
            yield objects, depth is not None


def _walked(objects: Objects, good: str, bad: str) -> dict[str, Commit]:
    found: dict[str, Commit] = {}
    pending = [bad, good]
    while pending:
        sha = pending.pop()
        if sha in found:
            continue
        try:
            commit = found[sha] = read_commit(objects, sha)
        except KeyError:
            continue
        pending.extend(commit.parents)
    return found


def _is_enclosed(found: Mapping[str, Commit], good: str, bad: str) -> bool:
    """Whether every way down from `bad` ends at an ancestor of `good` or at the beginning."""
    if good not in found or bad not in found:
        return False
    known = _ancestors(found, good)
    return all(parent in found for sha in _ancestors(found, bad) - known for parent in found[sha].parents)


def _ancestors(found: Mapping[str, Commit], sha: str) -> set[str]:
    seen: set[str] = set()
    pending = [sha]
    while pending:
        one = pending.pop()
        if one not in seen and one in found:
            seen.add(one)
            pending.extend(found[one].parents)
    return seen
