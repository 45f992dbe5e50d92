"""Text, Markdown and HTML of a report: what fits, and what a repo's text cannot do."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from isohub.comparison.document import Heading, Line, Named, Table
from isohub.comparison.render import as_html, as_markdown, as_text, fitted

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "`code` | cell | @everyone #1 ![x](http://example.org/x)",
    "``` ` ````",
    "\x1b]0;title\x07\u202egnp.exe\u2066",
    "a\nb\r\n| c |",
    "&lt;b&gt;",
    "$(rm) {{ 7*7 }} {% raw %}",
    " ",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_control_reaches_a_reader(text: str) -> None:
    blocks = [Line([Named(text)]), Table(("a", "b"), [(Named(text), Named(text))])]
    for made in (as_text(blocks), as_markdown(blocks), as_html(blocks)):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", made)


@pytest.mark.parametrize("text", HOSTILE)
def test_html_is_text_alone(text: str) -> None:
    class Parser(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: set[str] = set()
            self.attributes: list[tuple[str, str | None]] = []
            self.words = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)
            self.attributes += attrs

        def handle_data(self, data: str) -> None:
            self.words += data

    parser = Parser()
    parser.feed(as_html([Heading(text), Line([Named(text), text], "bad"), Table((text,), [(Named(text),), (text,)])]))
    assert parser.tags == {"div", "h4", "p", "b", "code", "table", "thead", "tbody", "tr", "th", "td"}
    assert parser.attributes == [("class", "isohub")]
    if text.isprintable() and text.isascii():
        assert parser.words.count(text) == 6


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_keeps_what_is_a_repo_s_in_code(text: str) -> None:
    made = as_markdown([Line(["at ", Named(text)]), Table(("a", "b"), [(Named(text), "1")])])
    line, _, table = made.partition("\n\n")
    span = line.removeprefix("at ")
    if text.strip():
        fence = re.match("`+", span)[0]
        assert span.endswith(fence)
        assert not re.search(f"(?<!`){fence}(?!`)", span[len(fence) : -len(fence)])  # nothing within ends it
    rows = table.strip().splitlines()
    assert len(rows) == 3
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_isohub_s_own_words_are_no_markdown_either() -> None:
    assert as_markdown([Line(["a_b *c* <d> @e"])]) == "a\\_b \\*c\\* \\<d\\> \\@e\n"


def test_a_comment_is_not_longer_than_one_may_be() -> None:
    table = Table(("a",), [(Named("x" * 150),)] * 100)
    made = as_markdown([Line(["verdict"], "bad"), *[table] * 10])
    assert len(made) < 65_536
    assert made.startswith("**verdict**")
    assert made.endswith("do not fit into a comment.*\n")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_tables_fit_the_width(width: int) -> None:
    table = Table(("name", "figure", "verdict"), [("n" * 100, "1.5", "changed"), ("m", "2", "f" * 60)])
    for row in as_text([table], width).splitlines():
        assert len(row) <= width
    assert fitted(Table(("a",), [("b" * 20,)]), 80)[1] == ["b" * 20]


def test_a_repo_s_lines_do_not_pass_for_a_report_s() -> None:
    text = as_text([Line(["B failed: ", Named("x\nno change\n\nB against A")])])
    assert text.splitlines() == ["B failed: x", "    no change", "    ", "    B against A"]
