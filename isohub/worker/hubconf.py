"""A checkout's hubconf in this process: its place on the path, its import, its entrypoints.

The rules that torch.hub lacks: the checkout stays first on ``sys.path`` for life, so that an import within
``forward`` finds the repo's own modules; the module is called ``hubconf`` and is in ``sys.modules``, so that
what it defines can be pickled; the working directory is the worker's own and shows the checkout's top
entries as links, so that relative files are found and new files can be written.

Side: worker. Trust: everything here runs the repo's code with the worker's powers.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from importlib.machinery import SourceFileLoader
from typing import Any, List, Optional, Sequence, Type

from isohub.worker.bytecode import install

__all__ = ["Hubconf", "HubconfFailed", "seed_everything", "seed_host"]

_NUMPY_SEED_LIMIT = 1 << 32  # numpy.random.seed takes 32 bits, torch 64


class HubconfFailed(Exception):  # noqa: N818 - a message to the caller, never shown as it is
    """The caller asked for something that hubconf does not have; `kind` tells it what."""

    def __init__(self, kind: str, details: List[str]) -> None:
        super().__init__(kind)
        self.kind = kind
        self.details = details


class Hubconf:
    """One checkout, opened once in a worker's life."""

    def __init__(self) -> None:
        self._path: Optional[str] = None
        self._loader: Type[SourceFileLoader] = SourceFileLoader
        self._module: Any = None
        self._failure: Optional[BaseException] = None

    def open(self, path: str, dependencies: Sequence[str], bytecode: Optional[bytes] = None) -> List[str]:
        """Put the checkout in its place. Runs nothing of the repo's.

        Args:
            path: The directory that holds ``hubconf.py``.
            dependencies: Import names, top-level, that hubconf declares.
            bytecode: Of its modules, if there is some (`isohub.worker.bytecode`).

        Returns:
            Those of them that cannot be found, in order.
        """
        if self._path is None:
            self._path = path
            if bytecode is not None:
                self._loader = install(path, bytecode)
            sys.path.insert(0, path)
            sys.argv = [""]
            sys.dont_write_bytecode = True  # neither into a read-only checkout nor into a user's clone
            for name in sorted(os.listdir(path)):
                if name not in (".git", "__pycache__"):
                    os.symlink(os.path.join(path, name), name)
        return [name for name in dependencies if name not in sys.modules and not _can_find(name)]

    def module(self) -> Any:
        """Hubconf's module, imported on first use."""
        if self._module is None:
            assert self._path is not None
            place = os.path.join(self._path, "hubconf.py")
            spec = importlib.util.spec_from_file_location("hubconf", place, loader=self._loader("hubconf", place))
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules["hubconf"] = module
            try:
                spec.loader.exec_module(module)
            except BaseException as error:
                sys.modules.pop("hubconf", None)
                self._failure = error
                raise
            self._module = module
        return self._module

    def entrypoints(self) -> List[str]:
        """Names of the public callables, as ``torch.hub.list`` gives them."""
        module = self.module()
        return [name for name in dir(module) if not name.startswith("_") and callable(getattr(module, name))]

    def entrypoint(self, name: str) -> Any:
        """One callable.

        Raises:
            HubconfFailed: There is none of that name.
        """
        found = getattr(self.module(), name, None)
        if found is None or not callable(found):
            raise HubconfFailed("no_entrypoint", self.entrypoints())
        return found

    def help(self, name: str) -> Optional[str]:
        """An entrypoint's docstring."""
        text = self.entrypoint(name).__doc__
        return text if isinstance(text, str) else None


def _can_find(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def seed_everything(seed: Optional[int]) -> None:
    """Seed torch, numpy (where it is installed) and random; None takes new entropy.

    A fork starts with its zygote's generators, so without this every worker would draw the same numbers.
    """
    import torch

    if seed is None:
        seed = int.from_bytes(os.urandom(8), "little") >> 1
    seed_host(seed)
    # In a worker only: to ask in the zygote would initialise CUDA there, and a fork could not use it any more.
    # Where there is none torch.manual_seed would note a seed, with a formatted stack, for each that is not there.
    if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        torch.manual_seed(seed)


def seed_host(seed: int) -> None:
    """Seed the generators of the processor's."""
    import torch

    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if _can_find("numpy"):
        import numpy

        numpy.random.seed(seed % _NUMPY_SEED_LIMIT)
