"""From requirements to packages by name, version and hash; and those into a directory. By uv, wheels alone.

1. Over the host's packages ("auto"), each of them is offered as it is and preferred (`host`); torch is the host's, or
   nothing is. What comes out and is the host's already is left out.
2. Requirements reach uv in a file, each in the form that a parser gave it; none holds a line break, an option or an
   address.
3. Nothing is built here: no code of a package runs.
4. What was installed is counted: exactly what was to be, by hash.

Side: caller. Trust: names and versions are a repo's and an index's; uv and the indexes are the user's.
Source: ``uv help pip compile``; PEP 751 (pylock.toml); pip's "Hash-checking Mode".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from isohub.environments.declared import Asked, Declared
from isohub.environments.environment import Environment
from isohub.environments.host import HostPackages
from isohub.environments.interpreters import Interpreter
from isohub.environments.requirements import required_name
from isohub.environments.settings import PackageSettings
from isohub.environments.uv import run_uv
from isohub.errors import EnvironmentBuildError, printable
from isohub.repos.lock_format import LockedPackage
from isohub.repos.naming import has_hidden

__all__ = ["Question", "install", "resolve"]

#: What the worker's side runs on.
_OLDEST_TORCH = "1.13"
# torch before 2.3 was built for numpy 1, and says of numpy 2 only that there is none. Source: torch 2.3's notes.
_TORCH_OF_NUMPY_2 = "2.3"
_MOST_PACKAGES = 2_000


@dataclass(frozen=True)
class Question:
    """What is to be resolved.

    Attributes:
        environment: What the caller wants.
        declared: What was asked for.
        interpreter: What it is for.
        host: What it goes over; None for an environment of its own.
        host_torch: The host's version of torch, if it has one.
        settings: Where packages come from.
        plain: Whether torch is nothing to it: for what building from source needs.
        refresh: Whether the indexes are asked again for what uv has kept of them.
    """

    environment: Environment
    declared: Declared
    interpreter: Interpreter
    host: HostPackages | None
    host_torch: str | None
    settings: PackageSettings
    plain: bool = False
    refresh: bool = False

    @property
    def identity(self) -> list[Any]:
        """All that the answer depends on, but what the indexes hold."""
        return [
            [(each.text, *each.hashes) for each in self.declared.asked],
            [(each.text, *each.hashes) for each in self.declared.constraints],
            self.environment.overrides,
            self.environment.allow_build,
            self.interpreter.identity,
            None if self.host is None else self.host.digest,
            self.host_torch,
            self.settings.identity,
        ]


def resolve(
    question: Question, directory: Path, held: int | None, *, what: str, progress: bool, links: Sequence[str] = ()
) -> tuple[LockedPackage, ...]:
    """Ask uv which packages meet the requirements.

    Args:
        question: What for.
        directory: To work in.
        held: A descriptor that uv keeps open.
        what: What for, for people.
        progress: Show it on a terminal.
        links: More directories of files.

    Returns:
        What is to be installed, by name; over the host's packages only what differs from them.

    Raises:
        EnvironmentBuildError: Nothing meets them; the message has uv's explanation.
        SourceUnavailableError: The index did not answer.
    """
    stubs = directory / "host"
    stubs.mkdir()
    if question.host is not None:
        question.host.write_stubs(stubs)
    files = _Files(question, directory, (*links, *([str(stubs)] if question.host is not None else [])))
    packages = files.compiled(held, what, progress)
    if question.host is None and _is_before(packages.get("torch"), _TORCH_OF_NUMPY_2):
        numpy = packages.get("numpy")
        if numpy is not None and not _is_before(numpy, "2"):
            files.constraints.append(Asked("numpy<2", f"torch before {_TORCH_OF_NUMPY_2}"))
            packages = files.compiled(held, what, progress)
    if question.host is None and _is_before(packages.get("torch"), _OLDEST_TORCH):
        raise EnvironmentBuildError(
            f"{what}: torch {packages['torch'].version} comes out; workers run on torch {_OLDEST_TORCH} and newer",
            hint=f"overrides=['torch>={_OLDEST_TORCH}'] lets the repo have another one than it asks for",
        )
    _check_hashes((*question.declared.asked, *question.declared.constraints), packages)
    ours = question.host.versions if question.host is not None else {}
    found = tuple(each for name, each in sorted(packages.items()) if not _is_same(ours.get(name), each.version))
    bare = [each.name for each in found if not each.sha256]
    if bare:
        raise EnvironmentBuildError(
            f"{what}: no sha256 is known of a file of {', '.join(bare[:5])}, and nothing is installed without",
            hint="python -m pip install --upgrade uv; or an index that has hashes (PEP 503)",
        )
    return found


class _Files:
    """What uv reads and writes."""

    def __init__(self, question: Question, directory: Path, links: Sequence[str]) -> None:
        self.question = question
        self.links = links
        self.directory = directory
        self.constraints = list(question.declared.constraints)
        self.asked = list(question.declared.asked)
        if question.host_torch is not None and question.host is not None:
            # Its own needs hold too: it is what every worker imports.
            self.asked.append(Asked(f"torch=={question.host_torch}", "the host's torch"))
        elif question.host is None and not question.plain:
            self.asked.append(Asked(f"torch>={_OLDEST_TORCH}", "what workers run on"))

    def compiled(self, held: int | None, what: str, progress: bool) -> dict[str, LockedPackage]:
        """Ask uv, and read its answer."""
        question, settings = self.question, self.question.settings
        _write(self.directory / "requirements.in", self.asked)
        _write(self.directory / "constraints.txt", self.constraints)
        overrides = [Asked(text, "overrides=") for text in question.environment.overrides]
        _write(self.directory / "overrides.txt", overrides)
        output = self.directory / "pylock.toml"
        output.unlink(missing_ok=True)
        preferences = _preferences(question)
        if preferences:
            output.write_bytes(preferences)
        links, variables = settings.linked(*self.links)
        arguments = ["pip", "compile", "requirements.in"]
        arguments += ["--constraints", "constraints.txt"] if self.constraints else []
        arguments += [word for path in settings.constraints for word in ("--constraints", path)]
        arguments += ["--override", "overrides.txt"] if overrides else []
        arguments += ["--refresh"] if question.refresh else []
        arguments += [
            "--python",
            question.interpreter.executable,
            "--no-build",
            "--no-header",
            "--format",
            "pylock.toml",
        ]
        arguments += ["--output-file", str(output), *settings.arguments, *links]
        run_uv(arguments, settings, self.directory, what=what, variables=variables, held=held, progress=progress)
        return _read_pylock(output)


def _preferences(question: Question) -> bytes:
    """A pylock that uv keeps to where the requirements let it: what the host has."""
    if question.host is not None:
        versions: Mapping[str, str] = question.host.versions
    else:
        versions = {} if question.host_torch is None else {"torch": question.host_torch}
    entries = "".join(f'\n[[packages]]\nname = "{name}"\nversion = "{version}"\n' for name, version in versions.items())
    if not entries:
        return b""
    return f'lock-version = "1.0"\ncreated-by = "isohub"\n{entries}'.encode()


def _write(path: Path, asked: Sequence[Asked]) -> None:
    for each in asked:
        # A marker may hold any text. uv expands variables, and a line break begins another line.
        if has_hidden(each.text) or "$" in each.text:
            shown = printable(each.text, limit_chars=200, newlines=False)
            raise EnvironmentBuildError(
                f"{each.where}: {shown} holds control characters or a '$', which no package has"
            )
    path.write_text("".join(f"{each.text}\n" for each in asked), "utf-8")


class _Hashes(msgspec.Struct, frozen=True):
    sha256: str | None = None


class _File(msgspec.Struct, frozen=True):
    hashes: _Hashes = _Hashes()
    url: str = ""
    path: str = ""

    def sha256(self, directory: Path) -> str | None:
        """Its hash; of a file on this disk uv before 0.13 gives none."""
        if self.hashes.sha256 is not None:
            return self.hashes.sha256
        place = unquote(urlsplit(self.url).path) if self.url.startswith("file://") else self.path
        try:
            return hashlib.sha256((directory / place).read_bytes()).hexdigest() if place else None
        except OSError:
            return None


class _Package(msgspec.Struct, frozen=True):
    name: str
    version: str | None = None
    wheels: tuple[_File, ...] = ()


class _Pylock(msgspec.Struct, frozen=True):
    packages: tuple[_Package, ...] = ()


def _read_pylock(path: Path) -> dict[str, LockedPackage]:
    try:
        document = msgspec.toml.decode(path.read_bytes(), type=_Pylock)
        found = {}
        if len(document.packages) > _MOST_PACKAGES:
            raise ValueError(f"it names more than {_MOST_PACKAGES} packages")
        for each in document.packages:
            hashes = tuple(sorted({sha256 for file in each.wheels if (sha256 := file.sha256(path.parent))}))
            package = {"name": each.name, "version": each.version, "sha256": hashes}
            found[each.name] = msgspec.convert(package, LockedPackage)
    except (OSError, ValueError) as error:
        shown = printable(str(error), limit_chars=300, newlines=False)
        raise EnvironmentBuildError(f"what uv resolved cannot be used: {shown}") from error
    return found


def _check_hashes(asked: Sequence[Asked], packages: dict[str, LockedPackage]) -> None:
    """Keep of each package those files alone that the requirements allow."""
    for each in asked:
        name = required_name(each.text)
        if not each.hashes or name not in packages:
            continue
        package = packages[name]
        allowed = tuple(sha256 for sha256 in package.sha256 if sha256 in each.hashes)
        if not allowed:
            raise EnvironmentBuildError(
                f"{each.where}: no file of {name} {package.version} that fits this interpreter has one of the hashes "
                "that are asked for"
            )
        packages[name] = msgspec.structs.replace(package, sha256=allowed)


def _is_before(package: LockedPackage | None, version: str) -> bool:
    from packaging.version import Version

    return package is not None and Version(package.version) < Version(version)


def _is_same(ours: str | None, version: str) -> bool:
    from packaging.version import Version

    return ours is not None and Version(ours) == Version(version)


def install(
    packages: Sequence[LockedPackage],
    interpreter: Interpreter,
    settings: PackageSettings,
    directory: Path,
    held: int | None,
    *,
    what: str,
    progress: bool,
    links: Sequence[str] = (),
) -> None:
    """Put packages into ``packages`` of a directory, and count them.

    Args:
        packages: Which, by hash.
        interpreter: What they are for; compiles them to bytecode, and runs nothing of them.
        settings: Where they come from.
        directory: Staging; what else is written there is thrown away.
        held: A descriptor that uv keeps open.
        what: What for, for people.
        progress: Show it on a terminal.
        links: More directories of files.

    Raises:
        EnvironmentBuildError: They cannot be had, or are not what was resolved.
        SourceUnavailableError: The index did not answer, or the disk is full.
    """
    lines = [
        " ".join((f"{each.name}=={each.version}", *(f"--hash=sha256:{sha256}" for sha256 in each.sha256)))
        for each in packages
    ]
    (directory / "requirements.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    found, variables = settings.linked(*links)
    arguments = ["pip", "install", "--target", str(directory / "packages"), "--python", interpreter.executable]
    # A copy: a link to uv's cache would share its file's modes, and whoever changes one changes the other.
    arguments += ["--requirements", "requirements.txt", "--require-hashes", "--no-deps", "--no-build"]
    arguments += ["--link-mode", "copy", "--compile-bytecode", *_without_prereleases(settings.arguments), *found]
    if packages:
        run_uv(arguments, settings, directory, what=what, variables=variables, held=held, progress=progress)
    _check_installed(packages, directory / "packages", what)


def _without_prereleases(arguments: Sequence[str]) -> list[str]:
    return [word for word in arguments if word == "--no-index"]


def _check_installed(packages: Sequence[LockedPackage], directory: Path, what: str) -> None:
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    found: dict[str, Version] = {}
    for each in distributions(path=[str(directory)]):
        try:
            found[canonicalize_name(each.metadata["Name"])] = Version(each.version)
        except (InvalidVersion, TypeError, KeyError):
            continue
    wanted = {each.name: Version(each.version) for each in packages}
    if found != wanted:
        differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise EnvironmentBuildError(f"{what}: what was installed is not what was resolved: {', '.join(differing[:10])}")
    lock = directory / ".lock"  # uv's
    lock.unlink(missing_ok=True)
