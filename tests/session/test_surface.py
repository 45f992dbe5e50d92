"""Every public name of torch.nn.Module on a handle, held against the list of docs/handles.md."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

from isohub import errors
from isohub.session.handles import RemoteModule

PAGE = (Path(__file__).parent.parent.parent / "docs" / "handles.md").read_text(encoding="utf-8")
LISTED = dict(re.findall(r"^\| `(\w+)` \| (worker|caller|copies|refused) \|", PAGE, re.MULTILINE))
NAMES = sorted({name for name in dir(torch.nn.Module) if not name.startswith("_")} | {"training"})

#: What a call looks like, where it needs arguments, and what of torch's own it comes to.
ARGUMENTS = {
    "add_module": ("one", torch.nn.Linear(1, 1)),
    "apply": (lambda module: None,),
    "forward": (torch.ones(1, 4),),
    "get_buffer": ("mean",),
    "get_parameter": ("0.weight",),
    "get_submodule": ("0",),
    "register_buffer": ("two", torch.ones(2)),
    "register_module": ("three", torch.nn.Linear(1, 1)),
    "register_parameter": ("four", torch.nn.Parameter(torch.ones(2), requires_grad=False)),
    "set_submodule": ("0", torch.nn.Linear(4, 8)),
    "to": (torch.float64,),
    "type": (torch.float64,),
    **{name: (lambda *_: None,) for name in NAMES if name.endswith("_hook")},
}
OVER = {
    "buffers": "named_buffers", "children": "named_children", "eval": "train", "modules": "named_modules",
    "parameters": "named_parameters",
}  # fmt: skip
RETURNS_ITSELF = {
    "apply", "bfloat16", "cpu", "double", "eval", "float", "half", "requires_grad_", "to", "to_empty", "train", "type"
}  # fmt: skip
NEEDS_A_DEVICE = {"cuda", "ipu", "mtia", "xpu"}
NOT_CALLED = {"T_destination", "call_super_init", "dump_patches", "training"}
# Their own methods are missing in most modules, with torch's own error.
ERRORS = {"get_extra_state": RuntimeError, "set_extra_state": RuntimeError, "get_buffer": AttributeError}


@pytest.fixture
def mlp(session, hub):
    with session.load(hub("good"), "mlp", seed=0) as handle:
        yield handle


def test_the_page_lists_every_name():
    if not torch.__version__.startswith("2.13."):
        pytest.skip("the page is of torch 2.13")
    assert sorted(LISTED) == NAMES


@pytest.mark.parametrize("name", sorted(LISTED))
def test_what_the_page_says_of_a_name(mlp, name):
    where = LISTED[name]
    if name in NOT_CALLED:
        assert name == "training" or getattr(mlp, name) is getattr(torch.nn.Module, name)
        return
    own = getattr(RemoteModule, name) is not getattr(torch.nn.Module, name)
    assert own != (name in OVER), "torch's own, where it comes to what a handle has of its own"
    assert where != "caller" or own or OVER[name]
    method = getattr(mlp, name)
    kwargs = {"device": "cpu"} if name == "to_empty" else {}
    arguments = ARGUMENTS.get(name, (mlp.state_dict(),) if name == "load_state_dict" else ())
    if name == "set_extra_state":
        arguments = ({},)
    if where == "refused":
        with pytest.raises(NotImplementedError, match="hint: "):
            method(*arguments)
        return
    if name in ERRORS or (name in NEEDS_A_DEVICE and not (name == "cuda" and torch.cuda.is_available())):
        with pytest.raises(ERRORS.get(name, Exception)) as remote:
            method(*arguments)
        with pytest.raises(Exception) as local:
            getattr(torch.nn.Sequential(torch.nn.Linear(4, 8)), name)(*arguments)
        assert isinstance(remote.value, ERRORS.get(name, errors.RemoteError))
        if name in ("get_extra_state", "set_extra_state"):
            assert remote.value.remote_message == str(local.value)
        return
    made = method(*arguments, **kwargs)
    if name in RETURNS_ITSELF:
        assert made is mlp
    if where == "copies" and not isinstance(made, (dict, torch.Tensor)):
        assert all(isinstance(item[-1] if isinstance(item, tuple) else item, torch.Tensor) for item in made)
    if name in ("children", "modules"):
        assert all(isinstance(item, RemoteModule) for item in made)


def test_names_that_change_the_remote_module_change_it(mlp):
    there = mlp.run
    mlp.add_module("one", torch.nn.Linear(1, 1))
    mlp.register_module("two", torch.nn.Linear(1, 1))
    mlp.register_buffer("three", torch.ones(2), persistent=False)
    mlp.register_parameter("four", torch.nn.Parameter(torch.ones(2), requires_grad=False))
    mlp.register_parameter("five", None)
    mlp.six = torch.nn.Parameter(torch.full((2,), 6.0))
    mlp.set_submodule("0", torch.nn.Linear(4, 8, bias=False))
    names = there(lambda module: [name for name, _ in module.named_parameters()])
    assert names == [
        "four",
        "six",
        "0.weight",
        "2.weight",
        "2.bias",
        "one.weight",
        "one.bias",
        "two.weight",
        "two.bias",
    ]
    assert there(lambda module: [module.four.requires_grad, module.six.requires_grad, module.five]) == [
        False,
        True,
        None,
    ]
    assert mlp.six.tolist() == [6.0, 6.0]
    assert [name for name, _ in mlp.named_buffers()] == ["three"]
    assert mlp.type(torch.float64).six.dtype is torch.float64
    assert mlp.to(torch.float16).six.dtype is torch.float16
    assert mlp.to_empty(device="meta") is mlp
    assert there(lambda module: module.six.is_meta)


def test_hooks_on_the_state_by_run(mlp):
    with pytest.raises(NotImplementedError, match=r"h\.run\(lambda module: module\.register_state_dict_post_hook"):
        mlp.register_state_dict_post_hook(print)
    drop = lambda module, state, *_: state.__delitem__("0.bias")  # noqa: E731
    mlp.run(lambda module: module.register_state_dict_post_hook(drop) and None)
    assert "0.bias" not in mlp.state_dict()


def test_apply_runs_there(mlp):
    import os

    mlp.apply(lambda module: setattr(module, "where", __import__("os").getpid()))
    assert mlp[0].where == mlp.where != os.getpid()


def test_copies_of_a_handle_are_refused(mlp):
    for local in (mlp, torch.nn.Sequential(mlp)):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copy.deepcopy(local)
