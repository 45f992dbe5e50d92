"""What a caller may give: choices, names, seeds, seconds. Pure; a mistake is a TypeError or ValueError here.

Side: caller. Source: torch.hub 2.13 for `trust_repo`; ``torch.manual_seed`` for seeds.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

__all__ = [
    "check_choice",
    "check_name",
    "check_path",
    "checked_bytes",
    "checked_count",
    "checked_options",
    "checked_seconds",
    "checked_seed",
    "checked_timeout",
    "checked_trust",
    "merged",
]


def merged(kwargs: dict[str, Any], entry_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entrypoint's keywords, of the call and of ``entry_kwargs``; none may be in both."""
    if entry_kwargs is None:
        return kwargs
    twice = sorted(set(kwargs) & set(entry_kwargs))
    if twice:
        raise TypeError(f"keywords given twice, in the call and in entry_kwargs: {', '.join(twice)}")
    return {**kwargs, **entry_kwargs}


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, choices))}")


def checked_seed(seed: Any) -> int | None:
    """A seed that torch, numpy and random take, or None."""
    if seed is None:
        return None
    try:
        number = None if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = None
    if number is None or not 0 <= number < 1 << 63:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
    return number


def checked_trust(trust_repo: Any) -> bool | Literal["check"]:
    """`trust_repo` of torch.hub: True, False, or "check", which None stands for."""
    # Identity, not equality: 1 and "Check" are mistakes, and a mistake here must not open anything.
    if trust_repo is None or trust_repo == "check":
        return "check"  # None is the default of torch.hub's list and help
    if trust_repo is True or trust_repo is False:
        return trust_repo
    raise ValueError(f"trust_repo must be True, False or 'check', got {trust_repo!r}")


def check_name(model: Any) -> None:
    """Refuse what is no name of an entrypoint."""
    if not isinstance(model, str):
        raise TypeError(f"model must be the name of an entrypoint, a str; got {model!r}")


def check_path(name: str, path: Any) -> None:
    """Refuse what is no path; None is none given."""
    if path is not None and not (isinstance(path, (str, os.PathLike)) and os.fspath(path)):
        raise ValueError(f"{name} must be a path, got {path!r}")


def checked_bytes(count: Any) -> int:
    """A positive number of bytes."""
    if isinstance(count, bool) or not isinstance(count, int) or count <= 0:
        raise ValueError(f"max_reply_bytes must be a positive whole number of bytes, got {count!r}")
    return count


def checked_count(name: str, count: Any) -> int | None:
    """A positive whole number, or None for no limit."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count <= 0):
        raise ValueError(f"{name} must be a positive whole number, or None for no limit; got {count!r}")
    return count


def checked_seconds(name: str, seconds: Any) -> float:
    """A number of seconds, 0 or more."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        raise ValueError(f"{name} must be a number of seconds, 0 or more; got {seconds!r}")
    return seconds


def checked_options(name: str, value: Any) -> dict[str, Any] | None:
    """Options by name; True is none of them given, False and None are no wish at all."""
    if value is None or value is False:
        return None
    if value is True:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be True, False or options by name, got {value!r}")
    return dict(value)


def checked_timeout(timeout_s: Any) -> float | None:
    """A positive number of seconds, or None for no limit."""
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s must be a positive number of seconds, or None for no limit; got {timeout_s!r}")
    return timeout_s
