"""Real git repositories, made with the git binary, that do not depend on anybody's configuration."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["GitRepo", "git_environment"]


def git_environment() -> dict[str, str]:
    """The environment that git runs in: no user's or machine's settings, fixed names and dates."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {
        **kept,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_AUTHOR_NAME": "A. Uthor",
        "GIT_AUTHOR_EMAIL": "author@example.org",
        "GIT_AUTHOR_DATE": "2024-01-02T03:04:05Z",
        "GIT_COMMITTER_NAME": "C. Ommitter",
        "GIT_COMMITTER_EMAIL": "committer@example.org",
        "GIT_COMMITTER_DATE": "2024-01-02T03:04:05Z",
    }


class GitRepo:
    """A repository with a work tree.

    Args:
        path: Where; made.
        branch: Name of its first branch.
        object_format: ``sha1`` or ``sha256``.
    """

    def __init__(self, path: Path, *, branch: str = "main", object_format: str = "sha1") -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.git("init", "--quiet", f"--initial-branch={branch}", f"--object-format={object_format}")

    def git(self, *arguments: str, stdin: bytes | None = None) -> str:
        """Run git in the repository and return what it prints."""
        done = subprocess.run(
            ["git", *arguments], cwd=self.path, env=git_environment(), input=stdin, capture_output=True, check=False
        )
        if done.returncode != 0:
            raise AssertionError(f"git {' '.join(arguments)}: {done.stderr.decode(errors='replace')}")
        return done.stdout.decode("utf-8", "surrogateescape").strip()

    def commit(self, files: dict[str, str | bytes | None] | None = None, message: str = "change") -> str:
        """Write files (None removes one) and commit everything; returns the commit's id."""
        for name, content in (files or {}).items():
            place = self.path / name
            if content is None:
                place.unlink()
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content.encode() if isinstance(content, str) else content)
        self.git("add", "--all", "--force")
        self.git("commit", "--quiet", "--allow-empty", f"--message={message}")
        return self.sha()

    def branch(self, name: str, at: str = "HEAD") -> str:
        """Make a branch and go there; returns its commit."""
        self.git("checkout", "--quiet", "-B", name, at)
        return self.sha()

    def checkout(self, name: str) -> None:
        """Go to a branch."""
        self.git("checkout", "--quiet", name)

    def tag(self, name: str, at: str = "HEAD", *, annotated: bool = False) -> str:
        """Make a tag; returns the id of what it names, which is a tag object if annotated."""
        self.git("tag", *(["--annotate", "--message=tag"] if annotated else []), name, at)
        return self.sha(f"refs/tags/{name}")

    def ref(self, name: str, at: str = "HEAD") -> str:
        """Set any ref, such as ``refs/pull/1/head``; returns its commit."""
        self.git("update-ref", name, self.sha(at))
        return self.sha(name)

    def orphan(self, files: dict[str, str | bytes], parent: str | None = None) -> str:
        """Commit files on no branch at all, as a fork's commit is in its parent's storage."""
        entries = b""
        for name, content in sorted(files.items()):
            blob = self.git(
                "hash-object", "-w", "--stdin", stdin=content.encode() if isinstance(content, str) else content
            )
            entries += f"100644 blob {blob}\t{name}\n".encode()
        tree = self.git("mktree", stdin=entries)
        return self.git("commit-tree", tree, "-m", "orphan", *(["-p", parent] if parent else []))

    def sha(self, name: str = "HEAD") -> str:
        """Id of an object."""
        return self.git("rev-parse", "--verify", name)

    def tree(self, name: str = "HEAD") -> str:
        """Id of a commit's tree."""
        return self.sha(f"{name}^{{tree}}")
