"""Records keep names, positions and keys, and survive pickling and copying."""

from __future__ import annotations

import copy
import pickle

import pytest

from isohub.wire.records import MappingRecord, TupleRecord


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
def test_records_can_be_copied(again):
    pair = again(TupleRecord("Point", ["x", "y"], [1, 2]))
    assert (pair.x, pair.y, pair[1], pair._fields, pair.class_name) == (1, 2, 2, ("x", "y"), "Point")
    mapping = again(MappingRecord("Output", [("a", 1), ("b", 2)]))
    assert (mapping.a, mapping["b"], mapping[0], mapping[:], mapping.class_name) == (1, 2, 1, (1, 2), "Output")


def test_records_say_what_they_have():
    with pytest.raises(AttributeError, match=r"'Point' has no field 'z'; it has \['x'\]"):
        _ = TupleRecord("Point", ["x"], [1]).z
    with pytest.raises(AttributeError, match="'Output' has no 'z'"):
        _ = MappingRecord("Output", [("a", 1)]).z
    with pytest.raises(AttributeError):
        TupleRecord("Point", ["x"], [1]).x = 3


def test_mapping_records_are_dicts():
    record = MappingRecord("Output", [("a", 1)])
    record.b = 2
    record["c"] = 3
    assert dict(record) == {"a": 1, "b": 2, "c": 3}
    assert list(record) == ["a", "b", "c"]
    assert "a" in dir(record)
    assert repr(record) == "Output(a=1, b=2, c=3)"


def test_fields_that_are_none_are_attributes_and_no_keys():
    record = MappingRecord("Output", [("logits", 1), ("cache", 2)], ["loss"])
    assert record.loss is None
    assert "loss" not in record
    assert list(record) == ["logits", "cache"]
    assert (record.past_key_values, record["past_key_values"]) == (2, 2)  # as transformers 5 has it
    assert MappingRecord("Output", [], ["cache"]).past_key_values is None
    assert copy.copy(record).loss is None
    with pytest.raises(KeyError):
        record["loss"]
    with pytest.raises(AttributeError):
        _ = MappingRecord("Output").past_key_values
