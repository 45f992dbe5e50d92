"""A repository of one model at several refs, and batches to go over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.servers.git_repo import GitRepo

HUBCONF = """\
import os, signal, time
import torch
from scale import SCALE


class Scaled(torch.nn.Module):
    def __init__(self, offset):
        super().__init__()
        self.offset = offset
        self.drop = torch.nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x):
        return x * SCALE + self.offset

    def die(self, how):
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(3)
        if how == "hang":
            time.sleep(3600)


def model(offset=0.0):
    return Scaled(offset)


def pair(offset=0.0):
    return Scaled(offset), {"names": ["a", "b"]}


def number():
    return 3.5
"""


@pytest.fixture(scope="session")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """References by scale: ``1``, ``2``, ``3``, and ``broken``, which cannot be imported."""
    path: Path = tmp_path_factory.mktemp("evaluated") / "clone"
    repo = GitRepo(path)
    for scale in ("1", "2", "3"):
        repo.commit({"hubconf.py": HUBCONF, "scale.py": f"SCALE = {scale}.0\n"})
        repo.tag(f"s{scale}")
    repo.commit({"hubconf.py": "raise RuntimeError('no \\x1b[31mway')\n"})
    repo.tag("broken")
    return {name: f"{path}:{tag}" for name, tag in (("1", "s1"), ("2", "s2"), ("3", "s3"), ("broken", "broken"))}


@pytest.fixture(scope="session")
def batches() -> list[torch.Tensor]:
    """Twenty of four examples, and one of two."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, generator=generator) for _ in range(20)] + [torch.randn(2, 3, generator=generator)]
