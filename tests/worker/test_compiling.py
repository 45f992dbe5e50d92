"""compile= of a load: in the worker, in place, with an error where there is no compiler."""

from __future__ import annotations

import shutil

import pytest
import torch

import isohub
from isohub import errors
from isohub.worker.compiling import compile_module

X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.timeout(300)
def test_a_compiled_model_answers_as_the_other_does(hub):
    with isohub.Session() as own:
        compiled = own.load(hub("good"), "mlp", seed=1, compile=True)
        plain = own.load(hub("good"), "mlp", seed=1)
        assert torch.allclose(compiled.eval()(X), plain.eval()(X), atol=1e-6)
        assert compiled.run(lambda module: module._compiled_call_impl is not None)
        assert not plain.run(lambda module: module._compiled_call_impl is not None)
        assert compiled.state_dict().keys() == plain.state_dict().keys()
        assert type(compiled).__name__ == type(plain).__name__


def test_options_are_torch_s(session, hub):
    handle = session.load(hub("good"), "mlp", compile={"backend": "eager", "dynamic": False})
    assert handle(X).shape == (2, 2)
    assert handle.run(lambda module: module._compiled_call_impl is not None)
    with pytest.raises(errors.RemoteError, match="nonsense"):
        session.load(hub("good"), "mlp", compile={"backend": "nonsense"})(X)


def test_no_compiler_is_an_error_of_the_load(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with isohub.Session(timeout_s=60) as own:
        with pytest.raises(errors.RemoteRuntimeError, match=r"needs a C\+\+ compiler on the CPU.*compile="):
            own.load(hub("good"), "mlp", compile=True)
        assert own.workers() == []
        assert own.load(hub("good"), "mlp", compile={"backend": "eager"})(X).shape == (2, 2)


def test_a_torch_without_it_says_so():
    with pytest.raises(RuntimeError, match="torch 2.1"):
        compile_module(object(), {})


@pytest.mark.parametrize("wrong", [1, "max-autotune", ["a"], {1: 2}])
def test_what_is_no_wish(session, hub, wrong):
    with pytest.raises(ValueError, match="compile must be"):
        session.load(hub("good"), "mlp", compile=wrong)


def test_what_makes_no_sense_is_refused(session, hub):
    with pytest.raises(ValueError, match="compile= is for a model that lives in a worker"):
        session.load(hub("good"), "mlp", compile=True, returns="state_dict")
    with pytest.raises(TypeError, match="compile= is for a module"):
        session.load(hub("good"), "counter", compile={"backend": "eager"})
    assert session.load(hub("good"), "mlp", compile=False)(X).shape == (2, 2)
