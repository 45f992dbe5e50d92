"""What a spare does while it waits to be needed: a question and a model of its own, once, so that the next is quick.

A fork shares its memory with its parent until one of them writes, and Python writes to whatever it looks at
(reference counts): the first run of any code copies its pages one fault at a time, and maps those of torch's
libraries. Half of what a small model took in a fresh fork was that. What is done here leaves nothing but those copies:
generators are seeded anew in the worker, and the answer goes to nobody.

Side: worker, before it is confined. Runs isohub's and torch's own code, on tensors too small for a second thread: who
has one enters no user namespace (unshare(2): EINVAL).
"""

from __future__ import annotations

import socket
from typing import Any, Dict

from isohub.wire.arena import Cargo, dtype_names
from isohub.wire.channel import Channel
from isohub.wire.codec import Encoder
from isohub.worker.caller import Caller, dump
from isohub.worker.hubconf import seed_host
from isohub.worker.serve import Server

__all__ = ["rehearse"]

# As a hubconf is: imports, a class, a function with a default.
_SOURCE = """\
import os
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Linear(width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.embedding = nn.Embedding(width, width)
        self.register_buffer("counts", torch.zeros(width))

    def forward(self, x):
        return self.layers(x)

def model(width=2, **kwargs):
    return Model(width, **kwargs)
"""


def rehearse(server: Server) -> None:
    """Build a model, and hear and answer a question.

    Args:
        server: What will answer the caller's.
    """
    seed_host(0)
    _build()
    caller = Caller()  # one of the rehearsal's own, who knows nothing of the other
    ours, theirs = socket.socketpair()
    with ours, theirs:
        caller.connect(ours)
        Channel(theirs).send(1, dump(_question()))
        question, descriptors, gone = caller.hear()
        caller.answer(*server.answer(caller.number, question, descriptors, gone))


def _build() -> None:
    names: Dict[str, Any] = {"__name__": "rehearsal"}
    exec(compile(_SOURCE, "rehearsal", "exec"), names)  # noqa: S102 - the text above
    model = names["model"]().eval()
    model.load_state_dict(model.state_dict())


def _question() -> Dict[str, Any]:
    encoder = Encoder(Cargo(), lambda _: [])
    args = [encoder.encode(""), encoder.encode(dtype_names())]
    options = {"limit": 0, "parcel": False, "grad": True, "inference": False}
    return {"op": "prepare", "target": None, "args": args, "claims": [[], []], **options}
