import json
import math

import numpy as np
import pytest
import torch

from isohub.evaluation.values import decoded, encoded, metrics_of, reduced

VALUES = {
    "bool": True,
    "int": 3**50,
    "float": 0.1 + 0.2,
    "nan": math.nan,
    "inf": -math.inf,
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "bf16": torch.tensor([[1.5]], dtype=torch.bfloat16),
    "complex": torch.tensor(1 + 2j),
    "empty": torch.empty(0, 4),
    "ints": torch.arange(6).reshape(2, 3).t(),
    "bools": torch.tensor([True, False]),
}


def test_values_survive_a_file_bit_for_bit():
    again = decoded(json.loads(json.dumps(encoded(metrics_of(VALUES)), allow_nan=False)))
    assert again.keys() == VALUES.keys()
    for name, value in VALUES.items():
        if isinstance(value, torch.Tensor):
            assert again[name].dtype == value.dtype
            assert again[name].shape == value.shape
            assert torch.equal(again[name], value)
        else:
            assert repr(again[name]) == repr(value)
            assert type(again[name]) is type(value)


def test_numpy_and_parameters_are_plain_values():
    found = metrics_of(
        {"a": np.float32(0.5), "b": np.arange(3), "c": torch.nn.Parameter(torch.ones(2)), "d": torch.tensor(4)}
    )
    assert found["a"] == 0.5
    assert type(found["a"]) is float
    assert torch.equal(found["b"], torch.arange(3))
    assert type(found["c"]) is torch.Tensor
    assert not found["c"].requires_grad
    assert found["d"] == 4
    assert type(found["d"]) is int


@pytest.mark.parametrize(
    "value",
    [torch.ones(2, device="meta"), torch.ones(2).to_sparse(), None, "a", [1], 1j, pytest.param(10**5000, id="huge")],
)
def test_other_values_are_none(value):
    with pytest.raises(TypeError, match="fn gave"):
        metrics_of({"a": value})


@pytest.mark.parametrize(
    "row",
    [
        3,
        {"a": "text"},
        {"a": [1]},
        {"a": {"dtype": "float32", "shape": [2], "data": "AAAA"}},
        {"a": {"dtype": "uint8", "shape": [-1, -3], "data": "AAAA"}},
        {"a": {"dtype": "object", "shape": [1], "data": "AAAA"}},
        {"a": {"dtype": "float32", "shape": [1], "data": "!!"}},
        {"a": {"dtype": "float32", "shape": None, "data": ""}},
    ],
)
def test_a_file_s_row_that_is_none(row):
    with pytest.raises(ValueError):
        decoded(row)


NAN = math.nan


@pytest.mark.parametrize(
    ("reducer", "values", "weights", "expected"),
    [
        ("mean", [1.0, 4.0], [1, 2], 3.0),
        ("mean", [True, False], [1, 1], 0.5),
        ("mean", [1.0], [0], NAN),
        ("sum", [1, 2, 3], [1, 1, 1], 6),
        ("sum", [2**62, 2**62], [1, 1], 2**63),
        ("sum", [True, True], [1, 1], 2),
        ("min", [3, 1, 2], [1, 1, 1], 1),
        ("max", [3.0, NAN, 2.0], [1, 1, 1], NAN),
        ("max", [NAN, 2.0], [1, 1], NAN),
        ("min", [2, -1.5], [1, 1], -1.5),
        ("count", [5, 5], [1, 1], 2),
        ("list", [5, "x"], [1, 1], [5, "x"]),
    ],
)
def test_reducers_of_numbers(reducer, values, weights, expected):
    found = reduced("a", reducer, values, weights)
    assert repr(found) == repr(expected)


def test_reducers_of_tensors():
    one, other = torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0])
    assert torch.equal(reduced("a", "mean", [one, other], [1, 3]), torch.tensor([2.5, 2.75], dtype=torch.float64))
    assert torch.equal(reduced("a", "max", [one, other], [1, 1]), torch.tensor([3.0, 5.0]))
    assert torch.equal(reduced("a", "min", [one, other], [1, 1]), torch.tensor([1.0, 2.0]))
    assert torch.equal(reduced("a", "concat", [one, other], [1, 1]), torch.tensor([1.0, 5.0, 3.0, 2.0]))
    assert torch.equal(reduced("a", "concat", [1, 2], [1, 1]), torch.tensor([1, 2]))
    confusion = [torch.ones(2, 2, dtype=torch.uint8) * 200] * 2
    assert torch.equal(reduced("a", "sum", confusion, [1, 1]), torch.full((2, 2), 400))


def test_a_sum_goes_over_batches_in_their_order():
    values = [1e16, 1.0, -1e16, 1.0]
    assert reduced("a", "sum", values, [1] * 4) == ((1e16 + 1.0) - 1e16) + 1.0


def test_what_does_not_go_together_is_said():
    with pytest.raises(ValueError, match=r"'a' cannot be reduced by 'sum'.*\nhint: reducers=\{'a': 'list'\}"):
        reduced("a", "sum", [torch.ones(2), torch.ones(3)], [1, 1])
