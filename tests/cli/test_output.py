"""The one output object: text, JSON, quiet; nothing that a repo says reaches a terminal as it is."""

from __future__ import annotations

import io
import json
import math

import pytest

from isohub.cli.output import Output, Styled, Table
from isohub.errors import IsohubError

HOSTILE = "\x1b[2J\x1b]0;title\x07 \x9b31m \x7f \u202eoverride \udc80 [bold]markup[/bold]"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(form: str, *blocks: object, data: object = None, quiet: tuple[str, ...] = (), terminal: bool = False) -> str:
    stream = Terminal() if terminal else io.StringIO()
    Output(form, stdout=stream, stderr=io.StringIO()).result(data, *blocks, quiet=quiet)  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("block", [HOSTILE, Table((HOSTILE,), [(HOSTILE,), (Styled(HOSTILE, ""),)])])
def test_no_hidden_character_of_a_repo_is_printed(block: object, terminal: bool) -> None:
    text = said("human", block, terminal=terminal)
    ours = text.replace("\x1b[1;4m", "").replace("\x1b[0m", "")  # a heading's style is rich's
    assert all(char == "\n" or char.isprintable() for char in ours)
    assert "\\x1b[2J" in "".join(text.split("\n"))


def test_markup_of_a_repo_is_not_read() -> None:
    assert "[bold]x[/bold] :smile:" in said("human", Table(("a",), [("[bold]x[/bold] :smile:",)]), terminal=True)


def test_quiet_lines_are_escaped_and_single() -> None:
    assert said("quiet", "shown to people", quiet=("a\nb", "\x1b")) == "a\\nb\n\\x1b\n"


def test_json_is_plain_ascii_and_keeps_the_text() -> None:
    text = said("json", "words", data={"text": HOSTILE, "list": (1, 2)})
    assert text.isascii()
    assert "\x1b" not in text
    assert "\x7f" not in text
    assert json.loads(text) == {"text": HOSTILE, "list": [1, 2]}


def test_json_has_no_numbers_that_json_lacks() -> None:
    text = said("json", data={"a": math.nan, "b": [math.inf, -math.inf]})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": "nan", "b": ["inf", "-inf"]}


def test_table_is_aligned_without_a_terminal() -> None:
    table = Table(("name", "n"), [("a", "1"), ("longer", "20")], right=frozenset({1}))
    assert said("human", table) == "name     n\na        1\nlonger  20\n"


@pytest.mark.parametrize("form", ["human", "quiet"])
def test_error_in_words(form: str) -> None:
    stream = io.StringIO()
    Output(form, stderr=stream).error(IsohubError("it broke \x1b[2J", hint="mend it"))  # type: ignore[arg-type]
    assert stream.getvalue() == "error: it broke \\x1b[2J\nhint: mend it\n"


def test_error_as_json() -> None:
    stream = io.StringIO()
    Output("json", stderr=stream).error(IsohubError("it broke\x1b"))
    assert json.loads(stream.getvalue()) == {"error": {"type": "IsohubError", "message": "it broke\x1b", "hint": None}}
    assert "\x1b" not in stream.getvalue()


def test_notes_are_for_people_only() -> None:
    for form, wanted in (("human", "wait\n"), ("quiet", ""), ("json", "")):
        stream = io.StringIO()
        Output(form, stderr=stream).note("wait")  # type: ignore[arg-type]
        assert stream.getvalue() == wanted
