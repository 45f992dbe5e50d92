from __future__ import annotations

import io
import pickle
import tarfile
import tempfile
import warnings
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isohub.repos import checkpoint_fault
from isohub.repos.checkpoint_fault import Fault, fault_of

STATE = {"layer.weight": torch.arange(12.0).reshape(3, 4), "layer.bias": torch.ones(3)}


def saved(value: object = STATE, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def fault(content: bytes, *, weights_only: bool = True) -> Fault | Exception | None:
    """What is wrong with a file; None if it loads, and torch's own error if that is about something else."""
    with tempfile.NamedTemporaryFile() as stream:
        stream.write(content)
        stream.flush()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.load(stream.name, weights_only=weights_only)
        except Exception as error:
            return fault_of(error, stream, weights_only=weights_only) or error
    return None


class Program:
    """Pickled code."""

    def __reduce__(self) -> Any:
        return print, ("it ran",)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_a_file_that_is_cut_anywhere_is_damaged(old: bool, weights_only: bool) -> None:
    content = saved(old=old)
    assert fault(content, weights_only=weights_only) is None
    for length in range(len(content)):
        found = fault(content[:length], weights_only=weights_only)
        assert isinstance(found, Fault), (length, found)
        assert found.damaged, length
        assert "weights_only=False" not in f"{found.reason} {found.hint}"


@pytest.mark.parametrize(
    "content",
    [saved(Program()), saved(Program(), old=True), pickle.dumps(Program(), 2), pickle.dumps([Program()], 4)],
    ids=["new", "old", "pickle", "pickle 4"],
)
def test_a_program_is_no_damage(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    found = fault(content)
    assert isinstance(found, Fault)
    assert not found.damaged
    assert "lets its author run code in this process" in (found.hint or "")
    assert capsys.readouterr().out == ""
    cut = fault(content[:-3])
    assert isinstance(cut, Fault)
    assert cut.damaged
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_and_tar_are_refused_and_no_damage() -> None:
    script, tar = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), script)
    with tarfile.open(fileobj=tar, mode="w") as archive:  # the form before torch 0.1.10
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    for content in (script.getvalue(), tar.getvalue()):
        found = fault(content)
        assert isinstance(found, Fault)
        assert not found.damaged


def test_bytes_that_are_changed_in_a_zip() -> None:
    content = bytearray(saved())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (info,) = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
    content[info.header_offset] ^= 0xFF
    found = fault(bytes(content))
    assert isinstance(found, Fault)
    assert found.damaged


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs", b"\x1b[31m" * 10])
def test_what_torch_never_wrote(content: bytes) -> None:
    for weights_only in (True, False):
        found = fault(content, weights_only=weights_only)
        assert isinstance(found, Fault)
        assert found.damaged
        assert found.reason.startswith(f"it begins with {content[:40]!r}")
        assert "\x1b" not in found.reason


def test_what_is_not_about_the_file() -> None:
    for error in (RuntimeError("of a device"), ValueError("of map_location"), TypeError()):
        for content in (saved(), saved(old=True), pickle.dumps(1, 2)):
            assert fault_of(error, io.BytesIO(content), weights_only=True) is None


def test_a_pickle_that_is_long_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_fault, "_OPCODES_LIMIT", 10)
    found = fault(pickle.dumps([Program(), list(range(100))], 2)[:-3])
    assert isinstance(found, Fault)


@given(st.binary(max_size=200))
def test_whatever_the_bytes_are(content: bytes) -> None:
    for head in (b"", b"PK\3\4", b"\x80", b"\x80\x02"):
        for error in (pickle.UnpicklingError("no"), EOFError(), IndexError(), RuntimeError("PytorchStreamReader")):
            found = fault_of(error, io.BytesIO(head + content), weights_only=True)
            assert found is None or found.reason.isprintable()
