"""Sizes and ages: read strictly, shown shortly. Side: caller."""

from __future__ import annotations

import re
from collections.abc import Mapping

import click

__all__ = ["read_age", "read_size", "show_age", "show_size"]

# SI for the decimal ones, IEC 80000-13 for the binary ones; a KB is taken for a kB.
_SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY_SIZES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_BY_NAME = {name.lower(): factor for name, factor in {**_SIZES, **_BINARY_SIZES}.items()}
_AGES = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_QUANTITY = re.compile(r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,6})?) ?(?P<unit>[A-Za-z]*)", re.ASCII)


def read_size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:  # noqa: ARG001
    """Bytes of an option's text, for click's `callback`."""
    return None if value is None else int(_read(value, _BY_NAME, "a size such as 5GB, 500MB or 1.5GiB"))


def read_age(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:  # noqa: ARG001
    """Seconds of an option's text, for click's `callback`."""
    return None if value is None else _read(value, _AGES, "an age such as 30d, 12h, 90min or 2w")


def _read(value: str, factors: Mapping[str, int], expected: str) -> float:
    match = _QUANTITY.fullmatch(value)
    factor = factors.get(match["unit"].lower()) if match else None
    if match is not None and not match["unit"] and float(match["number"]) == 0:
        return 0.0  # in any unit
    if match is None or factor is None:
        raise click.BadParameter(f"got {value!r}, expected {expected}")
    return float(match["number"]) * factor


def show_size(count: int) -> str:
    """Bytes, in three digits or so: ``17 MB``."""
    for name, factor in reversed(_SIZES.items()):
        if count >= factor:
            number = count / factor
            return f"{number:.1f} {name}" if number < 10 and factor > 1 else f"{number:.0f} {name}"
    return "0 B"


def show_age(seconds: float) -> str:
    """Seconds, in the largest unit of which there are two or so: ``3 d``."""
    for name in ("d", "h", "min"):
        if seconds >= _AGES[name]:
            return f"{seconds / _AGES[name]:.0f} {name}"
    return "now"
