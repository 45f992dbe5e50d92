"""``handle.save(path)``: a state as a safetensors file, with what it came from. The caller writes it.

Rules:

1. safetensors holds whole, contiguous tensors, each once. A tensor that shares memory with one of the same shape and
   strides (tied weights) is written once; the other name is in the metadata under ``aliases``. Any other view of
   memory is written as a tensor of its own.
2. The file appears whole or not at all: it is written beside its place, flushed, and renamed. A mode that a file of
   that name has is kept.
3. Nothing is left out in silence: what the format cannot hold (sparse and quantised tensors, extra state that is no
   tensor) is an error that names it.

Side: caller. Trust: the state is a worker's, checked and in memory of the caller's. Nothing here can be executed by
who reads the file. Source: safetensors 0.5's format page.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from isohub.errors import SaveError, printable
from isohub.session.recipe import path_words, plain_json

if TYPE_CHECKING:
    from isohub.session.link import Remote

__all__ = ["metadata_of", "save_state"]

_FORMAT = "1"


def save_state(state: Mapping[str, Any], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write a state.

    Args:
        state: Names and CPU tensors.
        path: The file; its directory has to be there.
        metadata: Texts for its header.

    Raises:
        SaveError: The format cannot hold the state, or the file cannot be written; nothing is left then.
    """
    place = os.fspath(path)
    kept, aliases = _distinct(state, place)
    texts = {"format": "pt", **metadata, "aliases": json.dumps(aliases)}
    directory, name = os.path.split(os.path.abspath(place))  # noqa: PTH100 - text in, text out
    try:
        descriptor, new = tempfile.mkstemp(prefix=f".{name[:100]}-", suffix=".part", dir=directory)
    except OSError as error:
        raise _failed(place, error) from error
    try:
        os.close(descriptor)
        _write(kept, new, texts)
        _flush(new)
        os.chmod(new, _mode(place))  # noqa: PTH101
        os.replace(new, place)  # noqa: PTH105
        _flush(directory)
    except OSError as error:
        raise _failed(place, error) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)  # noqa: PTH108


def _write(tensors: dict[str, torch.Tensor], place: str, texts: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, place, metadata=texts)
    except SafetensorError as error:  # the disk's refusals too, as text
        raise OSError(str(error)) from error


def _distinct(state: Mapping[str, Any], place: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors as the format takes them, and which names stand for which."""
    kept: dict[str, torch.Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    aliases: dict[str, str] = {}
    for name, value in state.items():
        reason = _reason(value)
        if reason is not None:
            raise SaveError(
                f"{place}: safetensors cannot hold {printable(name, newlines=False)!r}, {reason}",
                hint="torch.save(handle.state_dict(), path) holds everything; reading it back is by pickle",
                path=place,
            )
        tensor = value.detach()
        key = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        elif tensor.numel():
            storages.add(storage)
        kept[name] = tensor
    return kept, aliases


def _reason(value: Any) -> str | None:
    """Why the format cannot hold this; None if it can."""
    if not isinstance(value, torch.Tensor):
        return f"which is no tensor but a {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized:
        return f"a {'quantised' if value.is_quantized else str(value.layout).removeprefix('torch.')} tensor"
    if value.device.type == "meta":
        return "a tensor without data, on device meta"
    from safetensors.torch import _SIZE

    return None if value.dtype in _SIZE else f"a tensor of {value.dtype}"


def _mode(place: str) -> int:
    """The mode for the file: that of the one which it replaces, else what the user's umask leaves."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(os.stat(place).st_mode)  # noqa: PTH116
    with open("/proc/self/status") as file:  # noqa: PTH123 - os.umask would change it for all threads
        mask = next((line.split()[1] for line in file if line.startswith("Umask:")), "077")
    return 0o666 & ~int(mask, 8)


def _flush(place: str) -> None:
    descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _failed(place: str, error: OSError) -> SaveError:
    return SaveError(
        f"{place} cannot be written: {error.strerror or error}; nothing was left there",
        hint="is there room, and may you write to its directory?",
        path=place,
    )


def metadata_of(remote: Remote) -> dict[str, str]:
    """What a handle's state came from, as texts: JSON where there is structure."""
    link = remote.link
    pin, recipe = link.checkout.pin, link.recipe
    found = {
        "isohub_format": _FORMAT,
        "isohub": version("isohub"),
        "torch": torch.__version__,
        "reference": str(pin.reference),
        "commit": link.checkout.commit,
        "class": remote.class_name,
    }
    if recipe is None:
        return found
    found["entrypoint"] = recipe.entrypoint
    for name, value in (("args", list(recipe.args)), ("kwargs", dict(recipe.kwargs))):
        text = plain_json(value)
        found[name] = "not plain values" if text is None else text
    if recipe.seed is not None:
        found["seed"] = str(recipe.seed)
    if remote.path is None:
        found["part"] = "an object within what the entrypoint gave"
    elif remote.path:
        found["part"] = path_words(remote.path)
    return found
