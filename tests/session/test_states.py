"""``load(returns="state_dict")``: the values are those of torch.hub, whatever the build does, in memory that was built in."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest
import torch

import isohub
from isohub import errors
from isohub.sandbox.policy import Sandbox
from tests.conftest import open_descriptors

MIB = 1 << 20


def bits(tensor):
    tensor = tensor.detach().contiguous()
    return tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def here(path, name, *args):
    """What torch.hub gives in this process."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    threads = torch.get_num_threads()
    try:
        return torch.hub.load(path, name, *args, source="local").state_dict()
    finally:
        torch.set_num_threads(threads)


def groups(state):
    """Which names share memory."""
    by_storage = {}
    for name, tensor in state.items():
        if tensor.numel():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return sorted(by_storage.values())


def same(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(got[name]) == bits(tensor), name
    assert groups(got) == groups(expected)
    assert getattr(got, "_metadata", None) == getattr(expected, "_metadata", None)


def shared_lines(_):
    """How many mappings of parcels this worker could still write to."""
    with open("/proc/self/maps") as maps:
        return sum("isohub-parcel" in line and " rw-s " in line for line in maps)


KINDS = [
    ("layers",), ("cloned_layers",), ("factories",), ("initialised",), ("shapes",), ("tied",), ("from_checkpoint",),
    ("from_checkpoint", True), ("from_checkpoint", False, True), ("changed_after",), ("not_persistent",),
    ("deep_copied",), ("scripted",), ("used_in_the_build",), ("in_threads",), ("forks",), ("loads_data",),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_values_aliases_and_metadata_are_those_of_torch_hub(session, hub, kind):
    path = hub("state_dicts")
    got = session.load(path, *kind, returns="state_dict", seed=7)
    same(got, here(path, *kind))
    for tensor in got.values():  # the caller's own: every page can be written
        if tensor.numel():
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).zero_()


def test_a_model_that_stays_in_the_worker_keeps_its_values(session, hub):
    with session.load(hub("state_dicts"), "megabytes", 1) as other:
        first = session.load(hub("state_dicts"), "the_same_again", returns="state_dict")
        kept = bits(first["weight"])
        first["weight"].zero_()
        second = session.load(hub("state_dicts"), "the_same_again", returns="state_dict")
        assert bits(second["weight"]) == kept
        with session.load(hub("state_dicts"), "the_same_again") as live:
            same(live.state_dict(), second)
            live.run(lambda module: module.weight.data.fill_(3).sum().item())
            assert bits(second["weight"]) == kept
            given = session.load(hub("state_dicts"), "the_same_again", returns="state_dict")
            assert given["weight"].eq(3).all()
            live.run(lambda module: module.weight.data.fill_(4).sum().item())
            assert given["weight"].eq(3).all()
        assert other.run(shared_lines) == 0


def test_a_build_that_raises_shares_nothing_and_the_next_one_works(session, hub):
    with session.load(hub("state_dicts"), "megabytes", 1) as other:
        with pytest.raises(ValueError, match="the first time"):
            session.load(hub("state_dicts"), "raises_once", returns="state_dict", seed=7)
        assert other.run(shared_lines) == 0
        again = session.load(hub("state_dicts"), "raises_once", returns="state_dict")
        torch.manual_seed(7)
        assert bits(again["weight"]) == bits(torch.nn.Linear(512, 512).weight)


def test_what_is_built_lies_in_what_is_sent(session, hub):
    """The tensors are made in shared memory, and the worker never has them twice, nor those of a checkpoint."""
    largest = {}
    for how, count in itertools.product(("empty", "rand", "checkpoint"), (8, 200)):
        state = session.load(hub("state_dicts"), "megabytes", count, how, returns="state_dict")
        # What malloc has left of a huge page is given out first.
        assert int(state["shared"]) >= ((count - 2) * MIB if how == "empty" else 0)
        largest[how, count] = int(state["largest"])
    for how in ("empty", "rand"):
        assert largest[how, 200] - largest[how, 8] < 1.2 * 192 * MIB


def test_a_build_that_dies_leaves_nothing(session, hub):
    before = open_descriptors()
    with pytest.raises(errors.WorkerDiedError, match="SIGKILL"):
        session.load(hub("state_dicts"), "dies", 64, returns="state_dict")
    with open("/proc/self/maps") as maps:
        assert not any("isohub-parcel" in line for line in maps)
    assert open_descriptors() <= before


def test_a_build_takes_as_much_memory_as_without(hub):
    """The limit of memory ends a build, in torch's words or the watchdog's; what fits once, fits."""
    with isohub.Session(sandbox=Sandbox(memory="768 MiB")) as small:
        with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
            small.load(hub("state_dicts"), "megabytes", 2000, returns="state_dict")
        assert "Sandbox(memory=...)" in caught.value.hint
        with pytest.raises((RuntimeError, errors.WorkerLimitError), match="memory"):
            small.load(hub("state_dicts"), "one_by_one", 2000, returns="state_dict")
        assert len(small.load(hub("state_dicts"), "one_by_one", 450, returns="state_dict")) == 450
        assert len(small.load(hub("state_dicts"), "megabytes", 450, returns="state_dict")) == 452


def test_a_limit_of_files_is_one_of_answers(hub):
    with isohub.Session(sandbox=Sandbox(file_size="16 MiB")) as small:
        with pytest.raises(OSError, match="File too large"):
            small.load(hub("state_dicts"), "megabytes", 32, returns="state_dict")
        assert len(small.load(hub("state_dicts"), "megabytes", 8, returns="state_dict")) == 10


def test_the_handle_of_the_same_build_is_as_before(session, hub):
    path = hub("state_dicts")
    with session.load(path, "layers", seed=7) as handle:
        same(handle.state_dict(), here(path, "layers"))
    assert os.path.isdir(path)
