"""A value's leaves: their places, and what is compared how."""

from __future__ import annotations

import numpy as np
import torch

from isohub.comparison.leaves import leaves_by_place, leaves_of
from isohub.comparison.outputs import OutputPair
from isohub.wire.records import EnumRecord, MappingRecord, TupleRecord


def forms(value: object) -> dict[str, str]:
    return {leaf.path: leaf.form if leaf.tensor is not None else leaf.shown for leaf in leaves_of(value)}


def test_places_are_written_as_python_writes_them() -> None:
    value = {
        "a": [torch.ones(2), None],
        3: TupleRecord("Pair", ["x", "y"], [1, 2.5]),
        "m": MappingRecord("Out", [("logits", torch.ones(1, 2)), ("of all", True)]),
    }
    assert forms(value) == {
        "output": "'dict of 3'",
        "output['a']": "'list of 2'",
        "output['a'][0]": "float32[2]",
        "output['a'][1]": "None",
        "output[3]": "'Pair of 2'",
        "output[3].x": "1",
        "output[3].y": "number float64[]",
        "output['m']": "'Out of 2'",
        "output['m'].logits": "float32[1, 2]",
        "output['m']['of all']": "True",
    }


def test_numbers_in_a_row_are_one_tensor() -> None:
    assert forms([0.5] * 100) == {"output": "list float64[100]"}
    assert verdicts([0.5] * 8, (0.5,) * 8) == {"output": ("kind", "changed")}
    assert verdicts([0.5] * 8, torch.full((8,), 0.5, dtype=torch.float64)) == {"output": ("kind", "changed")}
    assert forms([1 << 80] * 10)["output"] == "'list of 10'"
    assert forms(np.ones((2, 2), "f4")) == {"output": "array float32[2, 2]"}
    assert forms(np.float64(0.1)) == {"output": "number float64[]"}


def test_a_repo_s_keys_move_no_cursor() -> None:
    (_, path) = forms({"\x1b[31m\u202e": 1})
    assert path == "output['\\x1b[31m\\u202e']"
    assert "\x1b" not in "".join(forms(MappingRecord("\x1b", [("a\n", "\x07")])))


def verdicts(first: object, second: object) -> dict[str, tuple[object, str]]:
    pair = OutputPair()
    pair.add({leaf.path: leaf for leaf in leaves_of(first)}, {leaf.path: leaf for leaf in leaves_of(second)})
    return {leaf.path: (leaf.change, leaf.verdict) for leaf in pair.result()}


def test_plain_values_are_equal_or_not() -> None:
    same = [EnumRecord("Colour", "RED", 1), np.array(["a", "b"]), b"x", slice(1, 2), {1, 2}, torch.float16, "t"]
    again = [EnumRecord("Colour", "RED", 1), np.array(["a", "b"]), b"x", slice(1, 2), {2, 1}, torch.float16, "t"]
    assert {verdict for _, verdict in verdicts(same, again).values()} == {"same"}
    other = [EnumRecord("Colour", "BLUE", 2), np.array(["a", "c"]), b"y", slice(1, 3), {1, 3}, torch.float32, "u"]
    found = verdicts(same, other)
    assert found.pop("output") == (None, "same")
    assert set(found.values()) == {("value", "changed")}
    assert verdicts([1], [1.0])["output[0]"] == ("kind", "changed")
    assert verdicts([], ())["output"] == ("value", "changed")
    assert verdicts(True, 1)["output"] == ("kind", "changed")


def test_a_comparison_that_fails_is_no_equality() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError

        __hash__ = None  # type: ignore[assignment]

    assert verdicts(Odd(), Odd())["output"] == ("value", "changed")


def test_keys_that_are_cut_to_the_same_stay_apart() -> None:
    keys = ["k" * 60 + middle + "k" * 60 for middle in "ab"]
    assert len(leaves_by_place(dict.fromkeys(keys, 1), "output")) == 3


def test_a_number_of_more_digits_than_python_writes_is_compared() -> None:
    huge = 10**5000
    same = verdicts({"n": huge, huge: {huge}}, {"n": huge, huge: {huge}})
    assert {verdict for _, verdict in same.values()} == {"same"}
    assert verdicts({"n": huge}, {"n": huge + 1})["output['n']"] == ("value", "changed")
    _, leaf, among = leaves_of({"n": huge, "set": {huge}})
    assert leaf.shown.startswith("0x")
    assert among.shown == "set with a number of very many digits"


def test_a_tensor_without_values_is_not_equal_to_one_that_has_them() -> None:
    (verdict,) = verdicts(torch.zeros(3, device="meta"), torch.zeros(3)).values()
    assert verdict == ("kind", "changed")
