"""A GPU's checkpoint, in a worker on a machine without one."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch


def from_a_gpu() -> bytes:
    """What torch.save writes for a tensor of ``cuda:0``, made without one."""
    saved, made = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.tensor([4.0])}, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(made, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("data.pkl"):
                # BINUNICODE: an X, the length in four bytes, the text.
                assert data.count(b"X\x03\x00\x00\x00cpu") == 1
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(info, data)
    return made.getvalue()


def test_a_checkpoint_of_a_gpu_loads_without_one(session, tmp_path):
    (tmp_path / "w.pt").write_bytes(from_a_gpu())
    (tmp_path / "hubconf.py").write_text(
        "import torch\ndef model(**options):\n    return torch.load('w.pt', **options)['weight']\n"
    )
    for options in ({}, {"weights_only": False}, {"map_location": "cpu"}):
        assert session.load(tmp_path, "model", **options).item() == 4.0
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):  # the control: in this process torch is as it was
            torch.load(tmp_path / "w.pt", weights_only=True)
