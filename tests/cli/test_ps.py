"""isohub ps."""

from __future__ import annotations

import json
import os
import platform

import pytest
import torch

import isohub


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # sessions of other runs have their files in the usual one
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with isohub.Session(timeout_s=60) as opened:
        yield opened


def test_no_workers(own, isohub_here):
    assert isohub_here("ps").stdout == "no workers\n"
    assert json.loads(isohub_here("ps", "--json").stdout) == {"workers": []}
    assert isohub_here("ps", "-q").stdout == ""


def test_workers_of_another_process(own, hub, isohub_process):
    handle = own.load(hub("good"), "mlp")
    other = own.load(hub("edits_sys_path"), "model")
    pids = {str(worker.pid) for worker in own.workers()}
    calls = [worker.calls for worker in own.workers()]
    lines = isohub_process("ps").stdout.splitlines()
    columns = "worker pid session age calls cpu memory state confinement runs on"
    assert lines[0].split() == columns.split()
    assert all(f"host, Python {platform.python_version()}, torch {torch.__version__}" in line for line in lines[1:])
    assert {line.split()[1] for line in lines[1:]} == pids
    assert all(line.split()[2] == str(os.getpid()) for line in lines[1:])
    assert all(" idle " in line for line in lines[1:])
    found = json.loads(isohub_process("ps", "--json").stdout)["workers"]
    assert {entry["name"] for entry in found} == {worker.name for worker in own.workers()}
    assert all(entry["rss_bytes"] > 0 and entry["state"] == "idle" for entry in found)
    assert set(isohub_process("ps", "-q").stdout.split()) == pids
    assert [worker.calls for worker in own.workers()] == calls  # nobody was asked anything
    assert handle(torch.ones(1, 4)).shape == (1, 2)
    handle.close()
    assert len(isohub_process("ps", "-q").stdout.split()) == 1
    assert other is not None


def test_a_name_cannot_move_the_cursor(own, isohub_here):
    from isohub.session.register import Register, start_ticks

    register = Register()
    register.enter(
        name="a\x1b[2J@1",
        reference="\x1b]0;x",
        commit="1",
        pid=os.getpid(),
        ticks=start_ticks(os.getpid()),
        active=(),
        missing=("seccomp",),
        environment="host",
        python="3.11.7",
        torch="2.13.0",
    ).write(1, "\x1b[H")
    try:
        for form in ((), ("--json",)):
            done = isohub_here("ps", *form)
            assert "\x1b" not in done.stdout
            assert "seccomp" in done.stdout
    finally:
        register.close()
