"""What two sides of different versions cannot exchange is refused here, before anything is sent."""

from __future__ import annotations

import argparse
import sys

import pytest
import torch

from isohub import errors
from isohub.session.supervisor import Versions
from isohub.session.versions import minor_of, other_python
from isohub.wire import arena
from isohub.wire.arena import dtype_names

HERE = ".".join(map(str, sys.version_info[:3]))


def remote(handle):
    return handle.__dict__["_isohub"]


@pytest.fixture
def echo(session, hub):
    """A handle, and its worker of another Python and torch, as far as this side knows."""
    handle = session.load(hub("echoes"), "echo")
    worker = remote(handle).worker
    was = worker.versions, worker.lacking
    yield handle
    worker.versions, worker.lacking = was


def test_minor_versions():
    assert minor_of("3.9.18") == "3.9"
    assert minor_of("2") == "2"
    assert other_python(Versions(HERE, "1.13.1")) == ""
    assert other_python(Versions("", "")) == ""
    assert other_python(Versions("3.8.1", torch.__version__)) == "3.8.1"


class Own:
    def method(self):
        return 1


def test_code_is_for_one_python(echo):
    assert echo.apply(lambda x: x + 1, 2) == 3  # the control
    worker = remote(echo).worker
    worker.versions = Versions("3.8.18", torch.__version__)
    nested = {"deep": [lambda x: x]}
    for place, attempt in {
        "argument 1": lambda: echo.apply(lambda x: x + 1, 2),
        "argument 2": lambda: echo.apply(torch.relu, Own()),
        "argument 1, at ['deep'][0]": lambda: echo(nested),
        "the function": lambda: remote(echo).ask("run", lambda m: 1, (), {}, phase="running it"),
    }.items():
        with pytest.raises(errors.ValueNotTransferableError) as caught:
            attempt()
        told = str(caught.value)
        assert told.startswith(f"{place}: ")
        assert f"Python {HERE} here, and the worker has Python 3.8.18" in told
        assert "hint: call methods" in told
    # Nothing of it was sent; and what is imported there goes.
    assert echo.apply(torch.relu, torch.tensor([-1.0, 1.0])).tolist() == [0, 1]
    assert echo(argparse.Namespace(a=1)).a == 1


class OwnError(ValueError):
    def __str__(self):
        return "own"


def test_an_exception_of_a_class_of_ones_own_is_the_nearest_builtin_one_there(echo):
    for version, name in ((HERE, "OwnError"), ("3.8.18", "ValueError")):
        remote(echo).worker.versions = Versions(version, torch.__version__)
        scope = echo.scope()
        with scope:
            raise OwnError
        assert scope.left == [name, "own"]


def test_a_dtype_that_the_worker_lacks(echo):
    worker = remote(echo).worker
    assert worker.lacking == frozenset()
    x = torch.ones(2, dtype=torch.float16)
    assert echo(x).dtype is torch.float16  # the control
    worker.versions, worker.lacking = Versions(HERE, "1.0.0"), frozenset({"float16"})
    meta, sparse = x.to("meta"), torch.eye(2, dtype=torch.float16).to_sparse()
    for given in (x, [x], {"weight": x}, torch.float16, meta, sparse, x[:1], torch.nn.Parameter(x)):
        with pytest.raises(errors.ValueNotTransferableError) as caught:
            echo(given)
        told = str(caught.value)
        assert "torch.float16 cannot go to echoes@" in told
        assert torch.__version__ in told
        assert "torch 1.0.0" in told
    assert echo(x.float()).dtype is torch.float32


def test_a_dtype_that_the_caller_lacks(hub, tmp_path, monkeypatch):
    """The worker is told what its caller's torch knows, and sends nothing else."""
    import isohub
    from isohub.session import preparing

    monkeypatch.setattr(preparing, "dtype_names", lambda: [name for name in dtype_names() if name != "float16"])
    with isohub.Session(timeout_s=60) as own:
        echo = own.load(hub("echoes"), "echo")
        with pytest.raises(errors.RemoteError, match=r"the answer holds torch\.float16") as caught:
            echo.ones("float16")
        assert isinstance(caught.value, TypeError)
        assert str(caught.value).count(torch.__version__) >= 2
        assert echo.ones("float32")["weight"].tolist() == [1, 1]


def test_names_of_dtypes():
    assert "float32" in dtype_names()
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in dtype_names())
    assert set(dtype_names()) <= set(arena._DTYPE_SIZES)


def test_a_program_of_another_torch_is_not_opened(session, hub):
    handle = session.load(hub("good"), "mlp", trust_repo=True)
    worker = remote(handle).worker
    was = worker.versions
    try:
        for other, words in (("1.13.1", "and torch 1.13.1 makes none"), ("2.1.0", "one minor version of torch\n")):
            worker.versions = Versions(HERE, other)
            with pytest.raises(errors.ValueNotTransferableError) as caught:
                handle.export((torch.ones(1, 4),))
            assert words in str(caught.value)
            assert f"opened by torch {torch.__version__}" in str(caught.value)
        assert handle.torchscript()(torch.ones(1, 4)).shape == (1, 2)
    finally:
        worker.versions = was
