"""What a report is made of, before it is text, Markdown or HTML: lines and tables whose words know whose they are.

Side: caller. Trust: `Named` is a repo's, or an argument's; a plain str is isohub's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Block", "Heading", "Line", "Named", "Table", "Words"]


@dataclass(frozen=True)
class Named:
    """A text that is not isohub's own: shown as it is, and never read as markup."""

    text: str


Words = str | Named


@dataclass(frozen=True)
class Line:
    """A sentence.

    Attributes:
        parts: What stands in it, one after another.
        tone: "good" or "bad" for a verdict; "" else.
    """

    parts: Sequence[Words]
    tone: str = ""

    @property
    def text(self) -> str:
        """As plain text."""
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)


@dataclass(frozen=True)
class Heading:
    """The name of what follows.

    Attributes:
        text: It.
    """

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under headings.

    Attributes:
        columns: Headings.
        rows: As many cells each as there are headings.
        right: Numbers of the columns that are aligned to the right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Words]]
    right: frozenset[int] = field(default_factory=frozenset)


Block = Line | Heading | Table
