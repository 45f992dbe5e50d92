"""What a caller wants a repo to run on, typed and checked. Nothing here asks the disk for more than a file's name.

    Environment("host")                                       the caller's interpreter and packages, as torch.hub has it
    Environment("auto")                                       the same, and over it what the repo asks for beyond
    Environment("auto", requirements=["timm==0.6.13"])        the same, and over it what the caller asks for
    Environment(requirements=["torch==1.13.1"], python="3.9") an interpreter and packages of its own
    Environment(python="3.9")                                 the same, with what the repo asks for

1. A requirement names a package and versions (PEP 508). Addresses, paths and options are refused: what is installed
   comes from the caller's package index, by its hash.
2. It is a value: it can be compared, hashed and printed, and holds no secret.

Side: caller. Trust: the caller's own words; a mistake is an `EnvironmentBuildError`, TypeError or ValueError, at once.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from isohub.environments.dependencies import parsed_requirement
from isohub.errors import EnvironmentBuildError, printable
from isohub.repos.naming import has_hidden

__all__ = ["Environment", "check_requirement", "checked_environment"]

Base = Literal["host", "auto"]
_BASES = ("host", "auto")
_VERSION = re.compile(r"3\.\d{1,2}(?:\.\d{1,2})?")
#: What the worker's side runs on.
_OLDEST = (3, 8)
_EXTRA = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_NAME_CHARS = 200


@dataclass(frozen=True)
class Environment:
    """The interpreter and packages that a repo is to run on.

    Attributes:
        base: "host": this interpreter and its packages. "auto": these, and in front of them what else is asked for.
            None: an interpreter and packages of its own.
        requirements: What to install, as PEP 508 has it, or the path of a requirements file of yours. None: what the
            repo's own files ask for.
        python: The interpreter: a version such as "3.9" or "3.9.18", or a path. None: this one.
        overrides: Requirements that take the place of whatever else asks for those packages: ``["torch"]`` lets a repo
            that pins torch have any.
        extras: Optional parts of the repo's own project, such as ``["vision"]``.
        allow_build: Also take packages that are there as source only. Building one runs its code, confined and without
            a network.
    """

    base: Base | None = None
    _: KW_ONLY
    requirements: tuple[str, ...] | str | None = None
    python: str | None = None
    overrides: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    allow_build: bool = False

    def __post_init__(self) -> None:
        """Check everything, and give it its one form."""
        put: Any = object.__setattr__
        if self.base is not None and self.base not in _BASES:
            raise ValueError(f"Environment({self.base!r}); expected 'host', 'auto', or requirements= and python=")
        put(self, "requirements", _requirements(self.requirements))
        put(self, "python", _python(self.python))
        put(self, "overrides", _texts("overrides", self.overrides))
        put(self, "extras", _extras(self.extras))
        if self.allow_build is not True and self.allow_build is not False:
            raise ValueError(f"allow_build={self.allow_build!r}; expected True or False")
        given = (self.requirements, self.python, self.overrides, self.extras, self.allow_build)
        if self.base == "host" and given != (None, None, (), (), False):
            raise ValueError(
                "Environment('host') is as it stands; Environment('auto', ...) puts packages in front of it"
            )
        if self.extras and self.requirements is not None:
            raise ValueError(
                "extras= are parts of the repo's own project, and requirements= says what to install instead"
            )
        if self.base == "auto" and self.python is not None:
            raise ValueError(
                f"Environment('auto', python={self.python!r}): 'auto' is over this interpreter, Python "
                f"{sys.version_info[0]}.{sys.version_info[1]}; leave 'auto' out for another one"
            )
        if self.base is None and self.requirements is None and self.python is None:
            raise ValueError("Environment() wants nothing; expected 'host', 'auto', requirements= or python=")

    @property
    def is_host(self) -> bool:
        """Whether nothing is to be built."""
        return self.base == "host"

    @property
    def name(self) -> str:
        """For people, and for the lockfile: what was wanted, in a line without secrets."""
        words: list[str] = [self.base] if self.base is not None else [f"python {self.python or 'this'}"]
        if isinstance(self.requirements, str):
            words.append(f"file {Path(self.requirements).name} sha256 {_content_digest(self.requirements)}")
        elif self.requirements is not None:
            words.append(f"with {', '.join(self.requirements) or 'nothing'}")
        words += [f"override {', '.join(self.overrides)}"] if self.overrides else []
        words += [f"extras {', '.join(self.extras)}"] if self.extras else []
        words += ["builds allowed"] if self.allow_build else []
        text = printable("; ".join(words), newlines=False)
        if len(text) <= _NAME_CHARS:
            return text
        return f"{text[:_NAME_CHARS]}... sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def __str__(self) -> str:
        return self.name


def checked_environment(environment: Any) -> Environment | None:
    """An environment, also by the words "host" and "auto"; None for whatever holds elsewhere.

    Raises:
        EnvironmentBuildError: It is something else.
    """
    if environment is None or isinstance(environment, Environment):
        return environment
    if isinstance(environment, str) and environment in _BASES:
        return Environment(environment)  # type: ignore[arg-type]  # one of the two words
    shown = printable(repr(environment), limit_chars=200, newlines=False)
    raise EnvironmentBuildError(
        f"environment={shown} was asked for; expected 'host', 'auto', an isohub.Environment or None",
        hint="isohub.Environment(requirements=[...], python='3.9') for packages and an interpreter of its own",
    )


def check_requirement(text: Any, what: str) -> str:
    """A PEP 508 requirement in its own form: names, extras, versions and markers, and nothing else.

    Raises:
        ValueError: It is an option, an address or a path, or is none.
    """
    shown = printable(repr(text), limit_chars=200, newlines=False)
    if not isinstance(text, str):
        raise TypeError(f"{what}: got {shown}; expected a requirement such as 'timm==0.6.13'")
    requirement = parsed_requirement(text)
    if requirement is None:
        raise ValueError(f"{what}: {shown} is no requirement; expected one such as 'timm==0.6.13'")
    if requirement.url is not None:
        raise ValueError(
            f"{what}: {shown} names an address; expected a package of an index\n"
            "hint: put the wheel into a directory, and that into UV_FIND_LINKS or pip's find-links"
        )
    if has_hidden(str(requirement)):
        raise ValueError(f"{what}: {shown} holds control or invisible characters")
    return str(requirement)


def _content_digest(path: str) -> str:
    """What tells a file from another of its name; empty where it cannot be read, which reading it says."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}={value!r}; expected a list of requirements, such as ['timm==0.6.13']")
    return tuple(dict.fromkeys(check_requirement(text, name) for text in value))


def _requirements(value: Any) -> tuple[str, ...] | str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)):
        return _texts("requirements", value)
    path = Path(value).expanduser().absolute()
    if not path.is_file():
        raise ValueError(
            f"requirements={os.fspath(value)!r} is no file; expected a requirements file's path, or a list such as "
            "['timm==0.6.13']"
        )
    return str(path)


def _python(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, os.PathLike) or (isinstance(value, str) and ("/" in value or value.startswith("~"))):
        path = Path(value).expanduser().absolute()
        if not path.is_file():
            raise ValueError(f"python={os.fspath(value)!r} is no file; expected an interpreter's path or a version")
        return str(path)
    if not isinstance(value, str) or not _VERSION.fullmatch(value):
        raise ValueError(f"python={value!r}; expected a version such as '3.9' or '3.9.18', or an interpreter's path")
    if tuple(map(int, value.split(".")[:2])) < _OLDEST:
        raise ValueError(f"python={value!r} is older than workers run on; expected 3.8 or newer")
    return value


def _extras(value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"extras={value!r}; expected a list of names")
    names = tuple(dict.fromkeys(value))
    for name in names:
        if not isinstance(name, str) or not _EXTRA.fullmatch(name):
            raise ValueError(f"extras={value!r}; expected names such as 'vision'")
    return names
