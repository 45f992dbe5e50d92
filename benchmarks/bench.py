"""What every part is given, and what it needs of isohub."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.hubs import write_hub
from benchmarks.measure import Sizes
from benchmarks.peers import Absent

__all__ = ["Bench", "open_bench"]


class _Closeable(Protocol):
    def close(self) -> None: ...


_P = TypeVar("_P", bound=_Closeable)


@dataclass(frozen=True)
class Bench:
    """One run.

    Attributes:
        sizes: How much is measured.
        directory: Temporary; removed after the run.
        hub: The repo that is loaded.
        environment: Variables that keep a fresh process's caches within `directory`.
        absent: Peers that are not in this run, and why.
    """

    sizes: Sizes
    directory: Path
    hub: Path
    environment: dict[str, str]
    absent: dict[str, str] = field(default_factory=dict)

    def peer(self, stack: ExitStack, name: str, make: Callable[[], _P]) -> _P | None:
        """Start a peer until the stack ends; None if it is not to be had here, which the page then says."""
        try:
            return stack.enter_context(closing(make()))
        except Absent as absent:
            self.absent[name] = str(absent).replace(str(self.directory), "<directory>")
            print(f"{name}: {self.absent[name]}", file=sys.stderr)
            return None

    def directory_for(self, name: str) -> Path:
        """A new directory within that of the run."""
        return Path(tempfile.mkdtemp(prefix=name, dir=self.directory))

    def copy_of_hub(self, number: int) -> Path:
        """The same repo in another directory: a further worker."""
        copy = self.directory / f"hub{number}"
        if not copy.exists():
            shutil.copytree(self.hub, copy, ignore=shutil.ignore_patterns("__pycache__"))
        return copy

    @contextmanager
    def session(self) -> Iterator[Any]:
        """A session of isohub that is warm: its zygote has imported torch."""
        import isohub

        with isohub.Session(cache_dir=self.directory / "isohub") as session:
            session.load(self.hub, "twice").close()
            yield session


@contextmanager
def open_bench(sizes: Sizes) -> Iterator[Bench]:
    """Make the directory and the repo, and remove them at the end."""
    with ExitStack() as stack:
        # Not through ISOHUB_HOME or TORCH_HOME alone: a user's own settings must not decide.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ihb-")))
        environment = {"ISOHUB_HOME": str(directory / "isohub"), "TORCH_HOME": str(directory / "torch")}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        stack.callback(_restore, before)
        yield Bench(sizes, directory, write_hub(directory / "hub"), environment)


def _restore(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
