"""What stands on the command line, as values: arguments, keywords, and inputs of models.

The forms of inputs are those of `isohub.comparison.inputs`; a mistake in one is a mistake in ``--input``. Side: caller.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from isohub.comparison import inputs as specifications
from isohub.comparison.inputs import Input

__all__ = ["Input", "make_inputs", "parse_input", "parse_keywords", "parse_value"]


def parse_value(text: str) -> Any:
    """An argument: what JSON makes of it, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parse_keywords(settings: Sequence[str]) -> dict[str, Any]:
    """``--set key=value`` as keywords.

    Raises:
        click.BadParameter: There is no ``=``, no key, or a key twice.
    """
    keywords: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{setting!r}: expected name=value", param_hint="--set")
        if key in keywords:
            raise click.BadParameter(f"{key!r} is given twice", param_hint="--set")
        keywords[key] = parse_value(value)
    return keywords


def parse_input(text: str) -> Input:
    """One ``--input``.

    Raises:
        click.BadParameter: It is none of the forms.
    """
    try:
        return specifications.parse_input(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--input") from error


def make_inputs(inputs: Sequence[Input], seed: int | None) -> tuple[list[Any], dict[str, Any]]:
    """The inputs themselves: positional ones, and keywords.

    Raises:
        click.BadParameter: A file cannot be read, or there is not enough memory.
    """
    try:
        return specifications.make_inputs(inputs, seed)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--input") from error.__cause__
