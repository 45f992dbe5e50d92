"""Whether a process that waits looks again and again for a while, or sleeps at once.

To wake a process that sleeps takes the kernel 30 to 60 µs on an idle processor, and leaves it with cold caches. A short
call takes as long, so both sides look for a while first, where what they wait for has lately come that soon. Waits that
are long, or that looking did not shorten, end it: an idle worker sleeps, and so does one that works for long, or shares
its processor with others.

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
# A wait that ends a sleep is measured with the waking. One in so many of up to this length shows what it is without.
_TRIED_S = 1200e-6
_TRIAL_AFTER = 32
# A wait beyond this says no more than that it was long.
_LONGEST_LEARNED_S = 1800e-6
_MARGIN_S = 30e-6
_SHARE = 0.25  # of the last wait in what is expected of the next


class Patience:
    """How long it pays to look before sleeping. One thread at a time.

    Args:
        descriptor: What is waited for.
    """

    __slots__ = ("_began", "_expected_s", "_poll", "_several", "_sleeps")

    def __init__(self, descriptor: int) -> None:
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._expected_s = _LONGEST_LEARNED_S
        self._began = 0.0
        self._sleeps = 0  # since the last look
        # With one processor, what is waited for cannot come while this process looks.
        self._several = len(os.sched_getaffinity(0)) > 1

    def look(self) -> bool:
        """Look for as long as it pays; whether there is something to read, or an end."""
        clock, poll = time.perf_counter, self._poll.poll
        began = self._began = clock()
        expected = self._expected_s
        trial = expected > _WORTH_S
        if not self._several or (trial and (expected > _TRIED_S or self._sleeps < _TRIAL_AFTER)):
            return False
        self._sleeps = 0
        end = began + min(1.5 * expected + _MARGIN_S, _LONGEST_LOOK_S)
        while not poll(0):
            os.sched_yield()
            if clock() > end:
                self._expected_s = min(2 * expected + _MARGIN_S, _LONGEST_LEARNED_S)
                return False
        waited = clock() - began
        self._expected_s = waited if trial else expected + _SHARE * (waited - expected)
        return True

    def slept(self) -> None:
        """What was waited for has come, after `look` had given up."""
        self._sleeps += 1
        waited = min(time.perf_counter() - self._began, _LONGEST_LEARNED_S)
        self._expected_s += _SHARE * (waited - self._expected_s)
