from __future__ import annotations

import getpass
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isohub.errors import SourceUnavailableError
from isohub.repos.pins import Pin
from isohub.repos.reference import parse
from isohub.repos.sources import source_for, ssh
from isohub.repos.sources.ssh import SshAddress, SshRemote, is_ssh, parse_ssh
from tests.conftest import eventually, gone
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer

# Stands in for ssh: keeps what it was given, and does on this machine what a server would do.
FAKE = """
import json, os, subprocess, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
arguments = sys.argv[1:]
destination, asked = arguments[arguments.index("--") + 1:]
assert os.getsid(0) == os.getpid()
try:
    os.open("/dev/tty", os.O_RDWR)
except OSError:
    pass
else:
    sys.exit("there is a terminal to ask on")
assert "GIT_PROTOCOL" not in os.environ
if asked.startswith("git-lfs-authenticate "):
    print(os.environ["FAKE_LFS"])
    sys.exit()
environment = dict(os.environ, GIT_CONFIG_GLOBAL="/dev/null", GIT_CONFIG_NOSYSTEM="1")
sys.exit(subprocess.call(["sh", "-c", asked], env=environment))
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stand-in for ssh was called with, a line a call."""
    path, program = tmp_path / "ssh.log", tmp_path / "fake ssh.py"
    program.write_text(FAKE.format(log=str(path)))
    monkeypatch.setenv("GIT_SSH_COMMAND", shlex.join([sys.executable, str(program)]))
    monkeypatch.setenv("GIT_PROTOCOL", "version=2")
    return path


def calls(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def repo(git_repo: Callable[..., GitRepo]) -> GitRepo:
    made = git_repo("it's a !repo")
    made.commit({"hubconf.py": "one\n"}, "one")
    made.tag("v1", annotated=True)
    made.commit({"hubconf.py": "two\n", "big.bin": os.urandom(300_000)}, "two")
    return made


def address_of(repo: GitRepo, host: str = "git@example.org") -> str:
    return parse(f"ssh://{host}{repo.path}").location


def pin_of(text: str, *extras: str) -> Pin:
    reference = parse(text)
    pin = source_for(reference).resolve(reference)
    return Pin(reference, pin.commit, pin.ref_name, pin.validated, extras)


def fetch(pin: Pin, tmp_path: Path, name: str = "into") -> Path:
    into = tmp_path / "staging" / name
    into.mkdir(parents=True)
    source_for(pin.reference).fetch(pin, into)
    return into


# Addresses.


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ssh://git@h/o/r.git", SshAddress("git", "h", None, "/o/r.git")),
        ("ssh://h:2222/o/r%20x", SshAddress(None, "h", 2222, "/o/r x")),
        ("ssh://h/~me/r", SshAddress(None, "h", None, "~me/r")),
        ("ssh://me@[::1]:22/r", SshAddress("me", "::1", 22, "/r")),
        ("git@h:o/r.git", SshAddress("git", "h", None, "o/r.git")),
        ("h:/abs/r", SshAddress(None, "h", None, "/abs/r")),
        ("me@[::1]:r", SshAddress("me", "::1", None, "r")),
    ],
)
def test_addresses(text: str, found: SshAddress) -> None:
    assert is_ssh(text)
    assert parse_ssh(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "ssh://-oProxyCommand=touch%20x/r",
        "ssh://-oProxyCommand=x@h/r",
        "ssh://me@-h/r",
        "ssh://$(id)@h/r",
        "ssh://`id`/r",
        "ssh://h;id/r",
        "ssh://me:secret@h/r",
        "ssh://h%00/r",
        "ssh://h:-1/r",
        "ssh://h:0/r",
        "ssh://h:99999/r",
        "ssh://h/~-x/%0a",
        "ssh://h/a%00b",
        "ssh://h/\x1b",
        "ssh:///r",
        "-oProxyCommand=id:r",
        "git@h:-r",
        "git@-h:r",
        "ssh://h",
    ],
)
def test_addresses_that_would_be_something_else(text: str, log: Path) -> None:
    with pytest.raises(SourceUnavailableError) as caught:
        SshRemote(text)
    assert caught.value.message.isprintable()
    assert not log.exists()


@pytest.mark.parametrize("text", ["https://h/o/r", "/a:b", "./a:b", "file:///x", "a/b:c", "ext::sh", "h:"])
def test_what_is_no_ssh_address(text: str) -> None:
    assert not is_ssh(text)


# What is run.


def test_what_ssh_is_given(repo: GitRepo, log: Path, tmp_path: Path) -> None:
    pin = pin_of(f"{address_of(repo, 'git@example.org:2222')}@v1")
    assert (pin.commit, pin.ref_name) == (repo.sha("v1^{commit}"), "refs/tags/v1")
    assert (fetch(pin, tmp_path) / "hubconf.py").read_text() == "one\n"
    first, second = calls(log)
    assert first == second
    path = str(repo.path).replace("'", "'\\''").replace("!", "'\\!'")
    assert first == [
        *("-a", "-x", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
        *("-o", "ClearAllForwardings=yes", "-o", "PermitLocalCommand=no"),
        *("-p", "2222", "--", "git@example.org", f"git-upload-pack '{path}'"),
    ]


def test_shas_and_forms(repo: GitRepo, log: Path, tmp_path: Path) -> None:
    location = address_of(repo)
    old = repo.sha("main~1")
    for ref in (old, old[:8]):
        assert pin_of(f"{location}@{ref}").commit == old
    assert pin_of(f"git+{location}@main").commit == repo.sha("main")
    for number, able in enumerate(("true", "false")):
        repo.git("config", "uploadpack.allowReachableSHA1InWant", able)
        assert (fetch(pin_of(f"{location}@{old}"), tmp_path, str(number)) / "hubconf.py").read_text() == "one\n"
    whole = fetch(pin_of(f"{location}@main"), tmp_path)
    assert (whole / "big.bin").read_bytes() == (repo.path / "big.bin").read_bytes()


def test_no_setting_of_a_repository_chooses_the_program(
    repo: GitRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.git("config", "core.sshCommand", f"touch {tmp_path / 'ran'}; false")
    monkeypatch.chdir(repo.path)
    monkeypatch.setenv("GIT_SSH", str(tmp_path / "no such program"))
    with pytest.raises(SourceUnavailableError, match="no such program' cannot be run") as caught:
        pin_of("git@example.org:o/r")
    assert "GIT_SSH_COMMAND" in (caught.value.hint or "")
    monkeypatch.setenv("GIT_SSH_COMMAND", "'open")
    with pytest.raises(SourceUnavailableError, match="cannot be split"):
        pin_of("git@example.org:o/r")
    assert not (tmp_path / "ran").exists()


def test_submodules_over_ssh(git_repo: Callable[..., GitRepo], log: Path, tmp_path: Path) -> None:
    leaf, top = git_repo("leaf"), git_repo("top")
    leaf.commit({"name.txt": "leaf"})
    top.git("update-index", "--add", "--cacheinfo", f"160000,{leaf.sha()},sub")
    (top.path / ".gitmodules").write_text('[submodule "s"]\n\tpath = sub\n\turl = ../leaf\n')
    top.git("add", ".gitmodules")
    top.git("commit", "--quiet", "-m", "link")
    into = fetch(pin_of(f"{address_of(top)}@main", "submodules"), tmp_path)
    assert (into / "sub" / "name.txt").read_text() == "leaf"
    # ssh has no credentials but the user's, so it does not go to others at all.
    elsewhere = tmp_path / "git" / "others"
    elsewhere.mkdir()
    shutil.copytree(leaf.path, elsewhere / "leaf")
    (top.path / ".gitmodules").write_text('[submodule "s"]\n\tpath = sub\n\turl = ../others/leaf\n')
    top.git("add", ".gitmodules")
    top.git("commit", "--quiet", "-m", "elsewhere")
    before = len(calls(log))
    with pytest.raises(SourceUnavailableError, match="'sub'.*your keys"):
        fetch(pin_of(f"{address_of(top)}@main", "submodules"), tmp_path, "elsewhere")
    assert len(calls(log)) == before + 2


def test_lfs_over_ssh(
    repo: GitRepo, log: Path, tmp_path: Path, github: GitHubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    github.add("o", "r", repo)
    repo.commit({"w.bin": github.add_lfs("o", "r", b"weights")})
    github.token = "s3cret"
    answer = {"href": f"{github.url}/o/r.git/info/lfs", "header": {"Authorization": "Basic eDpzM2NyZXQ="}}
    monkeypatch.setenv("FAKE_LFS", json.dumps(answer))
    pin = pin_of(f"{address_of(repo, 'git@127.0.0.1')}@main", "lfs")
    assert (fetch(pin, tmp_path) / "w.bin").read_bytes() == b"weights"
    asked = calls(log)[-1][-1]
    assert asked.startswith("git-lfs-authenticate '")
    assert asked.endswith("' download")
    for number, bad in enumerate(("", "[]", "{}", '{"href": 5}', '{"href": "file:///x"}', '{"href": "http://h/x"}')):
        monkeypatch.setenv("FAKE_LFS", bad)
        with pytest.raises(SourceUnavailableError):
            fetch(pin, tmp_path, str(number))


# What goes wrong.


def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = tmp_path / "script"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setenv("GIT_SSH_COMMAND", shlex.quote(str(program)))


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("echo 'Host key verification failed.' >&2; exit 255", "Host key", "fingerprint"),
        ("echo 'REMOTE HOST IDENTIFICATION HAS CHANGED' >&2; exit 255", "CHANGED", "ssh-keygen -R 'example.org'"),
        ("echo 'me@h: Permission denied (publickey).' >&2; exit 255", "denied", "ssh-add"),
        ("echo 'Could not resolve hostname' >&2; exit 255", "resolve", "network"),
        ("printf 'bad\\033[2J' >&2; exit 3", r"exit code 3; ssh says: bad\\x1b\[2J", "address"),
        ("exit 0", "middle of a line", "ssh -T git@example.org"),
        ("echo Welcome", "no length", ""),
        ("printf '0009'; exec sleep 1000", "nothing came for 0.3 s", ""),
        ("exec sleep 1000", "nothing came for 0.3 s", ""),
        ("yes complaint >&2 & yes; kill $!", "no length", ""),
        ("printf '0011ERR no such\\n0000'", "no such", ""),
    ],
)
def test_failures_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str, hint: str) -> None:
    monkeypatch.setattr(ssh, "IDLE_LIMIT_S", 0.3)
    monkeypatch.setattr(ssh, "END_LIMIT_S", 0.1)
    script(tmp_path, monkeypatch, text)
    with pytest.raises(SourceUnavailableError, match=said) as caught:
        pin_of("git@example.org:o/r")
    assert hint in (caught.value.hint or "")
    assert caught.value.reference


@pytest.mark.parametrize(
    ("text", "passing"),
    [
        ("echo 'ssh: connect to host h port 22: Connection refused' >&2; exit 255", True),
        ("echo 'ssh: connect to host h port 22: Connection timed out' >&2; exit 255", True),
        ("echo 'ssh: connect to host h port 22: No route to host' >&2; exit 255", True),
        ("echo 'ssh: Could not resolve hostname h: Name or service not known' >&2; exit 255", True),
        ("echo 'Read from remote host h: Connection reset by peer' >&2; exit 255", True),
        ("exec sleep 1000", True),
        ("echo 'Connection refused' >&2; exit 128", False),  # the server's program says so
        ("echo 'git@h: Permission denied (publickey).' >&2; exit 255", False),
        ("echo 'Host key verification failed.' >&2; exit 255", False),
        ("echo 'REMOTE HOST IDENTIFICATION HAS CHANGED' >&2; echo 'Connection reset' >&2; exit 255", False),
        ("echo \"fatal: 'x' does not appear to be a git repository\" >&2; exit 128", False),
        ("echo Welcome", False),
    ],
)
def test_what_passes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, passing: bool) -> None:
    monkeypatch.setattr(ssh, "IDLE_LIMIT_S", 0.3)
    monkeypatch.setattr(ssh, "END_LIMIT_S", 0.1 if "sleep" in text else 10.0)
    script(tmp_path, monkeypatch, text)
    with pytest.raises(SourceUnavailableError) as caught:
        pin_of("git@example.org:o/r")
    assert caught.value.passing is passing
    assert caught.value.reference


def test_a_pack_that_stops(repo: GitRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    pin = pin_of(f"{address_of(repo)}@main")
    for number, bytes_kept in enumerate((10, 600, 100_000)):
        script(tmp_path, monkeypatch, f"git-upload-pack {shlex.quote(str(repo.path))} | head -c {bytes_kept}")
        with monkeypatch.context() as patched, pytest.raises(SourceUnavailableError):
            patched.setattr(ssh, "IDLE_LIMIT_S", 0.5)
            patched.setattr(ssh, "END_LIMIT_S", 0.1)
            fetch(pin, tmp_path, str(number))
    script(tmp_path, monkeypatch, f"exec git-upload-pack {shlex.quote(str(repo.path))}")
    assert (fetch(pin, tmp_path) / "hubconf.py").read_text() == "two\n"


def test_what_it_started_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "IDLE_LIMIT_S", 0.3)
    monkeypatch.setattr(ssh, "END_LIMIT_S", 0.1)
    script(
        tmp_path,
        monkeypatch,
        f"trap '' TERM PIPE; echo $$ > {tmp_path}/one; sleep 1000 & echo $! > {tmp_path}/two; wait",
    )
    with pytest.raises(SourceUnavailableError):
        pin_of("git@example.org:o/r")
    for name in ("one", "two"):
        pid = int((tmp_path / name).read_text())
        assert eventually(lambda pid=pid: gone(pid)), name


# The real thing.


def expects_sshd() -> bool:
    return "sshd" in os.environ.get("ISOHUB_EXPECT", "").split(",")


SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def test_sshd_is_where_it_is_expected() -> None:
    assert SSHD is not None or not expects_sshd()


if SSHD is not None:
    # Defined only here: where there is no sshd there is nothing to test, and CI says that it expects it.

    class Sshd:
        """A server on loopback that lets this user in with one key."""

        def __init__(self, home: Path) -> None:
            self.home = home
            for name in ("host", "user", "stranger"):
                key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(home / name)]
                subprocess.run(key, check=True, stdin=subprocess.DEVNULL)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            (home / "sshd_config").write_text(
                f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nPidFile none\nUsePAM no\n"
                f"AuthorizedKeysFile {home}/user.pub\nStrictModes no\nPasswordAuthentication no\n"
                "KbdInteractiveAuthentication no\nPermitRootLogin yes\n"
            )
            if os.getuid() == 0:  # sshd insists on it, and a service manager would have made it
                Path("/run/sshd").mkdir(exist_ok=True)
            command = [str(SSHD), "-D", "-e", "-f", str(home / "sshd_config")]
            self.output = (home / "sshd.log").open("wb")
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=self.output)
            assert eventually(self.listens), (home / "sshd.log").read_text()
            self.known = home / "known_hosts"
            self.know("host")

        def listens(self) -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", self.port)) == 0

        def know(self, key: str) -> None:
            self.known.write_text(f"[127.0.0.1]:{self.port} {(self.home / f'{key}.pub').read_text()}")

        def command(self, key: str = "user") -> str:
            return shlex.join(
                [
                    *("ssh", "-F", "none", "-o", f"UserKnownHostsFile={self.known}", "-o", "GlobalKnownHostsFile=none"),
                    *("-o", "IdentityAgent=none", "-o", "IdentitiesOnly=yes", "-i", str(self.home / key)),
                ]
            )

        def address(self, repo: GitRepo) -> str:
            return address_of(repo, f"{getpass.getuser()}@127.0.0.1:{self.port}")

        def end(self) -> None:
            self.process.terminate()
            self.process.wait()
            self.output.close()

    @pytest.fixture
    def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
        home = tmp_path / "sshd"
        home.mkdir(mode=0o700)
        server = Sshd(home)
        monkeypatch.setenv("GIT_SSH_COMMAND", server.command())
        yield server
        server.end()

    def test_a_real_server(sshd: Sshd, repo: GitRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        location = sshd.address(repo)
        old = repo.sha("main~1")
        assert pin_of(location).ref_name == "refs/heads/main"
        assert pin_of(f"{location}@{old[:8]}").commit == old
        into = fetch(pin_of(f"{location}@main"), tmp_path)
        assert (into / "big.bin").read_bytes() == (repo.path / "big.bin").read_bytes()
        with pytest.raises(SourceUnavailableError, match="does not appear to be a git repository|not a git"):
            pin_of(f"{location}-not")
        monkeypatch.setenv("GIT_SSH_COMMAND", sshd.command("stranger"))
        with pytest.raises(SourceUnavailableError, match="Permission denied") as caught:
            pin_of(location)
        assert f"ssh -p {sshd.port} -T" in (caught.value.hint or "")

    def test_a_real_servers_key(sshd: Sshd, repo: GitRepo) -> None:
        location = sshd.address(repo)
        assert pin_of(location).commit == repo.sha()
        sshd.know("stranger")
        with pytest.raises(SourceUnavailableError, match="has changed") as caught:
            pin_of(location)
        assert "ssh-keygen -R" in (caught.value.hint or "")
        sshd.known.write_text("")
        with pytest.raises(SourceUnavailableError, match="Host key verification failed") as caught:
            pin_of(location)
        assert "fingerprint" in (caught.value.hint or "")
        assert sshd.known.read_text() == ""
