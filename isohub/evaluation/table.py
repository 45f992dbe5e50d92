"""What an evaluation found: one row for each ref, in forms for people and for programs. Computes nothing.

Side: caller. Trust: names of metrics and messages of failures are a worker's text: escaped for terminals, Markdown and
spreadsheets.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from isohub.errors import MissingExtraError, printable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BatchResult", "Evaluation", "Failure", "Row"]

# A cell that begins so is a formula to a spreadsheet.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_SHOWN_FAILURES = 3
_OF_REFS = ("repo", "commit", "batches", "failed", "weight", "load_s", "call_s", "memory_bytes", "error")
_OF_BATCHES = ("repo", "commit", "batch", "weight", "seconds")
_OWN = frozenset({*_OF_REFS, *_OF_BATCHES, "ref"})


@dataclass(frozen=True)
class BatchResult:
    """What one batch gave.

    Attributes:
        batch: Its number.
        weight: What it weighs in a mean.
        seconds: How long the worker took for it.
        metrics: Names to numbers and tensors.
    """

    batch: int
    weight: float
    seconds: float
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """What gave nothing.

    Attributes:
        batch: Its number; None where the ref could not be resolved, fetched or loaded.
        kind: Name of the error.
        message: What it says, control characters escaped.
        tries: How often it was tried.
    """

    batch: int | None
    kind: str
    message: str
    tries: int


@dataclass(frozen=True)
class Row:
    """One ref.

    Attributes:
        repo: As it was written.
        commit: None if it could not be resolved.
        metrics: Reduced over all batches that have a result, in their order.
        results: Those batches.
        failures: The others, and why the ref as a whole has none.
        weight: Of all results together.
        load_s: How long the model took to load, the first time; None if nothing was computed now.
        call_s: Seconds of workers, over all results.
        memory_bytes: What a worker had of its own after its first batch, at most; None if nothing was computed now.
    """

    repo: str
    commit: str | None
    metrics: Mapping[str, Any]
    results: tuple[BatchResult, ...] = field(repr=False)
    failures: tuple[Failure, ...]
    weight: float
    load_s: float | None
    call_s: float
    memory_bytes: int | None

    @property
    def error(self) -> str | None:
        """Why the ref as a whole has no result; None if it has some, or only batches failed."""
        return next((f"{each.kind}: {each.message}" for each in self.failures if each.batch is None), None)

    def to_dict(self, *, results: bool = False) -> dict[str, Any]:
        """Plain values; tensors are nested lists.

        Args:
            results: Whether with those of each batch.
        """
        found: dict[str, Any] = {
            "repo": self.repo,
            "commit": self.commit,
            "metrics": {name: _plain(value) for name, value in self.metrics.items()},
            "batches": len(self.results),
            "weight": self.weight,
            "failures": [
                {"batch": each.batch, "kind": each.kind, "message": each.message, "tries": each.tries}
                for each in self.failures
            ],
            "load_s": self.load_s,
            "call_s": self.call_s,
            "memory_bytes": self.memory_bytes,
        }
        if results:
            found["results"] = [
                {
                    "batch": each.batch,
                    "weight": each.weight,
                    "seconds": each.seconds,
                    "metrics": {name: _plain(value) for name, value in each.metrics.items()},
                }
                for each in self.results
            ]
        return found


@dataclass(frozen=True)
class Evaluation:
    """One metric over the same batches, for each ref in the order in which they were given.

    Attributes:
        model: The entrypoint.
        rows: One for each ref.
        batches: How many the data has.
        seconds: How long it took.
        resumed: How many results came from the file and were not computed again.
        lanes: How many workers ran at once, at most.
        threads: How many threads each might use; None where that was left alone.
    """

    model: str
    rows: tuple[Row, ...]
    batches: int
    seconds: float
    resumed: int
    lanes: int
    threads: int | None

    @property
    def complete(self) -> bool:
        """Whether every batch of every ref has a result."""
        return not any(row.failures for row in self.rows)

    def to_dict(self, *, results: bool = False) -> dict[str, Any]:
        """Plain values; tensors are nested lists, and what is not finite is as Python has it.

        Args:
            results: Whether with those of each batch.
        """
        return {
            "model": self.model,
            "batches": self.batches,
            "seconds": self.seconds,
            "resumed": self.resumed,
            "lanes": self.lanes,
            "threads": self.threads,
            "rows": [row.to_dict(results=results) for row in self.rows],
        }

    def to_json(self, *, results: bool = False) -> str:
        """The same as JSON, in ASCII; numbers that JSON lacks are the strings "nan", "inf" and "-inf"."""
        text = json.dumps(_finite(self.to_dict(results=results)), indent=2, allow_nan=False)
        return text.replace("\x7f", "\\u007f")

    def to_csv(self, *, results: bool = False) -> str:
        """A line for each ref, or for each batch of each ref; metrics that are no numbers are left out.

        Args:
            results: Whether for each batch.
        """
        out = io.StringIO()
        columns, rows = self._cells(results=results)
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([_cell(name) for name in columns])
        for row in rows:
            writer.writerow([_cell(row.get(name)) for name in columns])
        return out.getvalue()

    def to_pandas(self, *, results: bool = False) -> pd.DataFrame:
        """The same as a DataFrame, with all metrics.

        Args:
            results: Whether a row for each batch.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError(
                "pandas is not installed", hint="python -m pip install 'isohub[pandas]'", extra="pandas"
            ) from error
        columns, rows = self._cells(results=results, every=True)
        return pd.DataFrame([{name: row.get(name) for name in columns} for row in rows], columns=columns)

    def to_markdown(self) -> str:
        """A table for a page or a comment, and a line for what failed."""
        columns, rows = self._shown()
        lines = [_line(columns), _line([":---", *["---:"] * (len(columns) - 1)], escape=False)]
        lines += [_line(row) for row in rows]
        lines += [f"\n{_markdown(words)}" for words in self._remarks()]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        columns, rows = self._shown()
        widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
        lines = []
        for row in [columns, *rows]:
            cells = [
                cell.ljust(width) if not place else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *self._remarks()])

    def _cells(self, *, results: bool, every: bool = False) -> tuple[list[str], list[dict[str, Any]]]:
        own = _OF_BATCHES if results else _OF_REFS
        rows: list[dict[str, Any]] = []
        names: dict[str, None] = {}
        for row in self.rows:
            if results:
                for each in row.results:
                    cells = {"repo": row.repo, "commit": row.commit, "batch": each.batch, "weight": each.weight}
                    rows.append({**cells, "seconds": each.seconds, **_metric_cells(each.metrics, names, every)})
                continue
            failed = sum(each.batch is not None for each in row.failures)
            cells = {"repo": row.repo, "commit": row.commit, "batches": len(row.results), "failed": failed}
            cells |= {"weight": row.weight, "load_s": row.load_s, "call_s": row.call_s}
            cells |= {"memory_bytes": row.memory_bytes, "error": row.error}
            rows.append({**cells, **_metric_cells(row.metrics, names, every)})
        return [*own, *names], rows

    def _shown(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells for people: metrics that are numbers, and what failed."""
        names: dict[str, None] = {}
        for row in self.rows:
            _metric_cells(row.metrics, names, False)
        columns = ["ref", *names, "batches", "failed", "seconds"]
        table = []
        for row in self.rows:
            cells = _metric_cells(row.metrics, {}, False)
            commit = "" if row.commit is None else f" ({row.commit.removeprefix('tree-')[:7]})"
            failed = sum(each.batch is not None for each in row.failures)
            table.append(
                [
                    printable(f"{row.repo}{commit}", limit_chars=200, newlines=False),
                    *(_figure(cells.get(name)) for name in names),
                    str(len(row.results)),
                    "all" if row.error is not None else str(failed),
                    f"{row.call_s:.2f}",
                ]
            )
        return [printable(name, limit_chars=200, newlines=False) for name in columns], table

    def _remarks(self) -> list[str]:
        remarks = []
        for row in self.rows:
            for each in row.failures[:_SHOWN_FAILURES]:
                where = "" if each.batch is None else f", batch {each.batch}"
                times = f" ({each.tries} tries)" if each.tries > 1 else ""
                remarks.append(printable(f"{row.repo}{where}: {each.kind}: {each.message}{times}", newlines=False))
            if len(row.failures) > _SHOWN_FAILURES:
                remarks.append(
                    printable(f"{row.repo}: {len(row.failures) - _SHOWN_FAILURES} more failures", newlines=False)
                )
        return remarks


def _metric_cells(metrics: Mapping[str, Any], names: dict[str, None], every: bool) -> dict[str, Any]:
    """Metrics by column. A metric's column never takes the place of one of the table's own."""
    cells = {}
    for name, value in metrics.items():
        number = isinstance(value, (bool, int, float))
        if number or every:
            column = f"metric:{name}" if name in _OWN else name
            names[column] = None
            cells[column] = value if number else _plain(value)
    return cells


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.tolist()) if value.is_complex() else value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, str):
        text = printable(value, newlines=False)
        return f"'{text}" if text.startswith(_FORMULA) else text
    return value


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _line(cells: list[str], *, escape: bool = True) -> str:
    return f"| {' | '.join(_markdown(cell) if escape else cell for cell in cells)} |"


def _markdown(text: str) -> str:
    """Text of a repo's in Markdown: no markup, no HTML, no cell's end, no mention of people."""
    for char in "\\`*_[]<>|#!~":
        text = text.replace(char, f"\\{char}")
    return text.replace("&", "&amp;").replace("@", "@\u2060")
