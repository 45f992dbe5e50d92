"""What inputs stand for: calls. The forms of a specification are tested with the command line."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isohub.comparison.inputs import Call, calls_of


def calls(inputs: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [(call.args, dict(call.kwargs)) for call in calls_of(inputs, 0)]


Pair = collections.namedtuple("Pair", "a b")


def test_plain_values_are_one_call() -> None:
    x = torch.ones(2)
    assert calls(x) == [((x,), {})]
    assert calls((x, 3)) == [((x, 3), {})]
    assert calls({"x": 1, "y": 2}) == [((), {"x": 1, "y": 2})]
    assert calls(({"x": 1},)) == [(({"x": 1},), {})]
    assert calls({1: 2}) == [(({1: 2},), {})]
    assert calls([x, x]) == [(([x, x],), {})]
    assert calls(Pair(1, 2)) == [((Pair(1, 2),), {})]
    assert calls(3) == [((3,), {})]
    assert calls(()) == [((), {})]
    array = np.ones(3)
    assert calls(array)[0][0][0] is array
    assert calls(Call((1,), {"b": 2})) == [((1,), {"b": 2})]


def test_what_is_iterated_is_a_data_set_and_read_as_it_is_needed() -> None:
    made: list[int] = []

    def items() -> Any:
        for number in range(3):
            made.append(number)
            yield number, {"label": number}

    found = calls_of(items(), 0)
    assert next(found).args == (0, {"label": 0})
    assert made == [0]
    assert len(list(found)) == 2
    assert calls(torch.utils.data.TensorDataset(torch.arange(2)))[1] == ((torch.tensor(1),), {})
    assert calls(range(2)) == [((0,), {}), ((1,), {})]
    assert [args[0].shape for args, _ in calls(["randn(2)", "zeros(3)"] for _ in range(2))] == [(2,), (2,)]


def test_random_ones_are_those_of_the_seed() -> None:
    first, again = calls(["randn(4)", "mask=rand(2)"]), calls(["randn(4)", "mask=rand(2)"])
    assert torch.equal(first[0][0][0], again[0][0][0])
    assert torch.equal(first[0][1]["mask"], again[0][1]["mask"])
    (call,) = calls_of("randn(4)", 1)
    assert call.text == "randn(4)"
    assert not torch.equal(call.args[0], first[0][0][0])


def test_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    save_file({"x": torch.ones(1), "y": torch.zeros(1)}, tmp_path / "b.safetensors")
    torch.save([torch.ones(2)], tmp_path / "c.pt")
    assert calls(tmp_path / "a.npy")[0][0][0].tolist() == [0, 1, 2]
    assert sorted(calls(str(tmp_path / "b.safetensors"))[0][0][0]) == ["x", "y"]
    assert calls(f"x={tmp_path / 'c.pt'}")[0][1]["x"][0].tolist() == [1, 1]


class Runs:
    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.place),)


def test_no_file_runs_code(tmp_path: Path) -> None:
    bad = Runs()
    bad.place = str(tmp_path / "ran")
    torch.save(bad, tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(bad))
    np.save(tmp_path / "bad.npy", np.array([bad], dtype=object), allow_pickle=True)
    for name in ("bad.pt", "plain.pt", "bad.npy", "missing.npy"):
        with pytest.raises(ValueError, match=name):
            calls(tmp_path / name)
    assert not (tmp_path / "ran").exists()
