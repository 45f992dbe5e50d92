"""What a repo's project files ask for: ``pyproject.toml``, ``setup.cfg``, ``environment.yml``, read as text.

1. Nothing is built or run: what a project computes when it is built (``dynamic``, ``setup.py``) is a remark.
2. Of ``environment.yml`` the list below ``pip:`` counts. conda's packages are a remark: an index has no such thing.
3. Poetry's table is read where there is no other: its ``^`` and ``~`` become the ranges that they mean.

Side: caller. Trust: a repo's text.
Source: PEP 621, PEP 508; setuptools' "Declarative Config"; Poetry's "Dependency specification"; conda's
environment files.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from isohub.environments.declared import Declared, Unusable, read_text
from isohub.environments.dependencies import is_excessive, is_package_name, parsed_requirement
from isohub.environments.requirements_file import read_lines, read_requirements_file
from isohub.errors import EnvironmentBuildError, printable

__all__ = ["read_environment_yml", "read_pyproject", "read_setup_cfg"]

# A key of 20,000 dotted parts keeps a TOML parser busy for seconds (`isohub.repos.lock_format`).
_MOST_DOTS = 1_000
_LINE_CHARS = 8_000
_DYNAMIC_HINT = "is computed when the project is built; it is not run"
_VERSION = re.compile(r"\d+(?:\.\d+){0,3}(?:\.?(?:a|b|rc|post|dev)\d+)?")


def read_pyproject(root: Path, extras: Sequence[str]) -> Declared | None:
    """Dependencies of ``[project]``, else of Poetry's table; None if the file is not there or declares none.

    Args:
        root: The checkout.
        extras: Optional parts that are wanted.

    Raises:
        EnvironmentBuildError: It cannot be read.
    """
    text = read_text(root / "pyproject.toml", root)
    if text is None:
        return None
    document = _toml(text)
    project, tool = _table(document, "project"), _table(document, "tool")
    poetry = _table(tool, "poetry")
    declared = Declared()
    if "dependencies" in project or "dependencies" in _list(project, "dynamic") or "optional-dependencies" in project:
        _requires_python(project.get("requires-python"), declared)
        _add(_list(project, "dependencies"), "pyproject.toml", declared)
        if "dependencies" in _list(project, "dynamic"):
            _dynamic(root, _table(_table(_table(tool, "setuptools"), "dynamic"), "dependencies"), declared)
        optional = _table(project, "optional-dependencies")
        for extra in extras:
            _add(_list(optional, _key(optional, extra)), f"pyproject.toml [{extra}]", declared)
        _say_unknown(extras, optional, "pyproject.toml", declared)
        return declared
    if "dependencies" in poetry:
        _poetry(poetry, extras, declared)
        return declared
    return None


def read_setup_cfg(root: Path, extras: Sequence[str]) -> Declared | None:
    """``install_requires`` and wanted extras; None if the file is not there or declares none."""
    text = read_text(root / "setup.cfg", root)
    if text is None:
        return None
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise EnvironmentBuildError(f"setup.cfg cannot be read: {_said(error)}") from error
    if not parser.has_option("options", "install_requires"):
        return None
    declared = Declared()
    _requires_python(parser.get("options", "python_requires", fallback=None), declared)
    _add_text(parser.get("options", "install_requires"), root, "setup.cfg", declared)
    optional = dict(parser.items("options.extras_require")) if parser.has_section("options.extras_require") else {}
    for extra in extras:
        _add_text(optional.get(_key(optional, extra), ""), root, f"setup.cfg [{extra}]", declared)
    _say_unknown(extras, optional, "setup.cfg", declared)
    return declared


def read_environment_yml(root: Path) -> Declared | None:
    """The list below ``pip:``; None if there is no such file."""
    for name in ("environment.yml", "environment.yaml"):
        text = read_text(root / name, root)
        if text is not None:
            break
    else:
        return None
    lines, conda = _pip_part(text)
    declared, _ = read_lines("\n".join(lines), name, root, root)
    if conda:
        shown = ", ".join(printable(each, limit_chars=60, newlines=False) for each in conda[:10])
        more = f" and {len(conda) - 10} more" if len(conda) > 10 else ""
        declared.remarks.append(f"{name}: conda's packages are not installed: {shown}{more}")
    return declared


def _toml(text: str) -> dict[str, Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > _MOST_DOTS or len(line) > _LINE_CHARS:
            raise EnvironmentBuildError(f"pyproject.toml:{number} is longer than any line of a project needs to be")
    try:
        return msgspec.toml.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError) as error:  # msgspec's and the TOML parsers' errors are ValueErrors
        raise EnvironmentBuildError(f"pyproject.toml cannot be read: {_said(error)}") from error


def _said(error: BaseException) -> str:
    return printable(str(error), limit_chars=300, newlines=False)


def _table(document: Any, name: str) -> dict[str, Any]:
    found = document.get(name) if isinstance(document, dict) else None
    return found if isinstance(found, dict) else {}


def _list(table: Mapping[str, Any], name: str) -> list[str]:
    found = table.get(name)
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def _key(table: Mapping[str, Any], extra: str) -> str:
    """An extra's name as the file has it: they are compared as packages' names are."""
    wanted = re.sub(r"[-_.]+", "-", extra).lower()
    return next((name for name in table if re.sub(r"[-_.]+", "-", name).lower() == wanted), extra)


def _say_unknown(extras: Sequence[str], optional: Mapping[str, Any], file: str, declared: Declared) -> None:
    for extra in extras:
        if _key(optional, extra) not in optional:
            known = ", ".join(printable(name, limit_chars=60, newlines=False) for name in list(optional)[:10]) or "none"
            declared.remarks.append(f"{file} has no extra {extra}; it has {known}")


def _requires_python(value: Any, declared: Declared) -> None:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    if isinstance(value, str):
        try:
            if is_excessive(value):
                raise InvalidSpecifier
            declared.requires_python = str(SpecifierSet(value))
        except InvalidSpecifier:
            declared.remarks.append(
                f"requires-python is no version: {printable(value, limit_chars=80, newlines=False)}"
            )


def _add(items: Sequence[str], where: str, declared: Declared) -> None:
    for item in items:
        shown = printable(item, limit_chars=200, newlines=False)
        requirement = parsed_requirement(item)
        if requirement is None:
            declared.unusable.append(Unusable(shown, where, "no requirement"))
            continue
        declared.ask(requirement, where)


def _add_text(text: str, root: Path, where: str, declared: Declared) -> None:
    """A value of setup.cfg: requirements, or ``file:`` and names of files."""
    stripped = text.strip()
    if stripped.startswith("file:"):
        for name in stripped.removeprefix("file:").split(","):
            _include(root, name.strip(), declared)
        return
    # As setuptools has it: a line each, or all in one line with semicolons between them.
    lines = _unfolded(stripped).splitlines() if "\n" in stripped else stripped.split(";")
    _add([line.strip() for line in lines if line.strip()], where, declared)


def _unfolded(text: str) -> str:
    return "\n".join(line.partition(" #")[0] for line in text.splitlines() if not line.strip().startswith("#"))


def _dynamic(root: Path, table: Mapping[str, Any], declared: Declared) -> None:
    """Setuptools' ``dynamic.dependencies = {file = [...]}``; whatever else computes them is a remark."""
    files = table.get("file")
    names = [files] if isinstance(files, str) else _list(table, "file")
    if not names:
        declared.remarks.append(f"pyproject.toml: the list of dependencies {_DYNAMIC_HINT}")
    for name in names[:5]:
        _include(root, name, declared)


def _include(root: Path, name: str, declared: Declared) -> None:
    found, _ = read_requirements_file(root / name, root)
    declared.extend(found)


def _poetry(poetry: Mapping[str, Any], extras: Sequence[str], declared: Declared) -> None:
    chosen = {name for extra in extras for name in _list(_table(poetry, "extras"), extra)}
    for name, value in _table(poetry, "dependencies").items():
        options = value if isinstance(value, dict) else {"version": value}
        if name.lower() == "python":
            _poetry_python(options.get("version"), declared)
            continue
        if options.get("optional") is True and name not in chosen:
            continue
        where = "pyproject.toml (poetry)"
        known = name if is_package_name(name) else None
        shown = printable(name, limit_chars=100, newlines=False)
        if any(key in options for key in ("git", "url", "path", "file")):
            declared.unusable.append(Unusable(shown, where, "an address", known))
            continue
        version = options.get("version", "*")
        specifier = _poetry_specifier(version) if isinstance(version, str) else None
        if specifier is None:
            text = printable(str(version), limit_chars=80, newlines=False)
            declared.unusable.append(Unusable(f"{shown} {text}", where, "no version that is understood", known))
            continue
        marker = options.get("markers")
        wanted = f"[{','.join(_list(options, 'extras'))}]" if _list(options, "extras") else ""
        _add([f"{name}{wanted}{specifier}" + (f"; {marker}" if isinstance(marker, str) else "")], where, declared)


def _poetry_python(version: Any, declared: Declared) -> None:
    specifier = _poetry_specifier(version) if isinstance(version, str) else None
    if specifier is not None:
        _requires_python(specifier, declared)


def _poetry_specifier(text: str) -> str | None:
    """PEP 440's words for Poetry's; None if they are not understood."""
    if is_excessive(text):
        return None
    parts = [part.strip() for part in text.split(",")]
    found = [_poetry_part(part) for part in parts]
    return None if None in found else ",".join(part for part in found if part)


def _poetry_part(part: str) -> str | None:
    if part in ("*", ""):
        return ""
    if part[0] in "<>=!" or part.startswith("~="):
        return part
    if part[0] in "^~":
        version = part[1:].strip()
        if not _VERSION.fullmatch(version):
            return None
        numbers = [int(number) for number in re.findall(r"\d+", version.split("a")[0].split("b")[0].split("rc")[0])][:3]
        return f">={version},<{_after(numbers, caret=part[0] == '^')}"
    return f"=={part}" if re.fullmatch(rf"{_VERSION.pattern}(?:\.\*)?", part) else None


def _after(numbers: list[int], *, caret: bool) -> str:
    """The first version that a caret or a tilde no longer means."""
    if caret:
        place = next((index for index, number in enumerate(numbers) if number), len(numbers) - 1)
    else:
        place = min(1, len(numbers) - 1)
    return ".".join(map(str, [*numbers[:place], numbers[place] + 1]))


def _pip_part(text: str) -> tuple[list[str], list[str]]:
    """Items below ``dependencies: - pip:``, and conda's own, of YAML in its block form."""
    pip: list[str] = []
    conda: list[str] = []
    inside, depth = False, -1
    for raw in text.splitlines():
        line = re.sub(r"(?:^|\s)#.*$", "", raw).rstrip()
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        item = line.strip()
        if not item.startswith("- ") and indent == 0:
            inside, depth = item.startswith("dependencies:"), -1
            continue
        if not inside or not item.startswith("-"):
            continue
        value = item[1:].strip().strip("\"'")
        if depth >= 0 and indent > depth:
            pip.append(value)
            continue
        depth = indent if value.rstrip() == "pip:" else -1
        if depth < 0:
            conda.append(value)
    return pip, conda
