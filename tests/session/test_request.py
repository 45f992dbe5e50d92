"""What a zygote is told of a worker."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from isohub.errors import PolicyError
from isohub.sandbox.policy import NONE, Sandbox
from isohub.session.request import Placement, memory_limit_bytes, worker_request


def sandbox_of(policy, **more):
    return worker_request(Placement(policy, Path("/checkout"), **more))["sandbox"]


def test_the_default_is_a_full_sandbox_without_network():
    told = sandbox_of(Sandbox())
    assert (told["level"], told["network"], told["gpu"]) == ("full", "none", False)
    assert (told["read"], told["write"], told["checkout"]) == ([], [], "/checkout")
    assert told["memory"] == int(psutil.virtual_memory().total * 0.9)
    json.dumps(told)


def test_none_is_said_in_a_word():
    assert sandbox_of(NONE)["level"] == "none"


@pytest.mark.parametrize(
    ("network", "word"), [((), "none"), (("example.org",), "proxy"), (["127.0.0.1:80"], "proxy"), ("open", "open")]
)
def test_networks(network, word):
    assert sandbox_of(Sandbox(network=network))["network"] == word


def test_granted_directories_are_read(tmp_path):
    told = sandbox_of(Sandbox(read=[tmp_path]), granted=(Path("/store/weights"),))
    assert told["read"] == [str(tmp_path), "/store/weights"]


@pytest.mark.parametrize("name", ["read", "write"])
def test_a_path_that_is_not_there(name, tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(PolicyError, match="missing"):
        sandbox_of(Sandbox(**{name: [missing]}))
    missing.mkdir()
    assert sandbox_of(Sandbox(**{name: [missing]}))[name] == [str(missing)]


def test_memory():
    assert memory_limit_bytes(Sandbox(memory="2 GiB")) == 2 << 30
    assert memory_limit_bytes(Sandbox(memory=123456789)) == 123456789


def test_variables_are_the_short_list(monkeypatch):
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    variables = worker_request(Placement(Sandbox(), Path("/checkout")))["variables"]
    assert variables["LANG"] == "C.UTF-8"
    assert "secret" not in variables.values()
    assert variables["PATH"] == os.environ["PATH"]
