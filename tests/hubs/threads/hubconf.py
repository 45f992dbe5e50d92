"""Starts threads when it is imported: one that works now and then, one that never lets go for long."""

dependencies = ["torch"]

import threading
import time

import torch

ticks = 0


def _tick():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.01)


threading.Thread(target=_tick, daemon=True).start()
# Not a daemon: an interpreter that ends in order would wait for it for ever.
threading.Thread(target=_tick, daemon=False).start()


class Counts(torch.nn.Module):
    def forward(self, x):
        return x + 1

    def ticks(self):
        return ticks


def model():
    """A module; `ticks()` shows that the threads run."""
    return Counts()
