"""The tree of a model's modules against another's: which came, went, or are of another kind.

Side: caller. Trust: names, classes and descriptions are the workers': escaped, and nothing else is made of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isohub.errors import printable

if TYPE_CHECKING:
    from isohub.session.link import Remote

__all__ = ["ModulesDifference", "Structure", "compare_structures", "read_structure"]

_PHASE = "reading its modules"
_NAME_CHARS = 300
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True)
class Structure:
    """A model's modules.

    Attributes:
        modules: What each is, such as ``torch.nn.modules.linear.Linear(in_features=3, ...)``, by its dotted name; the
            whole is the empty name. A module that is there twice has its first name.
        parameters: How many numbers its parameters have, shared ones once.
    """

    modules: Mapping[str, str]
    parameters: int


@dataclass(frozen=True)
class ModulesDifference:
    """What differs between two trees of modules.

    Attributes:
        expected: Modules of the base's.
        got: Modules of the other's.
        added: Name and what it is, of modules that the other alone has.
        removed: The same of the base's alone.
        changed: Name, what it was and what it is.
    """

    expected: int
    got: int
    added: tuple[tuple[str, str], ...]
    removed: tuple[tuple[str, str], ...]
    changed: tuple[tuple[str, str, str], ...]

    @property
    def any(self) -> bool:
        """Whether anything differs."""
        return bool(self.added or self.removed or self.changed)


def read_structure(remote: Remote) -> Structure:
    """Ask for it.

    Raises:
        ProtocolError: What came is no list of modules.
    """
    rows: Any = remote.ask("structure", phase=_PHASE)
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise remote.refuse("a list of modules", _PHASE)
    modules = {}
    for name, class_name, described, _ in rows:
        # An object's address is another one in every process.
        words = f"{class_name}({_ADDRESS.sub('', described)})"
        modules[printable(name, limit_chars=_NAME_CHARS, newlines=False)] = printable(
            words, limit_chars=_NAME_CHARS, newlines=False
        )
    return Structure(modules, sum(row[3] for row in rows))


def _is_row(row: Any) -> bool:
    if not isinstance(row, tuple) or len(row) != 4:
        return False
    return all(type(text) is str for text in row[:3]) and type(row[3]) is int and row[3] >= 0


def compare_structures(base: Structure, other: Structure) -> ModulesDifference:
    """The other against the base."""
    before, after = base.modules, other.modules
    return ModulesDifference(
        expected=len(before),
        got=len(after),
        added=tuple((name, words) for name, words in after.items() if name not in before),
        removed=tuple((name, words) for name, words in before.items() if name not in after),
        changed=tuple(
            (name, words, after[name]) for name, words in before.items() if name in after and after[name] != words
        ),
    )
