"""Which commits may be the first bad one, and which to ask about next. Knows ids and parents alone.

Rules:

1. A commit is suspect if it leads to every bad one that is known and to no good one. What is bad is taken to stay bad
   in all that follows it, as ``git bisect`` takes it: history is halved by what leads where, not by dates.
2. With n at once, those are asked about that leave as little as possible whatever the answers are: n of them cut the
   suspects into n + 1 parts of about one size.
3. One that cannot be told (it does not build) stays suspect and is not asked about again; its neighbours are.
4. A bad commit that leads to a good one shows that rule 1 does not hold. It is noted, and the search goes on below the
   bad one: what it finds is one change of several.

Side: caller. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from isohub.errors import BisectionError
from isohub.repos.sources.commits import Commit

__all__ = ["Suspects", "ancestors", "merge_bases", "ordered"]

# Each suspect has as many bits as there are suspects: 50 MB at 20,000. Of more, order stands for number, which costs a
# few questions at most until there are fewer.
_MOST_EXACT = 20_000


class Suspects:
    """The state of one search.

    Args:
        commits: By id: all that lead to the bad end and not to the good one, at least.
        good: The good end.
        bad: The bad end.

    Raises:
        BisectionError: Nothing lies between.
    """

    def __init__(self, commits: Mapping[str, Commit], good: str, bad: str) -> None:
        self._commits = commits
        self.good: set[str] = {good}
        self.bad: set[str] = {bad}
        self.skipped: set[str] = set()
        #: Pairs of a bad commit and a good one that it leads to.
        self.contradictions: list[tuple[str, str]] = []
        self._left = ancestors(commits, [bad]) - ancestors(commits, [good])
        if not self._left:
            raise BisectionError(
                f"the good commit {good[:12]} holds the bad one {bad[:12]} already",
                hint="for a change to the better, say bad for what is good: swap the two and turn the test round",
                commit=bad,
            )
        self.total = len(self._left)

    @property
    def left(self) -> frozenset[str]:
        """Those that may still be the first bad one."""
        return frozenset(self._left)

    @property
    def first_bad(self) -> str | None:
        """The first bad commit, once there is one suspect left."""
        return next(iter(self._left)) if len(self._left) == 1 else None

    def questions(self, most: int) -> list[str]:
        """Which commits to ask about next, at most so many; none once nothing more can be told."""
        order = ordered(self._commits, self._left)
        weights = _weights(self._commits, order)
        total = len(order)
        # The bad end is a suspect whose answer is known.
        open_ones = [sha for sha in order if sha not in self.skipped | self.bad | self.good]
        chosen: list[str] = []
        count = min(most, len(open_ones))
        for number in range(1, count + 1):
            aim = total * number / (count + 1)
            rest = (sha for sha in open_ones if sha not in chosen)
            chosen.append(min(rest, key=lambda sha: (abs(weights[sha] - aim), sha)))
        return chosen

    def note(self, sha: str, verdict: bool | None) -> None:
        """What was found: True for good, False for bad, None for what cannot be told."""
        if verdict is None:
            self.skipped.add(sha)
            return
        above = ancestors(self._commits, [sha])
        if verdict:
            self.good.add(sha)
            self.contradictions += [(bad, sha) for bad in sorted(self.bad) if bad in above]
            if not any(bad in above for bad in self.bad):
                self._left -= above
            return
        self.bad.add(sha)
        against = [good for good in sorted(self.good) if sha in ancestors(self._commits, [good])]
        self.contradictions += [(sha, good) for good in against]
        if self._left & above:
            self._left &= above
        elif against:
            # Good ones that it leads to were believed before: what leads to it is suspect once more.
            self._left = above - ancestors(self._commits, self.good & above)
        # Else the same change came twice, on two branches: either is one.


def ancestors(commits: Mapping[str, Commit], tips: Iterable[str]) -> set[str]:
    """Commits that lead to any of these, themselves included."""
    seen: set[str] = set()
    pending = list(tips)
    while pending:
        sha = pending.pop()
        if sha in commits and sha not in seen:
            seen.add(sha)
            pending.extend(commits[sha].parents)
    return seen


def merge_bases(commits: Mapping[str, Commit], one: str, other: str) -> list[str]:
    """The last commits that lead to both."""
    common = ancestors(commits, [one]) & ancestors(commits, [other])
    covered = {parent for sha in common for parent in commits[sha].parents}
    return sorted(common - ancestors(commits, covered))


def ordered(commits: Mapping[str, Commit], among: set[str]) -> list[str]:
    """These, parents first; of those that nothing orders, by id: the same in every run."""
    left = {sha: sum(parent in among for parent in commits[sha].parents) for sha in among}
    followers: dict[str, list[str]] = {}
    for sha in sorted(among):
        for parent in commits[sha].parents:
            if parent in among:
                followers.setdefault(parent, []).append(sha)
    ready = sorted((sha for sha, count in left.items() if count == 0), reverse=True)
    order: list[str] = []
    while ready:
        sha = ready.pop()
        order.append(sha)
        for follower in reversed(followers.get(sha, [])):
            left[follower] -= 1
            if left[follower] == 0:
                ready.append(follower)
    return order


def _weights(commits: Mapping[str, Commit], order: Sequence[str]) -> dict[str, int]:
    """How many of these lead to each, itself included."""
    if len(order) > _MOST_EXACT:
        return {sha: number + 1 for number, sha in enumerate(order)}
    masks: dict[str, int] = {}
    for number, sha in enumerate(order):
        mask = 1 << number
        for parent in commits[sha].parents:
            mask |= masks.get(parent, 0)
        masks[sha] = mask
    return {sha: mask.bit_count() for sha, mask in masks.items()}
