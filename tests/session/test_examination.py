"""The caller's side of ``isohub doctor``: what is made of what the examining process said."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

import isohub
from isohub.errors import ConfinementError
from isohub.session import examination
from isohub.session.examination import Diagnosis, Trial, diagnose
from tests.conftest import require_layers
from tests.lacking import start_without

WHOLE = Diagnosis(
    machine="x86_64", kernel="6.18", python="3.12.1", user=1000, landlock_abi=7,
    active=("landlock", "seccomp", "namespaces", "limits"), missing=(), details={"landlock": "ABI 7"},
    trials=(Trial("read", True, "Permission denied"), Trial("write to its own", True, "succeeded")), fault=None,
)  # fmt: skip


def without(*names):
    return dataclasses.replace(WHOLE, active=tuple(name for name in WHOLE.active if name not in names), missing=names)


def test_what_holds():
    assert WHOLE.default_holds
    assert WHOLE.all_holds
    assert without("namespaces").default_holds
    assert not without("namespaces").all_holds
    for name in ("landlock", "seccomp"):
        assert not without(name).default_holds
    broken = dataclasses.replace(WHOLE, trials=(Trial("read", False, "succeeded"),))
    assert not broken.default_holds
    assert not dataclasses.replace(WHOLE, fault="no").default_holds
    assert not dataclasses.replace(WHOLE, fault="no").all_holds


def test_the_text_says_it():
    assert str(WHOLE).splitlines()[0] == "Linux 6.18 on x86_64, Python 3.12.1, user 1000"
    assert "landlock     yes  ABI 7" in str(WHOLE)
    assert 'Sandbox(require="all") holds' in str(WHOLE)
    assert "root" in str(dataclasses.replace(WHOLE, user=0)).splitlines()[0]
    assert "namespaces   NO" in str(without("namespaces"))
    assert str(without("namespaces")).splitlines()[-1] == "Untrusted repos run here, without namespaces."
    assert str(without("landlock")).splitlines()[-1].startswith("Untrusted repos are refused here")
    assert "BAD  read: succeeded" in str(dataclasses.replace(WHOLE, trials=(Trial("read", False, "succeeded"),)))
    assert "could not be confined: no" in str(dataclasses.replace(WHOLE, fault="no"))


def test_it_becomes_json():
    made = json.loads(json.dumps(WHOLE.to_dict()))
    assert made["default_holds"] is made["all_holds"] is True
    assert made["trials"][0] == {"name": "read", "holds": True, "outcome": "Permission denied"}


def test_this_machine():
    require_layers("landlock", "seccomp", "namespaces")
    found = isohub.doctor()
    assert found.all_holds
    assert found.user == os.geteuid()
    assert len(found.trials) >= 7


@pytest.mark.parametrize("layers", [("landlock",), ("namespaces",), ("landlock", "seccomp", "namespaces")])
def test_a_machine_that_has_less(monkeypatch, tmp_path, layers):
    require_layers("landlock", "seccomp", "namespaces")
    monkeypatch.setattr(examination, "START", start_without(tmp_path, *layers))
    found = diagnose()
    assert set(found.missing) == set(layers)
    assert found.default_holds is (layers == ("namespaces",))
    assert not found.all_holds


@pytest.mark.parametrize("said", ["", "{}", "[]", "null", "not json", '{"machine": 1}'])
def test_an_answer_that_cannot_be_read_is_an_error(monkeypatch, tmp_path, said):
    start = tmp_path / "start.py"
    start.write_text(f"import sys\nprint({said!r})\nprint('why it is so', file=sys.stderr)\n")
    monkeypatch.setattr(examination, "START", start)
    with pytest.raises(ConfinementError, match="why it is so"):
        diagnose()
