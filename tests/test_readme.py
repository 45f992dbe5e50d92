"""README.md is true: its code and its commands run, and give what it says; its links lead somewhere.

Blocks of ``python`` run in one process, in their order; a ``text`` block after one is its output. Blocks of
``console`` run line by line; ``...`` stands for anything. Both in an empty directory that has ``./digits``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isohub.cli.demo import make_repository
from isohub.repos.reference import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = "\x1e"


def blocks() -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in BLOCK.finditer(README)]


def expect(found: str, wanted: str) -> None:
    """Equal but for trailing blanks and for what ``...`` stands for."""
    found, wanted = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (found, wanted))
    pattern = re.escape(wanted).replace(re.escape("..."), ".*?")
    assert re.fullmatch(pattern, found, re.DOTALL), f"README says:\n{wanted}\n\nit is:\n{found}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("readme")
    make_repository(directory / "digits")
    return directory


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    own = {"ISOHUB_HOME": str(home / "isohub"), "HOME": str(home), "COLUMNS": "80"}
    return {**os.environ, **own, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    kinds = [kind for kind, _ in blocks()]
    assert set(kinds) == {"python", "text", "console", "sh"}
    # Every text is the output of the Python before it; the one `sh` installs isohub, as `make` does.
    assert all(kinds[number - 1] == "python" for number, kind in enumerate(kinds) if kind == "text")
    assert [text for kind, text in blocks() if kind == "sh"] == ["python3 -m pip install .\n"]


def test_the_first_code_is_eight_lines() -> None:
    kind, first = blocks()[0]
    assert kind == "python"
    assert len([line for line in first.splitlines() if line.strip()]) <= 8


def test_python_gives_what_it_says(place: Path, variables: dict[str, str]) -> None:
    pairs = [
        (text, following[1] if following[0] == "text" else None)
        for (kind, text), following in zip(blocks(), [*blocks()[1:], ("", "")], strict=True)
        if kind == "python"
    ]
    program = "\n".join(f"exec({text!r}); print({_MARK!r}, end='', flush=True)" for text, _ in pairs)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=place,
        env=variables,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    outputs = done.stdout.split(_MARK)[:-1]
    assert len(outputs) == len(pairs)
    for output, (_, wanted) in zip(outputs, pairs, strict=True):
        expect(output, wanted or "")


def commands() -> list[tuple[str, str]]:
    """Each ``$`` line of a console block, and what follows it."""
    found = []
    for kind, text in blocks():
        if kind == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                found.append((command, output))
    return found


MAKE = [command for command, _ in commands() if command.startswith("make ")]
DEMO = [(command, output) for command, output in commands() if command.startswith("isohub demo")]
OTHERS = [pair for pair in commands() if not pair[0].startswith(("make ", "isohub demo"))]


def test_commands_give_what_they_say(place: Path, variables: dict[str, str]) -> None:
    assert OTHERS
    for command, output in OTHERS:
        expect(_run(command, place, variables), output)


def test_the_demo_gives_what_it_says(tmp_path: Path, variables: dict[str, str]) -> None:
    ((command, output),) = DEMO
    expect(_run(command, tmp_path, variables), output)
    assert (tmp_path / "digits" / ".git").is_dir()


def _run(command: str, cwd: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
        check=False,
    )
    return done.stdout


def test_every_command_of_the_command_line_is_shown() -> None:
    from isohub.cli.main import isohub_group

    shown = {command.split()[1] for command, _ in commands() if command.startswith("isohub ")}
    assert set(isohub_group.commands) <= shown


def test_make_s_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {command.split()[1] for command in MAKE} | set(re.findall(r"`make ([a-z]+)`", README))
    assert {"demo", "test"} <= named <= targets


def test_every_reference_of_the_table_is_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    section = README.partition("## References")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    assert len(shown) >= 6
    for text in shown:
        assert parse(text).text == text
