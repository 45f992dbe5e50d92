"""What a ``hubconf.py`` says about itself, read with `ast`: nothing of it is run.

It reads one file of a checkout and gives the entrypoints, their signatures and docstrings, and the
declared dependencies, as far as the text alone tells them. It does not import, evaluate or follow
anything: what a name that was imported really is, or what a call returns, only running can tell, and
that is a worker's work.

Every string in an `Outline` is text that the repo controls, stored as it was written. Whoever
prints one passes it through `isohub.errors.printable` first.

Runs in the caller.
"""

from __future__ import annotations

import ast
import codecs
import functools
import io
import os
import stat
import threading
import tokenize
import warnings
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from isohub.errors import HubconfError, HubconfNotFoundError, printable

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Entrypoint", "Outline", "read_outline"]

_NAME = "hubconf.py"

# A hubconf is a page or two of text. Parsing takes up to 900 bytes for each byte of the most
# hostile source (measured: 1 MiB of "a;" took 931 MB and 5 s), so this bounds what a repo can make us use.
_LIMIT_BYTES = 256 << 10
# A signature is for people to read; a repo could put a megabyte of default values there.
_LIMIT_SIGNATURE_CHARS = 2_000

# Python has codecs that are quadratic (punycode) or no text encodings at all; sources use these.
_ENCODINGS = frozenset({"utf-8", "utf-8-sig", "ascii", "iso8859-1", "iso8859-15", "cp1252"})

# `warnings.catch_warnings` swaps process-wide state, so two readers must not interleave.
_WARNINGS_LOCK = threading.Lock()

Kind = Literal["function", "class", "import", "alias"]


@dataclass(frozen=True)
class Entrypoint:
    """A public name of hubconf that can be called, as far as can be read.

    Attributes:
        name: Its name. Trust: repo.
        signature: Parameters as written, such as ``(width=8, *, depth: int = 2)``; None if unknown.
            Trust: repo.
        doc: Docstring, indentation cleaned; None if there is none. Trust: repo; print it through
            `printable`.
        line: Line of the definition, from 1.
        kind: How it comes to be: a definition, a class, an import, or another name for something.
            What an import or a dotted alias names may turn out not to be callable.
    """

    name: str
    signature: str | None
    doc: str | None
    line: int
    kind: Kind


@dataclass(frozen=True)
class Outline:
    """A hubconf, read and not run.

    Attributes:
        entrypoints: Public callables in the order of their lines.
        dependencies: The entries of ``dependencies`` that are certain to be there. Trust: repo.
        dependencies_unreadable: There may be more of them, since some are computed or conditional.
        doc: The module's docstring. Trust: repo; print it through `printable`.
        star_imports: Modules of ``from m import *``: each may bring further entrypoints.
        undecided: Public names assigned from an expression, such as a call, whose value may or may
            not be callable.
    """

    entrypoints: tuple[Entrypoint, ...]
    dependencies: tuple[str, ...]
    dependencies_unreadable: bool
    doc: str | None
    star_imports: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and strings, for JSON. The strings are still the repo's."""
        plain = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def read_outline(path: Path) -> Outline:
    """Reads ``hubconf.py`` in a checkout without running it.

    Args:
        path: The checkout's directory. Trust: the caller chose the directory, the repo wrote what
            is in it.

    Raises:
        HubconfNotFoundError: There is no ``hubconf.py``; the message says what is there.
        HubconfError: It is too large, no regular file, leads out of the directory, cannot be
            decoded, or is no Python that this interpreter can parse; the message names the line.
    """
    source = _decode(_read(path), path)
    try:
        return _outline_of(source)
    except SyntaxError as error:
        where = f" at line {error.lineno}" if error.lineno else ""
        raise _unusable(path, f"is no valid Python{where}: {error.msg}") from error
    except ValueError as error:  # a null byte, before Python 3.12
        raise _unusable(path, f"is no valid Python: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise _unusable(path, "is nested too deeply to be read") from error


@functools.lru_cache(maxsize=16)  # each load of a repo reads it again, and most find what was there before
def _outline_of(source: str) -> Outline:
    with _WARNINGS_LOCK, warnings.catch_warnings():
        # An invalid escape in a repo's string is no warning of the caller's; under `-W error`
        # it would even become a syntax error.
        warnings.simplefilter("ignore")
        module = ast.parse(source, filename=_NAME)
    reader = _Reader()
    reader.read_block(module.body, certain=True)
    return reader.outline(module)


def _unusable(path: Path, why: str) -> HubconfError:
    return HubconfError(f"{path / _NAME} {printable(why, limit_chars=500, newlines=False)}")


def _not_found(path: Path, error: OSError) -> NoReturn:
    try:
        names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(path))
    except OSError:
        raise HubconfNotFoundError(f"{path} is no directory that can be read, so it has no {_NAME}") from error
    shown = ", ".join(printable(name, limit_chars=80, newlines=False) for name in names[:20]) or "nothing"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    inner = [name for name in names if name.endswith("/") and (path / name / _NAME).is_file()]
    hint = f"there is a {_NAME} in {', '.join(map(printable, inner[:5]))}" if inner else None
    raise HubconfNotFoundError(f"no {_NAME} in {path}; it has {shown}{more}", hint=hint) from error


def _read(path: Path) -> bytes:
    file = path / _NAME
    root = os.path.realpath(path)
    real = os.path.realpath(file)
    if os.path.commonpath([root, real]) != root:
        raise _unusable(path, "is a symbolic link that leads out of the checkout")
    try:
        # NONBLOCK: opening a FIFO would wait for its writer for ever. NOFOLLOW: `real` is resolved.
        descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError) as error:
        _not_found(path, error)
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _unusable(path, "is no regular file")
    with os.fdopen(descriptor, "rb") as stream:
        content = stream.read(_LIMIT_BYTES + 1)
    if len(content) > _LIMIT_BYTES:
        raise _unusable(path, f"is larger than {_LIMIT_BYTES} bytes, which no hubconf needs to be")
    return content


def _decode(content: bytes, path: Path) -> str:
    """Source: PEP 263 and PEP 3120 (the cookie in the first two lines; UTF-8 without one)."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    except SyntaxError as error:
        raise _unusable(path, f"cannot be decoded: {error.msg}") from error
    encoding = codecs.lookup(encoding).name
    if encoding not in _ENCODINGS:
        raise _unusable(path, f"declares the encoding {encoding!r}; expected one of {', '.join(sorted(_ENCODINGS))}")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _unusable(path, f"cannot be decoded as {encoding} at line {line}: {error.reason}") from error


@dataclass(frozen=True)
class _Strings:
    """A string, or a list of strings, that was worked out from literals."""

    items: tuple[str, ...]
    complete: bool  # False: there may be more items, which cannot be read
    lone: bool  # one string and not a list: `+` joins it

    def with_more(self, other: _Strings | None) -> _Strings:
        if other is None:
            return replace(self, complete=False)
        if self.lone or other.lone:
            return _Strings(("".join(self.items + other.items),), self.complete and other.complete, lone=True)
        return _Strings(self.items + other.items, self.complete and other.complete, lone=False)


_UNREADABLE = _Strings((), complete=False, lone=False)

_Binding = Entrypoint | Literal["undecided"] | None
_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class _Reader:
    """Follows module-level bindings in the order of the text.

    1. A binding that surely happens replaces what the name was before.
    2. A binding in an `if`, `try` or loop may not happen: it adds a callable, and removes none.
    3. Nothing is known of `dependencies` but what literals say. What may change it otherwise makes
       it incomplete, and never shorter than what is certain.
    """

    def __init__(self) -> None:
        # Private names are followed too: `model = _model` makes a public name of one.
        self.names: dict[str, _Binding] = {}
        self.strings: dict[str, _Strings] = {}
        self.star_imports: list[str] = []

    def outline(self, module: ast.Module) -> Outline:
        public = {
            name: value for name, value in self.names.items() if not name.startswith("_") and name != "dependencies"
        }
        found = sorted((value for value in public.values() if isinstance(value, Entrypoint)), key=lambda e: e.line)
        dependencies = self.strings.get("dependencies", _Strings((), complete=True, lone=False))
        return Outline(
            entrypoints=tuple(found),
            dependencies=tuple(dict.fromkeys(dependencies.items)),
            dependencies_unreadable=not dependencies.complete,
            doc=ast.get_docstring(module),
            star_imports=tuple(dict.fromkeys(self.star_imports)),
            undecided=tuple(name for name, value in public.items() if value == "undecided"),
        )

    def read_block(self, block: list[ast.stmt], *, certain: bool) -> None:
        for statement in block:
            self._read_statement(statement, certain=certain)

    def _read_statement(self, node: ast.stmt, *, certain: bool) -> None:
        if isinstance(node, _Function):
            self._bind(node.name, Entrypoint(node.name, _signature(node), ast.get_docstring(node), node.lineno,
                                             "function"), certain=certain)  # fmt: skip
        elif isinstance(node, ast.ClassDef):
            self._bind(node.name, _of_class(node), certain=certain)
        elif isinstance(node, ast.ImportFrom):
            self._read_import_from(node, certain=certain)
        elif isinstance(node, ast.Import):
            for alias in node.names:  # a module is not callable
                self._bind(alias.asname or alias.name.split(".")[0], None, certain=certain)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value, certain=certain)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self._assign(node.target, node.value, certain=certain)
        elif isinstance(node, ast.AugAssign):
            self._augment(node, certain=certain)
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self._bind(target.id, None, certain=certain)
                else:
                    self._doubt_mentioned(target)
        elif isinstance(node, ast.Expr):
            self._read_call(node.value, certain=certain)
        elif isinstance(node, ast.If):
            self._read_if(node, certain=certain)
        else:
            self._read_compound(node, certain=certain)

    def _read_if(self, node: ast.If, *, certain: bool) -> None:
        self._doubt_mentioned(node.test)
        if not _is_false_when_imported(node.test):
            self.read_block(node.body, certain=False)
            certain = False
        self.read_block(node.orelse, certain=certain)

    def _read_compound(self, node: ast.stmt, *, certain: bool) -> None:
        # By field and not by class: `try*` and `match` do not exist on every Python we run on. The
        # body of a `with` happens; bodies of loops, `try` and `match` may not.
        certain = certain and isinstance(node, (ast.With, ast.AsyncWith))
        for field, value in ast.iter_fields(node):
            if field in {"body", "orelse", "finalbody"}:
                self.read_block(value, certain=certain)
            elif field in {"handlers", "cases"}:
                for part in value:
                    self.read_block(part.body, certain=False)
            else:
                for part in value if isinstance(value, list) else [value]:
                    if isinstance(part, ast.AST):
                        self._doubt_mentioned(part)

    def _read_import_from(self, node: ast.ImportFrom, *, certain: bool) -> None:
        module = "." * node.level + (node.module or "")
        for alias in node.names:
            if alias.name == "*":
                self.star_imports.append(module)
                continue
            name = alias.asname or alias.name
            self._bind(name, Entrypoint(name, None, None, node.lineno, "import"), certain=certain)

    def _bind(self, name: str, value: _Binding, *, certain: bool, strings: _Strings | None = None) -> None:
        if certain or value is not None:
            self.names[name] = value
        if not certain:
            # Either this value or the earlier one: only what surely was there before is certain, and
            # even that may have been replaced.
            if name in self.strings or strings is not None or name == "dependencies":
                self.strings[name] = _UNREADABLE
        elif strings is not None:
            self.strings[name] = strings
        else:
            self.strings.pop(name, None)
            if name == "dependencies" and value is not None:
                self.strings[name] = _UNREADABLE

    def _assign(self, target: ast.expr, value: ast.expr, *, certain: bool) -> None:
        if isinstance(target, ast.Name):
            strings = self._evaluate(value)
            if strings is None and target.id == "dependencies":
                strings = _UNREADABLE
            self._bind(target.id, self._callable(target.id, value, target.lineno), certain=certain, strings=strings)
        elif isinstance(target, (ast.Tuple, ast.List)):
            values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else []
            paired = len(values) == len(target.elts) and not any(
                isinstance(part, ast.Starred) for part in [*values, *target.elts]
            )
            for index, part in enumerate(target.elts):
                if paired:
                    self._assign(part, values[index], certain=certain)
                elif isinstance(part, ast.Name):
                    self._bind(part.id, "undecided", certain=certain)
        else:
            self._doubt_mentioned(target)  # `dependencies[0] = ...`

    def _augment(self, node: ast.AugAssign, *, certain: bool) -> None:
        if not isinstance(node.target, ast.Name):
            self._doubt_mentioned(node.target)
        elif node.target.id in self.strings:
            added = self._evaluate(node.value) if isinstance(node.op, ast.Add) else None
            self._extend(node.target.id, added, certain=certain)

    def _read_call(self, node: ast.expr, *, certain: bool) -> None:
        """``name.append("literal")`` and ``name.extend(["literal"])``; all else that mentions a list is doubt."""
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in self.strings
            and node.func.attr in {"append", "extend", "add", "update"}
            and len(node.args) == 1
            and not node.keywords
        ):
            added = self._evaluate(node.args[0])
            if added is not None:
                one = node.func.attr in {"append", "add"}
                # `append(["a"])` puts a list in the list, `extend("ab")` puts letters: neither is a name.
                added = replace(added, lone=False) if one == added.lone else None
            self._extend(node.func.value.id, added, certain=certain)
        else:
            self._doubt_mentioned(node)

    def _extend(self, name: str, added: _Strings | None, *, certain: bool) -> None:
        self.strings[name] = self.strings[name].with_more(added if certain else None)

    def _doubt_mentioned(self, node: ast.AST) -> None:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id in self.strings:
                self.strings[part.id] = replace(self.strings[part.id], complete=False)

    def _evaluate(self, node: ast.expr) -> _Strings | None:
        """Strings that an expression of literals stands for; None if it is something else."""
        if isinstance(node, ast.Constant):
            return _Strings((node.value,), complete=True, lone=True) if isinstance(node.value, str) else None
        if isinstance(node, ast.Name):
            return self.strings.get(node.id)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._evaluate(node.left), self._evaluate(node.right)
            if left is None or right is None:
                known = left or right
                return None if known is None else known.with_more(None)
            return left.with_more(right)
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return self._evaluate_items(node.elts)
        return None

    def _evaluate_items(self, elements: list[ast.expr]) -> _Strings:
        found: list[str] = []
        complete = True
        for element in elements:
            starred = isinstance(element, ast.Starred)
            item = self._evaluate(element.value if isinstance(element, ast.Starred) else element)
            if item is None or item.lone == starred:
                complete = False
            else:
                found.extend(item.items)
                complete = complete and item.complete
        return _Strings(tuple(found), complete, lone=False)

    def _callable(self, name: str, value: ast.expr, line: int) -> _Binding:
        if isinstance(value, ast.Lambda):
            return Entrypoint(name, _arguments(value.args), None, line, "alias")
        if isinstance(value, ast.Name):
            known = self.names.get(value.id)
            if isinstance(known, Entrypoint):
                return Entrypoint(name, known.signature, known.doc, line, "alias")
            return known
        if isinstance(value, ast.Attribute):
            # `version = package.__version__` is data; of the rest only running can tell.
            return None if value.attr.startswith("__") else Entrypoint(name, None, None, line, "alias")
        if isinstance(value, ast.Call):
            function = value.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
            return Entrypoint(name, None, None, line, "alias") if called == "partial" else "undecided"
        literals = (ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.ListComp, ast.SetComp,
                    ast.DictComp, ast.GeneratorExp, ast.Compare)  # fmt: skip
        return None if isinstance(value, literals) else "undecided"


def _is_false_when_imported(test: ast.expr) -> bool:
    """``if TYPE_CHECKING:`` and ``if __name__ == "__main__":`` never hold when hubconf is imported."""
    if isinstance(test, ast.Compare):
        return isinstance(test.left, ast.Name) and test.left.id == "__name__" and isinstance(test.ops[0], ast.Eq)
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _of_class(node: ast.ClassDef) -> Entrypoint:
    init = next((part for part in node.body if isinstance(part, _Function) and part.name == "__init__"), None)
    signature = None if init is None else _arguments(init.args, skip_first=True)
    return Entrypoint(node.name, signature, ast.get_docstring(node), node.lineno, "class")


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return _shortened(_arguments(node.args) + returns)


def _arguments(arguments: ast.arguments, *, skip_first: bool = False) -> str:
    if skip_first and (arguments.posonlyargs or arguments.args):
        # Defaults belong to the last parameters, so dropping the first one leaves them in place.
        positional, plain = list(arguments.posonlyargs), list(arguments.args)
        (positional or plain).pop(0)
        kept = len(positional) + len(plain)
        arguments = ast.arguments(
            posonlyargs=positional,
            args=plain,
            vararg=arguments.vararg,
            kwonlyargs=arguments.kwonlyargs,
            kw_defaults=arguments.kw_defaults,
            kwarg=arguments.kwarg,
            defaults=arguments.defaults[max(0, len(arguments.defaults) - kept) :],
        )
    return _shortened(f"({ast.unparse(arguments)})")


def _shortened(signature: str) -> str:
    if len(signature) <= _LIMIT_SIGNATURE_CHARS:
        return signature
    return signature[:_LIMIT_SIGNATURE_CHARS] + " ..."
