"""Imports at once; building or calling may take any time."""

dependencies = ["torch"]

import signal
import time

import torch


def model(seconds=0.0):
    """Sleeps while it builds."""
    time.sleep(seconds)
    return Sleeps()


class Sleeps(torch.nn.Module):
    def forward(self, x, seconds=3600.0):
        time.sleep(seconds)
        return x

    def spin(self):
        """Busy, and never back in the interpreter's wait."""
        while True:
            pass


def deaf():
    """Sleeps while it ignores every signal that can be ignored."""
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass  # SIGKILL, SIGSTOP, and those that libc keeps
    while True:
        time.sleep(3600)
