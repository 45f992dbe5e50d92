"""C3: a state dict lies in the memory that it was built in, and nobody but the caller can change it once it is there."""

from __future__ import annotations

import pytest
import torch

import isohub
from isohub import errors


@pytest.fixture(scope="module")
def own():
    with isohub.Session(timeout_s=60) as opened:
        yield opened


def test_c3_a_build_that_keeps_a_mapping_of_its_state_is_refused(own, hub):
    with pytest.raises(errors.ProtocolError, match="sealed against writing"):
        own.load(hub("state_dicts"), "keeps_writing", "maps", returns="state_dict")
    state = own.load(hub("state_dicts"), "one_by_one", 4, returns="state_dict")
    assert len(state) == 4


def test_c3_a_build_that_keeps_a_descriptor_of_its_state_changes_nothing(own, hub):
    with own.load(hub("state_dicts"), "tied"):  # the worker stays
        state = own.load(hub("state_dicts"), "keeps_writing", "descriptor", returns="state_dict", seed=7)
        assert own.load(hub("state_dicts"), "change_kept") == "Operation not permitted"
    torch.manual_seed(7)
    for tensor in state.values():
        assert torch.equal(tensor, torch.nn.Linear(512, 512, bias=False).weight)


def test_c3_a_build_that_cuts_its_own_memory_off_hurts_itself(own, hub):
    with pytest.raises((errors.WorkerDiedError, errors.ProtocolError, errors.RemoteError)):
        own.load(hub("state_dicts"), "keeps_writing", "truncates", returns="state_dict").popitem()[1].sum()


def test_c3_a_build_that_seals_its_memory_early_is_still_sealed_by_the_caller(own, hub):
    try:
        state = own.load(hub("state_dicts"), "keeps_writing", "seals", returns="state_dict", seed=7)
    except errors.IsohubError:
        return
    torch.manual_seed(7)
    assert torch.equal(state["0.weight"], torch.nn.Linear(512, 512, bias=False).weight)
