"""Where things are in the store. Nothing here writes; what the records hold is `isohub.repos.records`.

    <root>/checkouts/<host>/<owner>/<repo>/<commit>[+lfs][+submodules]/{tree/, checkout.json}
    <root>/checkouts/<host>/<owner>/<repo>/{refs.json, .lock, .refs.lock, .staging-*, .trash-*}
    <root>/weights/{blobs/, urls/, partial/}             `isohub.repos.weights`
    <root>/trust.json                                    `isohub.repos.trust`

Components are percent-encoded, so that different names never meet. Runs in the caller.

Source: XDG Base Directory Specification 0.8; torch.hub 2.13's ``get_dir`` and ``set_dir``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from isohub.errors import SourceUnavailableError
from isohub.repos.naming import encode_component

if TYPE_CHECKING:
    from collections.abc import Sequence

    from isohub.repos.pins import Pin
    from isohub.repos.reference import Reference

__all__ = [
    "CHECKOUT_RECORD",
    "REFS_RECORD",
    "checkout_dir",
    "get_dir",
    "repo_dir",
    "set_dir",
    "weights_dir",
]

CHECKOUT_RECORD = "checkout.json"
REFS_RECORD = "refs.json"
_chosen_dir: str | None = None


def repo_dir(root: Path, reference: Reference) -> Path:
    """A repository's directory of checkouts."""
    return root / "checkouts" / _inside((reference.host, reference.owner, reference.repo))


def checkout_dir(root: Path, pin: Pin) -> Path:
    """A pin's directory, which holds ``tree`` and the record."""
    return repo_dir(root, pin.reference) / "+".join((pin.commit, *pin.extras))


def weights_dir(root: Path, scope: Sequence[str]) -> Path:
    """The directory of the weights that were fetched for a (host, owner, repo)."""
    return root / "weights" / "urls" / _inside(scope)


def _inside(parts: Sequence[str]) -> Path:
    return Path(*(encode_component(part) for part in parts))


def get_dir() -> str:
    """Directory of the default store.

    In order: `set_dir`, ``$ISOHUB_HOME``, ``$TORCH_HOME/isohub``, ``$XDG_CACHE_HOME/isohub``,
    ``~/.cache/isohub``. Not made.
    """
    if _chosen_dir is not None:
        return _chosen_dir
    for variable, below in (("ISOHUB_HOME", ""), ("TORCH_HOME", "isohub"), ("XDG_CACHE_HOME", "isohub")):
        value = os.environ.get(variable)
        if value:
            return _absolute(os.path.join(value, below) if below else value)  # noqa: PTH118 - text in, text out
    return _absolute("~/.cache/isohub")


def set_dir(d: str | os.PathLike[str] | None) -> None:
    """Choose the directory of the default store for this process; None goes back to the environment's."""
    global _chosen_dir  # noqa: PLW0603  # torch.hub.set_dir's contract is a process-wide setting
    _chosen_dir = None if d is None else _absolute(os.fspath(d))


def _absolute(path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except (RuntimeError, OSError) as error:
        raise SourceUnavailableError(
            f"there is no home directory for {path}", hint="set ISOHUB_HOME to a directory that can be written"
        ) from error
