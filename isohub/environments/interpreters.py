"""Which interpreters this machine has, and what each says of itself.

1. An interpreter is started with ``-I`` and an empty directory to stand in, and asked: nobody believes a file's name.
2. A version is looked for among pyenv's, the system's, those on PATH and uv's own; the highest that fits is taken. None
   is downloaded.
3. A virtual environment is taken for the interpreter that it was made of: its packages are somebody else's.

Side: caller. Trust: the caller's own interpreters; a repo names none.
Source: PEP 508, "Environment Markers"; ``pyenv help root``; ``uv python dir``.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isohub.errors import EnvironmentBuildError, printable

__all__ = ["Interpreter", "find_interpreter", "this_interpreter"]

_TIMEOUT_S = 30.0
_OLDEST = (3, 8)
_PROBE = """
import json, os, platform, sys, sysconfig
def version(info):
    text = "%d.%d.%d" % info[:3]
    return text if info.releaselevel == "final" else text + info.releaselevel[0] + str(info.serial)
json.dump({
    "version": list(sys.version_info[:3]), "implementation": sys.implementation.name,
    "executable": getattr(sys, "_base_executable", None) or sys.executable, "prefix": sys.base_prefix,
    "platform": sysconfig.get_platform(), "abi": sysconfig.get_config_var("SOABI") or "",
    "markers": {
        "implementation_name": sys.implementation.name, "implementation_version": version(sys.implementation.version),
        "os_name": os.name, "platform_machine": platform.machine(), "platform_release": platform.release(),
        "platform_system": platform.system(), "platform_version": platform.version(),
        "python_full_version": platform.python_version(),
        "platform_python_implementation": platform.python_implementation(),
        "python_version": ".".join(platform.python_version_tuple()[:2]), "sys_platform": sys.platform,
    },
}, sys.stdout)
"""


@dataclass(frozen=True)
class Interpreter:
    """An interpreter that was asked.

    Attributes:
        executable: Its path; for a virtual environment's that of what it was made of.
        version: Three numbers.
        platform: As ``sysconfig.get_platform`` has it.
        abi: As ``SOABI`` has it.
        prefix: Where it is installed.
        markers: What environment markers are about.
    """

    executable: str
    version: tuple[int, int, int]
    platform: str
    abi: str
    prefix: str
    markers: Mapping[str, str]

    @property
    def version_text(self) -> str:
        """Its version, with dots."""
        return ".".join(map(str, self.version))

    @property
    def identity(self) -> tuple[str, ...]:
        """What packages that are made for it depend on, and where it is."""
        return (self.executable, self.version_text, self.platform, self.abi)


def this_interpreter() -> Interpreter:
    """The caller's own."""
    return probe(sys.executable)


def find_interpreter(wanted: str | None) -> Interpreter:
    """The interpreter that a caller means.

    Args:
        wanted: A path, or a version of two or three numbers; None for the caller's own.

    Raises:
        EnvironmentBuildError: There is none such, or it cannot be used.
    """
    if wanted is None:
        return this_interpreter()
    if "/" in wanted:
        return _usable(probe(wanted), wanted)
    numbers = tuple(map(int, wanted.split(".")))
    found: list[Interpreter] = []
    others: set[str] = set()
    for path in _candidates(numbers):
        try:
            interpreter = _usable(probe(path), path)
        except EnvironmentBuildError:
            continue  # broken, or another implementation
        if interpreter.version[: len(numbers)] == numbers:
            found.append(interpreter)
        others.add(interpreter.version_text)
    if found:
        return max(found, key=lambda each: each.version)  # of equal ones the first
    known = ", ".join(sorted({*others, *_known_versions()}, key=_sort_key)) or "none"
    raise EnvironmentBuildError(
        f"no Python {wanted} was found on this machine; there is {known}",
        hint=f"uv python install {wanted}, or pyenv install {wanted}, or python='/path/to/python'",
    )


def probe(path: str) -> Interpreter:
    """Ask an interpreter what it is.

    Raises:
        EnvironmentBuildError: It cannot be run, or says nothing that can be read.
    """
    try:
        status = os.stat(path)  # noqa: PTH116  # a text, and its target
    except (OSError, ValueError) as error:
        raise EnvironmentBuildError(f"the interpreter {_shown(path)} is not there: {error}") from error
    return _probed(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _probed(path: str, _: tuple[int, ...]) -> Interpreter:
    try:
        done = subprocess.run(
            [path, "-I", "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            cwd="/",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentBuildError(
            f"the interpreter {_shown(path)} did not say in {_TIMEOUT_S:g} s what it is", hint="is it a Python at all?"
        ) from error
    except OSError as error:
        raise EnvironmentBuildError(f"the interpreter {_shown(path)} cannot be run: {error}") from error
    try:
        said: dict[str, Any] = json.loads(done.stdout)
        interpreter = Interpreter(
            executable=str(said["executable"]),
            version=(int(said["version"][0]), int(said["version"][1]), int(said["version"][2])),
            platform=str(said["platform"]),
            abi=str(said["abi"]),
            prefix=str(said["prefix"]),
            markers={str(key): str(value) for key, value in said["markers"].items()},
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        words = printable(done.stderr.decode("utf-8", "replace").strip(), limit_chars=500) or f"exit {done.returncode}"
        raise EnvironmentBuildError(f"{_shown(path)} is no Python that can be asked what it is: {words}") from error
    return interpreter


def _usable(interpreter: Interpreter, path: str) -> Interpreter:
    if interpreter.version < _OLDEST:
        raise EnvironmentBuildError(
            f"{_shown(path)} is Python {interpreter.version_text}; workers run on 3.8 and newer",
            hint="name another one: python='3.9'",
        )
    name = interpreter.markers.get("implementation_name")
    if name != "cpython":
        raise EnvironmentBuildError(f"{_shown(path)} is {_shown(str(name))}; workers run on CPython")
    return interpreter


def _candidates(numbers: tuple[int, ...]) -> Iterator[str]:
    """Paths that by their names may be of that version, those that come first winning among equals."""
    minor = ".".join(map(str, numbers[:2]))
    seen: set[str] = set()
    # A virtual environment's own is the interpreter that it was made of.
    paths = [sys.executable] if sys.version_info[: len(numbers)] == numbers else []
    paths += [str(place / "bin" / "python") for place in _versioned(numbers)]
    directories = [*_path_directories(), "/usr/bin", "/usr/local/bin"]
    paths += [os.path.join(directory, f"python{minor}") for directory in directories]  # noqa: PTH118
    for path in paths:
        real = os.path.realpath(path)
        # A shim of pyenv's is a script that asks for the version of the directory one stands in.
        if real not in seen and os.access(path, os.X_OK) and not _is_script(real):
            seen.add(real)
            yield path


def _path_directories() -> list[str]:
    return [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if os.path.isabs(entry)]  # noqa: PTH117


def _is_script(path: str) -> bool:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(2) == b"#!"
    except OSError:
        return True


def _roots() -> list[Path]:
    """Directories that hold one interpreter for each version, in directories that are named by it."""
    home = os.path.expanduser("~")  # noqa: PTH111  # no home is no error here
    data = os.environ.get("XDG_DATA_HOME") or os.path.join(home, ".local", "share")  # noqa: PTH118
    places = [os.environ.get("PYENV_ROOT") or os.path.join(home, ".pyenv")]  # noqa: PTH118
    roots = [Path(place) / "versions" for place in places]
    roots.append(Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or os.path.join(data, "uv", "python")))  # noqa: PTH118
    return roots


def _versioned(numbers: tuple[int, ...] | None) -> list[Path]:
    found: list[tuple[tuple[int, ...], Path]] = []
    for root in _roots():
        try:
            names = sorted(os.listdir(root))  # noqa: PTH208
        except OSError:
            continue
        for name in names:
            # pyenv: 3.9.18; uv: cpython-3.9.18-linux-x86_64-gnu
            match = re.fullmatch(r"(?:cpython-)?(\d+)\.(\d+)\.(\d+)(?:-linux-.*)?", name)
            version = tuple(map(int, match.groups())) if match else ()
            if version and (numbers is None or version[: len(numbers)] == numbers):
                found.append((version, root / name))
    return [place for _, place in sorted(found, key=lambda each: each[0], reverse=True)]


def _known_versions() -> set[str]:
    names = (re.search(r"\d+\.\d+\.\d+", place.name) for place in _versioned(None))
    return {match[0] for match in names if match and tuple(map(int, match[0].split(".")[:2])) >= _OLDEST}


def _sort_key(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _shown(text: str) -> str:
    return printable(text, limit_chars=300, newlines=False)
