"""Files that torch.hub has downloaded already: used again where their hash is known.

torch.hub keys its files by the last part of the URL alone, so a name says nothing about the content. A file
is taken only if a SHA-256, or its first eight digits or more, is known from a lockfile, from the caller or
from the name itself, and only after the whole of it was hashed. Eight digits are what torch.hub itself
relies on, in the same directory; they can be forged by whoever may write there, who is the user.

It copies and never links: torch.hub, and whatever else writes there, may change its files later. Runs in the
caller. Trust: the files in the user's cache, which repos that torch.hub ran may have written.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from isohub.repos.blobs import copy_into, hash_file, open_regular
from isohub.repos.weights_url import hash_in_name

if TYPE_CHECKING:
    from isohub.repos.weights_url import Hashes, WeightsUrl

__all__ = ["copy_hub_file", "hub_files"]

_log = logging.getLogger("isohub.repos")
# Fewer than torch.hub's convention asks for prove nothing.
_HASH_DIGITS = 8


def hub_files(address: WeightsUrl, hashes: Hashes) -> list[Path]:
    """Files of torch.hub's that may be a URL's; none if too little is known of its content to tell."""
    if not address.hub_name or _proof(address, hashes) is None:
        return []
    return [path for path in (directory / address.hub_name for directory in _directories()) if _is_file(path)]


def copy_hub_file(address: WeightsUrl, hashes: Hashes, target: Path, *, limit_bytes: int) -> str | None:
    """Copy the one of `hub_files` whose content is right.

    Args:
        address: Whose file.
        hashes: What is known of it; all of it must fit.
        target: Must not exist. Left behind only on success.
        limit_bytes: A larger file is passed over.

    Returns:
        SHA-256 of the copy in hex, or None if there is no such file.

    Raises:
        OSError: The copy could not be written.
    """
    proof = _proof(address, hashes)
    for path in hub_files(address, hashes):
        try:
            source = open_regular(path)
        except OSError:
            continue  # not for us to read
        try:
            size_bytes = os.fstat(source).st_size
            if size_bytes > limit_bytes:
                continue
            copy_into(source, target, size_bytes)
        finally:
            os.close(source)
        # The copy is hashed, not the file: what is hashed is what is used.
        digest, _ = hash_file(target)
        if proof is not None and digest.startswith(proof) and hashes.fit(digest):
            _log.info("%s is taken from %s, SHA-256 %s", address.shown, path.parent, digest)
            return digest
        target.unlink()
    return None


def _proof(address: WeightsUrl, hashes: Hashes) -> str | None:
    for known in (hashes.sha256, hashes.prefix, hash_in_name(address.hub_name)):
        if known is not None and len(known) >= _HASH_DIGITS:
            return known
    return None


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def _directories() -> list[Path]:
    """Where torch.hub 2.13 keeps its files, its own directory first."""
    caches = []
    for variable, below in (("TORCH_HOME", ""), ("XDG_CACHE_HOME", "torch")):
        if os.environ.get(variable):
            caches.append(Path(os.environ[variable], below))
    caches.append(Path("~/.cache/torch"))
    found = []
    for cache in caches:
        try:
            found.append(cache.expanduser().absolute() / "hub" / "checkpoints")
        except (RuntimeError, OSError):
            continue  # no home directory
    return list(dict.fromkeys(found))
