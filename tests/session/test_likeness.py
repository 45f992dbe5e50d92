"""What a handle shows where Python and torch look instead of asking: its class, and its dicts of parts."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.nn.utils import prune

import isohub
from isohub.session import likeness
from isohub.session.handles import RemoteModule


@pytest.fixture
def handle(session, hub):
    with session.load(hub("conforms"), "conv_norm") as loaded:
        yield loaded


def test_the_class_has_the_remote_ones_name(session, hub, handle):
    assert type(handle).__name__ == handle.__class__.__name__ == "ConvNorm"
    assert isinstance(handle, isohub.RemoteModule)
    assert type(handle.conv).__name__ == "Conv2d"
    assert not isinstance(handle.conv, torch.nn.Conv2d)
    with session.load(hub("conforms"), "conv_norm") as other:
        assert type(other) is type(handle)
    with pytest.raises(TypeError, match="'ConvNorm' object is not subscriptable"):
        handle[0]


def test_a_name_that_is_none_is_not_taken(session, hub, handle):
    def renamed(module, name):
        return type(name, (type(module),), {})()

    for name in ("a\x1b[2J", "<b>", "class", "x" * 101, ""):
        assert type(handle.run(renamed, name)) is RemoteModule
    assert type(handle.run(renamed, "Fine")).__name__ == "Fine"


def test_classes_go_with_their_handles(session, hub):
    def known():
        gc.collect()
        return {name for _, _, name in likeness._classes if name.endswith("Tanh")}

    before = known()
    with session.load(hub("conforms"), "smooth") as handle:
        part = handle[1]
        assert known() == {"torch.nn.modules.activation.Tanh"}
        del part, handle
    assert known() == before


def test_the_signature_of_the_class(handle):
    assert list(inspect.signature(type(handle).forward).parameters) == ["self", "x"]
    assert list(inspect.signature(RemoteModule.forward).parameters) == ["self", "args", "kwargs"]
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(type(handle).forward(handle.eval(), x), handle(x))


def test_parts_by_name(handle):
    assert list(handle._modules) == ["conv", "norm", "head"]
    assert list(handle.head._parameters) == ["weight", "bias"]
    assert list(handle.norm._buffers) == ["running_mean", "running_var", "num_batches_tracked"]


def test_a_state_that_could_not_be_loaded_hides_no_parts(session, hub):
    with session.load(hub("conforms"), "conv_norm") as handle:
        whole = torch.nn.Sequential(handle)
        state = whole.state_dict()
        with pytest.raises(RuntimeError, match="size mismatch"):
            whole.load_state_dict({**state, "0.head.bias": torch.zeros(5)})
        assert list(handle._modules) == ["conv", "norm", "head"]
        whole.load_state_dict(state)
        assert list(handle._modules) == ["conv", "norm", "head"]
    with pytest.raises(isohub.errors.SessionClosedError):
        whole.load_state_dict(state)
    assert not handle._was_just_loaded()


def test_what_would_change_nothing_says_so(handle):
    x = torch.randn(1, 3, 4, 4)
    zeros = {name: torch.zeros_like(value) for name, value in handle.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"'weight' is a copy of what .*\nhint: h.run.*functional_call"):
        torch.func.functional_call(handle.eval(), zeros, (x,))
    within = handle.run(lambda module, state, x: torch.func.functional_call(module, state, (x,)), zeros, x)
    assert torch.equal(within, torch.zeros(1, 2))
    for change in (
        lambda: handle._modules.pop("head"),
        lambda: handle._modules.update(head=torch.nn.Identity()),
        lambda: handle.head._parameters.clear(),
        lambda: handle.norm._buffers.__delitem__("running_mean"),
        lambda: handle.norm._buffers.setdefault("more", torch.ones(1)),
    ):
        with pytest.raises(RuntimeError, match="changes nothing there"):
            change()
    with pytest.raises(NotImplementedError, match="the class of a module in the worker"):
        handle.__class__ = torch.nn.Module


@pytest.mark.parametrize(
    "change",
    [
        lambda part: prune.l1_unstructured(part, "weight", amount=0.5),
        lambda part: torch.nn.utils.parametrize.register_parametrization(part, "weight", torch.nn.Identity()),
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        lambda part: setattr(part, "bias", part.bias),
        lambda part: delattr(part, "weight"),
    ],
    ids=["prune", "parametrize", "weight_norm", "spectral_norm", "tie", "delete"],
)
def test_what_would_change_a_module_by_halves_changes_nothing(handle, change):
    before = handle.state_dict()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"hint: h.run\(fn, ...\)|RemoteParameter"):
        change(handle.head)
    after = handle.state_dict()
    assert list(after) == list(before)
    assert all(map(torch.equal, after.values(), before.values()))


def test_utilities_of_torch_work_in_the_worker(handle):
    names = handle.run(lambda module: list(prune.l1_unstructured(module.head, "weight", amount=0.5).state_dict()))
    assert names == ["bias", "weight_orig", "weight_mask"]
    assert handle.head.weight.eq(0).sum() == 4


def test_what_handles_have_beyond_the_module_s_own_names_is_listed(handle):
    page = (Path(__file__).parents[2] / "docs" / "handles.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| `dir(h)` |")]
    listed = row.partition("every handle has:")[2].partition(". Where")[0]
    own = handle.run(dir)
    assert set(dir(handle)) - set(own) == set(re.findall(r"`(\w+)`", listed))
    assert set(own) - set(dir(handle)) == set()


def test_the_handle_s_own_names_go_before_the_module_s(handle):
    handle.run(lambda module: setattr(module, "export", lambda: "the module's"))
    assert handle.export.__self__ is handle
    assert handle.run(lambda module: module.export()) == "the module's"


def test_what_makes_copies_is_refused(handle, tmp_path):
    for copies in (
        copy.deepcopy,
        pickle.dumps,
        torch.optim.swa_utils.AveragedModel,
        lambda h: torch.save(h, tmp_path / "h"),
    ):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled.*\nhint: send its state_dict"):
            copies(handle)


def test_any_object_is_callable_and_says_so_itself(handle):
    made = handle.run(lambda module: object())
    assert callable(made)
    with pytest.raises(TypeError, match="'object' object is not callable"):
        made()


def test_symbols_do_not_cross(handle):
    for module in (handle, torch.nn.Sequential(handle)):
        with pytest.raises((ValueError, isohub.errors.ValueNotTransferableError), match="Proxy"):
            torch.fx.symbolic_trace(module)
