"""What a repo asks torch.hub for, the caller brings: in real workers, from real servers."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import os
import select
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
from isohub.repos.pins import Pin
from isohub.repos.reference import parse
from isohub.sandbox.hosts import HostPolicy
from isohub.session.broker import Broker
from isohub.session.replies import Want
from tests.conftest import eventually, open_descriptors
from tests.servers.files import Fault, FileServer
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer
from tests.servers.proxy import ProxyServer
from tests.servers.tls import authority

pytestmark = pytest.mark.usefixtures("loopback_weights")


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
    place = tmp_path / "place"
    place.mkdir()
    writing = isohub.Sandbox(write=[place])
    session.load(hub("downloads"), "into", url, str(place / "here.bin"), sandbox=writing)
    assert (place / "here.bin").read_bytes() == b"bytes"
    assert os.listdir(place) == ["here.bin"]
    with pytest.raises(FileNotFoundError):
        session.load(hub("downloads"), "into", url, str(place / "none" / "here.bin"), sandbox=writing)


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


def test_a_cancelled_task_does_not_wait_for_a_download(session, hub, server, cache):
    url = server.add("/w.bin", b"bytes" * 1000)
    fault = server.fail("w.bin", Fault(stall=30), times=1)
    handle = session.load(hub("good"), "mlp", seed=1)

    def maker(module):
        def bring(url):
            import torch as remote_torch

            remote_torch.hub.download_url_to_file(url, "w.bin", progress=False)
            return "brought"

        return bring

    bring = handle.run(maker)

    async def work():
        task = asyncio.ensure_future(bring.call_async(url))
        while not fault.stalled.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert eventually(lambda: not handle._isohub.worker.busy, within_s=5)
    assert handle(torch.ones(1, 4)).shape == (1, 2)  # the server still says nothing
    fault.resume.set()
    assert bring(url) == "brought"


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


def bring(broker, url, hash_prefix=None):
    """What a worker's wish brings: the bytes, or the error."""
    errand = broker.send(Want(1, "file", url, hash_prefix, False), verbose=False)
    assert select.select([errand], [], [], 30)[0]
    given = errand.take()
    if given.error is not None:
        return given.error
    with os.fdopen(given.descriptor, "rb") as stream:
        return stream.read()


@pytest.fixture
def broker(cache, tmp_path):
    """Makes brokers, for workers of a repo."""
    made = []

    def make(*hosts, repo=None, **options):
        pin = Pin(parse(str(tmp_path) if repo is None else repo), "0" * 40)
        options = {"offline": False, "lockfile": None, "hosts": HostPolicy(hosts), **options}
        made.append(Broker(cache, pin, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def resolver(monkeypatch, **names):
    """Answers for these names, with underscores for dots; gives what was asked."""
    asked, real = [], socket.getaddrinfo

    def answer(host, port, *args, **kwargs):
        if host.replace(".", "_") not in names:
            return real(host, port, *args, **kwargs)
        asked.append(host)
        addresses = names[host.replace(".", "_")]
        if callable(addresses):
            addresses = addresses()
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


def port_of(server):
    return int(server.host.rpartition(":")[2])


def test_a_host_that_the_policy_names_is_asked_and_no_other(broker, server, caplog):
    url = server.add("/w.bin", b"bytes")
    with caplog.at_level("INFO", logger="isohub.network"):
        for policy in ((), ("127.0.0.1",), ("127.0.0.2",), (f"127.0.0.1:{port_of(server) - 1}",), ("a.example",)):
            error = bring(broker(*policy), url)
            assert (error["kind"], error["status"]) == ("network", None)
            assert server.host in error["message"] or "127.0.0.1 for the ports 80 and 443" in error["message"]
            assert "network policy" in error["message"]
            assert f"hint: if this repo may have it: isohub.Sandbox(network=['{server.host}'])" in error["message"]
        assert {record.levelname for record in caplog.records} == {"WARNING"}
        assert server.count() == 0
        caplog.clear()
        assert bring(broker(server.host), url) == b"bytes"
        assert {record.levelname for record in caplog.records} == {"INFO"}
        assert f"{server.host} is allowed by {server.host}" in caplog.text


def test_the_well_known_hosts_are_the_default(broker, server, cache, tmp_path, monkeypatch):
    made = Broker(cache, Pin(parse(str(tmp_path)), "0" * 40), offline=False, lockfile=None)
    asked = resolver(monkeypatch, huggingface_co=["127.0.0.1"], elsewhere_example=["127.0.0.1"])
    assert "elsewhere.example is not named" in bring(made, "http://elsewhere.example/w.bin")["message"]
    assert "huggingface.co leads to 127.0.0.1, a loopback address" in bring(made, "http://huggingface.co/w")["message"]
    assert asked == ["huggingface.co"]  # nobody was asked for a name that is not allowed
    made.close()


def test_what_the_worker_s_repo_sees_is_an_error_of_urllib_s(session, hub, server, cache):
    url = server.add("/w.bin", b"bytes")
    kind, message, code = session.load(hub("downloads"), "caught", url.replace("127.0.0.1", "localhost"))
    assert (kind, code) == ("URLError", None)
    assert "isohub.Sandbox(network=['localhost:" in message
    assert server.count() == 0


def test_each_hop_is_checked(broker, server):
    with FileServer(host="127.0.0.2") as second, FileServer(host="127.0.0.3") as third:
        third.add("/w.bin", b"bytes")
        server.fail("", Fault(redirect=second.url + "{path}"))
        second.fail("", Fault(redirect=third.url + "{path}"))
        url = f"{server.url}/w.bin"
        assert f"{second.host} is not named" in bring(broker(server.host, third.host), url)["message"]
        assert second.count() == third.count() == 0
        assert f"{third.host} is not named" in bring(broker(server.host, second.host), url)["message"]
        assert third.count() == 0
        assert bring(broker(server.host, second.host, third.host), url) == b"bytes"


@pytest.mark.parametrize(
    "where",
    ["//{other}/w", "http://{own}@{other}/w", "http://{other}\\@{own}/w", "http://{own}#@{other}/w", "HTTP://{other}/w",
     "http://{other}./w", "http://2130706434:{port}/w", "http://0x7f.2:{port}/w", "http://127.2:{port}/w",
     "http://0177.0.0.2:{port}/w", "http://[::ffff:127.0.0.2]:{port}/w", "http://%31%32%37.0.0.2:{port}/w",
     "http://\uff11\uff12\uff17.0.0.2:{port}/w", "ftp://{other}/w", "file:///etc/passwd", "http:///w", "http://{other}:/w"],
)  # fmt: skip
def test_a_redirect_in_another_spelling_leads_nowhere(broker, server, where):
    with FileServer(host="127.0.0.2") as other:
        url, port = other.add("/w", b"theirs"), port_of(other)
        location = where.format(own=server.host, other=other.host, port=port)
        server.fail("", Fault(redirect=location.encode().decode("latin-1")))
        answer = bring(broker(server.host), f"{server.url}/w.bin")
        assert isinstance(answer, dict), answer
        assert other.count() == 0
        assert bring(broker(other.host), url) == b"theirs"  # the control


def test_the_address_that_was_checked_is_the_one_that_is_asked(broker, server, monkeypatch):
    """DNS rebinding: a second answer would be another one."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])
    asked = resolver(monkeypatch, weights_example=lambda: next(answers))
    server.add("/w.bin", b"bytes")
    url = f"http://weights.example:{port_of(server)}/w.bin"
    name = f"weights.example:{port_of(server)}"
    assert bring(broker(name, server.host), url) == b"bytes"
    assert asked == ["weights.example"]
    assert server.requests[-1].headers["Host"] == name
    with FileServer(host="127.0.0.2") as other:
        error = bring(broker(name, server.host), f"{url}?again")
        assert "leads to 127.0.0.2, a loopback address" in error["message"]
        assert f"isohub.Sandbox(network=['127.0.0.2:{port_of(server)}'])" in error["message"]
        assert other.count() == 0


def test_of_several_addresses_those_that_are_allowed_are_tried(broker, server, monkeypatch, caplog):
    resolver(monkeypatch, weights_example=["10.255.255.1", "::1", "127.0.0.3", "127.0.0.1"])
    server.add("/w.bin", b"bytes")
    name, port = f"weights.example:{port_of(server)}", port_of(server)
    with caplog.at_level("INFO", logger="isohub.network"):
        assert bring(broker(name, f"127.0.0.3:{port}", server.host), f"http://{name}/w.bin") == b"bytes"
    assert f"{name} is at 127.0.0.3, 127.0.0.1" in caplog.text  # the first of them refuses the connection
    assert "a private address" in bring(broker(name), f"http://{name}/x.bin")["message"]


def test_tls_is_with_the_name_that_the_url_has(broker, cache, tmp_path, monkeypatch):
    path, context = authority(tmp_path / "ca")
    names = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with FileServer(tls=context) as server:
        server.add("/w.bin", b"bytes")
        port = port_of(server)
        resolver(monkeypatch, weights_example=["127.0.0.1"])
        hosts = [server.host, f"localhost:{port}", f"weights.example:{port}"]
        assert bring(broker(*hosts), f"https://localhost:{port}/w.bin") == b"bytes"
        assert names == ["localhost"]
        assert server.requests[-1].headers["Host"] == f"localhost:{port}"
        # The certificate is not for this name, whatever address it has.
        assert "certificate" in bring(broker(*hosts), f"https://weights.example:{port}/w.bin")["message"]


def test_the_server_that_the_repo_came_from_is_allowed(broker, server, monkeypatch):
    monkeypatch.setenv("GITHUB_SERVER_URL", server.url)
    url = server.add("/o/r/releases/w.bin", b"bytes")
    made = broker(repo="o/r")
    assert bring(made, url) == b"bytes"
    localhost = url.replace("127.0.0.1", "localhost")
    with FileServer() as other:
        theirs = other.add("/w.bin", b"theirs")
        server.fail("away", Fault(redirect=theirs))
        for address in (theirs, localhost, url.replace("http:", "https:"), f"{server.url}/away"):
            assert "not named by the network policy" in bring(made, address)["message"]
        assert other.count() == 0
    assert bring(broker(repo=f"git+{server.url}/o/r"), f"{url}?git") == b"bytes"
    monkeypatch.setenv("GITHUB_SERVER_URL", f"http://localhost:{port_of(server)}")  # by a name: at whatever address
    assert bring(broker(repo="o/r"), localhost) == b"bytes"


def test_what_is_in_the_store_obeys_the_policy(broker, server):
    url = server.add("/w.bin", b"bytes")
    assert bring(broker(server.host), url) == b"bytes"
    for options in ({}, {"offline": True}):
        assert "not named" in bring(broker("a.example", **options), url)["message"]
        assert bring(broker(server.host, **options), url) == b"bytes"
    assert server.count() == 1


def test_a_file_of_torch_hub_s_obeys_the_policy(broker, server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    digest = hashlib.sha256(b"bytes").hexdigest()
    (checkpoints / f"w-{digest[:8]}.bin").write_bytes(b"bytes")
    url = f"{server.url}/w-{digest[:8]}.bin"
    assert "not named" in bring(broker(), url, digest[:8])["message"]
    assert bring(broker(server.host), url, digest[:8]) == b"bytes"
    assert server.count() == 0


def test_names_of_other_scripts_are_compared_as_they_are_asked(broker, server, monkeypatch):
    asked = resolver(monkeypatch, **{"xn--bcher-kva_example": ["127.0.0.1"]})
    server.add("/w.bin", b"bytes")
    url = f"http://xn--bcher-kva.example:{port_of(server)}/w.bin"
    assert "xn--bcher-kva.example" in bring(broker("bucher.example"), url)["message"]
    assert asked == []
    assert bring(broker(f"b\u00fccher.example:{port_of(server)}", server.host), url) == b"bytes"
    assert asked == ["xn--bcher-kva.example"]
    assert (
        "no URL" in bring(broker("b\u00fccher.example"), "http://b\u00fccher.example/")["message"]
    )  # no URL of a file


def test_a_name_that_has_no_address_is_a_failure_like_others(broker, server, monkeypatch):
    def nobody(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    resolver(monkeypatch, nobody_example=nobody, nowhere_example=list)
    assert "Name or service not known" in bring(broker("nobody.example"), "http://nobody.example/w")["message"]
    assert "nowhere.example has no address" in bring(broker("nowhere.example"), "http://nowhere.example/w")["message"]


def test_behind_a_proxy_names_are_checked_and_addresses_are_the_proxy_s(broker, server, monkeypatch):
    asked = resolver(monkeypatch, weights_example=["127.0.0.1"])
    url = server.add("/w.bin", b"bytes")
    with ProxyServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        assert "not named" in bring(broker(), url)["message"]
        assert proxy.requests == []
        name = f"weights.example:{port_of(server)}"
        assert bring(broker(name), f"http://{name}/w.bin") == b"bytes"  # though it is at a loopback address
        assert proxy.requests == [f"GET http://{name}/w.bin"]
        server.fail("away", Fault(redirect="http://elsewhere.example/"))
        assert "elsewhere.example is not named" in bring(broker(name), f"http://{name}/away")["message"]
        assert len(proxy.requests) == 2
        monkeypatch.setenv("no_proxy", "weights.example")
        assert "a loopback address" in bring(broker(name), f"http://{name}/w.bin?direct")["message"]
    assert asked


def test_what_is_logged_cannot_move_a_cursor(broker, caplog):
    with caplog.at_level("INFO", logger="isohub.network"):
        for address in ("http://a\x1b[2J.example/", "http://a\u202e.example/", "http://\u200b/"):
            assert isinstance(bring(broker("a.example"), address), dict)
    assert all(record.getMessage().isprintable() for record in caplog.records)
