"""What a search found, for people and for programs. Computes nothing.

Side: caller. Trust: authors and messages of commits are the repo's text, and messages of failures a worker's: escaped
where they are shown, and as they are in `to_dict`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from isohub.errors import printable
from isohub.repos.sources.commits import Commit

if TYPE_CHECKING:
    from isohub.comparison.outputs import LeafDifference

__all__ = ["Bisection", "Probe", "Verdict"]

Verdict = Literal["good", "bad", "skip"]
_SHOWN_CANDIDATES = 20
_SHOWN_LINES = 12


@dataclass(frozen=True)
class Probe:
    """One commit that was asked.

    Attributes:
        commit: Its id.
        verdict: What it was found to be.
        value: Of a metric.
        differences: Of outputs, from those of the good end.
        message: Why it was skipped, or how it is bad.
        seconds: How long it took.
        resumed: Whether the log knew it.
    """

    commit: str
    verdict: Verdict
    value: float | None = None
    differences: tuple[LeafDifference, ...] = field(default=(), repr=False)
    message: str = ""
    seconds: float = 0.0
    resumed: bool = False

    @property
    def words(self) -> str:
        """What it gave, in a few words; escaped."""
        if self.value is not None:
            return f"{self.value:.9g}"
        changed = [each for each in self.differences if each.verdict == "changed"]
        if changed:
            worst = max(changed, key=lambda each: each.max_abs)
            if worst.change == "values":
                return f"{worst.path} differs by {worst.max_abs:.3g}"
            return printable(f"{worst.path}: {worst.expected} is {worst.got} now", newlines=False)
        if self.differences:
            furthest = max(self.differences, key=lambda each: each.max_abs)
            return f"differs by {furthest.max_abs:.3g}" if furthest.max_abs else "equal"
        return printable(self.message, limit_chars=200, newlines=False)


@dataclass(frozen=True)
class Bisection:
    """The first bad commit, or as far as it could be told.

    Attributes:
        repo: As it was written.
        good: The good end.
        bad: The bad end.
        first_bad: The first bad commit; None if commits that could not be told lie before it.
        candidates: All that it may be: one if it was found.
        before: The last good commit before it that was asked, its parent; None if the parent could not be told.
        probes: What was asked, in order, the two ends first.
        total: How many commits there were to choose from.
        rounds: How often questions were asked, each for several commits at once.
        lanes: For how many at most.
        notes: What is to be known beside.
    """

    repo: str
    good: Commit
    bad: Commit
    first_bad: Commit | None
    candidates: tuple[Commit, ...]
    before: Commit | None
    probes: tuple[Probe, ...]
    total: int
    rounds: int
    lanes: int
    notes: tuple[str, ...]

    def probe_of(self, commit: str) -> Probe | None:
        """What a commit gave, if it was asked."""
        return next((probe for probe in self.probes if probe.commit == commit), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "repo": self.repo,
            "good": self.good.id,
            "bad": self.bad.id,
            "first_bad": None if self.first_bad is None else _commit_dict(self.first_bad),
            "candidates": [commit.id for commit in self.candidates],
            "before": None if self.before is None else self.before.id,
            "probes": [
                {
                    "commit": probe.commit,
                    "verdict": probe.verdict,
                    "value": probe.value,
                    "words": probe.words,
                    "seconds": probe.seconds,
                    "resumed": probe.resumed,
                }
                for probe in self.probes
            ],
            "total": self.total,
            "rounds": self.rounds,
            "lanes": self.lanes,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The same as JSON, in ASCII."""
        found = self.to_dict()
        for probe in found["probes"]:
            if probe["value"] is not None and not math.isfinite(probe["value"]):
                probe["value"] = repr(probe["value"])
        return json.dumps(found, indent=2, allow_nan=False).replace("\x7f", "\\u007f")

    def __str__(self) -> str:
        lines = []
        if self.first_bad is not None:
            lines += [f"{self.first_bad.id} is the first bad commit", *_shown(self.first_bad)]
            lines += ["", *self._comparisons(self.first_bad)]
        else:
            lines.append(
                f"the first bad commit is one of {len(self.candidates)}; those before the last could not be told"
            )
            for commit in self.candidates[:_SHOWN_CANDIDATES]:
                probe = self.probe_of(commit.id)
                why = "" if probe is None or probe.verdict != "skip" else f"  ({probe.words})"
                lines.append(f"  {commit.id[:12]}  {printable(commit.subject, limit_chars=100, newlines=False)}{why}")
            if len(self.candidates) > _SHOWN_CANDIDATES:
                lines.append(f"  and {len(self.candidates) - _SHOWN_CANDIDATES} more")
        skipped = sum(probe.verdict == "skip" for probe in self.probes)
        resumed = sum(probe.resumed for probe in self.probes)
        asked = f"{len(self.probes)} commits asked in {self.rounds} rounds to tell {self.total} apart"
        lines += [
            "",
            asked + (f", {skipped} skipped" if skipped else "") + (f", {resumed} from the log" if resumed else ""),
        ]
        return "\n".join([*lines, *self.notes])

    def _comparisons(self, first: Commit) -> list[str]:
        """What was good gave, what the last good one before gave, and what the first bad one gives."""
        rows: list[tuple[str, Commit]] = [("good", self.good)]
        if self.before is not None and self.before.id != self.good.id:
            rows.append(("before", self.before))
        rows.append(("first bad", first))
        found = [(words, commit, self.probe_of(commit.id)) for words, commit in rows]
        return [
            f"{words:<9}  {commit.id[:12]}  {'not asked' if probe is None else probe.words or probe.verdict}"
            for words, commit, probe in found
        ]


def _commit_dict(commit: Commit) -> dict[str, Any]:
    return {
        "commit": commit.id,
        "parents": list(commit.parents),
        "author": commit.author,
        "date": commit.date,
        "message": commit.message,
    }


def _shown(commit: Commit) -> Sequence[str]:
    lines = [printable(line, limit_chars=200, newlines=False) for line in commit.message.strip().splitlines()]
    cut = [*lines[:_SHOWN_LINES], *(["..."] if len(lines) > _SHOWN_LINES else [])]
    author = printable(commit.author, limit_chars=200, newlines=False)
    return [f"author: {author}", f"date:   {commit.date}", "", *(f"    {line}".rstrip() for line in cut)]
