"""Running uv: which one, with what environment, and what is made of what it says.

1. uv is the one of the extra ``isohub[env]``, else the one on PATH.
2. It stands in a directory of the store, reads no project's files (what lies in a directory above the store may be
   another user's, and would choose the index), downloads no interpreter and asks no terminal.
3. What it says when it fails is shown to people as it is, less secrets and control characters.
4. It keeps a shared lock on the directory that it works in: whatever ends its caller, nobody takes that directory away
   while it is still at work.

Side: caller. Trust: uv and its settings are the user's; names and versions in what it says are an index's.
"""

from __future__ import annotations

import logging
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from isohub.environments.settings import PackageSettings
from isohub.errors import EnvironmentBuildError, SourceUnavailableError, printable

__all__ = ["find_uv", "index_urls", "run_uv"]

_log = logging.getLogger("isohub.environments")
_OLDEST = (0, 8)  # `pip compile --format pylock.toml`, and `pip install` with --target that is left alone elsewhere
_TAIL_BYTES = 32 << 10
_TICK_S = 0.5
#: uv looks for uv.toml and pyproject.toml there and in every directory above.
_NO_PROJECT = ("--project", "/")
_NETWORK = re.compile(
    r"error sending request|Failed to fetch|dns error|Connection refused|timed out|network", re.IGNORECASE
)
_DISK = re.compile(r"No space left on device|Disk quota exceeded|File too large|os error (?:27|28|122)\b")


def find_uv() -> str:
    """The path of uv.

    Raises:
        EnvironmentBuildError: There is none, or it is too old.
    """
    path = _packaged() or shutil.which("uv")
    if path is None:
        raise EnvironmentBuildError(
            "uv is not installed, and it is what makes environments",
            hint="python -m pip install 'isohub[env]', or python -m pip install uv",
            command="python -m pip install uv",
        )
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    match = re.match(r"uv (\d+)\.(\d+)", done.stdout)
    if match is None or (int(match[1]), int(match[2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        said = printable((done.stdout or done.stderr).strip(), limit_chars=200, newlines=False)
        raise EnvironmentBuildError(
            f"{path} is {said or 'no uv'}; expected uv {oldest} or newer", hint="python -m pip install --upgrade uv"
        )
    return path


def _packaged() -> str | None:
    try:
        from uv import find_uv_bin
    except ImportError:
        return None
    try:
        return os.fspath(find_uv_bin())
    except FileNotFoundError:
        return None


def run_uv(
    arguments: Sequence[str],
    settings: PackageSettings,
    directory: Path,
    *,
    what: str,
    variables: Mapping[str, str] | None = None,
    held: int | None = None,
    progress: bool = False,
) -> str:
    """Run uv to its end.

    Args:
        arguments: Of uv; without secrets.
        settings: Whose secrets are kept.
        directory: Where it stands.
        what: What it does, for people: "resolving ...".
        variables: Its environment, if it is not that of `settings`.
        held: A descriptor that it keeps open.
        progress: Show on stderr what it does, if that is a terminal.

    Returns:
        What it wrote to stderr.

    Raises:
        EnvironmentBuildError: It failed; its own explanation is in the message.
        SourceUnavailableError: The index did not answer, or the disk is full.
    """
    words = [find_uv(), *arguments, *_NO_PROJECT, "--no-python-downloads", "--color", "never", "--no-progress"]
    _log.info("%s", what)
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=dict(settings.variables if variables is None else variables),
        cwd=directory,
        pass_fds=[] if held is None else [held],
    )
    try:
        assert process.stderr is not None
        said = _follow(process.stderr, settings, what, progress)
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        if process.stderr is not None:
            process.stderr.close()
    if code != 0:
        raise _failure(said, code, settings, what, words)
    return said


def index_urls(settings: PackageSettings, directory: Path) -> list[str]:
    """The addresses of the indexes that uv asks, in its order; they may hold credentials.

    Args:
        settings: What uv is told.
        directory: Where it stands.
    """
    (directory / "nothing.in").write_text("")
    words = [find_uv(), "pip", "compile", "nothing.in", "--emit-index-url", "--no-header", "--offline", "--quiet"]
    done = subprocess.run(
        [*words, *_NO_PROJECT, *settings.arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=dict(settings.variables),
        cwd=directory,
        check=False,
    )
    return re.findall(r"^--(?:extra-)?index-url (\S+)$", done.stdout, re.MULTILINE)


def _follow(stream: IO[bytes], settings: PackageSettings, what: str, progress: bool) -> str:
    """Read what it says until it ends, its end alone if there is much; show the last line of it meanwhile."""
    kept = b""
    with selectors.DefaultSelector() as selector, _Line(what, enabled=progress) as line:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            line.tick()
            if not selector.select(_TICK_S):
                continue
            chunk = os.read(stream.fileno(), 1 << 16)
            if not chunk:
                return kept.decode("utf-8", "replace")
            kept = (kept + chunk)[-_TAIL_BYTES:]
            line.show(settings.shown(kept.decode("utf-8", "replace").strip().rpartition("\n")[2].strip()))


class _Line:
    """One line on a terminal: what is done, the last that was said of it, and for how long."""

    def __init__(self, what: str, *, enabled: bool) -> None:
        self._bar: Any = None
        self._what = what
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=None, bar_format="{desc} [{elapsed}]", leave=False, file=sys.stderr)
            self._bar.set_description_str(what)

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def tick(self) -> None:
        """Let time be seen to pass."""
        if self._bar is not None:
            self._bar.refresh()

    def show(self, said: str) -> None:
        """Say what is done now."""
        if self._bar is not None and said:
            self._bar.set_description_str(f"{self._what}: {printable(said, limit_chars=60, newlines=False)}")


def _failure(
    said: str, code: int, settings: PackageSettings, what: str, words: Sequence[str]
) -> EnvironmentBuildError | SourceUnavailableError:
    text = settings.shown(said.strip()) or f"uv ended with {code}"
    if code < 0:
        text += f"\nuv was ended by {signal.Signals(-code).name}"
    if code == -signal.SIGXFSZ or _DISK.search(text):
        return SourceUnavailableError(
            f"{what}: the disk has no room\n{text}",
            hint="make room (isohub env prune, uv cache prune), or set ISOHUB_HOME and UV_CACHE_DIR to another disk",
        )
    if _NETWORK.search(text) and "unsatisfiable" not in text:
        return SourceUnavailableError(
            f"{what}: the package index did not answer\n{text}",
            hint="pip config list and UV_INDEX say where packages come from",
            passing=True,
        )
    command = settings.shown(" ".join(["uv", *words[1:]]))
    return EnvironmentBuildError(f"{what} failed:\n{text}", command=command, stderr_tail=text)
