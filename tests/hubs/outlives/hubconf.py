"""Leaves a process that does all it can to live on: own session, no parent, no signal of its parent's death, deaf.

It ends by itself after ten minutes, so that a failing test leaves nothing for ever.
"""

dependencies = ["torch"]

import ctypes
import os
import signal
import time


def _live_on():
    os.setsid()
    if os.fork():
        os._exit(0)
    try:
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG: none
    except OSError:
        pass
    for number in signal.valid_signals():
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    for descriptor in range(256):
        try:
            os.close(descriptor)
        except OSError:
            pass
    try:
        os.kill(1, signal.SIGKILL)  # not its parent, which may be its worker by now: that has to live to be ended
    except OSError:
        pass
    time.sleep(600)
    os._exit(0)


def leaves():
    """An object that has left a process behind, at its creation."""
    if os.fork() == 0:
        _live_on()
    return object()
