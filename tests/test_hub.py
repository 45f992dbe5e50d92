"""Session and the module's functions: what a user calls, and what a user gets wrong."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import isohub
from isohub import errors
from tests.conftest import HUBS


def test_a_handle_answers_as_the_model_does(session, hub):
    x = torch.arange(96.0).reshape(2, 3, 4, 4)
    with session.load(hub("good"), "model", pretrained=True) as handle:
        remote = handle(x)
        state = handle.state_dict()
    code = (
        "import sys, torch; m = torch.hub.load(sys.argv[1], 'model', source='local', pretrained=True);"
        "torch.save((m.state_dict(), m(torch.arange(96.0).reshape(2, 3, 4, 4)).detach()), sys.argv[2])"
    )
    out = Path(os.environ["ISOHUB_HOME"]) / "alone.pt"
    subprocess.run([sys.executable, "-c", code, hub("good"), str(out)], check=True, capture_output=True)
    alone_state, alone = torch.load(out)
    assert torch.equal(remote, alone)
    assert list(state) == list(alone_state)
    assert all(torch.equal(state[name], alone_state[name]) for name in state)
    assert state._metadata == alone_state._metadata


def test_arguments_reach_the_entrypoint(session, hub):
    answer = session.load(
        hub("good"), "echo", 1, "two", [3.0], four={"5": None}, entry_kwargs={"timeout_s": 7, "seed": 8}
    )
    assert answer == {"args": (1, "two", [3.0]), "kwargs": {"four": {"5": None}, "timeout_s": 7, "seed": 8}}


def test_a_keyword_given_twice_is_refused(session, hub):
    with pytest.raises(TypeError, match="given twice.*four"):
        session.load(hub("good"), "echo", four=1, entry_kwargs={"four": 2})


def test_structures_come_back_as_structures(session, hub):
    model, (normalize, denormalize, helper) = session.load(hub("good"), "pair")
    x = torch.rand(3)
    assert isinstance(model, torch.nn.Module)
    assert torch.allclose(denormalize(normalize(x)), x)
    assert isinstance(helper, isohub.RemoteObject)
    parts = session.load(hub("good"), "as_dict")
    assert isinstance(parts["encoder"], isohub.RemoteModule)
    assert parts["labels"] == ["cat", "dog"]
    assert parts["scale"] == 0.5
    assert len(session.load(hub("good"), "as_list")) == 3
    assert session.load(hub("good"), "returns_none") is None


def test_a_seed_seeds_torch_numpy_and_random(session, hub):
    def weights(**kwargs):
        with session.load(hub("uses_random"), "model", **kwargs) as handle:
            return handle.state_dict()

    first, again, other = weights(seed=7), weights(seed=7), weights(seed=8)
    unseeded, also = weights(), weights()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    # Forks of one zygote must not all draw what it would have drawn.
    assert not any(torch.equal(unseeded[name], also[name]) for name in unseeded)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1.5, "7", True])
def test_a_seed_that_is_none_is_refused(session, hub, seed):
    with pytest.raises(ValueError, match="seed"):
        session.load(hub("good"), "model", seed=seed)


def test_two_sessions_have_workers_of_their_own(session, hub):
    with isohub.Session() as other:
        mine, theirs = session.load(hub("good"), "counter"), other.load(hub("good"), "counter")
        mine.add(1)
        assert (mine.value, theirs.value) == (1, 0)


def test_a_closed_session_says_so(hub):
    with isohub.Session() as opened:
        handle = opened.load(hub("good"), "mlp")
    for use in (lambda: opened.load(hub("good"), "mlp"), lambda: handle(torch.ones(1, 4))):
        with pytest.raises(errors.SessionClosedError):
            use()


def test_the_functions_are_the_default_sessions(hub):
    with isohub.load(hub("good"), "mlp", sizes=(4, 2)) as handle:
        assert handle(torch.ones(1, 4)).shape == (1, 2)
    assert "mlp" in isohub.list(hub("good"))
    assert "multi-layer" in isohub.help(hub("good"), "mlp")
    assert next(iter(inspect.signature(isohub.load).parameters)) == "repo_or_dir"


def test_torch_hubs_own_call_works(hub):
    with isohub.load(hub("good"), "mlp", source="local", trust_repo=True, force_reload=False, verbose=False) as handle:
        assert isinstance(handle, torch.nn.Module)


def test_list_gives_what_torch_hub_gives(session, hub):
    code = "import sys, torch; print(*torch.hub.list(sys.argv[1], source='local'))"
    # torch.hub.list takes no source; its own helper does the same for a directory.
    code = "import sys, torch.hub as h; m = h._import_module('hubconf', sys.argv[1] + '/hubconf.py'); print(*[f for f in dir(m) if callable(getattr(m, f)) and not f.startswith('_')])"
    for name in ("good", "many_entrypoints"):
        there = subprocess.run(
            [sys.executable, "-c", code, hub(name)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": hub(name)},
        )
        assert session.list(hub(name)) == there.stdout.split()


def test_help_gives_the_docstring_or_none(session, hub):
    assert session.help(hub("good"), "mlp").startswith("A multi-layer")
    with pytest.raises(errors.EntrypointNotFoundError) as caught:
        session.help(hub("good"), "mdoel")
    assert "model" in caught.value.near


def test_inspect_runs_nothing(session, hub):
    outline = session.inspect(hub("raises"))
    assert [entry.name for entry in outline.entrypoints] == ["model"]
    assert session.inspect(hub("sys_exit_at_import")).entrypoints


def test_fetch_gives_commit_and_path(session, hub):
    checkout = session.fetch(hub("good"))
    assert checkout.path == Path(hub("good"))
    assert checkout.commit.startswith("tree-")


def test_handle_names_what_was_loaded(session, hub):
    with session.load(hub("good"), "mlp") as handle:
        assert handle.reference == hub("good")
        assert handle.commit == session.fetch(hub("good")).commit
        assert {"landlock", "seccomp"} <= set(handle.confinement.active)
        assert handle.stats().uss_bytes > 0


def test_an_edited_directory_gets_a_new_worker(session, tmp_path):
    conf = tmp_path / "hubconf.py"
    conf.write_text("def value():\n    return 1\ndef make():\n    return object()\n")
    kept = session.load(tmp_path, "make")
    assert session.load(tmp_path, "value") == 1
    conf.write_text("def value():\n    return 2\n")
    assert session.load(tmp_path, "value") == 2
    assert kept is not None


def test_relative_files_are_found_and_the_callers_cwd_is_not(session, hub, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert session.load(hub("relative_files"), "by_cwd") == session.load(hub("relative_files"), "model").in_features
    assert session.load(hub("relative_files"), "writes") == "written"
    assert list(tmp_path.iterdir()) == [tmp_path / "configs"]
    assert not list(Path(hub("relative_files")).glob("*written*"))


def test_imports_within_forward_find_the_repos_modules(session, hub):
    for name in ("good", "lazy_imports"):
        assert session.list(hub(name))
    assert session.load(hub("lazy_imports"), "model")(torch.ones(2)) is not None


def test_no_bytecode_is_written_into_a_local_directory(session, tmp_path):
    (tmp_path / "hubconf.py").write_text("import part\ndef value():\n    return part.VALUE\n")
    (tmp_path / "part.py").write_text("VALUE = 3\n")
    assert session.load(tmp_path, "value") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hubconf.py", "part.py"]


# What a user gets wrong, and what a repo does wrong.


def test_no_hubconf(session, hub):
    with pytest.raises(errors.HubconfNotFoundError, match=r"README\.md") as caught:
        session.load(hub("no_hubconf"), "model")
    assert isinstance(caught.value, FileNotFoundError)


def test_a_hubconf_that_is_no_python(session, hub):
    with pytest.raises(errors.HubconfError, match="line 8"):
        session.load(hub("syntax_error"), "model")


def test_an_entrypoint_that_is_not_there(session, hub):
    with pytest.raises(errors.EntrypointNotFoundError) as caught:
        session.load(hub("good"), "modle")
    assert caught.value.near[0] == "model"
    assert "did you mean 'model'" in str(caught.value)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("name", ["_private", "dependencies", "torch.nn", "__class__", ""])
def test_a_name_that_is_no_entrypoint(session, hub, name):
    with pytest.raises(errors.IsohubError):
        session.load(hub("good"), name)


def test_missing_dependencies_are_all_named_before_hubconf_runs(session, hub):
    with pytest.raises(errors.MissingDependenciesError) as caught:
        session.load(hub("missing_dependencies"), "model")
    assert len(caught.value.missing) == 3
    assert "pip install" in caught.value.hint
    assert not (HUBS / "missing_dependencies" / "RAN").exists()


@pytest.mark.parametrize(
    ("repo", "entrypoint", "kind", "text"),
    [
        ("raises", "model", ImportError, "while importing hubconf.py"),
        ("raises_in_entrypoint", "model", ValueError, "no weights for this size"),
        ("raises_in_entrypoint", "chained", RuntimeError, "direct cause"),
        ("raises_custom_error", "key_error", KeyError, "hubconf.MissingKeyError"),
        ("raises_custom_error", "model", errors.RemoteError, "code 7: no such model"),
        ("raises_custom_error", "bad_text", errors.RemoteError, "cannot be read"),
        ("sys_exit", "model", errors.RemoteError, "SystemExit: 3"),
        ("sys_exit_at_import", "model", errors.RemoteError, "SystemExit: 0"),
        ("raises_in_entrypoint", "interrupts", errors.RemoteError, "KeyboardInterrupt"),
        ("raises_in_entrypoint", "stops", errors.RemoteError, "StopIteration"),
    ],
)
def test_what_a_repo_raises(session, hub, repo, entrypoint, kind, text):
    with pytest.raises(errors.RemoteError) as caught:
        session.load(hub(repo), entrypoint)
    error = caught.value
    assert isinstance(error, kind)
    assert isinstance(error, Exception)
    assert text in str(error)
    assert error.commit
    assert "isohub/worker" not in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))


@pytest.mark.parametrize(
    ("repo", "entrypoint", "signal_name", "exit_code"),
    [
        ("segfaults", "model", "SIGSEGV", None),
        ("os_exit", "model", None, 0),
        ("stderr_then_dies", "model", "SIGABRT", None),
    ],
)
def test_what_kills_a_worker_while_it_builds(session, hub, repo, entrypoint, signal_name, exit_code):
    with pytest.raises(errors.WorkerDiedError) as caught:
        session.load(hub(repo), entrypoint)
    assert (caught.value.signal_name, caught.value.exit_code) == (signal_name, exit_code)
    assert entrypoint in caught.value.phase
    assert session.load(hub("good"), "returns_number") == 0.25


def test_the_last_words_are_told(session, hub):
    with pytest.raises(errors.WorkerDiedError, match="fatal: the reason is on this line"):
        session.load(hub("stderr_then_dies"), "model")


@pytest.mark.parametrize(("repo", "entrypoint"), [("sleeps_forever", "model"), ("sleeps_in_call", "deaf")])
def test_what_never_ends_is_ended(session, hub, repo, entrypoint):
    with pytest.raises(errors.WorkerTimeoutError) as caught:
        session.load(hub(repo), entrypoint, timeout_s=0.5)
    assert caught.value.timeout_s == 0.5
    assert isinstance(caught.value, TimeoutError)


def test_a_call_that_never_ends_is_ended(session, hub):
    handle = session.load(hub("sleeps_in_call"), "model", timeout_s=1)
    with pytest.raises(errors.WorkerTimeoutError, match=r"calling forward\(\) after 1 s"):
        handle(torch.ones(1))
    with pytest.raises(errors.WorkerTimeoutError):
        handle(torch.ones(1))


@pytest.mark.parametrize(
    "repo", ["edits_sys_path", "changes_directory", "replaces_torch_load", "prints_megabytes", "threads"]
)
def test_what_a_repo_does_to_its_own_process_stays_there(session, hub, repo):
    before = (list(sys.path), os.getcwd(), torch.load, torch.is_grad_enabled())
    x = torch.ones(2, 2)
    assert session.load(hub(repo), "model")(x).shape == x.shape
    assert before == (list(sys.path), os.getcwd(), torch.load, torch.is_grad_enabled())
    assert session.load(hub("good"), "returns_number") == 0.25


def test_gradients_switched_off_by_one_repo_stay_on_elsewhere(session, hub):
    assert session.load(hub("grads_off"), "grad_enabled") is False
    assert torch.is_grad_enabled()
    with session.load(hub("good"), "mlp") as handle:
        assert handle.run(lambda model: torch.is_grad_enabled()) is True


def test_an_object_that_no_codec_knows_is_a_remote_object(session, hub):
    found = session.load(hub("returns_unknown"), "model")
    assert isinstance(found, isohub.RemoteObject)
    assert "Pipeline" in repr(found)


def test_objects_that_lie_about_themselves_harm_nobody(session, hub):
    for entrypoint in ("raises_on_look", "lies", "fake_int", "fake_tensor", "model"):
        assert repr(session.load(hub("bad_repr"), entrypoint))
    with pytest.raises(errors.RemoteError):
        session.load(hub("bad_repr"), "raising_dict")


def test_values_that_nest_too_deep_or_are_shared_too_often(session, hub):
    for entrypoint in ("lists", "dicts", "wide_and_shared"):
        assert session.load(hub("deep_nesting"), entrypoint) is not None
    cyclic = session.load(hub("returns_unknown"), "cyclic")
    assert isinstance(cyclic[0], isohub.RemoteObject)


def test_a_huge_answer_is_refused_and_the_session_goes_on(hub):
    with isohub.Session(max_reply_bytes=1 << 20) as small:
        handle = small.load(hub("good"), "plus")
        with pytest.raises(errors.RemoteError, match="1048576") as caught:
            handle(torch.zeros(1 << 20))
        assert isinstance(caught.value, MemoryError)
        assert "max_reply_bytes" in caught.value.hint
        assert torch.equal(handle(torch.zeros(4)), torch.ones(4))


def test_a_reply_of_ten_gigabytes(session, hub):
    handle = session.load(hub("huge_reply"), "model")
    with pytest.raises(errors.RemoteError, match=str(4 << 30)) as caught:
        handle(10)
    assert isinstance(caught.value, MemoryError)
    view = session.load(hub("huge_reply"), "expanded")(10)
    assert view.untyped_storage().nbytes() < 1 << 12
    assert len(session.load(hub("huge_reply"), "text", 100)) == 100 << 20


@pytest.mark.parametrize("timeout_s", [1e7, 1e300])
def test_a_timeout_may_be_longer_than_the_system_can_wait(session, hub, timeout_s):
    assert session.load(hub("good"), "returns_number", timeout_s=timeout_s) == 0.25


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(session, hub, timeout_s):
    with pytest.raises(ValueError, match="timeout_s"):
        session.load(hub("good"), "model", timeout_s=timeout_s)


@pytest.mark.parametrize("model", [None, 5, b"net"])
def test_a_name_that_is_no_string_is_refused_here(session, hub, model):
    with pytest.raises(TypeError, match="name of an entrypoint"):
        session.load(hub("good"), model)


def test_wrong_types_of_settings_are_told(session, hub):
    for wrong in ("3", [1]):
        with pytest.raises(ValueError, match="timeout_s"):
            session.load(hub("good"), "model", timeout_s=wrong)
    for wrong in ("4G", float("nan"), 0, True):
        with pytest.raises(ValueError, match="max_reply_bytes"):
            isohub.Session(max_reply_bytes=wrong)
    import numpy as np

    with session.load(hub("good"), "mlp", seed=np.int64(3), trust_repo=None) as handle:
        assert handle is not None


def test_choices_are_checked(session, hub):
    with pytest.raises(ValueError, match="returns='tensor'"):
        session.load(hub("good"), "model", returns="tensor")
    with pytest.raises(ValueError, match="trust_repo"):
        session.load(hub("good"), "model", trust_repo="yes")
    with pytest.raises(ValueError, match="source='svn'"):
        session.load(hub("good"), "model", source="svn")


def test_what_is_no_policy_is_refused(session, hub):
    with pytest.raises(errors.PolicyError, match="sandbox='all'"):
        session.load(hub("good"), "model", sandbox="all")
    with pytest.raises(errors.EnvironmentBuildError, match="environment='conda'"):
        session.load(hub("good"), "model", environment="conda")


@pytest.mark.parametrize("text", ["a:b:c", "org/repo:", "", "org//repo", "org/repo:a..b", "./no/such/place"])
def test_malformed_references(session, text):
    with pytest.raises((errors.InvalidReferenceError, errors.SourceUnavailableError)):
        session.load(text, "model")


# Other things that come back.


def test_a_state_dict_alone(session, hub):
    before = session.workers()
    state = session.load(hub("good"), "tied_weights", returns="state_dict", seed=1)
    assert state["embedding.weight"].data_ptr() == state["output.weight"].data_ptr()
    assert set(session.workers()) <= set(before)
    state["embedding.weight"].zero_()  # the caller's own memory
    assert not state["output.weight"].any()


def test_a_state_dict_of_no_module(session, hub):
    with pytest.raises(TypeError, match="one torch.nn.Module; this one gave float"):
        session.load(hub("good"), "returns_number", returns="state_dict")


@pytest.mark.parametrize("returns", ["torchscript", "exported_program"])
def test_programs_need_trust(tmp_path, hub, returns):
    x = torch.rand(2, 4)
    with isohub.Session(tmp_path) as fresh:
        for trust_repo in ("check", False):
            with pytest.raises(errors.UntrustedRepoError, match="can run the repo's code here"):
                fresh.load(hub("good"), "mlp", returns=returns, example_inputs=x, trust_repo=trust_repo)
        with fresh.load(hub("good"), "mlp", seed=3) as handle:
            expected = handle(x)
            with pytest.raises(errors.UntrustedRepoError):
                handle.torchscript()
        program = fresh.load(hub("good"), "mlp", returns=returns, example_inputs=(x,), trust_repo=True, seed=3)
        run = program if returns == "torchscript" else program.module()
        assert torch.allclose(run(x), expected)
        with fresh.load(hub("good"), "mlp", seed=3) as handle:  # a tensor alone is one input, and not one for each row
            assert (handle.torchscript if returns == "torchscript" else handle.export)(x) is not None
        # Remembered once it had succeeded, and forgotten when asked.
        assert fresh.load(hub("good"), "mlp", returns=returns, example_inputs=x) is not None
        assert len(fresh.trusted()) == 1
        assert fresh.untrust(hub("good"))
        with pytest.raises(errors.UntrustedRepoError):
            fresh.load(hub("good"), "mlp", returns=returns, example_inputs=x)


def test_scripting_needs_no_inputs(tmp_path, hub):
    with isohub.Session(tmp_path) as fresh:
        scripted = fresh.load(hub("good"), "mlp", returns="torchscript", trust_repo=True)
        assert scripted(torch.ones(1, 4)).shape == (1, 2)
        with pytest.raises(ValueError, match="example_inputs"):
            fresh.load(hub("good"), "mlp", returns="exported_program", trust_repo=True)


def test_a_failed_load_trusts_nobody(tmp_path, hub):
    with isohub.Session(tmp_path) as fresh:
        with pytest.raises(errors.RemoteError):
            fresh.load(hub("raises"), "model", trust_repo=True)
        assert fresh.trusted() == []


def test_what_a_repo_prints_is_not_on_stdout(hub, tmp_path):
    (tmp_path / "hubconf.py").write_text(
        "import os\nprint('import')\ndef model():\n    print('build')\n    os.system('echo child')\n    return 1\n"
    )
    code = f"import isohub; print(isohub.load({str(tmp_path)!r}, 'model'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_checkout_stands_for_its_commit(session, tmp_path):
    from tests.servers.git_repo import GitRepo

    repo = GitRepo(tmp_path / "repo")
    repo.commit({"hubconf.py": "def model():\n    return 1\n"})
    checkout = session.fetch(f"{repo.path}:main")
    repo.commit({"hubconf.py": "def model():\n    return 2\n"})
    assert session.load(checkout, "model") == 1
    assert session.list(checkout) == ["model"]
    assert session.inspect(checkout).entrypoints[0].name == "model"
    assert session.load(f"{repo.path}:main", "model") == 2


def test_a_repo_without_its_submodules_is_told(session, tmp_path, caplog):
    (tmp_path / ".gitmodules").write_text('[submodule "parts"]\n\tpath = parts\n\turl = ../parts\n')
    (tmp_path / "parts").mkdir()
    (tmp_path / "hubconf.py").write_text("def model():\n    return 1\n")
    (tmp_path / "w.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1\n")
    with caplog.at_level("WARNING", "isohub"):
        assert session.load(tmp_path, "model") == 1
    assert "without its submodules (parts) and Git LFS files (w.bin)" in caplog.text
    assert "in the directory, git submodule update --init and git lfs pull brings them" in caplog.text
    from tests.servers.git_repo import GitRepo

    repo = GitRepo(tmp_path / "clone")
    repo.commit({"hubconf.py": "def model():\n    return 1\n", "w.bin": (tmp_path / "w.bin").read_text()})
    with caplog.at_level("WARNING", "isohub"):
        assert session.load(f"{repo.path}:main", "model") == 1
    assert "isohub.Session(lfs=True) or isohub fetch --lfs brings them" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"frozen": True}, {"lockfile": 7}, {"offline": "no"}, {"submodules": "yes"}, {"lfs": None}, {"frozen": "1"}],
)
def test_settings_that_make_no_sense(options):
    with pytest.raises((ValueError, TypeError)):
        isohub.Session(**options)


def test_trust_of_one_commit(tmp_path):
    with isohub.Session(tmp_path) as session:
        session.trust("o/r:" + "a" * 40)
        assert session.trusted() == ["github.com/o/r@" + "a" * 40]
        with pytest.raises(errors.InvalidReferenceError, match="full SHA"):
            session.trust("o/r:main")
        assert session.untrust("o/r:" + "a" * 40)
        assert session.trusted() == []
        place = tmp_path / "gone"
        place.mkdir()
        session.trust(place)
        place.rmdir()
        assert session.untrust(*session.trusted())
        assert session.trusted() == []
