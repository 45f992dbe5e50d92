"""Values in figures."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from isohub.cli import summary
from isohub.cli.summary import lines, summarise
from isohub.wire.records import MappingRecord, TupleRecord


def test_tensor_figures_are_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "_CHUNK_ELEMENTS", 7)
    tensor = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1000
    found = summarise(tensor)
    assert found["mean"] == pytest.approx(tensor.mean().item(), rel=1e-12)
    assert found["std"] == pytest.approx(tensor.std().item(), rel=1e-9)
    assert (found["min"], found["max"]) == (tensor.min().item(), tensor.max().item())
    assert (found["kind"], found["dtype"], found["shape"], found["nan"]) == ("tensor", "float64", [4, 5], 0)


def test_nan_is_counted_and_left_out() -> None:
    found = summarise(torch.tensor([1.0, math.nan, 3.0]))
    assert (found["mean"], found["min"], found["max"], found["nan"]) == (2.0, 1.0, 3.0, 1)
    assert list(lines(found)) == ["float32[3]  mean 2  std 1.41421  min 1  max 3  NaN 1"]


@pytest.mark.parametrize(
    ("tensor", "line"),
    [
        (torch.empty(0, 3), "float32[0, 3]"),
        (torch.tensor(math.nan), "float32[]  NaN 1"),
        (torch.tensor([math.inf]), "float32[1]  mean inf  min inf  max inf"),
        (torch.tensor([True, False]), "bool[2]  mean 0.5  std 0.707107  min 0  max 1"),
        (torch.tensor([3 + 4j]), "complex64[1]  mean 5  min 5  max 5"),
        (torch.tensor([1.0]).to(torch.float8_e4m3fn), "float8_e4m3fn[1]  mean 1  min 1  max 1"),
        (torch.arange(4).to(torch.uint16), "uint16[4]  mean 1.5  std 1.29099  min 0  max 3"),
        (np.arange(2, dtype=np.int64), "numpy int64[2]  mean 0.5  std 0.707107  min 0  max 1"),
    ],
)
def test_tensors_of_every_kind(tensor: Any, line: str) -> None:
    assert list(lines(summarise(tensor))) == [line]


def test_containers() -> None:
    value = {"a": [1, "x", None], 7: (2.5, {True}), "n": np.float32(0.5), "size": torch.Size([1, 2])}
    assert list(lines(summarise(value), "output")) == [
        "output: dict of 4",
        "  a: list of 3",
        "    0: int 1",
        "    1: str x",
        "    2: None",
        "  7: tuple of 2",
        "    0: float 2.5",
        "    1: set of 1",
        "      0: bool True",
        "  n: float32 0.5",
        "  size: Size torch.Size([1, 2])",
    ]


def test_records_keep_their_names() -> None:
    pair = TupleRecord("Pair", ["left", "right"], [1, 2])
    output = MappingRecord("ModelOutput", [("logits", 1)])
    assert summarise(pair) == {
        "kind": "Pair",
        "entries": [
            {"key": "left", "value": {"kind": "int", "value": 1}},
            {"key": "right", "value": {"kind": "int", "value": 2}},
        ],
    }
    assert summarise(output)["kind"] == "ModelOutput"
    assert summarise(OrderedDict(a=1))["kind"] == "OrderedDict"


def test_long_values_are_cut_for_people() -> None:
    assert list(lines(summarise(list(range(60)))))[-1] == "  ... and 10 more"
    assert len(next(lines(summarise("x" * 1000)))) < 400
    assert summarise(b"abc") == {"kind": "bytes", "value": "3 bytes"}
    assert summarise(1 << 70)["value"] == hex(1 << 70)
