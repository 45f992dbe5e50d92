"""Says why on stderr, then dies of a signal."""

dependencies = ["torch"]

import os
import signal
import sys

import torch


def _die(number):
    sys.stderr.write("first line\n" * 100)
    sys.stderr.write("fatal: the reason is on this line\n")
    sys.stderr.flush()
    os.kill(os.getpid(), number)


def model(number=signal.SIGABRT):
    """Dies while it builds."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die(number)


class Dies(torch.nn.Module):
    def forward(self, x, number=int(signal.SIGKILL)):
        _die(number)


def in_call():
    """A module that kills its process in forward."""
    return Dies()
