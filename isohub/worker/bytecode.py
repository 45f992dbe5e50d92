"""Bytecode of a checkout: made by a worker that runs none of its code, used by those that do.

    marshal of (magic number of the interpreter, root, [(path below the root, size, mtime in ns, marshal of its code)])

Rules:

1. It is made in a worker of its own, confined as any other, that compiles and does nothing else: the text is hostile
   to a compiler too. What cannot be compiled is left out, and is compiled where it is imported, as ever.
2. It is used for modules below the checkout's root alone, by a finder for those directories. No setting of Python's is
   changed (``sys.pycache_prefix`` would hide the bytecode of the standard library and of packages).
3. Code is used for a file whose size and time are those that it was made from, as with Python's own ``.pyc``. Of
   another interpreter or another place it is nothing.

Side: worker. Trust: the repo's, as the text is. What reads it has checked that it is what was written, since damage
can bring an interpreter down. Source: ``importlib._bootstrap_external``, marshal.
"""

from __future__ import annotations

import importlib.util
import marshal  # noqa: TID251 - in a worker, of what its own repo may run anyway
import os
import sys
import types
import warnings
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from typing import Any, List, Optional, Tuple, Type

__all__ = ["compile_tree", "install"]

# What a large repo has of modules; beyond, the rest is compiled where it is imported.
_MOST_FILES = 8192
_MOST_SOURCE_BYTES = 64 << 20
# A compiler takes some hundred times as much memory as its text has.
_LARGEST_SOURCE_BYTES = 1 << 20
_SUFFIX = ".py"


def compile_tree(root: str) -> bytes:
    """Compile every module of a checkout.

    Args:
        root: The directory that holds ``hubconf.py``.
    """
    entries: List[Tuple[str, int, int, bytes]] = []
    left = _MOST_SOURCE_BYTES
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith(".") and name != "__pycache__")
        for name in sorted(files):
            path = os.path.join(directory, name)
            if not name.endswith(_SUFFIX) or os.path.islink(path):
                continue
            status = os.stat(path)
            if status.st_size > _LARGEST_SOURCE_BYTES:
                continue
            left -= status.st_size
            if left < 0 or len(entries) >= _MOST_FILES:
                return _bundle(root, entries)
            code = _compiled(path)
            if code is not None:
                entries.append((os.path.relpath(path, root), status.st_size, status.st_mtime_ns, code))
    return _bundle(root, entries)


def _compiled(path: str) -> Optional[bytes]:
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return marshal.dumps(compile(file.read(), path, "exec", dont_inherit=True))
    except (OSError, SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return None


def _bundle(root: str, entries: List[Tuple[str, int, int, bytes]]) -> bytes:
    return marshal.dumps((importlib.util.MAGIC_NUMBER, root, entries))


def install(root: str, bundle: bytes) -> Type[SourceFileLoader]:
    """Have this process's imports from a checkout use its bytecode.

    Args:
        root: The directory that holds ``hubconf.py``.
        bundle: What `compile_tree` gave.

    Returns:
        What loads a module of it.
    """
    magic, made_for, entries = marshal.loads(bundle)  # noqa: S302 - as above
    fits = magic == importlib.util.MAGIC_NUMBER and made_for == root
    known = {os.path.join(root, path): entry for path, *entry in (entries if fits else ())}

    class Loader(SourceFileLoader):
        """Python's own, less the compiling."""

        def get_code(self, fullname: str) -> Any:
            return _code_of(self.path, known.get(self.path)) or super().get_code(fullname)

    finder = FileFinder.path_hook(
        (ExtensionFileLoader, EXTENSION_SUFFIXES), (Loader, SOURCE_SUFFIXES), (SourcelessFileLoader, BYTECODE_SUFFIXES)
    )
    inside = os.path.join(root, "")

    def hook(path: str) -> Any:
        if not os.path.join(path, "").startswith(inside):
            raise ImportError(f"{path} is not in the checkout", path=path)
        return finder(path)

    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.pop(root, None)
    return Loader


def _code_of(path: str, entry: Optional[List[Any]]) -> Optional[types.CodeType]:
    """A file's code, if it is what it was."""
    if entry is None:
        return None
    size, time_ns, code = entry
    try:
        status = os.stat(path)
    except OSError:
        return None
    if (status.st_size, status.st_mtime_ns) != (size, time_ns):
        return None
    loaded = marshal.loads(code)  # noqa: S302 - as above
    return loaded if isinstance(loaded, types.CodeType) else None
