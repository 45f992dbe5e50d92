"""C14 to C17: what is brought on a worker's word, and with whose credentials. Each attack has its control."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

import isohub
from isohub import errors
from isohub.errors import ProtocolError
from isohub.repos.credentials import Credentials
from isohub.repos.pins import Pin
from isohub.repos.reference import parse
from isohub.repos.store import Store
from isohub.sandbox.hosts import WEIGHT_HOSTS, HostPolicy
from isohub.session.broker import Broker
from tests.attacks.liar import COMMIT, Liar, frame, value
from tests.conftest import HUBS, open_descriptors
from tests.servers.files import Fault, FileServer
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer


@pytest.fixture
def liar():
    with Liar() as made:
        yield made


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOHUB_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "cache"


@pytest.fixture
def server():
    with FileServer() as made:
        yield made


def wish(address="http://127.0.0.1:1/x", number=1, **changes):
    return {
        "event": "want", "number": number, "wish": 1, "what": "file", "address": address, "hash_prefix": None, "progress": False,
        **changes,
    }  # fmt: skip


def equip(liar, cache, *hosts):
    """As `Session` does it, with hosts that the policy names besides the well-known ones."""
    policy = HostPolicy((*WEIGHT_HOSTS, *hosts))
    liar.worker.equip(Broker(cache, Pin(parse(str(HUBS / "good")), COMMIT), offline=False, lockfile=None, hosts=policy))


def test_c14_a_wish_within_a_question_is_answered(liar, cache, server):
    """The control: the same frames, in turn, bring the file and then the answer is taken."""
    equip(liar, cache, server.host)
    url = server.add("/w.bin", b"bytes")
    answers = frame(wish(url)) + frame(wish(f"{server.url}/none")) + frame(value(["l", 1]))
    assert liar.answer(answers) == [1]
    assert server.count("w.bin") == 1
    assert liar.worker.alive


@pytest.mark.parametrize(
    "lie",
    [
        wish(number=2),
        wish(number=0),
        wish(wish="1"),
        wish(wish=None),
        wish(what="directory"),
        wish(what="file:///etc/passwd"),
        wish(address=7),
        wish(address=None),
        wish(address=["http://127.0.0.1/"]),
        wish(hash_prefix=1),
        wish(progress="yes"),
        wish(path="/etc/passwd"),
        {"event": "give", "number": 1, "path": "/etc/passwd", "error": None},
        {"event": "want", "number": 1},
    ],
)
def test_c14_a_wish_that_is_none_ends_the_worker(liar, cache, lie):
    equip(liar, cache)
    with pytest.raises(ProtocolError):
        liar.answer(frame(lie))
    assert not liar.worker.alive
    assert not cache.exists()


def test_c14_a_wish_with_descriptors_ends_the_worker(liar, cache):
    equip(liar, cache)
    descriptor = os.open(os.devnull, os.O_RDONLY)
    before = open_descriptors()
    with pytest.raises(ProtocolError):
        liar.answer(frame(wish(), 1), descriptors=[descriptor])
    os.close(descriptor)
    assert open_descriptors() < before


def test_c14_a_wish_that_no_question_allows_ends_the_worker(liar, cache, server):
    equip(liar, cache, server.host)
    url = server.add("/w.bin", b"bytes")
    assert liar.answer(frame(value(["l"]))) == []
    liar.end.sendall(frame(wish(url)))
    with pytest.raises(ProtocolError):
        liar.answer(frame(value(["l"], number=2)))
    assert server.count() == 0


def test_c14_a_worker_without_a_broker_gets_nothing(liar, server):
    url = server.add("/w.bin", b"bytes")
    assert liar.answer(frame(wish(url)) + frame(value(["l"]))) == []
    assert server.count() == 0


@pytest.mark.parametrize(
    "address",
    ["file:///etc/passwd", "/etc/passwd", "ftp://127.0.0.1/x", "http:///x", "", "http://[", "data:,x", "x" * 10_000],
)
def test_c14_only_addresses_of_the_web_are_brought(liar, cache, address):
    equip(liar, cache)
    assert liar.answer(frame(wish(address)) + frame(value(["l"]))) == []
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize(
    "address",
    ["./", "../x", "/", "~", "git+file:///", "https://127.0.0.1:1/a/b", "a/b:../../x", "git@host:a/b", "a//b"],
)
def test_c14_a_nested_repo_is_one_of_the_github_server_s(liar, cache, address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_SERVER_URL", "http://127.0.0.1:1")
    (tmp_path / "a" / "b").mkdir(parents=True)
    equip(liar, cache)
    assert liar.answer(frame(wish(address, what="repo")) + frame(value(["l"]))) == []
    assert liar.worker.alive


def test_c14_no_credentials_go_along_with_a_wish(liar, cache, server, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    monkeypatch.setenv("GITHUB_SERVER_URL", server.url)
    equip(liar, cache, server.host)
    url = server.add("/w.bin", b"bytes")
    server.fail("w.bin", Fault(status=401), times=1)
    liar.answer(frame(wish(url)) + frame(wish(url)) + frame(value(["l"])))
    names = {name.lower() for request in server.requests for name in request.headers}
    assert "authorization" not in names
    isohub.download_url_to_file(url, tmp_path / "w.bin", progress=False)  # the control: his own word
    assert "authorization" in {name.lower() for name in server.requests[-1].headers}


def test_c14_a_wish_goes_to_the_hosts_that_the_policy_names_and_to_no_other(liar, cache, server, caplog):
    """By name, by number, by a redirect, by a name that leads home, and from the cache."""
    equip(liar, cache, server.host)
    url = server.add("/w.bin", b"bytes")
    with FileServer(host="127.0.0.2") as other:
        theirs = other.add("/w.bin", b"theirs")
        server.fail("away", Fault(redirect=theirs))
        addresses = [
            theirs,
            f"{server.url}/away",
            url.replace("127.0.0.1", "localhost"),
            "http://169.254.169.254/latest/meta-data/",
        ]
        with caplog.at_level("INFO", logger="isohub.network"):
            answers = b"".join(frame(wish(address)) for address in [*addresses, url])
            assert liar.answer(answers + frame(value(["l", 1]))) == [1]
        assert other.count() == 0
        assert server.count("w.bin") == 1  # the control
        refused = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [text.partition("refused: ")[2].split(" ")[0] for text in refused] == [
            other.host, other.host, f"localhost:{server.host.rpartition(':')[2]}", "169.254.169.254",
        ]  # fmt: skip
        with Liar() as second:  # what is here already, for whom nothing is allowed
            second.worker.equip(
                Broker(cache, Pin(parse(str(HUBS / "good")), COMMIT), offline=True, lockfile=None, hosts=HostPolicy(()))
            )
            caplog.clear()
            second.answer(frame(wish(url)) + frame(value(["l"])))
            assert "refused" in caplog.text
    assert liar.worker.alive


def test_c14_a_private_repo_in_the_cache_is_not_handed_over(cache, monkeypatch, tmp_path):
    repo = GitRepo(tmp_path / "private")
    repo.commit({"hubconf.py": "def model():\n    return 'secret'\n"})
    with GitHubServer() as github:
        for name, text in github.environment.items():
            monkeypatch.setenv(name, text)
        github.add("my", "secrets", repo)
        github.token = "mine"
        monkeypatch.setenv("GITHUB_TOKEN", "mine")
        mine = isohub.fetch("my/secrets")
        anonymous = Store(cache, credentials=Credentials(anonymous=True))
        for ref in ("", ":main", f":{mine.commit}", f":{mine.commit[:8]}"):
            for store in (anonymous, Store(cache, offline=True, credentials=Credentials(anonymous=True))):
                with pytest.raises(errors.FetchError):
                    store.fetch(store.resolve(parse(f"my/secrets{ref}", "github")))
        github.token = None
        assert anonymous.fetch(anonymous.resolve(parse("my/secrets", "github"))).path == mine.path  # the control


def test_c15_tokens_stay_with_their_server_and_out_of_everything(tmp_path, monkeypatch, caplog, hub):
    """Refs, archives, redirects, errors, logs, the processes' lists of arguments, and what workers see."""
    secret = "ghp_" + "s3cr3t" * 6
    cache = tmp_path / "cache"
    monkeypatch.setenv("ISOHUB_HOME", str(cache))
    monkeypatch.setenv("GITHUB_TOKEN", secret)
    repo = GitRepo(tmp_path / "repo")
    repo.commit({"hubconf.py": "import os\ndef model():\n    return dict(os.environ)\n"})
    with GitHubServer() as github, FileServer(host="127.0.0.2") as elsewhere, caplog.at_level("DEBUG"):
        for name, text in github.environment.items():
            monkeypatch.setenv(name, text)
        github.add("o", "r", repo)
        github.token = secret
        with isohub.Session(timeout_s=60) as session:
            assert secret not in str(session.load("o/r", "model"))
            processes = {worker.pid for worker in session.workers()} | {os.getpid()}
            for pid in processes:
                assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert any("Authorization" in request.headers for request in github.requests)  # the control
        from tests.servers.github import Fault as GitHubFault

        elsewhere.add("/archive.zip", b"no zip")
        github.fail("/archive/", GitHubFault(redirect=f"{elsewhere.url}/archive.zip"))
        repo.commit({"hubconf.py": "def model():\n    return 1\n"})
        with pytest.raises(errors.FetchError) as caught:
            isohub.fetch("o/r")
        assert elsewhere.requests
        assert not any("authorization" in {n.lower() for n in request.headers} for request in elsewhere.requests)
        assert secret not in str(caught.value)
        github.behave()
        github.token = "another"
        with pytest.raises(errors.FetchError) as caught:
            isohub.fetch("o/r", force_reload=True)
        assert secret not in str(caught.value) + repr(caught.value) + str(caught.value.fields)
    import base64

    basic = base64.b64encode(f"x-access-token:{secret}".encode()).decode()
    for found in (secret, basic):
        assert found not in caplog.text
        assert not any(found.encode() in path.read_bytes() for path in cache.rglob("*") if path.is_file())


def test_c16_what_a_lockfile_names_is_what_comes_or_nothing(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("ISOHUB_HOME", str(cache))
    repo = GitRepo(tmp_path / "repo")
    repo.commit({"hubconf.py": "def model():\n    return 'good'\n"})
    lock = tmp_path / "isohub.lock"
    with GitHubServer() as github:
        for name, text in github.environment.items():
            monkeypatch.setenv(name, text)
        github.add("o", "r", repo)
        with isohub.Session(timeout_s=60, lockfile=lock) as session:
            assert session.load("o/r:main", "model") == "good"
            checkout = session.fetch("o/r:main")
            repo.commit({"hubconf.py": "def model():\n    return 'evil'\n"})
            assert session.load("o/r:main", "model") == "good"  # the branch moved, the lock did not
            hubconf = checkout.path / "hubconf.py"
            hubconf.chmod(0o644)
            hubconf.write_text("def model():\n    return 'evil'\n")
            with pytest.raises(errors.LockMismatchError):
                session.load("o/r:main", "model")
        # The server serves another tree under the same commit.
        from isohub.repos.disk import remove_tree

        remove_tree(cache / "checkouts")
        evil = GitRepo(tmp_path / "evil")
        evil.commit({"hubconf.py": "def model():\n    return 'evil'\n"})
        archive = evil.path / "a.zip"
        evil.git("archive", "--format=zip", "--prefix=r/", f"--output={archive}", "HEAD^{tree}")
        with zipfile.ZipFile(archive, "a") as opened:
            opened.comment = checkout.commit.encode()
        repo.tag("v1", checkout.commit)
        from tests.servers.github import Fault as GitHubFault

        github.fail("/archive/", GitHubFault(status=200, body=archive.read_bytes()))
        with isohub.Session(timeout_s=60, lockfile=lock, frozen=True) as session:
            assert session.load("o/r:main", "model") == "good"  # the commit's own hash says that the archive lies
        remove_tree(cache / "checkouts")
        github.fail("/git-upload-pack$", GitHubFault(status=404))  # nobody says so
        with isohub.Session(timeout_s=60, lockfile=lock, frozen=True) as session:
            with pytest.raises(errors.LockMismatchError, match=checkout.tree):
                session.load("o/r:main", "model")
        with isohub.Session(timeout_s=60) as session:  # the control: without a lock a server is believed
            remove_tree(cache / "checkouts")
            assert session.load("o/r:v1", "model") == "evil"


def test_c17_a_checkpoint_is_data_unless_the_caller_says_otherwise(tmp_path, monkeypatch, server, cache):
    import io

    import torch

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    stream = io.BytesIO()
    torch.save({"weight": Bomb()}, stream)
    url = server.add("/bomb.pth", stream.getvalue())
    for options in ({}, {"model_dir": tmp_path}, {"file_name": "other.pth"}):
        with pytest.raises(errors.IntegrityError, match="weights_only"):
            isohub.load_state_dict_from_url(url, progress=False, **options)
    assert not (tmp_path / "exploded").exists()
    isohub.load_state_dict_from_url(url, progress=False, weights_only=False)  # the control
    assert (tmp_path / "exploded").exists()


def test_c11_trust_in_a_repo_is_not_trust_in_a_pull_request(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOHUB_HOME", str(tmp_path / "cache"))
    model = "import torch\ndef model():\n    return torch.nn.Linear(1, 1)\n"
    repo = GitRepo(tmp_path / "repo")
    repo.commit({"hubconf.py": model})
    theirs = repo.orphan({"hubconf.py": model + "# theirs\n"}, parent=repo.sha())
    repo.ref("refs/pull/1/head", theirs)
    with GitHubServer() as github, isohub.Session(timeout_s=60) as session:
        for name, text in github.environment.items():
            monkeypatch.setenv(name, text)
        github.add("o", "r", repo)
        session.trust("o/r")
        assert session.load("o/r", "model", returns="torchscript") is not None  # the control
        for reference, options in (("o/r:pull/1", {}), (f"o/r:{theirs}", {"skip_validation": True})):
            with pytest.raises(errors.UntrustedRepoError, match="not trusted"):
                session.load(reference, "model", returns="torchscript", **options)
        session.trust(f"o/r:{theirs}")
        assert session.load("o/r:pull/1", "model", returns="torchscript") is not None
        session.untrust("o/r")
        assert session.load("o/r:pull/1", "model", returns="torchscript", trust_repo=True) is not None
        assert session.trusted() == [f"{github.host}/o/r@{theirs}"]  # and not the whole repo
