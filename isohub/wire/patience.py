"""Whether a process that waits looks again and again for a while, or sleeps at once.

To wake a process that sleeps takes the kernel 30 to 60 µs on an idle processor, and leaves it with cold caches. A short
call takes as long, so both sides look for a while first. But who looks takes a processor, which the other side's
threads may need: then waits are longer for it. So waits of both kinds are measured, and the kind that has lately been
shorter is taken; the other is tried now and then. Where waits are long nobody looks: an idle worker sleeps, and so does
one that works for long, or has one processor.

Side: both.
"""

from __future__ import annotations

import os
import select
import time

__all__ = ["Patience"]

# Beyond this a sleep costs less than looking does.
_WORTH_S = 600e-6
_LONGEST_LOOK_S = 700e-6
# A wait beyond this is a pause. One among short waits says nothing of the next.
_PAUSE_S = 1200e-6
_MARGIN_S = 30e-6
# Of the last wait in what is expected of the next of its kind.
_SHARE = 0.25
# One wait in so many is of the other kind, to see what that has become: it costs more to sleep in vain.
_LOOKS_TRIED_AFTER, _SLEEPS_TRIED_AFTER = 32, 256


class Patience:
    """How long it pays to look before sleeping. One thread at a time.

    Args:
        descriptor: What is waited for.
    """

    __slots__ = ("_began", "_looked", "_looked_s", "_of_one_kind", "_paused", "_poll", "_several", "_slept_s", "_trial")

    def __init__(self, descriptor: int) -> None:
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._slept_s = self._looked_s = _PAUSE_S  # what is expected of either kind
        self._began = 0.0
        self._looked = self._trial = False  # what this wait is
        self._of_one_kind = 0  # waits since a trial
        self._paused = True  # whether the last wait was a pause
        # With one processor, what is waited for cannot come while this process looks.
        self._several = len(os.sched_getaffinity(0)) > 1

    def look(self) -> bool:
        """Look for as long as it pays; whether there is something to read, or an end."""
        clock, poll, give_way = time.perf_counter, self._poll.poll, os.sched_yield
        began = self._began = clock()
        if not self._choose():
            return False
        end = began + min(1.5 * min(self._looked_s, _WORTH_S) + _MARGIN_S, _LONGEST_LOOK_S)
        while not poll(0):
            give_way()
            if clock() > end:
                return False
        self._learn(clock())
        return True

    def slept(self) -> None:
        """What was waited for has come, after `look` had given up."""
        self._learn(time.perf_counter())

    def _choose(self) -> bool:
        """Whether this wait begins with a look."""
        looks = self._looked_s < self._slept_s and self._looked_s < _WORTH_S
        self._of_one_kind += 1
        self._trial = False
        if looks:
            self._trial = self._of_one_kind > _SLEEPS_TRIED_AFTER
        elif self._slept_s < _PAUSE_S / 1.2:
            self._trial = self._of_one_kind > _LOOKS_TRIED_AFTER
        if self._trial:
            self._of_one_kind = 0
            looks = not looks
        self._looked = looks and self._several
        return self._looked

    def _learn(self, now: float) -> None:
        waited = min(now - self._began, _PAUSE_S)
        first, self._paused = not self._paused, waited >= _PAUSE_S
        if self._paused and first:
            return
        share = 1.0 if self._trial else _SHARE
        if self._looked:
            self._looked_s += share * (waited - self._looked_s)
        else:
            self._slept_s += share * (waited - self._slept_s)
