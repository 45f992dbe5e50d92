"""The way in and the way out: help, options, exit statuses, errors in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import psutil
import pytest
from click.testing import CliRunner

import isohub
from isohub.cli.main import isohub_group
from isohub.cli.options import Settings
from tests.conftest import eventually, gone

COMMANDS = [
    "demo",
    "list",
    "help",
    "inspect",
    "fetch",
    "run",
    "compare",
    "evaluate",
    "bisect",
    "ps",
    "lock",
    "trust",
    "cache",
    "env",
    "doctor",
]


def test_help_lists_every_command() -> None:
    found = CliRunner().invoke(isohub_group, ["--help"])
    assert found.exit_code == 0
    assert list(isohub_group.commands) == COMMANDS
    assert all(f"\n  {name} " in found.output for name in COMMANDS)


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS), ["trust", "add"], ["cache", "dir"]])
def test_every_command_has_help(command: list[str]) -> None:
    found = CliRunner().invoke(isohub_group, [*command, "-h"])
    assert found.exit_code == 0
    assert f"Usage: isohub {' '.join(command)}" in found.output


def _leaves(group: click.Group) -> list[click.Command]:
    return [
        leaf
        for command in group.commands.values()
        for leaf in (_leaves(command) if isinstance(command, click.Group) else [command])
    ]


@pytest.mark.parametrize("command", _leaves(isohub_group), ids=lambda command: command.name)
def test_every_command_takes_the_output_options(command: click.Command) -> None:
    names = {name for parameter in command.params for name in parameter.opts}
    assert {"--json", "--quiet", "--verbose"} <= names


def test_version(isohub_here: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert isohub_here("--version").stdout == f"isohub {isohub.__version__}\n"


@pytest.mark.parametrize("arguments", [["--json", "cache", "dir"], ["cache", "dir", "--json"]])
def test_output_options_stand_anywhere(
    isohub_here: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str], tmp_path: Path
) -> None:
    assert json.loads(isohub_here(*arguments).stdout) == {"dir": str(tmp_path / "isohub-home")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lst"], "No such command 'lst'"),
        (["list"], "Missing argument 'REPO'"),
        (["list", "./x", "--source", "svn"], "svn"),
        (["list", "./x", "--timeout", "0"], "--timeout"),
        (["list", "./x", "--timeout", "nan"], "--timeout"),
        (["run", "./x", "m", "--seed", "-1"], "--seed"),
        (["run", "./x", "m", "--seed", str(1 << 63)], "--seed"),
        (["run", "./x", "m", "--input", "torch.ones(1)"], "--input"),
        (["run", "./x", "m", "--set", "width"], "--set"),
        (["--json", "--quiet", "cache", "dir"], "exclude each other"),
        (["cache", "dir", "--json", "-q"], "exclude each other"),
    ],
)
def test_usage_errors(
    isohub_here: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str], words: str
) -> None:
    done = isohub_here(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "\nerror: " in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("repo", ["", "a/b/c", "./nowhere", "o/r:", "https://user:secret@host/o/r", "o/r:a b"])
def test_what_is_no_reference_ends_with_2(
    isohub_here: Callable[..., subprocess.CompletedProcess[str]], repo: str
) -> None:
    for command in (["list", repo], ["fetch", repo], ["inspect", repo], ["trust", "add", repo]):
        done = isohub_here(*command)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "secret" not in done.stderr


def test_errors_as_json(isohub_here: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = isohub_here("fetch", "a/b/c", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert json.loads(done.stderr)["error"]["type"] == "InvalidReferenceError"


def test_a_traceback_only_on_request(
    isohub_process: Callable[..., subprocess.CompletedProcess[str]], hub: Callable[[str], str]
) -> None:
    plain = isohub_process("inspect", hub("no_hubconf"))
    traced = isohub_process("inspect", hub("no_hubconf"), ISOHUB_TRACEBACK="1")
    assert plain.returncode == traced.returncode == 1
    assert plain.stderr.startswith("error: no hubconf.py in ")
    assert "Traceback" in traced.stderr
    assert "Traceback" not in plain.stderr


def test_interrupted(hub: Callable[[str], str]) -> None:
    """Ctrl-C while a worker imports: status 130, no traceback, and no process left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "isohub", "list", hub("sleeps_forever")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # Those around the zygote, it, the worker's init, and the worker; a spare and its init may be there too.
    assert eventually(lambda: len(psutil.Process(process.pid).children(recursive=True)) >= 5, 60)
    time.sleep(0.3)
    started = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    try:
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted")
    assert eventually(lambda: all(gone(child.pid) for child in started))


@pytest.mark.parametrize("form", [[], ["--json"], ["-q"]])
def test_a_full_disk_is_an_error_in_words(form: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "isohub", "cache", "dir", *form]
    environment = {**os.environ, "ISOHUB_HOME": str(tmp_path)}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert done.returncode == 1
    said = json.loads(done.stderr)["error"]["message"] if form == ["--json"] else done.stderr
    assert said.strip() in {f"{head}the result cannot be written: No space left on device" for head in ("", "error: ")}


def test_a_closed_pipe_is_no_error(hub: Callable[[str], str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "isohub", "inspect", hub("many_entrypoints"), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(20)
    assert err == b""


def test_a_stream_that_cannot_encode(
    isohub_process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    repo = tmp_path / "gru\u00df"
    repo.mkdir()
    (repo / "hubconf.py").write_text('"""Gr\u00fc\u00dfe"""\ndef model():\n    """\u0394"""\n', encoding="utf-8")
    done = isohub_process("inspect", str(repo), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u0394" in done.stdout


def test_settings_are_each_command_s_own() -> None:
    assert Settings().output.form == "human"
    assert Settings(json=True).output.form == "json"
    assert Settings(quiet=True).progress is False
