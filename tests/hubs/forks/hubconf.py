"""Leaves processes behind: plain children, one in its own session, and a double fork that outlives its parent.

They end by themselves after ten minutes, so that a failing test leaves nothing for ever.
"""

dependencies = ["torch"]

import os
import time

import torch

_SECONDS = 600


def _sleep():
    time.sleep(_SECONDS)
    os._exit(0)


def _child():
    pid = os.fork()
    if pid == 0:
        _sleep()
    return pid


def _own_session():
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _sleep()
    return pid


def _daemon():
    """The textbook double fork: the process that stays is nobody's child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        inner = os.fork()
        if inner == 0:
            _sleep()
        os.write(writer, str(inner).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    daemon = int(os.read(reader, 32))
    os.close(reader)
    return daemon


class Parent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pids = [_child(), _own_session(), _daemon()]

    def forward(self, x):
        return x + 1


def model():
    """A module; `pids` are the processes it has left, as the worker numbers them."""
    return Parent()


class ForksInCall(torch.nn.Module):
    def forward(self, x):
        """Both sides of the fork return, so that two processes answer one call."""
        self.child = os.fork()
        return x + (100 if self.child == 0 else 1)


def in_call():
    """A module whose forward forks and returns twice."""
    return ForksInCall()
