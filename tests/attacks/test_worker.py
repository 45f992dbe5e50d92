"""C6 to C8 and C10 to C13: what a repo finds in its worker, and what it can do to its caller from there."""

from __future__ import annotations

import io
import logging
import os
import stat
import zipfile
from pathlib import Path

import psutil
import pytest
import torch

import isohub
from isohub import errors
from isohub.repos.archive import extract_zip
from tests.conftest import companions, eventually, gone

SECRETS = {
    "GITHUB_TOKEN": "ghp_secret",
    "AWS_SECRET_ACCESS_KEY": "aws-secret",
    "HF_TOKEN": "hf-secret",
    "PYTHONPATH": "/tmp/secret-path",
    "LD_PRELOAD": "",
    "SSH_AUTH_SOCK": "/tmp/secret-socket",
    "ISOHUB_HOME_HINT": "secret-hint",
}


@pytest.fixture(scope="module")
def secretive(hub):
    """A session of a caller whose environment holds secrets."""
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        with isohub.Session(timeout_s=60) as opened:
            yield opened


@pytest.fixture
def inside(secretive, hub):
    with secretive.load(hub("good"), "mlp") as handle:
        yield handle


# C6: the environment.


def test_c6_a_worker_sees_a_short_list_of_variables(inside, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    variables = inside.run(lambda module: dict(os.environ))
    assert not set(SECRETS) & set(variables)
    assert not any("secret" in value for value in variables.values())
    assert variables["PATH"] == os.environ["PATH"]  # the control: it does see what it should
    own = Path(variables["HOME"]).parent
    assert {Path(variables[name]).parent for name in ("HOME", "TMPDIR")} == {own}
    assert os.environ["HOME"] != variables["HOME"]


def test_c6_nor_does_anything_around_it(secretive, inside):
    family = psutil.Process(secretive._pool.warm().pid)
    pids = [family.pid, *(process.pid for process in family.children(recursive=True))]
    assert inside.stats().pid in pids
    for pid in pids:
        try:
            assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        except PermissionError:  # of what cannot be dumped: root alone may look
            assert os.geteuid() != 0
    assert b"secret" in b"\0".join(f"{k}={v}".encode() for k, v in os.environ.items())  # the control


def test_c6_python_has_none_of_the_callers_path(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "added"))
    monkeypatch.setenv("PYTHONPATH", "/tmp/secret-path")
    with isohub.Session() as own, own.load(hub("good"), "mlp") as handle:
        paths = handle.run(lambda module: list(__import__("sys").path))
        assert paths[0] == hub("good")  # the control
        assert not {"", ".", str(tmp_path), str(tmp_path / "added"), "/tmp/secret-path"} & set(paths)
        assert handle.run(lambda module: __import__("sys").argv) == [""]


# C7: descriptors.


def test_c7_a_worker_has_no_descriptor_of_the_callers(secretive, hub, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    kept = os.open(secret, os.O_RDONLY)
    os.set_inheritable(kept, True)
    try:
        with isohub.Session() as own, own.load(hub("good"), "mlp") as handle:

            def look(module):
                seen = {}
                for name in os.listdir("/proc/self/fd"):
                    try:
                        seen[int(name)] = os.readlink(f"/proc/self/fd/{name}")
                    except OSError:
                        pass
                return seen

            seen = handle.run(look)
            assert str(secret) not in seen.values()
            assert seen[0] == "/dev/null"
            allowed = ("pipe:", "socket:", "/memfd:isohub-arena", "/dev/null", "/proc/")
            assert all(target.startswith(allowed) for target in seen.values()), seen
            assert len([target for target in seen.values() if target.startswith("socket:")]) == 1
            assert str(secret) in look(None).values()  # the control
    finally:
        os.close(kept)


def test_c7_directories_of_a_worker_are_its_own_and_go_with_it(secretive, hub):
    with secretive.load(hub("good"), "mlp") as first, secretive.load(hub("relative_files"), "model") as second:
        homes = [Path(handle.run(lambda module: os.environ["HOME"])).parent for handle in (first, second)]
        assert homes[0] != homes[1]
        for home in homes:
            assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert eventually(lambda: not any(home.exists() for home in homes))


# C8: nothing outlives its caller; see also tests/session/test_supervisor.py.


def test_c8_processes_that_a_repo_hides_end_with_its_worker(secretive, hub):
    handle = secretive.load(hub("forks"), "model")
    handle(torch.ones(1))
    left = companions(handle.stats().pid)
    assert len(left) > 2  # the control: the worker, the first process of its namespace, and what it hid
    handle.close()
    assert eventually(lambda: all(gone(pid) for pid in left))


def test_c8_a_repo_cannot_ignore_its_end(secretive, hub):
    def deaf(module):
        import signal as remote_signal

        for number in remote_signal.valid_signals():
            try:
                remote_signal.signal(number, remote_signal.SIG_IGN)
            except (OSError, ValueError):
                pass

    handle = secretive.load(hub("good"), "mlp")
    handle.run(deaf)
    pid = handle.stats().pid
    handle.close()
    assert gone(pid)


# C10: escapes.


def clean(text):
    return not any(
        (ord(char) < 32 and char not in "\n\t") or 127 <= ord(char) < 160 or char == "\u202e" for char in text
    )


def test_c10_escapes_are_neutralised_wherever_they_are_shown(secretive, hub, caplog):
    with caplog.at_level(logging.INFO, logger="isohub.worker"):
        handle = secretive.load(hub("escapes"), "model")
        shown = [repr(handle), repr(secretive.load(hub("escapes"), "named"))]
        shown += secretive.list(hub("escapes"))
        shown += [secretive.help(hub("escapes"), name) or "" for name in ("model", "named")]
        shown += dir(handle)
        with pytest.raises(errors.RemoteError) as caught:
            handle(torch.ones(1))
        shown += [str(caught.value), repr(caught.value), caught.value.remote_traceback]
        assert eventually(lambda: bool(caplog.records))
    shown += [record.getMessage() for record in caplog.records]
    assert any("\\x1b" in text for text in shown)  # the control: there were some
    assert [text for text in shown if not clean(text)] == []


def test_c10_keys_are_escaped_in_a_records_repr(inside):
    def output(module):
        class Output(dict):
            pass

        return Output({"\x1b]0;pwned\x07": 1})

    assert "\x1b" not in repr(inside.run(output))


# C11: programs.


@pytest.mark.parametrize("form", ["torchscript", "exported_program"])
def test_c11_no_program_of_an_untrusted_repo_is_opened(tmp_path, hub, form, monkeypatch):
    opened = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: opened.append(args))
    monkeypatch.setattr(torch.export, "load", lambda *args, **kwargs: opened.append(args))
    x = torch.ones(1, 4)
    with isohub.Session(tmp_path) as fresh:
        for trust_repo in ("check", False):
            with pytest.raises(errors.UntrustedRepoError):
                fresh.load(hub("good"), "mlp", returns=form, example_inputs=x, trust_repo=trust_repo)
        fresh.trust(hub("raises"))  # another repo's trust is nobody else's
        with pytest.raises(errors.UntrustedRepoError):
            fresh.load(hub("good"), "mlp", returns=form, example_inputs=x)
        assert opened == []
        fresh.load(hub("good"), "mlp", returns=form, example_inputs=x, trust_repo=True)
        assert len(opened) == 1  # the control


def test_c11_a_damaged_list_of_trust_trusts_nobody(tmp_path, hub):
    with isohub.Session(tmp_path) as fresh:
        fresh.trust(hub("good"))
        assert fresh.load(hub("good"), "mlp", returns="torchscript") is not None
        (tmp_path / "trust.json").write_text("{}")
        with pytest.raises(errors.TrustError):
            fresh.load(hub("good"), "mlp", returns="torchscript")


# C12: archives; see tests/repos/test_archive.py for the many ways.


@pytest.mark.parametrize("name", ["../out", "/out", "repo/../../out", "repo/a\\..\\..\\out", "repo/link/out"])
def test_c12_an_archive_writes_nothing_outside_of_its_directory(tmp_path, name):
    def archive(entry):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as file:
            file.writestr("repo/hubconf.py", "")
            if "link" in entry:
                link = zipfile.ZipInfo("repo/link")
                link.external_attr = (stat.S_IFLNK | 0o777) << 16
                file.writestr(link, "../..")
            file.writestr(entry, "x")
        data.seek(0)
        return data

    into = tmp_path / "a" / "b"
    into.mkdir(parents=True)
    with pytest.raises(errors.IntegrityError):
        extract_zip(archive(name), into, origin="archive")
    assert not list(tmp_path.rglob("out"))
    other = tmp_path / "control"
    other.mkdir()
    extract_zip(archive("repo/out"), other, origin="archive")
    assert list(tmp_path.rglob("out"))


# C13: floods.


def test_c13_a_line_that_never_ends_grows_nothing(inside):
    rss = psutil.Process().memory_info().rss

    def flood(module):
        for _ in range(200):
            os.write(2, b"z" * 1_000_000)

    inside.run(flood)
    assert psutil.Process().memory_info().rss - rss < 64 << 20
    assert inside(torch.ones(1, 4)).shape == (1, 2)


def test_c13_a_log_handler_that_fails_stalls_nobody(inside):
    class Broken(logging.Handler):
        def emit(self, record):
            raise KeyError("broken")

    logger, handler = logging.getLogger("isohub.worker"), Broken()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert inside.run(lambda module: [os.write(1, b"line\n" * 1000) for _ in range(200)]) is not None
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert inside(torch.ones(1, 4)).shape == (1, 2)


def test_c8_deep_directories_of_one_worker_end_no_other(secretive, hub):
    def deep(module):
        for _ in range(3000):
            os.mkdir("d")
            os.chdir("d")

    with secretive.load(hub("good"), "mlp") as other:
        handle = secretive.load(hub("edits_sys_path"), "model")
        home = Path(handle.run(lambda module: os.environ["HOME"])).parent
        handle.run(deep)
        handle.close()
        assert other(torch.ones(1, 4)).shape == (1, 2)
        assert secretive.load(hub("good"), "returns_number") == 0.25
        assert eventually(lambda: not home.exists())
