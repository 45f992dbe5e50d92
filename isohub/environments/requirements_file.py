"""``requirements.txt``, as pip reads it, read as text: nothing is expanded, fetched or run.

1. Includes (``-r``) and constraints (``-c``) are followed: inside the checkout for a repo's file, so deep, so many.
2. A line that names an address or a path is `Unusable`; ``-e .`` is the repo's own project, which its checkout is.
3. Options that choose package indexes are the caller's to give: in a repo's file each is a remark and nothing more, in
   a file of the caller's they hold. What is neither understood nor harmless is a remark, or for the caller an error.
4. ``${VARIABLE}`` is never expanded in a repo's file: it could carry a secret to an index.

Side: caller. Trust: a repo's text, or the caller's own file.
Source: pip's "Requirements File Format"; PEP 508.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from isohub.environments.declared import MOST_ENTRIES, Declared, Unusable, read_text
from isohub.environments.dependencies import is_package_name, parsed_requirement
from isohub.errors import EnvironmentBuildError, printable
from isohub.repos.naming import has_hidden, without_credentials

__all__ = ["read_lines", "read_requirements_file"]

_MOST_FILES = 20
_DEEPEST = 5
_LINE_CHARS = 8_000
_COMMENT = re.compile(r"(?:^|\s)#.*$")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")  # pip's own pattern
_HASH = re.compile(r"\s--hash[ =]sha256:([0-9a-fA-F]{64})")
_OTHER_HASH = re.compile(r"\s--hash[ =]\S+")
_EGG = re.compile(r"[#&]egg=([A-Za-z0-9][A-Za-z0-9._-]*)")
_EXTRAS_OF_DOT = re.compile(r"\.(?:/)?(?:\[([A-Za-z0-9._, -]*)\])?")
_ARCHIVES = (".whl", ".zip", ".tar.gz", ".tar.bz2")
_VALUED = {
    "-r": "--requirement", "-c": "--constraint", "-e": "--editable", "-i": "--index-url", "-f": "--find-links",
}  # fmt: skip
_INDEXES = frozenset({"--index-url", "--extra-index-url", "--find-links", "--no-index", "--trusted-host", "--pypi-url"})
# Wheels alone are taken, by their hashes, whatever these say.
_HARMLESS = frozenset({"--prefer-binary", "--only-binary", "--require-hashes", "--use-feature", "--progress-bar"})


@dataclass
class _Reading:
    """One walk through files that include each other."""

    root: Path | None
    seen: set[Path] = field(default_factory=set)
    lines: int = 0
    own_extras: list[str] | None = None


def read_requirements_file(path: Path, root: Path | None) -> tuple[Declared, list[str] | None]:
    """Read a file and what it includes.

    Args:
        path: The file.
        root: The checkout; None for a file of the caller's.

    Returns:
        What it asks for; and the extras of the repo's own project, where it names that (``-e .[vision]``).

    Raises:
        EnvironmentBuildError: It cannot be read, or asks for too much; for the caller's own also a line that is none.
    """
    reading = _Reading(root)
    declared = Declared()
    _read_file(path, reading, declared, depth=0, constraint=False)
    return declared, reading.own_extras


def read_lines(text: str, name: str, directory: Path, root: Path | None) -> tuple[Declared, list[str] | None]:
    """Read lines that are in another file, as those of ``environment.yml`` are."""
    reading = _Reading(root)
    declared = Declared()
    _read_text(text, name, directory, reading, declared, depth=0, constraint=False)
    return declared, reading.own_extras


def _read_file(path: Path, reading: _Reading, declared: Declared, *, depth: int, constraint: bool) -> None:
    shown = _shown_path(path, reading.root)
    if "\0" in str(path):
        raise EnvironmentBuildError(f"the requirements file {shown} is not there")
    real = Path(os.path.realpath(path))
    if real in reading.seen:
        return
    reading.seen.add(real)
    if depth > _DEEPEST or len(reading.seen) > _MOST_FILES:
        raise EnvironmentBuildError(f"{shown}: requirements files include more than {_MOST_FILES}, or {_DEEPEST} deep")
    text = read_text(path, reading.root)
    if text is None:
        raise EnvironmentBuildError(f"the requirements file {shown} is not there")
    _read_text(text, shown, path.parent, reading, declared, depth=depth, constraint=constraint)


def _read_text(
    text: str, name: str, directory: Path, reading: _Reading, declared: Declared, *, depth: int, constraint: bool
) -> None:
    for number, line in _logical_lines(text):
        where = f"{name}:{number}"
        reading.lines += 1
        if reading.lines > MOST_ENTRIES or len(line) > _LINE_CHARS:
            raise EnvironmentBuildError(
                f"{where}: more than {MOST_ENTRIES} requirements, or {_LINE_CHARS} characters in one"
            )
        if reading.root is None:
            line = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), line)  # noqa: PLW2901
        if line.startswith("-"):
            _read_option(line, where, directory, reading, declared, depth=depth, constraint=constraint)
        else:
            _read_requirement(line, where, reading, declared, constraint=constraint)


def _logical_lines(text: str) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    begun, number = "", 0
    for count, raw in enumerate(text.splitlines(), 1):
        number = number if begun else count
        # A comment ends at its own line, also where that ends in a backslash.
        comment = _COMMENT.search(raw)
        part = raw[: comment.start()] if comment else raw
        if part.endswith("\\") and comment is None:
            begun += part[:-1] + " "
            continue
        line, begun = (begun + part).strip(), ""
        if line:
            found.append((number, line))
    return [*found, (number, begun.strip())] if begun.strip() else found


def _read_option(
    line: str, where: str, directory: Path, reading: _Reading, declared: Declared, *, depth: int, constraint: bool
) -> None:
    option, value = _split_option(line)
    if option in ("--requirement", "--constraint"):
        if "://" in value:
            declared.unusable.append(Unusable(_shown(line), where, "an address of more requirements"))
            return
        inner = constraint or option == "--constraint"
        _read_file(directory / value, reading, declared, depth=depth + 1, constraint=inner)
    elif option == "--editable":
        _read_place(value, line, where, reading, declared)
    elif option in _INDEXES or option == "--pre":
        if reading.root is None:
            _take_index(option, value, directory, declared)
        elif option != "--pre":
            declared.remarks.append(f"{where}: {_shown(line)} is not followed: package indexes are yours to choose")
    elif option not in _HARMLESS:
        if reading.root is None:
            raise EnvironmentBuildError(f"{where}: the option {_shown(line)} is not understood")
        declared.remarks.append(f"{where}: {_shown(line)} is not followed")


def _split_option(line: str) -> tuple[str, str]:
    for short, name in _VALUED.items():
        if line.startswith(short) and not line.startswith("--"):
            return name, line[len(short) :].lstrip(" =").strip("\"'")
    option, _, value = re.sub(r"[ =]", "\0", line, count=1).partition("\0")
    return option, value.strip().strip("\"'")


def _take_index(option: str, value: str, directory: Path, declared: Declared) -> None:
    """Follow an option of the caller's own file."""
    indexes = declared.indexes
    if option == "--index-url":
        declared.indexes = replace(indexes, default=value)
    elif option == "--extra-index-url":
        declared.indexes = replace(indexes, extra=(*indexes.extra, value))
    elif option == "--find-links":
        place = value if "://" in value else str((directory / value).absolute())
        declared.indexes = replace(indexes, find_links=(*indexes.find_links, place))
    elif option == "--no-index":
        declared.indexes = replace(indexes, no_index=True)
    elif option == "--pre":
        declared.indexes = replace(indexes, prereleases=True)
    else:
        declared.remarks.append(f"{option} {without_credentials(value)} is not followed; UV_INSECURE_HOST is")


def _read_requirement(line: str, where: str, reading: _Reading, declared: Declared, *, constraint: bool) -> None:
    hashes = tuple(found.lower() for found in _HASH.findall(line))
    plain = _OTHER_HASH.sub("", line).strip()
    if plain.endswith(_ARCHIVES) and " " not in plain:  # also a name, as PEP 508 has it; pip takes it for a file
        _read_place(plain, line, where, reading, declared)
        return
    requirement = parsed_requirement(plain)
    if requirement is None:
        _read_place(plain, line, where, reading, declared)
        return
    if _OTHER_HASH.search(line) and not hashes:
        raise EnvironmentBuildError(f"{where}: {_shown(line)} has a hash that is no sha256")
    declared.ask(requirement, where, hashes=hashes, constraint=constraint)


def _read_place(value: str, line: str, where: str, reading: _Reading, declared: Declared) -> None:
    """What is no requirement: the repo itself, an address, a path, or nothing at all."""
    own = _EXTRAS_OF_DOT.fullmatch(value)
    if own is not None and reading.root is not None:
        named = [each.strip() for each in (own[1] or "").split(",") if each.strip()]
        reading.own_extras = [*(reading.own_extras or []), *named]
        return
    egg = _EGG.search(value)
    name = egg[1] if egg and is_package_name(egg[1]) else None
    if "://" in value:
        declared.unusable.append(Unusable(_shown(line), where, "an address", name))
    elif "/" in value or value.startswith(".") or value.endswith(_ARCHIVES):
        declared.unusable.append(Unusable(_shown(line), where, "a path", name))
    elif reading.root is None:
        raise EnvironmentBuildError(f"{where}: {_shown(line)} is no requirement; expected one such as timm==0.6.13")
    else:
        declared.unusable.append(Unusable(_shown(line), where, "no requirement"))


def _shown(line: str) -> str:
    """A line for people: printable, without what may be a password."""
    words = " ".join(without_credentials(word) for word in line.split())
    text = printable(words, limit_chars=200, newlines=False)
    return shlex.quote(text) if has_hidden(line) else text


def _shown_path(path: Path, root: Path | None) -> str:
    try:
        text = str(path) if root is None else os.path.relpath(path, root)
    except ValueError:
        text = str(path)
    return printable(text, limit_chars=200, newlines=False)
