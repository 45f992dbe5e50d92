"""Every exception of isohub, in one tree.

    IsohubError                       .hint, structured fields, picklable
    ├ InvalidReferenceError           (ValueError)  what was written is no reference
    ├ FetchError
    │  ├ SourceUnavailableError       the network, the server or the disk did not answer
    │  ├ RefNotFoundError             (also ValueError, as torch.hub raises)  no such branch, tag or commit
    │  ├ IntegrityError               (also RuntimeError, as torch.hub raises)  not what was asked for
    │  └ OfflineError                 not in the cache, and the network may not be used
    ├ TrustError
    │  ├ UntrustedRepoError
    │  └ LockMismatchError            .what, .expected, .got
    ├ EnvironmentBuildError           .command, .stderr_tail
    │  └ MissingDependenciesError     .missing
    ├ HubconfError                    (RuntimeError, as torch.hub raises)  the repo has no usable hubconf
    │  ├ HubconfNotFoundError         (also FileNotFoundError)
    │  └ EntrypointNotFoundError      .entrypoint, .near
    ├ SandboxError
    │  ├ PolicyError
    │  └ ConfinementError             .missing
    ├ WorkerError                     .reference, .commit, .phase
    │  ├ WorkerStartError
    │  ├ WorkerDiedError              .signal_name, .exit_code, .stderr_tail
    │  │  └ WorkerLimitError          .limit, .allowed, .used: it passed a limit of its sandbox
    │  ├ WorkerTimeoutError           (also TimeoutError)
    │  ├ RemoteError                  the repo's code raised; also the builtin exception it names
    │  └ ValueNotTransferableError    (also TypeError)  a value of the caller's that cannot cross
    ├ ProtocolError                   the worker sent something that the wire does not allow
    ├ MissingExtraError               (ImportError)  .extra: a part of isohub that was not installed with it
    ├ SaveError                       (OSError)  .path: a state or a report could not be written to a file
    ├ ResultsError                    .path: a file of results or a log that cannot be used
    ├ BisectionError                  (also ValueError)  the first bad commit cannot be looked for
    └ SessionClosedError              (also RuntimeError)

A message says what, where, what was found and what was expected; `hint:` gives the command
that helps. Text that a repo controls passes through `printable` before it is put in a message.

Runs on both sides of the wire and on every Python from 3.8, with the standard library alone.
"""

from __future__ import annotations

import builtins
import unicodedata
from typing import Any, ClassVar, Dict, List, Mapping, Optional, Sequence, Tuple, Type

__all__ = [
    "BisectionError",
    "ConfinementError",
    "EntrypointNotFoundError",
    "EnvironmentBuildError",
    "FetchError",
    "HubconfError",
    "HubconfNotFoundError",
    "IntegrityError",
    "InvalidReferenceError",
    "IsohubError",
    "LockMismatchError",
    "MissingDependenciesError",
    "MissingExtraError",
    "OfflineError",
    "PolicyError",
    "ProtocolError",
    "RefNotFoundError",
    "RemoteError",
    "ResultsError",
    "SandboxError",
    "SaveError",
    "SessionClosedError",
    "SourceUnavailableError",
    "TrustError",
    "UntrustedRepoError",
    "ValueNotTransferableError",
    "WorkerDiedError",
    "WorkerError",
    "WorkerLimitError",
    "WorkerStartError",
    "WorkerTimeoutError",
    "printable",
]

# Cc: C0 and C1 controls (terminal escapes). Cf: bidirectional overrides and other invisible
# characters that make a line read as something else (CVE-2021-42574). Cs: lone surrogates,
# which no UTF-8 stream can write. Zl, Zp: line breaks that only some viewers see.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str, *, limit_chars: int = 20_000, newlines: bool = True) -> str:
    r"""Text of a repo's, made safe to show on a terminal or in a log.

    Args:
        text: Any string. Trust: the worker or the network controls it.
        limit_chars: Longer text is cut in its middle, and the cut is marked.
        newlines: Whether line feeds and tabs stay as they are.

    Returns:
        The text with every control, bidirectional, invisible and surrogate character written
        as an escape such as ``\x1b``.
    """
    if len(text) > limit_chars:
        half = limit_chars // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters cut ...] {text[-half:]}"
    if text.isascii() and text.isprintable():
        return text
    kept = "\n\t" if newlines else ""
    return "".join(
        char
        if char in kept or unicodedata.category(char) not in _HIDDEN_CATEGORIES
        else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )


def _rebuild(cls: Type[IsohubError], message: str, hint: Optional[str], fields: Dict[str, Any]) -> IsohubError:
    return cls(message, hint=hint, **fields)


class IsohubError(Exception):
    """Root of all errors that isohub raises on purpose.

    Attributes:
        message: What happened, where, what was found and what was expected.
        hint: What to run or change, or None.
    """

    #: Names of the structured fields that a class adds; each is an attribute, None unless given.
    field_names: ClassVar[Tuple[str, ...]] = ()

    message: str
    hint: Optional[str]

    def __init__(self, message: str, *, hint: Optional[str] = None, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        known = self._known_fields()
        unknown = set(fields) - set(known)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no fields {sorted(unknown)}; it has {sorted(known)}")
        for name in known:
            setattr(self, name, fields.get(name))

    @classmethod
    def _known_fields(cls) -> List[str]:
        return [name for base in cls.__mro__ for name in vars(base).get("field_names", ())]

    @property
    def fields(self) -> Mapping[str, Any]:
        """The structured fields by name."""
        return {name: getattr(self, name) for name in self._known_fields()}

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> Tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.hint, dict(self.fields))


class InvalidReferenceError(IsohubError, ValueError):
    """What was written is no reference. `reference` is the text, `part` the part at fault."""

    field_names: ClassVar[Tuple[str, ...]] = ("reference", "part")
    reference: Optional[str]
    part: Optional[str]


class FetchError(IsohubError):
    """Code or weights could not be brought here."""

    field_names: ClassVar[Tuple[str, ...]] = ("reference", "url")
    reference: Optional[str]
    url: Optional[str]


class SourceUnavailableError(FetchError):
    """The server, the network or the disk did not do its part.

    `status` is the HTTP status, if any. `passing` is True where the same question may be answered later: no
    connection, a timeout, a limit on the rate, a server in trouble.
    """

    field_names: ClassVar[Tuple[str, ...]] = ("status", "passing")
    status: Optional[int]
    passing: Optional[bool]


class RefNotFoundError(FetchError, ValueError):
    """The repository exists and has no such ref. `near` are the nearest names it has."""

    field_names: ClassVar[Tuple[str, ...]] = ("ref", "near")
    ref: Optional[str]
    near: Optional[Sequence[str]]


class IntegrityError(FetchError, RuntimeError):
    """What arrived is not what was asked for, or an archive asks for what no archive may."""

    field_names: ClassVar[Tuple[str, ...]] = ("expected", "got")
    expected: Optional[str]
    got: Optional[str]


class OfflineError(FetchError):
    """It is not in the cache, and the network may not be used."""


class TrustError(IsohubError):
    """Something would hand a repo the caller's own powers, and nobody allowed that."""

    field_names: ClassVar[Tuple[str, ...]] = ("repo",)
    repo: Optional[str]


class UntrustedRepoError(TrustError):
    """The repo is not on the trusted list."""


class LockMismatchError(TrustError):
    """What was loaded is not what the lockfile names.

    Attributes:
        reference: As the lockfile has it.
        what: ``commit``, ``tree``, ``weights``, ``environment``, or ``reference`` for one that is not locked at all.
        expected: What is locked, if anything.
        got: What was found.
        lockfile: Path of the lockfile.
    """

    field_names: ClassVar[Tuple[str, ...]] = ("reference", "what", "expected", "got", "lockfile")
    reference: Optional[str]
    what: Optional[str]
    expected: Optional[str]
    got: Optional[str]
    lockfile: Optional[str]


class EnvironmentBuildError(IsohubError):
    """The interpreter or the packages that a repo needs are not there."""

    field_names: ClassVar[Tuple[str, ...]] = ("command", "stderr_tail")
    command: Optional[str]
    stderr_tail: Optional[str]


class MissingDependenciesError(EnvironmentBuildError):
    """Packages that hubconf declares are not installed. `missing` names all of them."""

    field_names: ClassVar[Tuple[str, ...]] = ("missing",)
    missing: Optional[Sequence[str]]


class HubconfError(IsohubError, RuntimeError):
    """The repo has no hubconf that can be used."""

    field_names: ClassVar[Tuple[str, ...]] = ("reference", "commit")
    reference: Optional[str]
    commit: Optional[str]


class HubconfNotFoundError(HubconfError, FileNotFoundError):
    """The checkout has no ``hubconf.py`` at its top."""


class EntrypointNotFoundError(HubconfError):
    """hubconf has no such callable. `near` are the nearest names it has."""

    field_names: ClassVar[Tuple[str, ...]] = ("entrypoint", "near")
    entrypoint: Optional[str]
    near: Optional[Sequence[str]]


class SandboxError(IsohubError):
    """Confinement was asked for that cannot be had."""


class PolicyError(SandboxError):
    """The policy itself makes no sense."""


class ConfinementError(SandboxError):
    """A layer that was asked for cannot be applied here. `missing` names the layers."""

    field_names: ClassVar[Tuple[str, ...]] = ("missing",)
    missing: Optional[Sequence[str]]


class WorkerError(IsohubError):
    """Something went wrong in a worker. `phase` says what it was doing."""

    field_names: ClassVar[Tuple[str, ...]] = ("reference", "commit", "phase")
    reference: Optional[str]
    commit: Optional[str]
    phase: Optional[str]


class WorkerStartError(WorkerError):
    """A zygote or a worker could not be started."""

    field_names: ClassVar[Tuple[str, ...]] = ("stderr_tail",)
    stderr_tail: Optional[str]


class WorkerDiedError(WorkerError):
    """A worker's process ended. `signal_name` such as ``SIGSEGV``, or `exit_code`."""

    field_names: ClassVar[Tuple[str, ...]] = ("pid", "signal_name", "exit_code", "stderr_tail")
    pid: Optional[int]
    signal_name: Optional[str]
    exit_code: Optional[int]
    stderr_tail: Optional[str]


class WorkerLimitError(WorkerDiedError):
    """A worker was killed for passing a limit of its sandbox; `limit` is the field of `isohub.Sandbox`."""

    field_names: ClassVar[Tuple[str, ...]] = ("limit", "allowed", "used")
    limit: Optional[str]
    allowed: Optional[float]
    used: Optional[float]


class WorkerTimeoutError(WorkerError, TimeoutError):
    """A request took longer than `timeout_s`; its worker was killed."""

    field_names: ClassVar[Tuple[str, ...]] = ("timeout_s", "stderr_tail")
    timeout_s: Optional[float]
    stderr_tail: Optional[str]


class ValueNotTransferableError(WorkerError, TypeError):
    """An argument that cannot be sent to a worker. `where` is its place, such as ``args[0]``."""

    field_names: ClassVar[Tuple[str, ...]] = ("where",)
    where: Optional[str]


class RemoteError(WorkerError):
    """The repo's own code raised an exception in its worker.

    The object raised in the caller is also an instance of the builtin exception that the
    remote one is or derives from, so ``except KeyError`` works as it does in one process.
    No class is imported and no remote object is rebuilt: everything here is text.

    Attributes:
        remote_type: Qualified name of the remote class, text only.
        remote_message: ``str()`` of the remote exception, control characters escaped.
        remote_traceback: The remote traceback as text, control characters escaped.
    """

    field_names: ClassVar[Tuple[str, ...]] = ("remote_type", "remote_message", "remote_traceback")
    remote_type: Optional[str]
    remote_message: Optional[str]
    remote_traceback: Optional[str]

    @staticmethod
    def class_for(claimed_bases: Sequence[str]) -> Type[RemoteError]:
        """The class to raise for a remote exception.

        Args:
            claimed_bases: Names of the remote class and its bases, nearest first, as the worker
                claims them. Trust: worker. Names outside the table below are passed over.
        """
        for name in claimed_bases:
            if name in _REMOTE_CLASSES:
                return _REMOTE_CLASSES[name]
        return RemoteError


# The builtins that a remote error may also be. SystemExit, KeyboardInterrupt and GeneratorExit
# are left out: a repo must not be able to end its caller's process. StopIteration and
# StopAsyncIteration too: inside a caller's generator they would end a loop in silence.
_BUILTIN_NAMES = (
    "ArithmeticError", "AssertionError", "AttributeError", "BufferError", "ConnectionError", "EOFError",
    "FileExistsError", "FileNotFoundError", "FloatingPointError", "ImportError", "IndexError",
    "IsADirectoryError", "KeyError", "LookupError", "MemoryError", "ModuleNotFoundError", "NameError",
    "NotADirectoryError", "NotImplementedError", "OSError", "OverflowError", "PermissionError",
    "RecursionError", "ReferenceError", "RuntimeError", "TimeoutError", "TypeError",
    "UnboundLocalError", "ValueError", "ZeroDivisionError",
)  # fmt: skip


def _remote_class(name: str) -> Type[RemoteError]:
    builtin = getattr(builtins, name)
    cls = type(
        f"Remote{name}",
        (RemoteError, builtin),
        {"__module__": __name__, "__doc__": f"A RemoteError that is also a {name}."},
    )
    globals()[cls.__name__] = cls  # pickle looks a class up by its name in its module
    return cls


_REMOTE_CLASSES: Dict[str, Type[RemoteError]] = {name: _remote_class(name) for name in _BUILTIN_NAMES}


class ProtocolError(IsohubError):
    """A worker sent something that the wire does not allow; the worker is killed."""


class MissingExtraError(IsohubError, ImportError):
    """Packages that isohub needs for this alone are not installed. `extra` is what brings them."""

    field_names: ClassVar[Tuple[str, ...]] = ("extra",)
    extra: Optional[str]


class SaveError(IsohubError, OSError):
    """A state or a report could not be written to a file, and nothing was left there. `path` is the file."""

    field_names: ClassVar[Tuple[str, ...]] = ("path",)
    path: Optional[str]


class ResultsError(IsohubError):
    """A file of results is another question's, in use, or damaged. `path` is the file."""

    field_names: ClassVar[Tuple[str, ...]] = ("path",)
    path: Optional[str]


class BisectionError(IsohubError, ValueError):
    """The ends do not enclose a first bad commit: one is not what it is said to be, or no history joins them."""

    field_names: ClassVar[Tuple[str, ...]] = ("commit",)
    commit: Optional[str]


class SessionClosedError(IsohubError, RuntimeError):
    """The session, the handle or its worker was closed before this call."""
