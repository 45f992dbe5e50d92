"""Built environments: each once, whole, read-only, under the hash of what it consists of.

    <root>/environments/<key>/{packages/, venv/, environment.json}    `venv` only of one with its own interpreter
    <root>/environments/resolutions/<key>.json                        what requirements came to, and when
    <root>/environments/built/<key>/*.whl                             what was built from source
    <root>/environments/{locks/, .staging-*, .trash-*}

Rules, as those of `isohub.repos.store`:

1. An environment is there if and only if its record is whole and names its key.
2. It is made in a staging directory beside, made read-only, flushed, and renamed once. Whoever makes one holds its
   key's lock, and a shared lock on the staging directory, which the processes that it starts keep: a staging directory
   that can be claimed is a dead one's, and is removed by whoever makes the next.
3. What is there never changes. Who uses it holds a shared lock on it, and nothing removes it meanwhile.
4. Packages lie in a directory of their own and never in an interpreter's site-packages: no ``.pth`` file of theirs is
   read, so starting the interpreter runs nothing of theirs.

Side: caller. Trust: isohub's own files; names and versions in them are an index's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from isohub.environments.interpreters import Interpreter
from isohub.environments.runtime import HOST, Runtime
from isohub.repos.disk import (
    claim,
    disk_errors,
    flush_directory,
    flush_file_system,
    freeze,
    hold,
    locked,
    make_root,
    remove_tree,
)
from isohub.repos.lock_format import LockedPackage
from isohub.repos.records import read_record, write_record

__all__ = ["RECORD", "EnvironmentRecord", "EnvironmentStore", "InUse", "Recipe", "ResolutionRecord", "digest_of"]

_log = logging.getLogger("isohub.environments")
RECORD = "environment.json"
#: Of what a key stands for: another number for each change of what is made of the same packages.
_FORMAT: Literal[1] = 1
_KEY_DIGITS = 40

Kind = Literal["overlay", "whole"]


class EnvironmentRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """environment.json.

    Attributes:
        format: Sealed by `isohub.repos.records`.
        key: Its directory's name.
        kind: "overlay": over the packages of the caller's interpreter. "whole": with an interpreter of its own.
        name: `Environment.name` of what it was first made for.
        made_for: The repo and commit that it was first made for; empty for the caller's own list.
        interpreter: Path of the interpreter.
        python: Its version, three numbers.
        platform: As ``sysconfig.get_platform`` has it.
        packages: What was installed, by name.
        created: UTC, ISO 8601.
    """

    format: Literal[1]
    key: str
    kind: Kind
    name: str
    made_for: str
    interpreter: str
    python: str
    platform: str
    packages: tuple[LockedPackage, ...]
    created: str


class ResolutionRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What requirements came to.

    Attributes:
        format: Sealed by `isohub.repos.records`.
        packages: What is to be installed, by name.
        created: UTC, ISO 8601.
    """

    format: Literal[1]
    packages: tuple[LockedPackage, ...]
    created: str


@dataclass(frozen=True)
class Recipe:
    """What an environment consists of.

    Attributes:
        kind: As `EnvironmentRecord.kind`.
        interpreter: What it is for.
        packages: What is installed, by name.
    """

    kind: Kind
    interpreter: Interpreter
    packages: tuple[LockedPackage, ...]

    @property
    def key(self) -> str:
        """Hash of all of it. An overlay is of the caller's interpreter, wherever that is from."""
        place = sys.executable if self.kind == "overlay" else self.interpreter.executable
        packages = [(each.name, each.version, *each.sha256) for each in self.packages]
        return digest_of([_FORMAT, self.kind, place, *self.interpreter.identity, packages])


def digest_of(value: object) -> str:
    """A hash of plain values, as long as keys are."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_KEY_DIGITS]


class InUse:
    """The environments that a session uses, until it is closed or nobody can reach it any more."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._finalizer = weakref.finalize(self, _close, self._held)

    def add(self, key: str, held: int | None) -> None:
        """Keep one from being removed; takes the descriptor of `EnvironmentStore.hold` over."""
        if held is None:
            return
        if key in self._held:
            os.close(held)
        else:
            self._held[key] = held

    def close(self) -> None:
        """Let them go."""
        self._finalizer()


def _close(held: dict[str, int]) -> None:
    while held:
        os.close(held.popitem()[1])


class EnvironmentStore:
    """Environments under one directory.

    Args:
        root: The store's directory; made when something is first written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.directory = self.root / "environments"
        #: What was built from source, each wheel in a directory of its own.
        self.built = self.directory / "built"

    def lookup(self, recipe: Recipe) -> EnvironmentRecord | None:
        """The record of an environment that is there and can be started."""
        place = self.directory / recipe.key
        record = read_record(place / RECORD, EnvironmentRecord)
        if record is None or record.key != recipe.key:
            return None
        return record if recipe.kind == "overlay" or os.access(_venv_python(place), os.X_OK) else None

    def runtime(self, recipe: Recipe) -> Runtime:
        """What a zygote is started on."""
        place = self.directory / recipe.key
        python = HOST.python if recipe.kind == "overlay" else str(_venv_python(place))
        return Runtime(recipe.key, python, (str(place / "packages"),))

    def hold(self, recipe: Recipe) -> int | None:
        """Say that an environment is in use, as `disk.hold` does, and note when.

        Raises:
            FileNotFoundError: It was removed meanwhile.
        """
        place = self.directory / recipe.key
        try:
            os.utime(place)
        except OSError:
            pass  # a store that is only read; or it is gone, which `hold` says
        return hold(place)

    def make(self, recipe: Recipe, name: str, made_for: str, fill: Callable[[Path, int | None], None]) -> None:
        """Make an environment, unless somebody else has.

        Args:
            recipe: What it consists of.
            name: As `EnvironmentRecord.name`.
            made_for: Likewise.
            fill: Puts all packages into the staging directory that it is given, below ``packages``; keeps the
                descriptor open in whatever it starts.

        Raises:
            SourceUnavailableError: The disk refused.
        """
        key = recipe.key
        with disk_errors(self.root, f"the environment {name}"), self._locked(key):
            if self.lookup(recipe) is not None:
                return
            self._sweep()
            with self._staging(key) as (staging, held):
                (staging / "packages").mkdir()
                if recipe.kind == "whole":
                    _make_venv(staging / "venv", recipe.interpreter)
                fill(staging, held)
                for path in staging.iterdir():
                    if path.name not in ("packages", "venv"):
                        remove_tree(path)
                record = EnvironmentRecord(
                    format=_FORMAT,
                    key=key,
                    kind=recipe.kind,
                    name=name,
                    made_for=made_for,
                    interpreter=recipe.interpreter.executable,
                    python=recipe.interpreter.version_text,
                    platform=recipe.interpreter.platform,
                    packages=recipe.packages,
                    created=_now(),
                )
                for part in ("packages", "venv"):
                    if (staging / part).is_dir():
                        freeze(staging / part)
                write_record(staging / RECORD, record)
                staging.chmod(0o555)
                # The bytes before the name: after a power cut an environment is whole or is not there.
                flush_file_system(staging)
                place = self.directory / key
                if os.path.lexists(place):
                    self._put_aside(place)
                staging.rename(place)
                flush_directory(self.directory)

    def recall(self, question: str) -> ResolutionRecord | None:
        """What requirements came to when they were last resolved, by the hash of the question."""
        return read_record(self._resolution(question), ResolutionRecord)

    def remember(self, question: str, packages: tuple[LockedPackage, ...]) -> None:
        """Write down what requirements came to."""
        with disk_errors(self.root, "a resolution"):
            self._resolution(question).parent.mkdir(parents=True, exist_ok=True)
            record = ResolutionRecord(format=_FORMAT, packages=packages, created=_now())
            write_record(self._resolution(question), record)

    def built_wheels(self, packages: Sequence[LockedPackage]) -> list[str]:
        """Directories that hold a wheel of one of these, which was built from source."""
        names = {each.name for each in packages}
        wheels = sorted(self.built.glob("[!.]*/*.whl"))
        return [str(path.parent) for path in wheels if path.name.partition("-")[0].lower().replace("_", "-") in names]

    @contextmanager
    def resolving(self, question: str) -> Iterator[tuple[Path, int | None]]:
        """Have a directory to resolve in, while nobody else resolves the same.

        Raises:
            SourceUnavailableError: The disk refused.
        """
        with disk_errors(self.root, "a resolution"), self._locked(question):
            self._sweep()
            with self._staging(question) as staging:
                yield staging

    def _resolution(self, question: str) -> Path:
        return self.directory / "resolutions" / f"{question}.json"

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        make_root(self.root)
        locks = self.directory / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with locked(locks, f"{name}.lock"):
            yield

    @contextmanager
    def _staging(self, key: str) -> Iterator[tuple[Path, int | None]]:
        while True:
            staging = self.directory / f".staging-{key}-{secrets.token_hex(8)}"
            staging.mkdir(mode=0o700)
            try:
                held = hold(staging)
                break
            except FileNotFoundError:
                continue  # somebody swept it before it was held
        try:
            yield staging, held
        finally:
            if held is not None:
                os.close(held)
            if os.path.lexists(staging):
                remove_tree(staging)

    def _sweep(self) -> None:
        """Remove what dead writers left; what is held is somebody's."""
        for pattern in (".staging-*", ".trash-*"):
            for path in self.directory.glob(pattern):
                try:
                    claimed = claim(path)
                except (FileNotFoundError, NotADirectoryError, BlockingIOError):
                    continue
                try:
                    _log.info("removing %s, which a writer that died left", path)
                    remove_tree(path)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                        raise  # else an orphan of the dead writer's still writes there: the next one removes it
                finally:
                    if claimed is not None:
                        os.close(claimed)

    def _put_aside(self, place: Path) -> None:
        """Take away what has an environment's name and is none; a session may still use its files."""
        place.rename(place.with_name(f".trash-{place.name}-{secrets.token_hex(8)}"))
        self._sweep()


def _make_venv(directory: Path, interpreter: Interpreter) -> None:
    """A virtual environment without a package, so that starting it runs nothing but the interpreter.

    Source: PEP 405; `site`.
    """
    version = ".".join(map(str, interpreter.version[:2]))
    (directory / "lib" / f"python{version}" / "site-packages").mkdir(parents=True)
    (directory / "bin").mkdir()
    home = Path(interpreter.executable)
    (directory / "bin" / "python").symlink_to(home)
    (directory / "bin" / f"python{version}").symlink_to("python")
    (directory / "pyvenv.cfg").write_text(
        f"home = {home.parent}\ninclude-system-site-packages = false\nversion = {interpreter.version_text}\n", "utf-8"
    )


def _venv_python(place: Path) -> Path:
    return place / "venv" / "bin" / "python"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
