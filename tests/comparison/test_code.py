"""Which files differ, and by how many lines, as git says it."""

from __future__ import annotations

import os
import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from isohub.comparison import code
from isohub.comparison.code import compare_trees
from tests.comparison.conftest import git


def lcs(a: list[bytes], b: list[bytes]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for number, y in enumerate(b, start=1):
            before, row[number] = row[number], before + 1 if x == y else max(row[number], row[number - 1])
    return row[-1]


lines = st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=25)


@settings(max_examples=300, deadline=None)
@given(lines, lines)
def test_lines_are_the_least_that_come_and_go(a: list[bytes], b: list[bytes]) -> None:
    common = lcs(a, b)
    assert code._counts(a, b, code._Budget()) == (len(b) - common, len(a) - common)


def test_files_are_git_s(tmp_path: Path) -> None:
    rng = random.Random(3)
    text = [f"line {rng.randrange(40)}\n" for _ in range(300)]
    repo = tmp_path / "repo"
    (repo / "deep" / "er").mkdir(parents=True)
    git(repo, "init", "--quiet")
    (repo / "gone.py").write_text("a\nb")
    (repo / "deep" / "er" / "edited.py").write_text("".join(text))
    (repo / "tool").write_text("#!/bin/sh\n")
    (repo / "data.bin").write_bytes(b"\0\1")
    (repo / "link").symlink_to("tool")
    (repo / "same").write_text("same")
    git(repo, "add", "--all")
    git(repo, "commit", "--quiet", "-m", "one")
    git(repo, "worktree", "add", "--quiet", str(tmp_path / "before"), "HEAD")
    (repo / "gone.py").unlink()
    (repo / "deep" / "er" / "edited.py").write_text("".join([*text[:40], "new\n", *text[60:], "last, without an end"]))
    (repo / "tool").chmod(0o755)
    (repo / "data.bin").write_bytes(b"\0\2")
    (repo / "link").unlink()
    (repo / "link").symlink_to("data.bin")
    (repo / "new.py").write_text("x\n" * 3)
    (repo / "empty").touch()
    (repo / "__pycache__").mkdir()
    (repo / "__pycache__" / "x.pyc").write_bytes(b"0")
    (tmp_path / "exclude").write_text("__pycache__\n")
    git(repo, "-c", f"core.excludesFile={tmp_path / 'exclude'}", "add", "--all")
    wanted = {}
    for line in git(repo, "diff", "--no-renames", "--numstat", "--minimal", "HEAD").splitlines():
        added, removed, path = line.split("\t")
        wanted[path] = (None, None) if added == "-" else (int(added), int(removed))
    found = compare_trees(tmp_path / "before", repo)
    assert {file.path: (file.added, file.removed) for file in found.files} == wanted
    assert {file.path: file.status for file in found.files if file.status != "modified"} == {
        "gone.py": "removed",
        "new.py": "added",
        "empty": "added",
    }
    assert found.added == sum(added or 0 for added, _ in wanted.values())
    assert compare_trees(repo, repo).files == ()


def test_what_a_repo_may_not_do_with_names_and_sizes(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    (new / "a\x1b[31m\nb").write_text("x")
    (new / "out").symlink_to("/etc/passwd")
    os.mkfifo(new / "pipe")
    (old / "huge").write_bytes(b"a\n" * 600_000)  # above the limit of a text
    (new / "huge").write_bytes(b"b\n" * 600_000)
    rng = random.Random(1)
    for place in (old, new):
        (place / "shuffled").write_text("".join(f"{rng.randrange(20000)}\n" for _ in range(20_000)))
    found = {file.path: file for file in compare_trees(old, new).files}
    assert set(found) == {"a\\x1b[31m\\nb", "out", "huge", "shuffled"}
    assert (found["out"].added, found["huge"].added) == (1, None)
    assert 1000 < found["shuffled"].added <= 20_000
