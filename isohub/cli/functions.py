"""``file.py:name`` on the command line: a function or data of the user's own, imported in this process.

Side: caller. Trust: the user's own file, which runs here with all of the user's powers; never a repo's.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import click

__all__ = ["is_named", "named_object"]


def is_named(text: str) -> bool:
    """Whether this is ``file.py:name``."""
    file, colon, name = text.rpartition(":")
    return bool(colon) and file.endswith(".py") and name.isidentifier()


def named_object(text: str, option: str) -> Any:
    """The object of that name.

    Args:
        text: ``file.py:name``.
        option: What gave it, for errors.

    Raises:
        click.BadParameter: There is no such file or name, or the file cannot be imported.
    """
    file, _, name = text.rpartition(":")
    if not is_named(text):
        raise click.BadParameter(f"{text!r}: expected file.py:name", param_hint=option)
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise click.BadParameter(f"there is no file {file!r}", param_hint=option)
    try:
        found = getattr(_module(path), name)
    except AttributeError:
        raise click.BadParameter(f"{file} has no {name!r}", param_hint=option) from None
    except (Exception, SystemExit) as error:
        words = f"{file} cannot be imported: {type(error).__name__}: {error}"
        raise click.BadParameter(words, param_hint=option) from error
    return found


def _module(path: Path) -> Any:
    """The file as a module, as running it would find its neighbours; each file once."""
    name = path.stem if path.stem.isidentifier() else "_of_command_line"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if known is not None:  # such as torch.py: the installed one has to stay what it is
        name = f"_of_command_line_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module
