"""What a load asked of an entrypoint: enough to ask it again, or to write down where a state came from.

Side: caller. Trust: the caller's own arguments; the structure that an entrypoint gave is a worker's, and is walked
by its plain containers alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from isohub.session.link import Remote, remote_of

__all__ = ["Recipe", "path_words", "plain_json", "remotes_in"]

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Recipe:
    """What one load asked.

    Attributes:
        entrypoint: Its name.
        args: Its positional arguments, as they are now: nothing is copied.
        kwargs: Its keywords.
        seed: What the worker was seeded with; None for new entropy.
        device: Where the model was moved, if anywhere.
        compiled: Options for ``torch.compile``, if it was compiled.
    """

    entrypoint: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    seed: int | None = None
    device: Any = None
    compiled: Mapping[str, Any] | None = None


def remotes_in(built: Any, path: Path = ()) -> Iterator[tuple[Path, Any, Remote]]:
    """The handles in what an entrypoint gave: place, handle, remote."""
    remote = remote_of(built)
    if remote is not None:
        yield path, built, remote
    elif isinstance(built, (list, tuple)):
        for number, item in enumerate(built):
            yield from remotes_in(item, (*path, number))
    elif isinstance(built, dict):
        for key, item in built.items():
            yield from remotes_in(item, (*path, key))


def path_words(path: Path) -> str:
    """A place in what an entrypoint gave, as Python writes it: ``[0]['encoder']``; empty for the whole."""
    return "".join(f"[{key!r}]" for key in path)


def plain_json(value: Any) -> str | None:
    """A value as JSON, if JSON has it as it is; None for anything else (tensors, tuples within, objects)."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return text if json.loads(text) == value else None
