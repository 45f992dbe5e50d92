"""Wheels from source, for what an index has no wheels of: built by a confined process, one package at a time.

1. What building needs is installed first, from wheels; then the source is built in a process that sees these, the
   interpreter and itself, has no network, and writes to directories of its own alone (`isohub.worker.build`).
2. What comes back is a file of a size, with the name and version that were asked for; its content is the package's.
   uv installs it like a downloaded one, by its hash.
3. A wheel that was built is kept with the environments, by the hash of its source and the interpreter.

Side: caller. Trust: the source's code is anybody's; what its process says is checked.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from isohub.environments.declared import Asked, Declared
from isohub.environments.environment import Environment
from isohub.environments.requirements import required_name
from isohub.environments.resolver import Question, install, resolve
from isohub.environments.sdists import BuildSystem, Sdist, find_sdist, read_build_system
from isohub.environments.store import digest_of
from isohub.environments.uv import index_urls
from isohub.errors import ConfinementError, EnvironmentBuildError, printable
from isohub.repos.lock_format import LockedPackage
from isohub.sandbox.confine import UNCONFINED
from isohub.sandbox.processes import PASSED_VARIABLES, remove_tree

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

__all__ = ["SourceBuilds", "sourceless"]

START = Path(__file__).resolve().parent.parent / "worker" / "start.py"
_WHEEL_BYTES = 1 << 30
_TAIL_BYTES = 16 << 10
_MOST_BUILDS = 30
_TIMEOUT_S = 3600.0
_LIMITS = {
    "memory": None, "cpu_time_s": None, "processes": 512, "open_files": 1024, "disk": 8 << 30, "file_size": None,
}  # fmt: skip
_NAMED = (
    re.compile(r"Wheels are required for `([A-Za-z0-9][A-Za-z0-9._-]*)`"),
    re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*?)(?:[=<>!~].*?)? has no (?:usable )?wheels"),
)


def sourceless(said: str) -> list[str]:
    """Names of which uv says that there is source alone.

    Args:
        said: Its explanation. Trust: names in it are an index's.
    """
    from packaging.utils import canonicalize_name

    return [*dict.fromkeys(canonicalize_name(match) for pattern in _NAMED for match in pattern.findall(said))]


class SourceBuilds:
    """Builds what one resolution lacks.

    Args:
        question: The resolution.
        kept: Where wheels that were built are kept.
        directory: To work in.
        held: A descriptor that uv keeps open.
        progress: Show it on a terminal.
    """

    def __init__(self, question: Question, kept: Path, directory: Path, held: int | None, *, progress: bool) -> None:
        self._question = question
        self._kept = kept
        self._directory = directory
        self._held = held
        self._progress = progress
        self._sources: set[str] = set()
        self._links: list[str] = []

    def resolve(self, what: str) -> tuple[LockedPackage, ...]:
        """Resolve, build what has no wheel, and resolve again until nothing lacks one.

        Args:
            what: What for, for people.

        Raises:
            EnvironmentBuildError: Nothing helps, or a build failed.
            ConfinementError: Nothing can be built here.
        """
        while True:
            try:
                place = self._new("resolve")
                return resolve(self._question, place, self._held, what=what, progress=self._progress, links=self._links)
            except EnvironmentBuildError as error:
                said = error.stderr_tail or ""
                built = [self._build(name, said, what) for name in sourceless(said)[:_MOST_BUILDS]]
                # At least one more wheel each time, or it ends.
                if not any(built) or len(self._sources) > _MOST_BUILDS:
                    raise

    def _new(self, name: str) -> Path:
        place = self._directory / f"{name}-{secrets.token_hex(4)}"
        place.mkdir()
        return place

    def _build(self, name: str, said: str, what: str) -> bool:
        """Build the newest version that may be wanted; False if there is none that was not built yet."""
        question = self._question
        sdist = find_sdist(
            name,
            self._versions(name, said),
            question.interpreter.version_text,
            index_urls(question.settings, self._directory),
            [place for place in question.settings.find_links if "://" not in place],
            self._new("sdist"),
            question.settings.variables.get("SSL_CERT_FILE"),
        )
        if sdist is None or sdist.sha256 in self._sources:
            return False
        self._sources.add(sdist.sha256)
        place = self._kept / digest_of([sdist.sha256, question.interpreter.identity])
        if not any(place.glob("*.whl")):
            file, content = self._built(sdist, what)
            staging = self._kept / f".{place.name}-{secrets.token_hex(8)}"
            staging.mkdir(parents=True)
            (staging / file).write_bytes(content)
            try:
                staging.rename(place)
            except OSError:  # somebody else has built it meanwhile
                remove_tree(str(staging))
        self._links.append(str(place))
        return True

    def _versions(self, name: str, said: str) -> SpecifierSet:
        """What is asked for of a package, by the requirements and, as far as uv says so, by other packages."""
        from packaging.requirements import Requirement
        from packaging.specifiers import InvalidSpecifier, SpecifierSet

        wanted = SpecifierSet()
        declared = self._question.declared
        overrides = [Asked(text, "overrides=") for text in self._question.environment.overrides]
        for each in (*declared.asked, *declared.constraints, *overrides):
            if required_name(each.text) == name:
                wanted &= Requirement(each.text).specifier
        for text in re.findall(rf"(?:depends on|you require) {re.escape(name)}([=<>!~][^\s]*)", said):
            with contextlib.suppress(InvalidSpecifier):
                wanted &= SpecifierSet(text)
        return wanted

    def _built(self, sdist: Sdist, what: str) -> tuple[str, bytes]:
        system = read_build_system(sdist)
        packages = self._new("build") / "packages"
        packages.mkdir()
        words = f"building {sdist.name} {sdist.version} from source"
        question = replace(
            self._question,
            environment=Environment(requirements=system.requires, overrides=()),
            declared=Declared(asked=[Asked(text, f"{sdist.name}'s build") for text in system.requires]),
            host=None,
            host_torch=None,
            plain=True,
        )
        needed = resolve(question, packages.parent, self._held, what=f"{what}: {words}", progress=self._progress)
        install(
            needed,
            question.interpreter,
            question.settings,
            packages.parent,
            self._held,
            what=f"{what}: {words}",
            progress=self._progress,
        )
        return _run_build(sdist, system, packages, question.interpreter.executable, words)


def _run_build(sdist: Sdist, system: BuildSystem, packages: Path, python: str, words: str) -> tuple[str, bytes]:
    """Start the confined process, and take its wheel."""
    variables = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
    request = {
        "caller": os.getpid(),
        "source": str(sdist.path),
        "packages": [str(packages)],
        "backend": system.backend,
        "backend_path": list(system.backend_path),
        "limits": _LIMITS,
        "variables": variables,
    }
    # In the staging directory: what a caller that is killed leaves there, the next one removes.
    directory = tempfile.mkdtemp(prefix="work-", dir=packages.parent)
    read, write = os.pipe()
    try:
        process = subprocess.Popen(
            [python, "-I", "-S", str(START), "build", directory, str(write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=directory,
            pass_fds=[write],
            start_new_session=True,
        )
        os.close(write)
        write = -1
        timer = threading.Timer(_TIMEOUT_S, process.kill)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            tail = _Tail(process.stdout)
            with contextlib.suppress(BrokenPipeError), process.stdin:  # it ended before it read; it says why
                process.stdin.write(json.dumps(request).encode())
            with os.fdopen(read, "rb", closefd=True) as answer:
                read = -1
                file, content = _received(answer, sdist)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
    finally:
        for descriptor in (read, write):
            if descriptor >= 0:
                os.close(descriptor)
        remove_tree(directory)
    if code == UNCONFINED:
        raise ConfinementError(
            f"{words}: this machine cannot confine the build: {tail.text()}", hint="isohub doctor says what it can do"
        )
    if code != 0 or file is None:
        text = tail.text()
        raise EnvironmentBuildError(
            f"{words} failed; it had no network, and what its pyproject.toml asks for:\n{text}", stderr_tail=text
        )
    return file, content


class _Tail(threading.Thread):
    """Reads what a build prints, and keeps its end."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True, name="isohub-build-output")
        self._stream = stream
        self._kept = b""
        self.start()

    def run(self) -> None:
        """Read until it ends."""
        with self._stream:
            while chunk := os.read(self._stream.fileno(), 1 << 16):
                self._kept = (self._kept + chunk)[-_TAIL_BYTES:]

    def text(self) -> str:
        """Its end, printable."""
        self.join(5)
        return printable(self._kept.decode("utf-8", "replace").strip(), limit_chars=4_000)


def _received(answer: IO[bytes], sdist: Sdist) -> tuple[str | None, bytes]:
    """A wheel, if it is one of what was to be built; no name if nothing came."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename
    from packaging.version import Version

    head = answer.readline(1 << 12)
    if not head:
        return None, b""
    try:
        claimed = json.loads(head)
        name, size = claimed["name"], claimed["bytes"]
        found, version, *_ = parse_wheel_filename(name)
        if type(size) is not int or not 0 < size <= _WHEEL_BYTES:
            raise ValueError(f"a wheel of {size!r} bytes")
        if found != sdist.name or version != Version(sdist.version) or "/" in name or not name.isprintable():
            raise ValueError(f"a wheel called {name!r}")
    except (ValueError, KeyError, TypeError, InvalidWheelFilename, RecursionError) as error:
        shown = printable(str(error), limit_chars=200, newlines=False)
        raise EnvironmentBuildError(f"building {sdist.name} {sdist.version} gave {shown}") from error
    content = answer.read(size)
    if len(content) != size or answer.read(1):
        raise EnvironmentBuildError(f"building {sdist.name} {sdist.version} gave a wheel of another size than it said")
    return name, content
