"""Where things are in the store, and the records that say what they are. Nothing here writes.

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
from typing import TYPE_CHECKING, Literal

import msgspec

from isohub.errors import SourceUnavailableError
from isohub.repos.naming import encode_component

if TYPE_CHECKING:
    from collections.abc import Sequence

    from isohub.repos.pins import Pin
    from isohub.repos.reference import Reference

__all__ = [
    "CHECKOUT_RECORD",
    "REFS_RECORD",
    "CheckoutRecord",
    "Resolution",
    "Resolutions",
    "checkout_dir",
    "get_dir",
    "repo_dir",
    "set_dir",
    "weights_dir",
]

CHECKOUT_RECORD = "checkout.json"
REFS_RECORD = "refs.json"
_chosen_dir: str | None = None


class CheckoutRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """checkout.json.

    Attributes:
        format: 2: sealed by `isohub.repos.records`.
        reference: What it was first fetched for.
        commit: Its commit.
        extras: As in `Pin.extras`.
        ref_name: As in `Pin.ref_name`.
        validated: As in `Pin.validated`.
        tree: git's tree id of ``tree/`` in the SHA-256 object format.
        files: Files and symlinks.
        bytes: Their sizes together.
        submodules: Paths that were left empty.
        lfs_pointers: Paths of Git LFS pointer files, at most 100.
        url: Where it came from.
        created: UTC, ISO 8601.
    """

    format: Literal[2]
    reference: str
    commit: str
    extras: tuple[str, ...]
    ref_name: str | None
    validated: bool
    tree: str
    files: int
    bytes: int
    submodules: tuple[str, ...]
    lfs_pointers: tuple[str, ...]
    url: str
    created: str


class Resolution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a ref meant when a source was last asked.

    Attributes:
        commit: The commit.
        ref_name: As in `Pin.ref_name`.
        validated: As in `Pin.validated`.
        public: Whether it was told to somebody who had shown no credentials.
        time: UTC, ISO 8601.
    """

    commit: str
    ref_name: str | None
    validated: bool
    public: bool
    time: str


class Resolutions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """refs.json: last resolutions by the ref as it was written; empty for the remote's HEAD."""

    format: Literal[1]
    refs: dict[str, Resolution]


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
