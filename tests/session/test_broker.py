"""What a repo asks torch.hub for, the caller brings: in real workers, from real servers."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

import isohub
from isohub import errors
from isohub.repos import http
from tests.conftest import eventually, open_descriptors
from tests.servers.files import Fault, FileServer
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer


def weights(value: float) -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": torch.tensor([value])}, stream)
    return stream.getvalue()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF_S", 0.001)
    with FileServer() as made:
        yield made


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOHUB_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "cache"


def test_torch_hubs_own_function_downloads_once(session, hub, server, cache):
    url = server.add("/a/model.pth", weights(3.0))
    for name in ("model", "zoo", "model"):  # a new worker each time
        with session.load(hub("downloads"), name, url) as handle:
            assert handle(torch.ones(1)).item() == 3.0
    assert server.count("/a/model.pth") == 1
    assert session.workers() == [] or all("downloads" not in worker.name for worker in session.workers())


def test_a_name_is_no_key(session, hub, server, cache):
    """torch.hub keeps `model.pth` once, whatever repo and URL it came from."""
    urls = [server.add(f"/{place}/model.pth", weights(value)) for place, value in (("a", 1.0), ("b", 2.0))]
    handles = [session.load(hub("downloads"), "model", url) for url in urls]  # one worker, two URLs
    assert [handle(torch.ones(1)).item() for handle in handles] == [1.0, 2.0]


def test_two_repos_do_not_share_answers_but_bytes(session, hub, server, cache, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(hub("downloads"), other)
    url = server.add("/model.pth", weights(5.0))
    for repo in (hub("downloads"), other):
        assert session.load(repo, "file", url)[0] == weights(5.0)
    assert [request.headers.get("If-None-Match") is not None for request in server.requests] == [False, True]
    blobs = [path for path in (cache / "weights" / "blobs").rglob("*") if path.is_file()]
    assert [path.name for path in blobs] == [hashlib.sha256(weights(5.0)).hexdigest()]
    server.replace("/model.pth", weights(6.0))
    third = tmp_path / "third"
    shutil.copytree(hub("downloads"), third)
    assert session.load(third, "file", url)[0] == weights(6.0)


def test_a_worker_has_a_torch_home_of_its_own(session, hub, cache):
    place, variable = session.load(hub("downloads"), "places")
    again, _ = session.load(hub("downloads"), "places")
    assert place == os.path.join(variable, "hub")
    assert place != again
    assert not place.startswith(str(cache))


def test_what_arrives_is_where_it_was_asked_for(session, hub, server, cache, tmp_path):
    url = server.add("/w.bin", b"bytes")
    writing = isohub.Sandbox(write=[tmp_path])
    session.load(hub("downloads"), "into", url, str(tmp_path / "here.bin"), sandbox=writing)
    assert (tmp_path / "here.bin").read_bytes() == b"bytes"
    assert os.listdir(tmp_path) == ["here.bin"] or {"cache", "here.bin"} >= set(os.listdir(tmp_path)) - {"home"}
    with pytest.raises(FileNotFoundError):
        session.load(hub("downloads"), "into", url, str(tmp_path / "none" / "here.bin"), sandbox=writing)


@pytest.mark.parametrize(
    ("status", "kind", "code"), [(404, "HTTPError", 404), (403, "HTTPError", 403), (500, "HTTPError", 500)]
)
def test_errors_are_those_that_torch_hub_raises(session, hub, server, cache, status, kind, code):
    url = server.add("/w.bin", b"bytes")
    server.fail("w.bin", Fault(status=status))
    assert session.load(hub("downloads"), "caught", url)[::2] == (kind, code)


def test_a_server_that_is_not_there(session, hub, server, cache):
    assert session.load(hub("downloads"), "caught", "http://127.0.0.1:1/w.bin")[0] == "URLError"
    assert session.load(hub("downloads"), "caught", "https://user:password@127.0.0.1:1/w.bin")[0] != "NoneType"
    kind, message, _ = session.load(hub("downloads"), "caught", "http://127.0.0.1:1/" + "x" * 9000)
    assert (kind, "9" in message) == ("RuntimeError", True)


def test_hashes_are_checked(session, hub, server, cache):
    digest = hashlib.sha256(b"bytes").hexdigest()
    url = server.add("/w.bin", b"bytes")
    assert session.load(hub("downloads"), "file", url, hash_prefix=digest[:8])[0] == b"bytes"
    kind, message, _ = session.load(hub("downloads"), "caught", url, hash_prefix="0" * 8)
    assert kind == "RuntimeError"
    assert "0" * 8 in message
    good = server.add(f"/m-{hashlib.sha256(weights(1.0)).hexdigest()[:8]}.pth", weights(1.0))
    assert session.load(hub("downloads"), "model", good, check_hash=True)(torch.ones(1)).item() == 1.0


def test_nobodys_credentials_go_along(session, hub, server, cache, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("GITHUB_TOKEN", "secret-token")
    monkeypatch.setenv("GITHUB_SERVER_URL", server.url)
    url = server.add("/w.bin", b"bytes")
    session.load(hub("downloads"), "file", url)
    assert server.requests
    assert not any("authorization" in {name.lower() for name in request.headers} for request in server.requests)
    # The control: what the user himself names carries his credentials.
    isohub.download_url_to_file(url, str(tmp_path / "mine.bin"), progress=False)
    assert "authorization" in {name.lower() for name in server.requests[-1].headers}


def test_threads_of_a_worker_download_at_once(session, hub, server, cache):
    for number in range(6):
        server.add(f"/w{number}", b"%d" % number)
    assert session.load(hub("downloads"), "in_threads", f"{server.url}/w", 6) == {n: b"%d" % n for n in range(6)}


def test_a_worker_that_nobody_asks_gets_nothing(session, hub, server, cache):
    url = server.add("/w.bin", b"bytes")
    late = session.load(hub("downloads"), "after_the_answer", url)
    late.go()  # its thread may ask while this question is open, or after it
    assert eventually(lambda: late.said() is not None)
    nothing = ("downloaded", "RuntimeError: a download needs the caller", "URLError: <urlopen error only the caller")
    assert late.said().startswith(nothing)
    assert session.load(hub("downloads"), "file", url)[0] == b"bytes"


def test_a_fork_of_a_worker_goes_its_own_way_where_it_has_one(session, hub, server, cache):
    url = server.add("/w.bin", b"bytes")
    assert session.load(hub("downloads"), "in_a_fork", url) == "URLError"
    assert server.count() == 0
    assert session.load(hub("downloads"), "in_a_fork", url, sandbox="none", trust_repo=True) == "downloaded"
    assert session.load(hub("downloads"), "file", url)[0] == b"bytes"


def test_offline_brings_what_is_here_and_nothing_else(hub, server, cache):
    url, other = server.add("/w.bin", b"bytes"), server.add("/x.bin", b"other")
    with isohub.Session(timeout_s=60) as online:
        online.load(hub("downloads"), "file", url)
    asked = len(server.requests)
    with isohub.Session(timeout_s=60, offline=True) as offline:
        assert offline.load(hub("downloads"), "file", url)[0] == b"bytes"
        kind, message, _ = offline.load(hub("downloads"), "caught", other)
        assert kind == "URLError"
        assert "/x.bin" in message
    assert len(server.requests) == asked


def test_a_download_counts_in_a_question_s_time_and_is_resumed(hub, server, cache):
    """A server that drips one byte a minute must not hold a caller who gave a deadline."""
    content = b"bytes" * 100_000
    url = server.add("/w.bin", content)
    fault = server.fail("w.bin", Fault(stall=len(content) - 5), times=1)
    with isohub.Session(timeout_s=60) as session:
        session.load(hub("downloads"), "places")  # the zygote is up
        with pytest.raises(errors.WorkerTimeoutError, match=r"waiting for the download of http://.*/w\.bin"):
            session.load(hub("downloads"), "file", url, timeout_s=2)
        fault.resume.set()
        assert session.load(hub("downloads"), "file", url)[0] == content
    assert server.requests[-1].headers["Range"].startswith("bytes=")


def test_a_nested_load(session, hub, cache, tmp_path, monkeypatch):
    """MiDaS calls torch.hub.load in its hubconf."""
    repo = GitRepo(tmp_path / "inner")
    repo.commit(
        {
            "hubconf.py": "import torch\nfrom inner_parts import make\n\ndef model(size=2):\n    return make(size)\n",
            "inner_parts.py": "import torch\n\ndef make(size):\n    return torch.nn.Linear(size, size)\n",
            "tool.sh": "#!/bin/sh\n",
        }
    )
    with GitHubServer() as github:
        for name, value in github.environment.items():
            monkeypatch.setenv(name, value)
        github.add("in", "ner", repo)
        for ref in ("", ":main", f":{repo.sha()}"):
            handle = session.load(hub("downloads"), "nested", f"in/ner{ref}", size=3)
            assert handle(torch.ones(1, 3)).shape == (1, 3)
            handle.close()
        assert github.count("/archive/") == 1
        github.forget()
        with isohub.Session(timeout_s=60, offline=True) as offline:
            assert offline.load(hub("downloads"), "nested", "in/ner", size=4)(torch.ones(1, 4)).shape == (1, 4)
        assert github.count() == 0
        # What the user alone may see is not brought on a repo's word, though it lies in the cache.
        private = GitRepo(tmp_path / "private")
        private.commit({"hubconf.py": "def model():\n    return 'secret'\n"})
        github.add("my", "secrets", private)
        github.token = "mine"
        monkeypatch.setenv("GITHUB_TOKEN", "mine")
        assert session.load("my/secrets", "model") == "secret"
        with pytest.raises(errors.RemoteError, match="does not exist, or not for you"):
            session.load(hub("downloads"), "nested", "my/secrets")
    for place in (hub("good"), f"git+file://{private.path}", "../../x", "https://127.0.0.1:1/a/b"):
        with pytest.raises(errors.RemoteError):
            session.load(hub("downloads"), "nested", str(place))


def test_a_lockfile_binds_what_a_worker_downloads(hub, server, cache, tmp_path):
    url = server.add("/model.pth", weights(1.0))
    lock = tmp_path / "isohub.lock"
    with isohub.Session(timeout_s=60, lockfile=lock) as session:
        assert session.load(hub("downloads"), "model", url)(torch.ones(1)).item() == 1.0
    digest = hashlib.sha256(weights(1.0)).hexdigest()
    assert digest in lock.read_text()
    with isohub.Session(timeout_s=60, lockfile=lock, frozen=True) as session:
        assert session.load(hub("downloads"), "model", url)(torch.ones(1)).item() == 1.0
        other = server.add("/other.pth", weights(2.0))
        with pytest.raises(errors.LockMismatchError, match="other.pth"):
            session.load(hub("downloads"), "model", other)
        with pytest.raises(errors.LockMismatchError, match="other.pth"):  # whatever the repo makes of it
            session.load(hub("downloads"), "caught", other)
        assert session.load(hub("downloads"), "model", url)(torch.ones(1)).item() == 1.0
    lock.write_text(lock.read_text().replace(digest, "0" * 64))
    with isohub.Session(timeout_s=60, lockfile=lock) as session:
        with pytest.raises(errors.LockMismatchError, match=digest):
            session.load(hub("downloads"), "model", url)


INTERRUPTED = """
import os, signal, sys, threading
sys.path.insert(0, {project!r})
import isohub
from tests.servers.files import Fault, FileServer
with FileServer() as server:
    url = server.add("/w.bin", b"bytes" * 1000)
    fault = server.fail("w.bin", Fault(stall=10), times=1)
    def interrupt():
        fault.stalled.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
    with isohub.Session(timeout_s=60) as session:
        keep = session.load({hub!r}, "places")
        threading.Thread(target=interrupt).start()
        try:
            session.load({hub!r}, "file", url)
        except KeyboardInterrupt:
            print("interrupted")
        fault.resume.set()
        print(len(session.load({hub!r}, "file", url)[0]))
"""


def test_an_interrupted_download_leaves_the_session_usable(hub, cache):
    code = INTERRUPTED.format(project=str(Path(__file__).parents[2]), hub=hub("downloads"))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100)
    assert done.stdout == "interrupted\n5000\n", done.stderr


def test_a_session_closes_while_a_download_stalls(hub, server, cache):
    url = server.add("/w.bin", b"bytes")
    fault = server.fail("w.bin", Fault(stall=2))
    with isohub.Session() as session:
        raised = []

        def work():
            try:
                session.load(hub("downloads"), "file", url)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        assert fault.stalled.wait(60)
        started = time.monotonic()
        session.close()
        thread.join(30)
        took_s = time.monotonic() - started
        fault.resume.set()
    assert len(raised) == 1
    assert isinstance(raised[0], errors.SessionClosedError)
    print(f"closed after {took_s:.2f} s")


# What a second reader found.


def test_a_wish_that_was_given_up_answers_no_other(session, hub, server, cache):
    first, second = server.add("/a.bin", b"A" * 1000), server.add("/b.bin", b"B" * 1000)
    fault = server.fail("a.bin", Fault(stall=10))
    threading.Timer(1.5, fault.resume.set).start()
    assert session.load(hub("downloads"), "mirror", first, second, 0.5) == b"B" * 1000
    assert session.load(hub("downloads"), "file", second)[0] == b"B" * 1000


def test_a_server_that_says_nothing_holds_nobody(hub, cache):
    """Not a byte of an answer: there is nothing yet that could be ended."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/w.bin"
        with isohub.Session(timeout_s=60) as session:
            session.load(hub("downloads"), "places")
            with pytest.raises(errors.WorkerTimeoutError, match="waiting for the download of"):
                session.load(hub("downloads"), "file", url, timeout_s=1)
            kept = session.load(hub("downloads"), "single")
            (worker,) = session.workers()
            threading.Timer(0.5, os.kill, (worker.pid, 9)).start()
            with pytest.raises(errors.WorkerDiedError, match="SIGKILL"):
                session.load(hub("downloads"), "file", url)
            kept.close()
            raised = []

            def work():
                try:
                    session.load(hub("downloads"), "file", url)
                except BaseException as error:
                    raised.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            assert eventually(lambda: len(session.workers()) == 1)
            time.sleep(0.5)
            session.close()
            thread.join(30)
            assert isinstance(raised[0], errors.SessionClosedError)


def test_a_download_within_a_download_is_an_error_and_no_deadlock(session, hub, server, cache):
    url = server.add("/w.bin", b"bytes")
    fault = server.fail(r"w.bin$", Fault(stall=2), times=1)
    threading.Timer(1.5, fault.resume.set).start()
    (said,) = session.load(hub("downloads"), "within_a_download", url)
    assert "within a download" in said


def test_a_directory_of_the_repo_s_holds_what_was_asked_for(session, hub, server, cache):
    urls = [server.add(f"/{place}/model.pth", weights(value)) for place, value in (("a", 1.0), ("b", 2.0))]
    kept = session.load(hub("downloads"), "single")
    assert session.load(hub("downloads"), "in_a_directory", *urls) == [1.0, 2.0]
    assert session.load(hub("downloads"), "in_a_directory", *urls, name="other.pth") == [1.0, 2.0]
    kept.close()


def test_a_repo_that_rewrites_its_file_harms_nobody(session, hub, server, cache, tmp_path):
    import shutil

    url = server.add("/w.pth", weights(1.0))
    other = tmp_path / "other"
    shutil.copytree(hub("downloads"), other)
    assert session.load(other, "model", url)(torch.ones(1)).item() == 1.0
    assert session.load(hub("downloads"), "rewrites", url) == (False, 7.0)
    assert session.load(other, "model", url)(torch.ones(1)).item() == 1.0
    assert session.load(hub("downloads"), "model", url)(torch.ones(1)).item() == 1.0


def test_a_large_file_is_a_link(session, hub, server, cache, monkeypatch):
    from isohub.session import broker

    monkeypatch.setattr(broker, "_LINKED_BYTES_CONFINED", 4)
    url = server.add("/w.bin", b"bytes")
    data, place = session.load(hub("downloads"), "file", url)
    assert data == b"bytes"
    assert place.startswith(str(cache / "weights" / "urls"))


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("hash", "TypeError"),
        ("repo", "TypeError"),
        ("surrogate", "UnicodeEncodeError"),
        ("directory", "IsADirectoryError"),
    ],
)
def test_a_repo_s_mistake_is_its_own(session, hub, cache, kind, raised):
    kept = session.load(hub("downloads"), "single")
    assert session.load(hub("downloads"), "mistake", kind) == raised
    assert kept(torch.ones(1)).shape == (1,)
    kept.close()


def test_what_a_hash_may_be(session, hub, server, cache):
    url = server.add("/w.bin", b"bytes")
    assert session.load(hub("downloads"), "file", url, hash_prefix="")[0] == b"bytes"
    assert session.load(hub("downloads"), "caught", url, hash_prefix="zz")[0] == "RuntimeError"


def test_a_cache_whose_name_is_no_text(hub, server, monkeypatch, tmp_path):
    monkeypatch.setenv("ISOHUB_HOME", os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    from isohub.session import broker

    url = server.add("/w.bin", b"bytes")
    with isohub.Session(timeout_s=60) as session:
        assert session.load(hub("downloads"), "file", url)[0] == b"bytes"
        monkeypatch.setattr(broker, "_LINKED_BYTES_CONFINED", 1)
        assert session.load(hub("downloads"), "file", server.add("/x.bin", b"other"))[0] == b"other"


def test_forks_and_threads_are_bound_where_the_session_is(hub, server, cache, tmp_path):
    url = server.add("/w.bin", b"bytes")
    for options in ({"offline": True}, {"lockfile": tmp_path / "isohub.lock"}):
        with isohub.Session(timeout_s=60, **options) as session:
            assert session.load(hub("downloads"), "in_a_fork", url) == "URLError"
    assert server.count() == 0


def test_an_object_that_the_caller_has_stays_open(session, hub, cache):
    kept = session.load(hub("downloads"), "single")
    state = session.load(hub("downloads"), "single", returns="state_dict")
    assert torch.equal(kept.state_dict()["weight"], state["weight"])
    kept.close()


def test_a_keyword_that_could_be_either_s_is_refused(session, hub, cache):
    for option in ({"seed": 5}, {"device": "cpu"}):
        (name,) = option
        with pytest.raises(TypeError, match=f"{name}= is a parameter of isohub's and of the entrypoint"):
            session.load(hub("downloads"), "late", **option)
    assert session.load(hub("downloads"), "late", entry_kwargs={"seed": 5}) == (5, None, 1)
    assert session.load(hub("downloads"), "late", seed=5, entry_kwargs={}) == (0, None, 1)


def test_two_references_of_one_commit_have_locks_of_their_own(cache, server, tmp_path, monkeypatch):
    import shutil

    from tests.conftest import HUBS

    repo = GitRepo(tmp_path / "repo")
    shutil.copy(HUBS / "downloads" / "hubconf.py", repo.path)
    repo.commit()
    repo.git("branch", "other")
    url, lock = server.add("/m.pth", weights(1.0)), tmp_path / "isohub.lock"
    with isohub.Session(timeout_s=60, lockfile=lock) as session:
        handles = [session.load(f"{repo.path}:{ref}", "model", url) for ref in ("main", "other")]
        assert len(handles) == len(session.workers()) == 2
    assert lock.read_text().count(hashlib.sha256(weights(1.0)).hexdigest()) == 2
    with isohub.Session(timeout_s=60, lockfile=lock, frozen=True) as session:
        assert session.load(f"{repo.path}:other", "model", url)(torch.ones(1)).item() == 1.0


def test_weights_that_lie_do_not_pass_a_lock(hub, server, cache, tmp_path):
    import msgspec

    from isohub.repos.blobs import Stamp
    from isohub.repos.records import read_record, write_record
    from isohub.repos.weights_entry import WeightsEntry

    url, lock = server.add("/m.pth", weights(1.0)), tmp_path / "isohub.lock"
    with isohub.Session(timeout_s=60, lockfile=lock) as session:
        session.load(hub("downloads"), "model", url)
    (entry,) = cache.rglob("entry.json")
    file = entry.parent / "m.pth"
    file.unlink()
    file.write_bytes(weights(666.0))
    record = read_record(entry, WeightsEntry)
    assert record is not None
    write_record(entry, msgspec.structs.replace(record, stamp=Stamp.of(file.lstat())))
    with isohub.Session(timeout_s=60, offline=True) as session:  # the control: the entry is believed
        assert session.load(hub("downloads"), "model", url)(torch.ones(1)).item() == 666.0
    with isohub.Session(timeout_s=60, lockfile=lock, frozen=True, offline=True) as session:
        with pytest.raises(errors.LockMismatchError):
            session.load(hub("downloads"), "model", url)


def test_a_forced_load_runs_what_was_fetched_and_keeps_what_others_use(cache, tmp_path, monkeypatch):
    repo = GitRepo(tmp_path / "repo")
    repo.commit(
        {
            "hubconf.py": "def model():\n    import late\n    return late.VALUE\nclass Later:\n    def value(self):\n        import other\n        return other.VALUE\ndef later():\n    return Later()\n",
            "late.py": "VALUE = 'good'\n",
            "other.py": "VALUE = 'other'\n",
        }
    )
    with GitHubServer() as github, isohub.Session(timeout_s=60) as session:
        for name, value in github.environment.items():
            monkeypatch.setenv(name, value)
        github.add("o", "r", repo)
        checkout = session.fetch("o/r")
        damaged = checkout.path / "late.py"
        damaged.chmod(0o644)
        damaged.write_text("VALUE = 'evil'\n")
        kept = session.load("o/r", "later")
        assert session.load("o/r", "model") == "evil"
        assert session.load("o/r", "model", force_reload=True) == "good"
        from isohub.repos.disk import claim

        with pytest.raises(BlockingIOError):  # by the worker of the tree that was put aside
            claim(checkout.path.parent)
        assert kept.value() == "other"
        del kept
        gc.collect()
        assert eventually(lambda: not session.workers())
        session.fetch("o/r", force_reload=True)
        descriptor = claim(checkout.path.parent)
        assert descriptor is not None
        os.close(descriptor)


def test_a_thousand_downloads_leave_nothing(session, hub, server, cache):
    for number in range(4):
        server.add(f"/w{number}", b"%d" % number)
    kept = session.load(hub("downloads"), "single")
    session.load(hub("downloads"), "in_threads", f"{server.url}/w", 4)
    before, threads = open_descriptors(), threading.active_count()
    for _ in range(250):
        session.load(hub("downloads"), "in_threads", f"{server.url}/w", 4)
    assert open_descriptors() <= before
    assert eventually(lambda: threading.active_count() <= threads)
    kept.close()
