"""C27: what is required is there, or the worker does not run; what is missing is said."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import isohub
from isohub import errors
from isohub.session import spawn
from tests.attacks import acts
from tests.attacks.acts import DONE
from tests.conftest import HUBS, require_layers
from tests.lacking import start_without

REASONS = {
    "landlock": "the kernel has none, or it is switched off",
    "seccomp": "the kernel has no filters",
    "namespaces": "a user namespace: unshare: Operation not permitted",
}


@pytest.fixture(scope="module", params=["landlock", "seccomp", "namespaces", "landlock,seccomp,namespaces"])
def lacking(request, tmp_path_factory):
    """A session on a machine that has less, and what it has not."""
    require_layers("landlock", "seccomp", "namespaces")
    layers = request.param.split(",")
    place = tmp_path_factory.mktemp("lacking")
    with isohub.Session(place / "home", timeout_s=60) as opened:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spawn, "START", start_without(place, *layers))
            with contextlib.suppress(errors.ConfinementError):  # starts what makes all of this session's workers
                opened.load(str(HUBS / "good"), "returns_number")
        yield opened, layers


def test_c27_an_untrusted_repo_is_refused_without_what_is_required(lacking, hub, tmp_path):
    session, layers = lacking
    required = [name for name in ("landlock", "seccomp") if name in layers]
    for load in (session.load, lambda repo, _: session.list(repo)):
        if not required:
            assert load(hub("edits_sys_path"), "model") is not None
            continue
        with pytest.raises(errors.ConfinementError) as caught:
            load(hub("edits_sys_path"), "model")
        assert caught.value.missing == tuple(required)
        for name in required:
            assert f"{name}: {REASONS[name]}" in str(caught.value)
        assert "isohub doctor" in caught.value.hint


def test_c27_none_of_its_code_ran(lacking, free, tmp_path):
    session, layers = lacking
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "hubconf.py").write_text(
        f"import os\ntry:\n    open({str(tmp_path / 'ran')!r}, 'w').close()\nexcept OSError:\n    pass\n"
        "import torch\ndef model():\n    return torch.nn.Identity()\n"
    )
    if {"landlock", "seccomp"} & set(layers):
        with pytest.raises(errors.ConfinementError):
            session.load(repo, "model")
        assert not (tmp_path / "ran").exists()
    with free.session.load(repo, "model", trust_repo=True):
        assert (tmp_path / "ran").exists()  # the control: it would have


def test_c27_a_trusted_repo_runs_and_says_what_it_runs_without(lacking, hub):
    session, layers = lacking
    with session.load(hub("good"), "mlp", trust_repo=True) as handle:
        assert handle(torch.ones(1, 4)).shape == (1, 2)
        assert set(handle.confinement.missing) == set(layers)
        assert not set(layers) & set(handle.confinement.active)
        for name in layers:
            assert handle.confinement.details[name].startswith(REASONS[name])
            assert f"{name}: missing" in str(handle.confinement)


@pytest.mark.parametrize("trust_repo", [False, True])
def test_c27_whoever_requires_all_gets_all_or_nothing(lacking, hub, trust_repo):
    session, layers = lacking
    for require in ("all", layers):
        with pytest.raises(errors.ConfinementError) as caught:
            session.load(hub("good"), "mlp", sandbox=isohub.Sandbox(require=require), trust_repo=trust_repo)
        assert set(caught.value.missing) == set(layers)
    left = [name for name in ("landlock", "seccomp", "namespaces", "limits") if name not in layers]
    with session.load(hub("good"), "mlp", sandbox=isohub.Sandbox(require=left), trust_repo=True) as handle:
        assert set(left) <= set(handle.confinement.active)  # the control


def test_c27_with_namespaces_alone_files_and_network_are_still_out_of_reach(lacking, hub, tmp_path):
    """A trusted repo on an old kernel: what is left holds what it can."""
    session, layers = lacking
    if layers == ["landlock"]:
        secret = tmp_path / "secret"
        secret.write_text("secret")
        with session.load(hub("good"), "mlp", trust_repo=True) as handle:
            for act, argument in (
                (acts.read, str(secret)),
                (acts.create_file, str(tmp_path / "new")),
                (acts.signal_nothing, os.getpid()),
            ):
                assert handle.run(acts.attempt, act, argument) != DONE
                assert acts.attempt(None, act, argument) == DONE
            assert handle.run(acts.attempt, acts.make_socket, 2, 1) == "EPERM"


def test_c27_a_caller_sees_what_its_workers_use(jail):
    """Whoever it is: root, or a user who may not look into processes that cannot be dumped."""
    stats = jail.handle.stats()
    assert stats.rss_bytes >= stats.pss_bytes >= stats.uss_bytes > 0


def test_c27_a_layer_that_is_there_and_fails_is_an_error(tmp_path, hub, monkeypatch):
    """Not of a machine that has none: of one where it cannot be applied."""
    require_layers("landlock")
    start = tmp_path / "start.py"
    start.write_text(
        "import runpy, sys\n"
        f"START = {os.fspath(spawn.START)!r}\n"
        "sys.argv[0] = START\n"
        "runpy.run_path(START)['_package']()\n"
        "from isohub.sandbox import landlock\n"
        "def fail(*args): raise OSError(1, 'landlock_restrict_self: refused')\n"
        "landlock.Ruleset.restrict = fail\n"
        "sys.argv[5:] = ['plain']\n"
        "runpy.run_path(START, run_name='__main__')\n"
    )
    monkeypatch.setattr(spawn, "START", start)
    with isohub.Session(tmp_path / "home", timeout_s=60) as own:
        for trust_repo in (False, True):
            with pytest.raises(errors.ConfinementError, match="landlock_restrict_self"):
                own.load(hub("good"), "mlp", trust_repo=trust_repo)


def test_c27_the_whole_of_it_is_expected_where_the_environment_says_so():
    """ISOHUB_EXPECT turns a skip into a failure."""
    code = "from tests.conftest import HUBS, require_layers; require_layers('landlock')"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    lacking = [sys.executable, str(root / "tests" / "lacking.py"), "landlock", "--", *command]

    def last_line(command, expected):
        environment = {**os.environ, "ISOHUB_EXPECT": expected, "PYTHONPATH": str(root)}
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        return done.returncode, done.stderr.strip().splitlines()[-1:] or [""]

    code, (said,) = last_line(lacking, "landlock,seccomp")
    assert code != 0
    assert "ISOHUB_EXPECT says that it has" in said
    code, (said,) = last_line(lacking, "seccomp")
    assert code != 0
    assert "Skipped" in said
    code, (said,) = last_line(command, "landlock,everything")
    assert "names everything" in said
