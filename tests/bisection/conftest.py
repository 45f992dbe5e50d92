"""A repository of more than 500 commits with merges, in which one commit changes what the model gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers.git_repo import GitRepo, git_environment

HUBCONF = """\
import torch
from factor import FACTOR


class Scaled(torch.nn.Module):
    def forward(self, x):
        return x * FACTOR


def model():
    return Scaled()
"""


@dataclass(frozen=True)
class History:
    """A repository and what is true of it.

    Attributes:
        path: Of a clone.
        commits: Ids by mark.
        parents: Marks of each mark's parents.
        first_bad: Mark of the commit at which the factor changed.
    """

    path: Path
    commits: dict[int, str]
    parents: dict[int, list[int]]
    first_bad: int

    def leads_to(self, mark: int) -> set[int]:
        """Marks of the commits that lead to one, itself included."""
        seen, left = set(), [mark]
        while left:
            one = left.pop()
            if one not in seen:
                seen.add(one)
                left += self.parents[one]
        return seen


def write_history(
    path: Path, shape: list[list[int]], factors: dict[int, str], broken: frozenset[int] = frozenset()
) -> dict[int, str]:
    """Commits by `git fast-import`: commit n has the parents shape[n - 1] and the factor factors[n], or its first parent's.

    Args:
        path: Where the repository is made.
        shape: Parents of each, by mark.
        factors: Text of the factor, by mark; carried on by the first parent, and by the second where that changed.
        broken: Marks whose hubconf cannot be imported.
    """
    repo = GitRepo(path)
    lines: list[bytes] = []
    state: dict[int, str] = {0: "1.0"}
    for number, parents in enumerate(shape, start=1):
        inherited = {state[parent] for parent in parents} or {"1.0"}
        changed = sorted(inherited - {"1.0"}) or ["1.0"]
        state[number] = factors.get(number, changed[-1])
        message = f"change {number}\n\nbody of {number}".encode()
        lines.append(b"commit refs/heads/main\nmark :%d" % number)
        stamp = b"%d +0130" % (1_700_000_000 + number * 60)
        lines.append(b"author A. Uthor <author@example.org> " + stamp)
        lines.append(b"committer C. Ommitter <committer@example.org> " + stamp)
        lines.append(b"data %d\n%s" % (len(message), message))
        for place, parent in enumerate(parents):
            lines.append(b"%s :%d" % (b"merge" if place else b"from", parent))
        hubconf = ("raise RuntimeError('broken')\n" + HUBCONF) if number in broken else HUBCONF
        for name, text in (("hubconf.py", hubconf), ("factor.py", f"FACTOR = {state[number]}\nNUMBER = {number}\n")):
            data = text.encode()
            lines.append(b"M 100644 inline %s\ndata %d\n%s" % (name.encode(), len(data), data))
    lines.append(b"done\n")
    marks = path / "marks"
    repo.git("fast-import", "--quiet", "--done", f"--export-marks={marks}", stdin=b"\n".join(lines))
    found = {}
    for line in marks.read_text().splitlines():
        mark, _, sha = line.partition(" ")
        found[int(mark[1:])] = sha
    marks.unlink()
    assert git_environment()  # no settings of the machine's took part
    return found


def shape_of(count: int) -> list[list[int]]:
    """A main line with a branch of three commits every ten, merged at once."""
    shape: list[list[int]] = [[]]
    main = 1
    while len(shape) < count:
        for _ in range(6):
            shape.append([main])
            main = len(shape)
        side = main
        for _ in range(3):
            shape.append([side])
            side = len(shape)
        shape.append([main])
        main = len(shape)
        shape.append([main, side])
        main = len(shape)
    return shape


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    """551 commits with 50 merges; the change came on a branch, in the middle of its three commits."""
    path = tmp_path_factory.mktemp("history") / "clone"
    shape = shape_of(550)
    first_bad = 405
    assert shape[first_bad - 2 : first_bad + 3] == [[403], [404], [405], [403], [407, 406]]
    commits = write_history(path, shape, {first_bad: "1.5"})
    return History(path, commits, dict(enumerate(shape, start=1)), first_bad)
