"""Blocks of a report as text, as Markdown and as a piece of HTML.

Rules:

1. Every text is escaped for where it goes, and `printable` before: no control, no bidirectional override and no
   invisible character is left.
2. In Markdown what is not isohub's own stands in code spans: there no mention, no link, no image and no HTML is read.
3. Text fits the width that it is given: the longest cells of a table lose their middle.

Side: caller. Source: GitHub Flavored Markdown, code spans and tables.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from isohub.comparison.document import Block, Heading, Line, Named, Table, Words
from isohub.errors import printable

__all__ = ["as_html", "as_markdown", "as_text", "fitted", "indented", "line_text"]

_WIDTH = 80
_GAP = 2
_NARROWEST = 8
# GitHub takes 65,536 characters in a comment.
_MARKDOWN_CHARS = 60_000
_CELL_CHARS = 160
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|&~!@])")


def as_text(blocks: Sequence[Block], width: int = _WIDTH) -> str:
    """For a terminal or a log of that many columns."""
    kept: list[str] = []
    for line in (line for block in blocks for line in _text_lines(block, width)):
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).rstrip("\n")


def _text_lines(block: Block, width: int) -> Iterator[str]:
    if isinstance(block, Heading):
        yield ""
        yield printable(block.text, newlines=False)
    elif isinstance(block, Line):
        yield from line_text(block).split("\n")
    else:
        yield ""
        yield from _text_table(block, width)
        yield ""


def line_text(line: Line) -> str:
    """A sentence as text. Further lines of what it names are indented, so that none passes for a report's."""
    return printable("".join(part if isinstance(part, str) else indented(part.text) for part in line.parts))


def indented(text: str) -> str:
    """A text whose further lines cannot be taken for somebody else's."""
    return text.replace("\n", "\n    ")


def _text_table(table: Table, width: int) -> Iterator[str]:
    rows = fitted(table, width)
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    for row in rows:
        cells = [
            cell.rjust(size) if column in table.right else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        yield (" " * _GAP).join(cells).rstrip()


def fitted(table: Table, width: int) -> list[list[str]]:
    """The cells, headings first, so short that all of them fit into so many columns, if they can."""
    rows = [[_plain(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    room = width - _GAP * (len(widths) - 1)
    while sum(widths) > room and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return [[_cut(cell, size) for cell, size in zip(row, widths, strict=True)] for row in rows]


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    start = (width - 3) // 2
    return f"{text[:start]}...{text[len(text) - (width - 3 - start) :]}"


def _plain(words: Words) -> str:
    return printable(words.text if isinstance(words, Named) else words, newlines=False)


def as_markdown(blocks: Sequence[Block]) -> str:
    """For a comment on a pull request; at most as long as one may be."""
    parts = [_markdown(block) for block in blocks]
    kept, length = [], 0
    for number, part in enumerate(parts):
        length += len(part) + 2
        if length > _MARKDOWN_CHARS:
            kept.append(f"*{len(parts) - number} parts more do not fit into a comment.*")
            break
        kept.append(part)
    return "\n\n".join(kept) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"#### {_markdown_words(block.text)}"
    if isinstance(block, Line):
        words = "".join(_markdown_words(part) for part in block.parts).strip()
        return f"**{words}**" if block.tone else words
    rows = [block.columns, *block.rows]
    lines = ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in rows]
    marks = ("---:" if column in block.right else "---" for column in range(len(block.columns)))
    lines.insert(1, "| " + " | ".join(marks) + " |")
    return "\n".join(lines)


def _markdown_words(words: Words) -> str:
    if isinstance(words, str):
        return _SPECIAL.sub(r"\\\1", printable(words, newlines=False))
    text = printable(words.text, limit_chars=_CELL_CHARS * 4, newlines=False)
    if not text.strip():
        return ""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else ""
    return f"{fence}{space}{text}{space}{fence}"


def _markdown_cell(words: Words) -> str:
    if isinstance(words, str):
        return _markdown_words(words)
    # In a table a bar ends a cell even within a code span, unless it is escaped.
    text = _cut(printable(words.text, newlines=False), _CELL_CHARS).replace("|", "\\|")
    return _markdown_words(Named(text))


def as_html(blocks: Sequence[Block]) -> str:
    """A piece of HTML without scripts, for a notebook."""
    return f'<div class="isohub">{"".join(_html(block) for block in blocks)}</div>'


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h4>{_html_words(block.text)}</h4>"
    if isinstance(block, Line):
        words = "".join(_html_words(part) for part in block.parts)
        return f"<p>{f'<b>{words}</b>' if block.tone else words}</p>"
    head = "".join(f"<th>{_html_words(column)}</th>" for column in block.columns)
    rows = "".join(f"<tr>{''.join(_html_cell(block, *cell) for cell in enumerate(row))}</tr>" for row in block.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _html_cell(table: Table, column: int, words: Words) -> str:
    style = ' style="text-align: right"' if column in table.right else ""
    return f"<td{style}>{_html_words(words)}</td>"


def _html_words(words: Words) -> str:
    if isinstance(words, Named):
        return f"<code>{html.escape(printable(words.text, newlines=False))}</code>"
    return html.escape(printable(words, newlines=False))
