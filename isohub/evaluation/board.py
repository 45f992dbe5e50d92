"""Which lane does what next. Knows nothing of models, data or processes: numbers of refs and batches alone.

Rules:

1. A lane goes on with the ref that it has; then with others that it has loaded; then with one that nobody has begun;
   then it helps with one that others are at, if that is worth loading the model once more.
2. What failed is tried again by whoever is free, on a fresh worker, `retries` times. A ref that cannot be loaded is
   given up as a whole.
3. An exception that came again on a fresh worker three times is taken for the ref's own: others of that kind are not
   tried twice any more. A death, a limit or a timeout always is.
4. Of a stream, batches are known for as long as some ref needs them, and not more of them than the window.

Side: caller. Thread-safe; every lane's thread waits here.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

__all__ = ["Board", "Task"]

_REPEATS = 3
# How often a task goes on after its lane was lost: each is a machine's death and none of the task's doing.
_MOST_LOSSES = 10


@dataclass(frozen=True)
class Task:
    """One batch for one ref, and the refs that the lane is to let go of before."""

    ref: int
    batch: int
    drop: tuple[int, ...] = ()


@dataclass
class _Ref:
    """What is left to do for one ref."""

    waiting: list[int] = field(default_factory=list)  # a heap
    running: int = 0
    tries: Counter[int] = field(default_factory=Counter)  # by batch
    losses: Counter[int] = field(default_factory=Counter)
    load_tries: int = 0
    given_up: bool = False
    repeats: Counter[str] = field(default_factory=Counter)
    lanes: set[int] = field(default_factory=set)
    barred: set[int] = field(default_factory=set)  # lanes in which it could not be loaded, while it was in others
    load_s: float | None = None
    batch_s: float = 0.0
    done: int = 0
    size_bytes: int = 0


class Board:
    """The tasks of one evaluation.

    Args:
        refs: How many.
        lanes: How many.
        retries: How often what failed is tried again.
        window: How many batches of a stream may be known at once.
        fits: Whether one more worker of so many bytes has room.
    """

    def __init__(self, refs: int, lanes: int, retries: int, window: int, fits: Callable[[int], bool]) -> None:
        self._refs = [_Ref() for _ in range(refs)]
        self._loaded: list[list[int]] = [[] for _ in range(lanes)]  # refs of each lane, the present one last
        self._idle_s = [0.0] * lanes
        self._live = lanes
        self._retries = retries
        self._window = window
        self._fits = fits
        self._complete = False  # whether all batches are known
        self._needed: Counter[int] = Counter()  # batch: how many refs still need it
        self._stopped = False
        self._changed = threading.Condition()

    # Filling it.

    def offer(self, batch: int, refs: Iterable[int], *, wait: bool) -> bool:
        """Make a batch known; of a stream, wait for room in the window. False once the work has ended."""
        with self._changed:
            while wait and len(self._needed) >= self._window and not self._stopped:
                self._changed.wait()
            for number in refs:
                ref = self._refs[number]
                if not ref.given_up:
                    heapq.heappush(ref.waiting, batch)
                    self._needed[batch] += 1
            self._changed.notify_all()
            return not self._stopped and not all(ref.given_up for ref in self._refs)

    def complete(self) -> None:
        """All batches are known."""
        with self._changed:
            self._complete = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Nothing more is given out."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until all is done, or stopped."""
        with self._changed:
            while not self._stopped and not self._finished():
                self._changed.wait()

    @property
    def finished(self) -> bool:
        """Whether all is done."""
        with self._changed:
            return self._finished()

    # A lane's thread.

    def next(self, lane: int) -> Task | None:
        """What this lane does next; waits until there is something. None: nothing more."""
        with self._changed:
            began = time.monotonic()
            while not self._stopped and not self._finished():
                number = self._choose(lane, self._idle_s[lane] + time.monotonic() - began)
                if number is not None:
                    if self._loaded[lane]:
                        self._idle_s[lane] += time.monotonic() - began
                    return self._take(lane, number)
                # Whether it is worth to help changes with time alone.
                self._changed.wait(0.1)
            return None

    def _finished(self) -> bool:
        return self._complete and not any(ref.waiting or ref.running for ref in self._refs)

    def _choose(self, lane: int, idle_s: float) -> int | None:
        mine = self._loaded[lane]
        own = [number for number in reversed(mine) if self._refs[number].waiting]
        if own:
            # A stream goes on when its oldest batch is done by all.
            return own[0] if self._complete else min(own, key=lambda number: self._refs[number].waiting[0])
        waiting = [number for number, ref in enumerate(self._refs) if ref.waiting and lane not in ref.barred]
        unbegun = [number for number in waiting if not self._refs[number].lanes]
        if unbegun:
            return unbegun[0] if self._has_room(lane, unbegun[0]) else None
        begun = [number for number in waiting if self._refs[number].load_s is not None]
        best = max(begun, key=self._work_s, default=None)
        if best is None or not self._has_room(lane, best):
            return None
        cost_s = self._refs[best].load_s or 0.0
        # With a ref of its own it only waits for others; what it has waited says what help would be worth.
        worth = idle_s > 2 * cost_s if mine else not self._complete or self._work_s(best) > cost_s
        return best if worth else None

    def _work_s(self, number: int) -> float:
        """How long what waits would take those that are at it."""
        ref = self._refs[number]
        each = ref.batch_s / ref.done if ref.done else 0.0
        return len(ref.waiting) * each / max(1, len(ref.lanes))

    def _has_room(self, lane: int, number: int) -> bool:
        """Whether a lane may load one more model: the others may have to wait for each other."""
        size_bytes = self._refs[number].size_bytes or max(ref.size_bytes for ref in self._refs)
        loaded = sum(map(len, self._loaded))
        # A lane that has others gives them up for it; the only model of all has to fit.
        return loaded == 0 or bool(self._loaded[lane]) or size_bytes == 0 or self._fits(size_bytes)

    def _take(self, lane: int, number: int) -> Task:
        ref, mine = self._refs[number], self._loaded[lane]
        drop = [other for other in mine if other != number and self._is_over(other)]
        size_bytes = ref.size_bytes or max(each.size_bytes for each in self._refs)
        if number not in mine and size_bytes and not self._fits(size_bytes):
            drop = list(mine)
        for other in drop:
            self._forget(lane, other)
        if number in mine:
            mine.remove(number)
        mine.append(number)
        ref.lanes.add(lane)
        ref.running += 1
        return Task(number, heapq.heappop(ref.waiting), tuple(drop))

    def _is_over(self, number: int) -> bool:
        ref = self._refs[number]
        return ref.given_up or (self._complete and not ref.waiting and not ref.running)

    # What became of a task.

    def done(self, task: Task, seconds: float, load_s: float | None, size_bytes: int | None) -> None:
        """It has a result."""
        with self._changed:
            ref = self._refs[task.ref]
            ref.done += 1
            ref.batch_s += seconds
            ref.load_s = load_s if load_s is not None else ref.load_s
            ref.size_bytes = max(ref.size_bytes, size_bytes or 0)
            self._end(task)

    def failed(self, lane: int, task: Task, stage: str, kind: str, *, again: bool, own: bool) -> int | None:
        """It has none.

        Args:
            lane: Whose worker is closed now.
            task: The task.
            stage: ``load`` or ``batch``.
            kind: Of the error.
            again: Whether another try may end otherwise.
            own: Whether an exception says so, and not the worker's end.

        Returns:
            How often it was tried, if that was the last time; None if it is tried again.
        """
        with self._changed:
            ref = self._refs[task.ref]
            self._forget(lane, task.ref)
            if ref.given_up:
                self._end(task)
                return None
            if stage == "load":
                ref.load_tries += 1
                if again and ref.load_tries <= self._retries:
                    self._again(task)
                    return None
                if ref.lanes:
                    ref.barred.add(lane)
                    self._again(task)
                    return None
                ref.given_up = True
                for batch in ref.waiting:
                    self._settle(batch)
                ref.waiting.clear()
                self._end(task)
                return ref.load_tries
            ref.tries[task.batch] += 1
            tries = ref.tries[task.batch]
            if own and tries > 1:
                ref.repeats[kind] += 1
            if again and tries <= self._retries and not (own and ref.repeats[kind] >= _REPEATS):
                self._again(task)
                return None
            self._end(task)
            return tries

    def lost(self, lane: int, task: Task) -> bool:
        """The lane's machine is gone, and what was loaded there; whether the task goes on elsewhere."""
        with self._changed:
            for number in [*self._loaded[lane]]:
                self._forget(lane, number)
            ref = self._refs[task.ref]
            ref.losses[task.batch] += 1
            if ref.losses[task.batch] <= _MOST_LOSSES:
                self._again(task)
                return True
            self._end(task)
            return False

    def gone(self) -> int:
        """A lane does nothing more; how many are left."""
        with self._changed:
            self._live -= 1
            self._changed.notify_all()
            return self._live

    def _forget(self, lane: int, number: int) -> None:
        if number in self._loaded[lane]:
            self._loaded[lane].remove(number)
        ref = self._refs[number]
        ref.lanes.discard(lane)
        if not ref.lanes:
            ref.barred.clear()

    def _again(self, task: Task) -> None:
        ref = self._refs[task.ref]
        ref.running -= 1
        if ref.given_up:
            self._settle(task.batch)
        else:
            heapq.heappush(ref.waiting, task.batch)
        self._changed.notify_all()

    def _end(self, task: Task) -> None:
        self._refs[task.ref].running -= 1
        self._settle(task.batch)
        self._changed.notify_all()

    def _settle(self, batch: int) -> None:
        self._needed[batch] -= 1
        if self._needed[batch] <= 0:
            del self._needed[batch]

    def needs(self, batch: int) -> bool:
        """Whether some ref still needs a batch."""
        with self._changed:
            return batch in self._needed
