"""\x1b[2J\x1b]0;title\x07 Terminal escapes in every text that a repo controls. \u202edesrever\u202c"""

dependencies = ["torch"]

import sys
import warnings

import torch

print("\x1b[31mred on stdout\x1b[0m\r\x1b[2Koverwritten")
sys.stderr.write("\x1b]52;c;Y2xpcGJvYXJk\x07 clipboard on stderr\n")
warnings.warn("\x1b[5mblinking warning")


def model(text="\x1b[1mbold default"):
    """\x1b[8mhidden docstring\x1b[0m \u2066isolate"""
    return Escapes()


class Escapes(torch.nn.Module):
    def extra_repr(self):
        return "\x1b[31mrepr\x1b[0m"

    def forward(self, x):
        raise ValueError("\x1b[2Jcleared\x9b31m C1 \u202eoverride \udc80 surrogate\nsecond line")


def named():
    """A class whose name holds an escape."""
    return type("\x1b[31mEvil", (), {"method": lambda self: "\x1b[0mvalue"})()
