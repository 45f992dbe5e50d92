"""``isohub demo``: two refs of one repo, by torch.hub and by isohub, against what each gives alone.

It makes a real git repository of the two example releases, with a third commit that ends its process, and
compares state dicts and outputs to the bit. torch.hub runs in processes of its own, on the two trees laid
out as it lays its downloads out: one directory for each ref. The exit status is 1 unless isohub is right.

Side: caller.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from isohub.cli.options import Settings, output_options, pass_settings
from isohub.cli.output import Block, Cell, Styled, Table
from isohub.cli.torch_hub_loads import ENTRYPOINT, example_input, measured
from isohub.errors import IsohubError, WorkerDiedError, printable

__all__ = ["demo", "examples_directory", "make_repository"]

_REFS = ("v1", "v2")
_EXIT_CODE = 7
_BROKEN_HUBCONF = f"""\
import os

os._exit({_EXIT_CODE})
"""
# Fixed, so that the commits have the same ids on every machine.
_AUTHOR = b"A. Uthor <author@example.org>"
_EPOCH_S = 1_700_000_000
# Importing torch from a cold disk takes the longest.
_TIMEOUT_S = 300.0
_COLUMNS = ("", "ref", "parameters", "output", "mean |output|", "", "seconds")

Figures = dict[str, Any]


@click.command("demo")
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Leave the git repository there.")
@output_options
@pass_settings
@click.pass_context
def demo(ctx: click.Context, settings: Settings, /, keep: Path | None) -> None:
    """Show two refs of one repo side by side.

    What each gives alone, what torch.hub gives for both in one process, and what isohub gives for both in one
    session. The exit status is 1 unless isohub is right.
    """
    if keep is not None and keep.exists():
        raise click.BadParameter(f"{keep} exists", param_hint="--keep")
    output = settings.output
    with tempfile.TemporaryDirectory(prefix="isohub-demo-") as scratch:
        place = Path(scratch)
        repository = place / "digits"
        commits = make_repository(repository)
        trees = [_lay_out(place / "trees", ref) for ref in _REFS]
        output.note("loading both refs, each alone, with torch.hub: the truth")
        truth, alone_s = _timed(lambda: [_torch_hub([tree], place)[0] for tree in trees])
        output.note("loading both in one process with torch.hub")
        together, together_s = _timed(lambda: _torch_hub(trees, place))
        output.note("loading both in one session with isohub")
        isolated, contained, isohub_s = _isohub(repository, place / "store")
        if keep is not None:
            shutil.copytree(repository, keep)
    groups = (
        ("torch.hub, alone", truth, alone_s, ["the truth"] * len(truth)),
        ("torch.hub, both", together, together_s, _verdicts(truth, together)),
        ("isohub, both", isolated, isohub_s, _verdicts(truth, isolated)),
    )
    correct = set(groups[2][3]) == {"right"} and contained["correct"]
    found = {
        "commits": commits,
        "groups": [
            {"name": name, "seconds": round(seconds, 3), "models": _labelled(figures, verdicts)}
            for name, figures, seconds, verdicts in groups
        ],
        "containment": contained,
        "correct": correct,
    }
    table = Table(_COLUMNS, [row for group in groups for row in _rows(*group)], right=frozenset({2, 4, 6}))
    closing = (
        "isohub is right to the bit: every tensor of the state and of the output is what the ref gives alone."
        if correct
        else "isohub is NOT right here; please report this, with `isohub demo --json`."
    )
    blocks: list[Block] = []
    if "WRONG" in groups[1][3]:
        blocks.append(
            "torch.hub's second model is of neither ref: Python kept models.py and utils.py of v1, and v2's hubconf.py "
            "used them."
        )
    heading = ", ".join(f"{ref} is commit {commits[ref][:7]}" for ref in _REFS)
    output.result(
        found,
        f"one git repository, two refs: {heading}",
        "",
        table,
        "",
        *blocks,
        _containment_words(contained),
        closing,
    )
    if not correct:
        ctx.exit(1)


def examples_directory() -> Path:
    """Where the two releases are: in an installed package, or in a checkout of the project."""
    package = Path(__file__).resolve().parent.parent
    for place in (package / "examples" / "two_refs", package.parent / "examples" / "two_refs"):
        if place.is_dir():
            return place
    raise IsohubError(
        f"the example releases are neither in {package} nor beside it", hint="install isohub again, or use a checkout"
    )


def make_repository(place: Path) -> dict[str, str]:
    """Make a git repository of the two releases, as tags, and a tag ``broken`` whose import ends its process.

    Args:
        place: Where; made. Its branch ``main`` is at v2.

    Returns:
        The commits' ids by tag.
    """
    from dulwich.index import build_index_from_tree
    from dulwich.objects import Commit
    from dulwich.repo import Repo

    repo = Repo.init(str(place), mkdir=True)
    refs: Any = repo.refs  # whose type for names differs by version
    try:
        refs.set_symbolic_ref(b"HEAD", b"refs/heads/main")
        commits: dict[str, Any] = {}
        trees: dict[str, Any] = {}
        for number, tag in enumerate((*_REFS, "broken")):
            files = _files(tag)
            tree = trees[tag] = _tree(repo, files)
            commit = Commit()
            commit.tree = tree.id
            commit.parents = [commits[_REFS[number - 1]]] if number else []
            commit.author = commit.committer = _AUTHOR
            commit.author_time = commit.commit_time = _EPOCH_S + number
            commit.author_timezone = commit.commit_timezone = 0
            commit.message = f"release {tag}\n".encode()
            repo.object_store.add_object(commit)
            commits[tag] = commit.id
            refs[f"refs/tags/{tag}".encode()] = commit.id
        refs[b"refs/heads/main"] = commits[_REFS[-1]]
        build_index_from_tree(str(place), repo.index_path(), repo.object_store, trees[_REFS[-1]].id)
    finally:
        repo.close()
    return {tag: identity.decode("ascii") for tag, identity in commits.items()}


def _files(tag: str) -> dict[str, bytes]:
    if tag == "broken":
        return {"hubconf.py": _BROKEN_HUBCONF.encode()}
    return {path.name: path.read_bytes() for path in sorted((examples_directory() / tag).glob("*.py"))}


def _tree(repo: Any, files: dict[str, bytes]) -> Any:
    from dulwich.objects import Blob, Tree

    tree = Tree()
    for name, content in files.items():
        blob = Blob.from_string(content)
        repo.object_store.add_object(blob)
        tree.add(name.encode(), 0o100644, blob.id)
    repo.object_store.add_object(tree)
    return tree


def _lay_out(place: Path, ref: str) -> Path:
    tree = place / ref
    tree.mkdir(parents=True)
    for name, content in _files(ref).items():
        (tree / name).write_bytes(content)
    return tree


def _timed(work: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def _torch_hub(trees: Sequence[Path], place: Path) -> list[Figures]:
    """What torch.hub gives for these directories in one fresh process, in their order."""
    from isohub.cli import torch_hub_loads

    text = Path(torch_hub_loads.__file__).read_text(encoding="utf-8")
    # The text and not the file: a script's own directory would come first on the path of what it loads.
    command = [sys.executable, "-B", "-c", text, *map(str, trees)]
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, timeout=_TIMEOUT_S, check=False)
        figures: list[Figures] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise IsohubError(f"a process with torch.hub gave no figures: {type(error).__name__}: {error}") from error
    return figures


def _isohub(repository: Path, store: Path) -> tuple[list[Figures], Figures, float]:
    """What one session gives for both refs, how it takes a worker's end, and the time to both answers."""
    started = time.perf_counter()
    from torch import no_grad

    from isohub.hub import Session

    with Session(cache_dir=store, timeout_s=_TIMEOUT_S) as session, no_grad():
        handles = [session.load(f"{repository}:{ref}", ENTRYPOINT) for ref in _REFS]
        x = example_input()
        figures = [
            measured(sum(parameter.numel() for parameter in handle.parameters()), handle.state_dict(), handle(x))
            for handle in handles
        ]
        seconds = time.perf_counter() - started
        contained: Figures = {"error": None, "exit_code": None}
        try:
            session.load(f"{repository}:broken", ENTRYPOINT)
        except WorkerDiedError as error:
            contained = {"error": error.message, "exit_code": error.exit_code}
        again = measured(figures[0]["parameters"], handles[0].state_dict(), handles[0](x))
        contained["correct"] = contained["exit_code"] == _EXIT_CODE and again == figures[0]
    return figures, contained, seconds


def _verdicts(truth: Sequence[Figures], figures: Sequence[Figures]) -> list[str]:
    return [
        "error" if "error" in item else "right" if item == expected else "WRONG"
        for expected, item in zip(truth, figures, strict=True)
    ]


def _labelled(figures: Sequence[Figures], verdicts: Sequence[str]) -> list[Figures]:
    return [
        {"ref": ref, "verdict": verdict, **item} for ref, verdict, item in zip(_REFS, verdicts, figures, strict=True)
    ]


def _rows(name: str, figures: Sequence[Figures], seconds: float, verdicts: Sequence[str]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for number, (ref, item, verdict) in enumerate(zip(_REFS, figures, verdicts, strict=True)):
        style = {"right": "green", "WRONG": "bold red", "error": "bold red"}.get(verdict, "")
        shown = ["-", printable(item["error"], limit_chars=60), "-"] if "error" in item else _shown(item)
        first = number == 0
        rows.append([name * first, ref, *shown, Styled(verdict, style), f"{seconds:.1f}" * first])
    return rows


def _shown(item: Figures) -> list[str]:
    return [f"{item['parameters']:,}", "x".join(map(str, item["shape"])), f"{item['mean_abs']:.6f}"]


def _containment_words(contained: Figures) -> str:
    if contained["error"] is None:
        return "A third commit was to end its process, and did not."
    after = "v1 answered as before" if contained["correct"] else "v1 did NOT answer as before"
    return f'A third commit ends its process: "{contained["error"]}"; {after}.'
