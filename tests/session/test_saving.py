"""handle.save: what is in the file, how it appears, and what leaves nothing."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import isohub
from isohub import errors
from isohub.session import saving
from isohub.session.saving import save_state


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_model_is_written_with_what_it_came_from(session, hub, tmp_path):
    handle = session.load(hub("good"), "model", 4, pretrained=True, seed=7)
    place = tmp_path / "model.safetensors"
    handle.save(place)
    state = handle.state_dict()
    read = load_file(place)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in state.items())
    said = metadata(place)
    assert (said["commit"], said["reference"]) == (handle.commit, handle.reference)
    assert (said["entrypoint"], said["args"], said["kwargs"]) == ("model", "[4]", '{"pretrained": true}')
    assert (said["isohub"], said["torch"], said["seed"]) == (isohub.__version__, torch.__version__, "7")
    assert said["class"] == "models.Cnn"
    assert "part" not in said
    again = session.load(hub("good"), said["entrypoint"], *json.loads(said["args"]), **json.loads(said["kwargs"]))
    again.load_state_dict(read)
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(again(x), handle.eval()(x))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_tied_weights_are_written_once_and_come_back_by_one_line(session, hub, tmp_path):
    handle = session.load(hub("good"), "tied_weights")
    place = tmp_path / "tied.safetensors"
    handle.save(place)
    read = load_file(place)
    assert set(read) == {"embedding.weight"}
    read.update({name: read[kept] for name, kept in json.loads(metadata(place)["aliases"]).items()})
    assert read.keys() == handle.state_dict().keys()
    handle.load_state_dict(read)
    assert read["output.weight"].data_ptr() == read["embedding.weight"].data_ptr()


def test_arguments_that_are_not_plain_are_said_to_be_so(session, hub, tmp_path):
    handle = session.load(hub("good"), "mlp", (4, 2))
    handle.save(tmp_path / "a")
    assert metadata(tmp_path / "a")["args"] == "not plain values"
    handle[0].save(tmp_path / "b")
    assert metadata(tmp_path / "b")["part"] == "an object within what the entrypoint gave"
    parts = session.load(hub("good"), "as_dict")
    parts["decoder"].save(tmp_path / "c")
    assert metadata(tmp_path / "c")["part"] == "['decoder']"


def test_views_and_strides(tmp_path):
    base = torch.arange(12.0)
    state = {
        "whole": base,
        "half": base[:6],
        "again": base.view(12),
        "turned": base.reshape(3, 4).t(),
        "wide": torch.ones(1).expand(5),
        "conjugate": torch.view_as_complex(torch.rand(3, 2)).conj(),
        "empty": torch.empty(0, 3),
        "empty too": torch.empty(0, 3),
        "number": torch.tensor(3),
        "bfloat16": torch.ones(2, dtype=torch.bfloat16),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    save_state(state, tmp_path / "x", {"reference": "r"})
    said, read = metadata(tmp_path / "x"), load_file(tmp_path / "x")
    assert json.loads(said["aliases"]) == {"again": "whole"}
    read.update({name: read[kept] for name, kept in json.loads(said["aliases"]).items()})
    assert read.keys() == state.keys()
    for name, value in state.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name].to(torch.complex64), value.detach().to(torch.complex64)), name


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "quantised"),
        (lambda: {"extra": 1}, "dict"),
        (lambda: torch.ones(2, device="meta"), "meta"),
        (lambda: torch.ones(2, dtype=torch.complex128), "complex128"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_the_format_cannot_hold_is_named(tmp_path, value, words):
    with pytest.raises(errors.SaveError, match=f"'x'.*{words}"):
        save_state({"good": torch.ones(1), "x": value()}, tmp_path / "x", {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_replaced_whole_and_keeps_its_mode(tmp_path):
    place = tmp_path / "x"
    before = os.umask(0o027)
    try:
        save_state({"a": torch.ones(1)}, place, {})
        assert stat.S_IMODE(place.stat().st_mode) == 0o640
    finally:
        os.umask(before)
    place.chmod(0o604)
    with place.open("rb") as held:
        save_state({"a": torch.zeros(1)}, place, {})
        assert stat.S_IMODE(place.stat().st_mode) == 0o604
        assert os.fstat(held.fileno()).st_nlink == 0  # who had it open has it still
    assert load_file(place)["a"].item() == 0


@pytest.mark.parametrize("fails", ["_write", "_flush"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, fails):
    def full(*_):
        raise OSError(28, "No space left on device")

    place = tmp_path / "x"
    save_state({"a": torch.ones(1)}, place, {})
    monkeypatch.setattr(saving, fails, full)
    with pytest.raises(errors.SaveError, match="No space left on device; nothing was left") as caught:
        save_state({"a": torch.zeros(1)}, place, {})
    assert isinstance(caught.value, OSError)
    assert caught.value.path == str(place)
    monkeypatch.undo()
    assert load_file(place)["a"].item() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_limit_on_files_is_an_error_in_words(tmp_path):
    """The kernel's own refusal in the middle of the file, as a full disk gives it."""
    code = (
        "import resource, signal, sys, torch, os\n"
        "from isohub.session.saving import save_state\n"
        "from isohub.errors import SaveError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try: save_state({'a': torch.ones(1 << 20)}, sys.argv[1] + '/x', {})\n"
        "except SaveError as error: print(os.listdir(sys.argv[1]), error.message)\n"
        "save_state({'a': torch.ones(1)}, sys.argv[1] + '/y', {})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    assert "cannot be written" in done.stdout
    assert (tmp_path / "y").exists()


def test_no_directory_and_none_that_may_be_written_to(tmp_path):
    for place in (tmp_path / "none" / "x", "/proc/x"):
        with pytest.raises(errors.SaveError, match="cannot be written"):
            save_state({"a": torch.ones(1)}, place, {})
    assert list(tmp_path.iterdir()) == []
