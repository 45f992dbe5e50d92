"""What a caller may wish for its workers: each field's good and bad values, and that nothing empty means everything."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest

import isohub
from isohub.errors import PolicyError, UntrustedRepoError
from isohub.sandbox.hosts import WEIGHT_HOSTS
from isohub.sandbox.policy import DEFAULT_REQUIRED, LAYERS, Confinement, Sandbox, checked_sandbox

GIB = 1 << 30
GOOD = {
    "network": [((), ()), ([], ()), (["a.org"], ("a.org",)), ("open", "open"), ({"a.org"}, ("a.org",)), (("10.0.0.1:8080", "*.b.org"), ("10.0.0.1:8080", "*.b.org"))],
    "downloads": [(None, None), ((), ()), (["a.org"], ("a.org",)), (iter(["a.org"]), ("a.org",))],
    "read": [((), ()), (["/a/../b"], ("/b",)), ([Path("/a")], ("/a",)), (["/a", "/b"], ("/a", "/b"))],
    "write": [((), ()), (["/a"], ("/a",))],
    "memory": [(None, None), (GIB, GIB), ("8 GiB", 8 * GIB), ("8GiB", 8 * GIB), ("1.5 GB", 1_500_000_000), ("512m", 512_000_000), ("2 ti", 2 << 40), (str(1 << 20), 1 << 20)],
    "cpu_time_s": [(None, None), (1, 1.0), (0.5, 0.5)],
    "processes": [(4, 4), (1024, 1024)],
    "open_files": [(64, 64)],
    "disk": [(1 << 20, 1 << 20), ("4 GiB", 4 * GIB)],
    "file_size": [(None, None), ("1 MiB", 1 << 20)],
    "output": [("1 MiB", 1 << 20)],
    "gpu": [(True, True), (False, False), (0, (0,)), (3, (3,)), ([1, 0], (1, 0))],
    "require": [("default", "default"), ("all", "all"), (["landlock"], ("landlock",)), (LAYERS, LAYERS)],
}  # fmt: skip
BAD = {
    "network": ["a.org", "", "Open", "OPEN", "all", "*", None, 1, True, [""], [1], [None], ["http://a.org"], ["a.org\0b.org"], ["a.org/x"], [["a.org"]], b"a.org", ["a org"], ["open "]],
    "downloads": ["a.org", "open", "", 1, [""], [b"a.org"], ["a.org\n"]],
    "read": ["/a", Path("/a"), b"/a", [""], [b"/a"], ["/a\0b"], [1], [None], 1, None, [b""]],
    "write": ["/a", "", [""], [1], ["\0"]],
    "memory": [0, -1, 1, "", "8", "0 GiB", "lots", "8 PiB", "-8 GiB", "8 GiB GiB", 1.5, True, False, float("inf"), [], 1 << 61, "1e9", "nan", "٨ GiB x"],
    "cpu_time_s": [0, -1, float("nan"), float("inf"), True, "1", []],
    "processes": [0, 3, -1, 1.5, True, None, "8", 1 << 31],
    "open_files": [0, 63, True, None, 1 << 31],
    "disk": [None, 0, "", True, 1],
    "file_size": [0, "", True, 1],
    "output": [None, 0, "", True],
    "gpu": [None, -1, 1.0, "yes", "", "0", [], [0, 0], [True], [-1], 10**6],
    "require": ["", "none", "landlock", "ALL", (), [], None, 1, ["all"], ["landlock", "x"], [1], True],
}  # fmt: skip


def cases(table):
    return [
        pytest.param(name, value, id=f"{name}={re.sub(' at 0x[0-9a-f]+', '', repr(value))}"[:60])
        for name, values in table.items()
        for value in values
    ]


@pytest.mark.parametrize(("name", "case"), cases(GOOD))
def test_a_good_value_has_one_form(name, case):
    given, kept = case
    made = Sandbox(**{name: given})
    assert getattr(made, name) == kept
    again = dataclasses.replace(made)
    assert again == made
    assert hash(again) == hash(made)
    assert eval(repr(made), {"Sandbox": Sandbox}) == made
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.gpu = True


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_a_bad_value_is_a_policy_error(name, value):
    with pytest.raises(PolicyError) as caught:
        Sandbox(**{name: value})
    assert "expected" in str(caught.value)
    assert "\0" not in str(caught.value)


def test_every_field_has_good_and_bad_values_here():
    fields = {field.name for field in dataclasses.fields(Sandbox)}
    assert fields == set(GOOD) == set(BAD)


def test_a_home_is_resolved_for_the_caller(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Sandbox(read=["~/data"]).read == ("/home/somebody/data",)


def test_what_is_empty_allows_nothing():
    made = Sandbox()
    assert made.network == made.read == made.write == ()
    assert made.proxy_hosts is None
    assert Sandbox(network=[]).needs_trust == ()
    none = Sandbox(downloads=[]).download_hosts
    assert none is not None
    assert none.entries == ()
    default = made.download_hosts
    assert default is not None
    assert default.entries == WEIGHT_HOSTS


def test_what_is_open_has_a_word_of_its_own():
    made = Sandbox(network="open")
    assert made.needs_trust
    assert made.download_hosts is None
    assert made.proxy_hosts is None
    assert [
        made.needs_trust for made in (Sandbox(), Sandbox(network=["a.org"]), Sandbox(gpu=True), Sandbox(read=["/"]))
    ] == [()] * 4


def test_what_is_required():
    assert Sandbox().required == DEFAULT_REQUIRED == ("landlock", "seccomp")
    assert Sandbox(require="all").required == LAYERS
    assert Sandbox(require=["namespaces"]).required == ("namespaces",)


@pytest.mark.parametrize("value", ["", "None", "NONE", "open", "all", True, False, 0, {}, [], object, Sandbox])
def test_no_other_word_is_a_sandbox(value):
    with pytest.raises(PolicyError):
        checked_sandbox(value)
    with pytest.raises(PolicyError):
        isohub.Session(sandbox=value)


def test_those_that_are():
    assert checked_sandbox(None) is None
    assert checked_sandbox("none") == "none"
    assert checked_sandbox(Sandbox()) == Sandbox()


@pytest.mark.parametrize("wanted", ["none", Sandbox(network="open")], ids=["none", "open"])
def test_more_powers_need_trust(tmp_path, hub, wanted):
    with isohub.Session(tmp_path) as own:
        for trust_repo in ("check", False):
            with pytest.raises(UntrustedRepoError):
                own.load(hub("good"), "mlp", sandbox=wanted, trust_repo=trust_repo)
        assert own.workers() == []
    with isohub.Session(tmp_path, sandbox=wanted) as own:
        for look in (own.list, lambda repo: own.help(repo, "mlp")):
            with pytest.raises(UntrustedRepoError):
                look(hub("good"))
        own.trust(hub("good"))
        assert "mlp" in own.list(hub("good"))  # the control


def test_a_confinement_says_what_it_is():
    made = Confinement(("landlock", "seccomp"), ("seccomp",), ("landlock", "namespaces"), {"landlock": "switched off"})
    assert str(made).splitlines() == [
        "seccomp: active",
        "landlock: missing, and required (switched off)",
        "namespaces: missing",
    ]
    assert json.loads(json.dumps(made.to_dict()))["missing"] == ["landlock", "namespaces"]
    assert hash(made)
