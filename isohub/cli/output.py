"""Everything that the command line says, from one object: text for people, JSON, or only the essence.

Rules:

1. Results go to stdout; remarks and errors to stderr.
2. Every text passes through `isohub.errors.printable`, whoever escaped it before: a repo must not be able to
   move the cursor, set the window's title or fill the clipboard. rich's markup is never read.
3. JSON is ASCII with all control characters escaped, so that the repo's own text survives in it and a
   terminal that shows it is safe. Numbers that JSON lacks are the strings "nan", "inf" and "-inf".

Side: caller.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

from isohub.errors import IsohubError, printable

__all__ = ["Block", "Cell", "Form", "Output", "Styled", "Table"]

Form = Literal["human", "json", "quiet"]


@dataclass(frozen=True)
class Styled:
    """A text with a style for terminals, such as ``bold red``."""

    text: str
    style: str


Cell = str | Styled


@dataclass(frozen=True)
class Table:
    """Rows under headings.

    Attributes:
        columns: Headings.
        rows: As many cells each as there are headings.
        right: Numbers of the columns that are aligned to the right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    right: frozenset[int] = field(default_factory=frozenset)


Block = str | Table


class Output:
    """Where one command's results and errors go.

    Args:
        form: "human": `blocks`; "json": `data`; "quiet": the lines of `quiet`.
        stdout: For results.
        stderr: For remarks and errors.
    """

    def __init__(self, form: Form = "human", stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.form = form
        self._stdout = sys.stdout if stdout is None else stdout
        self._stderr = sys.stderr if stderr is None else stderr

    def result(self, data: Any, *blocks: Block, quiet: Sequence[str] = ()) -> None:
        """What a command found.

        Args:
            data: For JSON: dicts, lists, strings and numbers.
            *blocks: For people, in order.
            quiet: What a script would want of it, one a line.
        """
        try:
            self._write(data, blocks, quiet)
        except BrokenPipeError:  # click's
            raise
        except OSError as error:
            _drop(self._stdout)
            raise IsohubError(f"the result cannot be written: {error.strerror or error}") from error

    def _write(self, data: Any, blocks: Sequence[Block], quiet: Sequence[str]) -> None:
        if self.form == "json":
            text = json.dumps(_plain(data), indent=2, allow_nan=False).replace("\x7f", "\\u007f")
            self._stdout.write(text + "\n")
        elif self.form == "quiet":
            for line in quiet:
                self._stdout.write(printable(line, newlines=False) + "\n")
        else:
            for block in blocks:
                if isinstance(block, str):
                    self._stdout.write(printable(block) + "\n")
                else:
                    self._table(block)
        self._stdout.flush()

    def note(self, text: str) -> None:
        """A remark for people while they wait."""
        if self.form == "human":
            self._stderr.write(printable(text) + "\n")
            self._stderr.flush()

    def error(self, error: IsohubError) -> None:
        """What went wrong, and what helps."""
        if self.form == "json":
            said = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
            self._stderr.write(json.dumps({"error": said}).replace("\x7f", "\\u007f") + "\n")
        else:
            self._stderr.write(f"error: {printable(error.message)}\n")
            if error.hint:
                self._stderr.write(f"hint: {printable(error.hint)}\n")
        self._stderr.flush()

    def _table(self, table: Table) -> None:
        if self._stdout.isatty():
            self._rich_table(table)
            return
        rows = [[_text(heading) for heading in table.columns], *([_text(cell) for cell in row] for row in table.rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
        for row in rows:
            cells = [
                cell.rjust(width) if column in table.right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self._stdout.write("  ".join(cells).rstrip() + "\n")

    def _rich_table(self, table: Table) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
        for column, heading in enumerate(table.columns):
            drawn.add_column(
                Text(_text(heading)), justify="right" if column in table.right else "left", overflow="fold"
            )
        for row in table.rows:
            drawn.add_row(*(Text(_text(cell), style=cell.style if isinstance(cell, Styled) else "") for cell in row))
        Console(file=self._stdout, markup=False, highlight=False, emoji=False).print(drawn)


def _drop(stream: TextIO) -> None:
    """Let go of what a stream still holds, which Python would try to write once more at its end.

    Source: Python's signal module, "Note on SIGPIPE".
    """
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no file behind it
        pass


def _text(cell: Cell) -> str:
    return printable(cell.text if isinstance(cell, Styled) else cell, newlines=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
