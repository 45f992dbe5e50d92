"""What a repository's refs mean: the rules of gitrevisions(7), the same for every source.

Pure: no I/O. The refs come from a server's advertisement or from a clone. Runs in the caller.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isohub.errors import RefNotFoundError, printable
from isohub.repos.naming import near_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from isohub.repos.reference import Reference

__all__ = ["Match", "Refs", "is_full_sha", "is_sha"]

_log = logging.getLogger("isohub.repos")
_SHA = re.compile(r"[0-9a-fA-F]{4,64}")  # core.abbrev's minimum is 4
_FULL_SHA = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")
_PULL = re.compile(r"(?:refs/)?pull/([0-9]+)(?:/head)?")
_TOO_SHORT = re.compile(r"[0-9a-fA-F]{1,3}")
_LISTED = 8
_NUMBER = re.compile(r"([0-9]{1,18})")


def is_sha(ref: str) -> bool:
    """Whether a ref may be a full or a short SHA."""
    return _SHA.fullmatch(ref) is not None


def is_full_sha(ref: str) -> bool:
    """Whether a ref is a whole SHA, which git never takes for a name."""
    return _FULL_SHA.fullmatch(ref) is not None


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts v1.10 after v1.9."""
    parts = [part for part in _NUMBER.split(name) if part]
    return [(True, int(part), part) if _NUMBER.fullmatch(part) else (False, 0, part) for part in parts]


@dataclass(frozen=True)
class Match:
    """A ref that was found.

    Attributes:
        commit: Its commit; tags are peeled.
        name: Full name of the ref, or None if a SHA matched.
        own: Whether it is the repository's own word: HEAD, a branch or a tag. Anyone can open a pull
            request, and a server has a ref for each.
    """

    commit: str
    name: str | None
    own: bool = True


@dataclass(frozen=True)
class Refs:
    """The refs of one repository.

    Attributes:
        commits: Full name to commit, tags peeled. Trust: the network.
        head: Commit that HEAD is at, or None in an empty repository.
        head_name: The branch that HEAD names, or None if it is detached.
        remote: Name of the remote whose branches stand in for missing ones, in a clone.
    """

    commits: Mapping[str, str]
    head: str | None
    head_name: str | None
    remote: str | None = None

    def match(self, ref: str) -> Match | None:
        """Find a ref by name, in git's own order; a full SHA is never a name.

        Args:
            ref: As the user wrote it. Trust: the caller.
        """
        if ref == "HEAD":
            return Match(self.head, self.head_name) if self.head else None
        if is_full_sha(ref):
            return None
        candidates = [ref] if ref.startswith("refs/") else []
        if pull := _PULL.fullmatch(ref):
            candidates.append(f"refs/pull/{pull[1]}/head")
        candidates += [f"refs/{ref}", f"refs/tags/{ref}", f"refs/heads/{ref}"]
        if self.remote:
            candidates += [f"refs/remotes/{ref}", f"refs/remotes/{self.remote}/{ref}"]
        found = [name for name in dict.fromkeys(candidates) if name in self.commits]
        if not found:
            return None
        # A clone's own branch and its remote's of the same name are the normal case, not an ambiguity.
        own = [name for name in found if not name.startswith("refs/remotes/")]
        others = [name for name in own[1:] if self.commits[name] != self.commits[own[0]]]
        if others:
            _log.warning(
                "%s is both %s (%s) and %s (%s); the first is taken, as git does. Write the full name to choose",
                printable(ref, newlines=False),
                found[0],
                self.commits[found[0]][:7],
                others[0],
                self.commits[others[0]][:7],
            )
        prefixes = ("refs/heads/", "refs/tags/", *(["refs/remotes/"] if self.remote else []))
        return Match(self.commits[found[0]], found[0], found[0].startswith(prefixes))

    def tips(self) -> dict[str, str]:
        """Commits at the tips of branches and tags, each with one name; HEAD first, then branches.

        Pull requests are left out: anyone can open one, so its commits are not the repository's.
        """
        ordered: dict[str, str] = {}
        if self.head:
            ordered[self.head] = self.head_name or "HEAD"
        for prefix in ("refs/heads/", "refs/tags/"):
            for name, commit in self.commits.items():
                if name.startswith(prefix):
                    ordered.setdefault(commit, name)
        return ordered

    def match_tip(self, sha: str, reference: Reference) -> Match | None:
        """Find the one tip that a full or short SHA names.

        Raises:
            RefNotFoundError: More than one tip starts with it.
        """
        sha = sha.lower()
        hits = [commit for commit in self.tips() if commit.startswith(sha)]
        if len(hits) > 1:
            raise self.ambiguous(sha, hits, reference)
        return Match(hits[0], None) if hits else None

    @staticmethod
    def ambiguous(sha: str, commits: list[str], reference: Reference) -> RefNotFoundError:
        """The error for a short SHA that several commits start with."""
        listed = ", ".join(commit[:12] for commit in commits[:_LISTED])
        return RefNotFoundError(
            f"{sha!r} is short for {len(commits)} commits of {reference.location}: {listed}",
            hint="write more digits",
            reference=str(reference),
            url=reference.location,
            ref=sha,
            near=commits[:_LISTED],
        )

    def names_tag(self, reference: Reference, commit: str, name: str | None = None) -> RefNotFoundError:
        """The error for the id of an annotated tag, which `git rev-parse` and `git ls-remote` print for its name.

        Args:
            reference: Whose `ref` is that id.
            commit: What the tag is of.
            name: Full name of the tag, if it is known.
        """
        tag = "an annotated tag"
        if name is not None:
            tag = f"the annotated tag {printable(name.removeprefix('refs/tags/'), newlines=False)}"
        return self.not_found(
            reference,
            f"it is the id of {tag}, which is no commit",
            f"name the tag, or the commit that it is of: {commit}",
        )

    def _listed(self) -> str:
        """Some branches, the default one first, and the newest tags by their numbers."""
        heads = "refs/heads/"
        branches = {name.removeprefix(heads) for name in self.commits if name.startswith(heads)}
        remote = f"refs/remotes/{self.remote}/"
        branches |= {name.removeprefix(remote) for name in self.commits if self.remote and name.startswith(remote)}
        tags = {name.removeprefix("refs/tags/") for name in self.commits if name.startswith("refs/tags/")}
        first = (self.head_name or "").removeprefix(heads)
        ordered = sorted(branches, key=lambda name: (name != first, _natural(name)))
        newest = sorted(tags - branches, key=_natural, reverse=True)
        shown = ordered[: max(_LISTED - len(newest), _LISTED // 2)]
        shown += newest[: _LISTED - len(shown)]
        count = len(branches | tags)
        text = ", ".join(printable(name, newlines=False) for name in shown)
        return f"it has {count} branches and tags: {text}" + (", ..." if count > len(shown) else "")

    def not_found(self, reference: Reference, why: str | None = None, hint: str | None = None) -> RefNotFoundError:
        """The error for a ref that is not there, with the nearest names that are.

        Args:
            reference: Whose `ref` was looked for.
            why: More about it, as the rest of the sentence.
            hint: Instead of the near names.
        """
        ref = reference.ref or "HEAD"
        where = reference.location
        if not self.commits and self.head is None:
            return RefNotFoundError(
                f"{where} has no commits yet", reference=str(reference), url=where, ref=ref, near=[]
            )
        prefixes = ["refs/heads/", "refs/tags/"] + ([f"refs/remotes/{self.remote}/"] if self.remote else [])
        names = [name[len(prefix) :] for name in self.commits for prefix in prefixes if name.startswith(prefix)]
        near = [printable(name, newlines=False) for name in near_names(ref, names)]
        if _PULL.fullmatch(ref):
            near = []
            why = why or "it has no such pull request"
        if hint is None and near:
            hint = f"near names: {', '.join(near)}"
        if hint is None and names:
            hint = self._listed()
        if hint is not None and _TOO_SHORT.fullmatch(ref):
            hint += "; a commit is named with at least 4 digits"
        return RefNotFoundError(
            f"{where} has no branch, tag or commit {ref!r}" + (f": {why}" if why else ""),
            hint=hint,
            reference=str(reference),
            url=where,
            ref=ref,
            near=near,
        )
