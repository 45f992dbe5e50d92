"""One evaluation under way: lanes' threads, the batches that are held, the file of results, and the table at the end.

Side: caller.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from isohub.errors import IsohubError, ResultsError
from isohub.evaluation.batches import Batches, Weight, size_of
from isohub.evaluation.board import Board, Task
from isohub.evaluation.table import BatchResult, Evaluation, Failure, Row
from isohub.evaluation.values import decoded, encoded, reduced
from isohub.evaluation.working import Done, Failed, Function, evaluate_batch
from isohub.execution.digests import digest_of
from isohub.execution.executor import LaneLostError
from isohub.execution.journal import Journal
from isohub.execution.seats import Seat

if TYPE_CHECKING:
    import os

    from isohub.evaluation.evaluate import Progress
    from isohub.execution.executor import Executor, Lane

__all__ = ["Run"]

#: Of a stream, for each lane: what it works on, and what it goes on with; and some for refs that are slower.
_WINDOW_PER_LANE = 4
_CLOSE_S = 30.0
_END_S = 15.0


class Run:
    """Does the work and keeps the results.

    Args:
        executor: Where.
        seats: Of each ref; or why there is none: kind, message, tries.
        texts: The refs as they were written.
        function: The metric.
        batches: The data.
        reducers: By metric's name; under "" for all others.
        weight: What a batch weighs.
        retries: How often what failed is tried again.
        results: The file, if any.
        header: Its first line.
    """

    def __init__(
        self,
        executor: Executor,
        seats: Sequence[Seat | tuple[str, str, int]],
        texts: Sequence[str],
        function: Function,
        batches: Batches,
        *,
        reducers: Mapping[str, str],
        weight: Weight,
        retries: int,
        results: str | os.PathLike[str] | None,
        header: dict[str, Any] | None,
    ) -> None:
        self._executor = executor
        self._seats = seats
        self._texts = texts
        self._function = function
        self._batches = batches
        self._reducers = reducers
        self._weight = weight
        self._retries = retries
        self._found: list[dict[int, BatchResult]] = [{} for _ in seats]
        self._failures: list[list[Failure]] = [[] for _ in seats]
        self._load_s: list[float | None] = [None] * len(seats)
        self._memory: list[int | None] = [None] * len(seats)
        self._held: dict[int, Any] = {}  # batches of a stream, as the executor shares them
        self._weights: dict[int, float] = {}
        self._digests: dict[int, str] = {}
        self._known: dict[int, str] = {}  # digests that the file has
        self._lock = threading.Lock()
        self._telling = threading.RLock()
        self._fault: BaseException | None = None
        self._total: int | None = None
        self._journal: Journal | None = None
        if results is not None and header is not None:
            self._journal = Journal(results, "isohub evaluation", header)
            try:
                self._resume(header["commits"])
            except BaseException:
                self._journal.close()
                raise
        self.resumed = sum(map(len, self._found))

    def _resume(self, commits: Sequence[str | None]) -> None:
        """Take what the file has. A ref that could not be resolved then has its commit in a line of its own."""
        assert self._journal is not None
        before = {line["ref"]: line["commit"] for line in self._journal.lines if line.get("commit")}
        for number, commit in enumerate(commits):
            if commit is None:
                continue
            if before.setdefault(number, commit) != commit:
                raise ResultsError(
                    f"{self._journal.path} is another question's: ref {number + 1} was {before[number]}, is {commit}",
                    hint="give another file, or ask what was asked before",
                    path=str(self._journal.path),
                )
            if not any(line.get("commit") and line["ref"] == number for line in self._journal.lines):
                self._journal.append({"ref": number, "commit": commit})
        for place, line in enumerate(self._journal.lines, start=2):
            if "metrics" not in line:
                continue
            try:
                ref, batch = line["ref"], line["batch"]
                if type(ref) is not int or type(batch) is not int or ref < 0 or batch < 0:
                    raise ValueError("numbers that are none")
                weight, seconds = float(line["weight"]), float(line["seconds"])
                self._found[ref][batch] = BatchResult(batch, weight, seconds, decoded(line["metrics"]))
                self._known[batch] = str(line["digest"])
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ResultsError(
                    f"{self._journal.path} is damaged: line {place} is no result",
                    hint="remove the file, or that line",
                    path=str(self._journal.path),
                ) from error
        for number in sorted(self._known):
            if self._batches.listed is not None and number < len(self._batches.listed):
                self._note(number, self._batches.listed[number])  # it costs no reading

    # The work.

    def table(self, model: str, progress: Progress, began: float) -> Evaluation:
        """Compute what is missing, and give the table."""
        try:
            lanes, threads = self._work(progress)
        finally:
            if self._journal is not None:
                self._journal.close()
        rows = tuple(self._row(number) for number in range(len(self._seats)))
        numbers = {batch for found in self._found for batch in found}
        numbers |= {each.batch for failures in self._failures for each in failures if each.batch is not None}
        count = self._batches.count
        if count is None:
            count = max(numbers, default=-1) + 1
        return Evaluation(model, rows, count, time.monotonic() - began, self.resumed, lanes, threads)

    def _work(self, progress: Progress) -> tuple[int, int | None]:
        live = []
        for number, seat in enumerate(self._seats):
            if isinstance(seat, Seat):
                live.append(number)
            else:
                kind, message, tries = seat
                self._failures[number].append(Failure(None, kind, message, tries))
        count = self._batches.count
        self._total = None if count is None else count * len(live)
        left = None if count is None else sum(count - len(self._found[number]) for number in live)
        if not live or left == 0:
            self._tell(progress)
            return 0, None
        self._batches.begin()
        lanes = self._executor.open(left)
        board = Board(
            len(self._seats), len(lanes), self._retries, _WINDOW_PER_LANE * len(lanes) + 2, self._executor.fits
        )
        threads = [
            threading.Thread(target=self._serve, args=(board, number, lane, progress), name="isohub-lane", daemon=True)
            for number, lane in enumerate(lanes)
        ]
        ended = False
        try:
            self._tell(progress)
            for thread in threads:
                thread.start()
            self._feed(board, live)
            board.join()
            ended = self._fault is None
        finally:
            board.stop()
            if not ended:
                for lane in lanes:
                    lane.stop()
            deadline = time.monotonic() + _CLOSE_S
            for thread, lane in zip(threads, lanes, strict=True):
                if thread.ident is not None:
                    thread.join(_END_S if ended else max(0.0, deadline - time.monotonic()))
                    if thread.is_alive():
                        lane.stop()  # it waits for a place that nobody needs any more
        if self._fault is not None:
            raise self._fault
        if not board.finished:
            raise IsohubError("no lane is left: what was lost could not be placed again", hint="ray status shows why")
        self._total = self._steps()
        self._tell(progress)
        return len(lanes), lanes[0].threads

    def _tell(self, progress: Progress) -> None:
        """Say how far it is: one at a time, and never less than before."""
        with self._telling:
            progress(self._steps(), self._total)

    def _steps(self) -> int:
        """How many pieces of work are finished."""
        with self._lock:
            failed = sum(each.batch is not None for failures in self._failures for each in failures)
            return sum(map(len, self._found)) + failed

    def _feed(self, board: Board, live: Sequence[int]) -> None:
        """Make batches known, in this thread: the caller's data is read here and nowhere else."""
        listed = self._batches.listed

        def lacking(number: int) -> list[int]:
            return [ref for ref in live if number not in self._found[ref]]

        if listed is not None:
            for number in range(len(listed)):
                board.offer(number, lacking(number), wait=False)
        else:
            # `Board.offer` waits for room, so that no more than the window is held.
            number = -1
            for number, batch in self._batches.each(lambda number: not lacking(number)):
                refs = lacking(number)
                self._note(number, batch)
                if refs:
                    with self._lock:
                        self._held[number] = self._executor.share(batch)
                    del batch
                    if not board.offer(number, refs, wait=True):
                        break  # stopped, or no ref is left that could be loaded
                    if not board.needs(number):  # the refs that lacked it have been given up
                        with self._lock:
                            self._held.pop(number, None)
            else:
                self._check_end(number + 1)
        board.complete()

    def _check_end(self, count: int) -> None:
        """A stream that ends before what the file has of it is another one."""
        if self._journal is not None and not self._batches.indexed and max(self._known, default=-1) >= count:
            raise ResultsError(
                f"{self._journal.path} has results of other data: it has batch {max(self._known)}, and the data ended "
                f"after {count:,}",
                hint="a file goes on with the same batches in the same order alone",
                path=str(self._journal.path),
            )

    def _note(self, number: int, batch: Any) -> None:
        """What is to be known of a batch beside its content, once."""
        if not isinstance(self._weight, str) and number not in self._weights:
            weight = float(size_of(batch) if self._weight is None else self._weight(batch))
            if not _is_weight(weight):
                raise ValueError(f"weight gave {weight} for batch {number}; expected a finite number from 0 on")
            self._weights[number] = weight
        if self._journal is None or number in self._digests:
            return
        digest = self._digests[number] = digest_of(batch)
        if self._known.get(number, digest) != digest:
            raise ResultsError(
                f"{self._journal.path} has results of other data: batch {number} is not what it was",
                hint="a file goes on with the same batches in the same order alone: seed what shuffles",
                path=str(self._journal.path),
            )

    def _batch(self, number: int) -> Any:
        if self._batches.listed is None:
            with self._lock:
                return self._held[number]
        batch = self._batches.listed[number]
        self._note(number, batch)
        with self._lock:
            # Shared once, where sharing is a copy; what is here already costs nothing to hold.
            if number not in self._held:
                self._held[number] = self._executor.share(batch)
            return self._held[number]

    def _serve(self, board: Board, number: int, lane: Lane, progress: Progress) -> None:
        """A lane's thread."""
        try:
            while lane.ready() and (task := board.next(number)) is not None:
                self._one(board, number, lane, task)
                if not board.needs(task.batch):
                    with self._lock:
                        self._held.pop(task.batch, None)
                self._tell(progress)
        except BaseException as error:  # noqa: BLE001 - the caller's thread raises it
            with self._lock:
                self._fault = self._fault or error
            board.stop()
        finally:
            lane.close()
            if not board.gone():
                board.stop()

    def _one(self, board: Board, number: int, lane: Lane, task: Task) -> None:
        seat = self._seats[task.ref]
        assert isinstance(seat, Seat)
        batch = self._batch(task.batch)
        try:
            answer = lane.do(evaluate_batch, task.drop, seat, self._function, task.batch, batch)
        except LaneLostError as error:
            if not board.lost(number, task):
                self._fail(task.ref, Failure(task.batch, "LaneLostError", error.message, 1))
            return
        if isinstance(answer, Done) and isinstance(self._weight, str) and self._weight in answer.metrics:
            weight = answer.metrics[self._weight]
            if isinstance(weight, (int, float)) and not _is_weight(weight):
                words = (
                    f"{self._weight!r}, by which batches are weighed, is {weight}; expected a finite number from 0 on"
                )
                answer = Failed("batch", "ValueError", words, again=False)
        if isinstance(answer, Done):
            self._keep(task, answer)
            board.done(task, answer.seconds, answer.load_s, answer.memory_bytes)
            return
        self._answer_failed(board, number, task, answer)

    def _answer_failed(self, board: Board, number: int, task: Task, answer: Failed) -> None:
        tries = board.failed(number, task, answer.stage, answer.kind, again=answer.again, own=answer.own)
        if tries is not None:
            batch = None if answer.stage == "load" else task.batch
            self._fail(task.ref, Failure(batch, answer.kind, answer.message, tries))

    def _fail(self, ref: int, failure: Failure) -> None:
        with self._lock:
            self._failures[ref].append(failure)
        if self._journal is not None:
            # For people; the next run tries again.
            words = {"kind": failure.kind, "message": failure.message, "tries": failure.tries}
            self._journal.append({"ref": ref, "batch": failure.batch, "failure": words})

    def _keep(self, task: Task, answer: Done) -> None:
        metrics = answer.metrics
        for name in self._reducers:
            if name and name not in metrics:
                raise ValueError(
                    f"reducers names {name!r}, which fn did not give; it gave {', '.join(sorted(metrics))}"
                )
        weight = self._weigh(task.batch, metrics)
        result = BatchResult(task.batch, weight, answer.seconds, metrics)
        if self._journal is not None:
            self._journal.append(
                {
                    "ref": task.ref,
                    "batch": task.batch,
                    "digest": self._digests[task.batch],
                    "weight": weight,
                    "seconds": answer.seconds,
                    "metrics": encoded(metrics),
                }
            )
        with self._lock:
            self._found[task.ref][task.batch] = result
            if self._load_s[task.ref] is None:
                self._load_s[task.ref] = answer.load_s
            if answer.memory_bytes is not None:
                self._memory[task.ref] = max(answer.memory_bytes, self._memory[task.ref] or 0)

    def _weigh(self, number: int, metrics: Mapping[str, Any]) -> float:
        if not isinstance(self._weight, str):
            return self._weights[number]
        value = metrics.get(self._weight)
        if not isinstance(value, (int, float)):
            raise ValueError(f"weight={self._weight!r} names a metric that fn did not give as a number")
        return float(value)

    # The table.

    def _row(self, number: int) -> Row:
        seat, found = self._seats[number], self._found[number]
        results = tuple(found[batch] for batch in sorted(found))
        failures = sorted(self._failures[number], key=lambda each: -1 if each.batch is None else each.batch)
        names = dict.fromkeys(name for each in results for name in each.metrics)
        metrics: dict[str, Any] = {}
        for name in names:
            having = [each for each in results if name in each.metrics]
            reducer = self._reducers.get(name, self._reducers[""])
            values, weights = [each.metrics[name] for each in having], [each.weight for each in having]
            try:
                metrics[name] = reduced(name, reducer, values, weights)
            except ValueError as error:
                kind, message = type(error).__name__, str(error).partition("\n")[0]
                failures.append(Failure(None, kind, message, 1))
        return Row(
            repo=self._texts[number],
            commit=seat.commit if isinstance(seat, Seat) else None,
            metrics=metrics,
            results=results,
            failures=tuple(failures),
            weight=sum(each.weight for each in results),
            load_s=self._load_s[number],
            call_s=sum(each.seconds for each in results),
            memory_bytes=self._memory[number],
        )


def _is_weight(value: float) -> bool:
    return 0 <= value < math.inf
