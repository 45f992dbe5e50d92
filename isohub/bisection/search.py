"""One search under way: its log, its lanes, what was asked, and what follows from the answers.

Rules are those of `isohub.bisection.bisect`. Side: caller.
"""

from __future__ import annotations

import math
import os
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from isohub.bisection.probing import Answer, OutputTest, Test, ask_commit
from isohub.bisection.report import Bisection, Probe
from isohub.bisection.suspects import Suspects, merge_bases, ordered
from isohub.environments.environment import checked_environment
from isohub.errors import BisectionError, ResultsError
from isohub.execution.executor import Executor, Lane, LaneLostError
from isohub.execution.journal import Journal
from isohub.execution.seats import Seat
from isohub.repos.reference import Reference

if TYPE_CHECKING:
    from isohub.repos.sources.commits import Commit

__all__ = ["Search", "Told"]

#: Told of each commit that was asked, and how many were left before.
Told = Callable[[Probe, int], None]
_MOST_LOSSES = 10
_SHOWN_NOTES = 3


class Search:
    """One search.

    Args:
        executor: Where commits are asked.
        reference: The repo.
        commits: Its history.
        test: What is asked.
        seat: How models are built, the commit aside.
        errors: What a commit is whose model raises or whose worker ends.
        atol: Absolute tolerance.
        rtol: Relative tolerance.
        told: Told of each commit.
    """

    def __init__(
        self,
        executor: Executor,
        reference: Reference,
        commits: Mapping[str, Commit],
        test: Test,
        seat: Seat,
        *,
        errors: Literal["skip", "bad"],
        atol: float,
        rtol: float,
        told: Told,
    ) -> None:
        self._executor = executor
        self._reference = reference
        self._commits = commits
        self._test = test
        self._seat = seat
        self._errors: Literal["skip", "bad"] = errors
        self._atol, self._rtol = atol, rtol
        self._told = told
        self._journal: Journal | None = None
        self._logged: dict[str, Probe] = {}
        self._probes: dict[str, Probe] = {}
        self._lanes: Sequence[Lane] = ()
        self._base: Answer | None = None  # the good end's
        self._rounds = 0

    def open_log(self, log: str | os.PathLike[str], ends: Sequence[str], test: Any, inputs: Any) -> None:
        """Take what the log has."""
        import torch

        from isohub.execution.digests import digest_of

        seat, chosen = self._seat, self._test
        on = checked_environment(seat.options["environment"]) or self._executor.session.environment
        what = (type(chosen).__name__, test, [] if inputs is None else getattr(chosen, "calls", None))
        header = {
            "format": 1,
            "repo": str(self._reference),
            "good": ends[0],
            "bad": ends[1],
            "model": seat.model,
            "args": digest_of((seat.args, seat.kwargs)),
            "on": digest_of((str(seat.options["device"]), on)),
            "test": digest_of((what, getattr(chosen, "method", ""), getattr(chosen, "training", None))),
            "seed": seat.options["seed"],
            "tolerance": [self._atol, self._rtol],
            "errors": self._errors,
            "torch": torch.__version__,
        }
        self._journal = Journal(log, "isohub bisection", header)
        for line in self._journal.lines:
            try:
                value = line.get("value")
                probe = Probe(
                    str(line["commit"]),
                    line["verdict"],
                    None if value is None else float(value),
                    message=str(line["message"]),
                    seconds=float(line["seconds"]),
                    resumed=True,
                )
                if probe.verdict not in ("good", "bad", "skip"):
                    raise ValueError(probe.verdict)
            except (KeyError, TypeError, ValueError) as error:
                path = str(self._journal.path)
                self.close()
                raise ResultsError(f"{path} is damaged: a line is no probe", hint="remove it", path=path) from error
            self._logged[probe.commit] = probe

    def close(self) -> None:
        """Give back lanes and log."""
        for lane in self._lanes:
            lane.close()
        self._lanes = ()
        if self._journal is not None:
            self._journal.close()

    def run(self, good: str, bad: str) -> Bisection:
        """Search."""
        suspects = Suspects(self._commits, good, bad)
        self._lanes = self._executor.open(None)
        self._verify(good, bad)
        while questions := suspects.questions(len(self._lanes)):
            for sha, probe in zip(questions, self._ask(questions, len(suspects.left)), strict=True):
                suspects.note(sha, None if probe.verdict == "skip" else probe.verdict == "good")
        before = self._before(suspects)
        return self._result(suspects, good, bad, before)

    def _verify(self, good: str, bad: str) -> None:
        """Rule 1."""
        for sha, expected in ((good, "good"), (bad, "bad")):
            (probe,) = self._ask([sha], len(self._commits))
            if probe.verdict != expected:
                words = f"cannot be told: {probe.words}" if probe.verdict == "skip" else f"is {probe.verdict}"
                hint = "choose another end" if probe.verdict == "skip" else "is the tolerance what was meant?"
                raise BisectionError(f"the {expected} end {sha[:12]} {words}", hint=hint, commit=sha)
        bases = merge_bases(self._commits, good, bad)
        if not bases:
            raise BisectionError(
                f"{good[:12]} and {bad[:12]} have no history in common", hint="choose another good end", commit=good
            )
        for base in bases:
            if base != good and self._ask([base], len(self._commits))[0].verdict == "bad":
                raise BisectionError(
                    f"{base[:12]}, from which both ends come, is bad; what makes {good[:12]} good is its own branch's",
                    hint=f"choose a good end before {base[:12]}",
                    commit=base,
                )

    def _ask(self, commits: Sequence[str], left: int) -> list[Probe]:
        """One round."""
        self._rounds += 1
        # The good end is asked again where its outputs are needed, which no log holds.
        fresh = [
            sha
            for sha in commits
            if sha not in self._logged or (self._base is None and isinstance(self._test, OutputTest))
        ]
        lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for lane in self._lanes:
            lanes.put(lane)
        with ThreadPoolExecutor(max(1, len(fresh)), thread_name_prefix="isohub-lane") as pool:
            asked = [pool.submit(self._answer, lanes, sha) for sha in fresh]
            try:
                answers = dict(zip(fresh, [future.result() for future in asked], strict=True))
            except BaseException:
                for lane in self._lanes:
                    lane.stop()
                raise
        probes = []
        for sha in commits:
            probe = self._probe(sha, answers[sha]) if sha in answers else self._logged[sha]
            self._probes[sha] = probe
            if sha in answers:
                self._write(probe)
            elif self._base is None:
                self._base = Answer("value" if probe.value is not None else "good", probe.value)
            self._told(probe, left)
            probes.append(probe)
        return probes

    def _answer(self, lanes: queue.SimpleQueue[Lane], sha: str) -> Answer:
        """What one commit gives, on whatever lane is free; one that is lost does not come back unless it is ready."""
        reference = replace(self._reference, ref=sha)
        name = f"{self._reference.repo}@{sha[:7]}"
        seat = replace(self._seat, number=len(self._probes), repo=str(reference), commit=sha, name=name)
        lost: LaneLostError | None = None
        for _ in range(_MOST_LOSSES):
            lane = lanes.get()
            try:
                if lane.ready():
                    return lane.do(ask_commit, seat, self._test, self._errors)
            except LaneLostError as error:
                lost = error
            finally:
                lanes.put(lane)
        raise lost or LaneLostError("no lane is left: what was lost could not be placed again")

    def _probe(self, sha: str, answer: Answer) -> Probe:
        """Rule 2."""
        first = self._base is None
        if first:
            self._base = answer
        base = self._base
        assert base is not None
        probe = Probe(sha, "skip", answer.value, message=answer.message, seconds=answer.seconds)
        if answer.kind == "value":
            assert answer.value is not None
            if base.value is None:
                raise TypeError(
                    "test gave a number, and none for the good end; expected the same kind for every commit"
                )
            return replace(probe, verdict="good" if self._is_near(base.value, answer.value) else "bad")
        if answer.kind == "outputs":
            differences = self._compared(base, answer)
            changed = any(each.verdict == "changed" for each in differences)
            return replace(probe, verdict="bad" if changed else "good", differences=differences)
        return replace(probe, verdict=answer.kind)

    def _is_near(self, expected: float, got: float) -> bool:
        if math.isnan(expected) or math.isnan(got) or math.isinf(expected) or math.isinf(got):
            return expected == got or (math.isnan(expected) and math.isnan(got))
        return abs(got - expected) <= self._atol + self._rtol * abs(expected)

    def _compared(self, base: Answer, answer: Answer) -> tuple[Any, ...]:
        from isohub.comparison.outputs import OutputPair

        pair, noises = OutputPair(self._atol, self._rtol), [OutputPair(), OutputPair()]
        for (expected, expected_again), (got, got_again) in zip(base.outputs, answer.outputs, strict=True):
            pair.add(expected, got)
            noises[0].add(expected, expected_again)
            noises[1].add(got, got_again)
        return pair.result(*(noise.noise() for noise in noises))

    def _write(self, probe: Probe) -> None:
        if self._journal is None or probe.commit in self._logged:
            return
        value = None if probe.value is None else probe.value if math.isfinite(probe.value) else repr(probe.value)
        self._journal.append(
            {
                "commit": probe.commit,
                "verdict": probe.verdict,
                "value": value,
                "message": probe.words if not probe.message else probe.message,
                "seconds": probe.seconds,
            }
        )

    def _before(self, suspects: Suspects) -> str | None:
        """The parent of what was found, asked if it was only concluded: the two are what people look at."""
        first = suspects.first_bad
        if first is None:
            return None
        parents = [sha for sha in self._commits[first].parents if sha in self._commits]
        for number in range(0, len(parents), max(1, len(self._lanes))):
            unasked = [sha for sha in parents[number : number + len(self._lanes)] if sha not in self._probes]
            if unasked:
                for sha, probe in zip(unasked, self._ask(unasked, 1), strict=True):
                    if probe.verdict == "bad":
                        suspects.contradictions.append((sha, first))
        return next((sha for sha in parents if self._probes[sha].verdict == "good"), None)

    def _result(self, suspects: Suspects, good: str, bad: str, before: str | None) -> Bisection:
        commits = self._commits
        notes = [
            f"not the only change: {commits[one].id[:12]} is bad, and {other[:12]}, which it leads to, is not; "
            "what was found is one change of several"
            for one, other in [*dict.fromkeys(suspects.contradictions)][:_SHOWN_NOTES]
        ]
        first = suspects.first_bad
        candidates = [first] if first is not None else ordered(commits, set(suspects.left))
        return Bisection(
            repo=self._reference.text,
            good=commits[good],
            bad=commits[bad],
            first_bad=None if first is None else commits[first],
            candidates=tuple(commits[sha] for sha in candidates),
            before=None if before is None else commits[before],
            probes=tuple(self._probes.values()),
            total=suspects.total,
            rounds=self._rounds,
            lanes=len(self._lanes),
            notes=tuple(notes),
        )
