from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from isohub.repos import credentials
from isohub.repos.credentials import Authorization, Credentials, Login
from tests.conftest import eventually, gone

VARIABLES = (
    "GH_ENTERPRISE_TOKEN GITHUB_ENTERPRISE_TOKEN GH_HOST GITLAB_TOKEN GITLAB_HOST NETRC GIT_ASKPASS SSH_ASKPASS "
    "GIT_CONFIG_COUNT GIT_CONFIG_PARAMETERS GIT_CONFIG_GLOBAL GIT_DIR GIT_TERMINAL_PROMPT"
)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home directory of its own, and no other settings of git."""
    for name in VARIABLES.split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
    home = tmp_path / "home"
    home.mkdir()
    return home


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def helper(own_settings: Path) -> Callable[..., Path]:
    """Makes a credential helper; what it is asked is in the file that is returned."""

    def make(*answer: str, text: str = "") -> Path:
        asked = own_settings / "asked"
        lines = "\n".join(f"echo '{line}'" for line in answer)
        # The command lines of the helper, of git, and of all between them and this process, whose own are not ours.
        log = (
            f"p=$$; while [ $p -gt 1 ] && [ $p -ne {os.getpid()} ]; do tr '\\0' ' ' < /proc/$p/cmdline; echo; "
            f"p=$(sed -n 's/^PPid:.//p' /proc/$p/status); done >> {asked}"
        )
        made = program(own_settings / "helper", f'{log}; echo "$1" >> {asked}; cat >> {asked}\n{lines}\n{text}')
        (own_settings / ".gitconfig").write_text(f"[credential]\n\thelper = {made}\n")
        return asked

    return make


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


GITHUB = {"https://github.com": basic("x-access-token", "t"), "https://api.github.com": "Bearer t"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"GITHUB_TOKEN": "t"}, GITHUB),
        ({"GH_TOKEN": "t"}, GITHUB),
        ({"GITHUB_TOKEN": "t", "GH_TOKEN": "other"}, GITHUB),
        ({"GITHUB_TOKEN": " ", "GH_TOKEN": "t\n"}, GITHUB),
        ({"GITHUB_TOKEN": "t t"}, {}),
        ({"GITHUB_TOKEN": "t\r\nHost: evil"}, {}),
        ({"GITHUB_TOKEN": "tök"}, {}),
        (
            {"GITHUB_TOKEN": "t", "GITHUB_SERVER_URL": "https://ghe.example.org"},
            {"https://ghe.example.org": basic("x-access-token", "t"), "https://ghe.example.org/api/v3": "Bearer t"},
        ),
        ({"GITHUB_TOKEN": "t", "GITHUB_SERVER_URL": "http://ghe.example.org"}, {}),
        ({"GH_ENTERPRISE_TOKEN": "e"}, {}),
        (
            {"GH_ENTERPRISE_TOKEN": "e", "GITHUB_ENTERPRISE_TOKEN": "f", "GH_HOST": "GHE.example.org"},
            {"https://ghe.example.org": basic("x-access-token", "e"), "https://ghe.example.org/api/v3": "Bearer e"},
        ),
        ({"GITHUB_ENTERPRISE_TOKEN": "e", "GH_HOST": "github.com"}, {}),
        ({"GITHUB_ENTERPRISE_TOKEN": "e", "GH_HOST": "tenant.ghe.com"}, {}),
        ({"GITHUB_ENTERPRISE_TOKEN": "e", "GH_HOST": "not a host/"}, {}),
        ({"GITLAB_TOKEN": "g"}, {"https://gitlab.com": basic("oauth2", "g")}),
        ({"GITLAB_TOKEN": "g", "GITLAB_HOST": "https://lab.example.org/"}, {"https://lab.example.org": basic("oauth2", "g")}),
        ({"GITLAB_TOKEN": "g", "GITLAB_HOST": "http://lab.example.org"}, {}),
        ({"GITLAB_TOKEN": "g", "GITLAB_HOST": "http://127.0.0.9:80"}, {"http://127.0.0.9": basic("oauth2", "g")}),
        ({"GITLAB_TOKEN": "g", "GITLAB_HOST": "http://127.0.0.9.example.org"}, {}),
    ],
)  # fmt: skip
def test_tokens_by_address(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert {address: found.value for address, found in Credentials().tokens().items()} == expected
    assert Credentials(anonymous=True).tokens() == {}


def test_what_a_hint_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GH_HOST", "ghe.example.org")
    names = {
        "https://github.com/o/r": "GITHUB_TOKEN",
        "https://api.github.com/repos": "GITHUB_TOKEN",
        "https://ghe.example.org/api/v3/repos": "GH_ENTERPRISE_TOKEN",
        "https://gitlab.com/o/r": "GITLAB_TOKEN",
        "https://github.com.example.org/o/r": None,
    }
    assert {url: Credentials().token_name(url) for url in names} == names
    assert Credentials(anonymous=True).token_name("https://github.com/o/r") is None


def test_secrets_are_not_shown() -> None:
    assert "s3cret" not in repr([Authorization("s3cret", "netrc"), Login("s3cret", "s3cret")])


def test_netrc(own_settings: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(url: str, *, anonymous: bool = False) -> str | None:
        value = Credentials(anonymous=anonymous).from_netrc(url)
        return value and value.value

    assert found("https://example.org/x") is None
    (own_settings / ".netrc").write_text("machine example.org login me password s3cret\nmachine ::1 password x\n")
    assert found("https://example.org:8443/x") == basic("me", "s3cret")
    assert found("https://EXAMPLE.org/x") == basic("me", "s3cret")
    assert found("http://[::1]:80/x") == basic("", "x")
    for url in ("https://example.org.evil.org/", "https://evil.org/example.org", "https://example.org:@evil.org/"):
        assert found(url) is None
    assert found("http://example.org/x") is None  # in the clear
    assert found("https://example.org/x", anonymous=True) is None
    monkeypatch.setenv("NETRC", str(tmp_path / "other"))
    assert found("https://example.org/x") is None
    (tmp_path / "other").write_text("machine example.org login you password other\n")
    assert found("https://example.org/x") == basic("you", "other")
    (tmp_path / "other").write_text("machine example.org login")
    assert found("https://example.org/x") is None


def test_a_helper_is_asked(helper: Callable[..., Path]) -> None:
    asked = helper("username=me", "password=s3cret")
    login = Credentials().from_helper("https://example.org:8443/a/b.git/info/refs?service=git-upload-pack")
    assert login == Login("me", "s3cret")
    assert Credentials().present(login, "https://example.org:8443/") == Authorization(
        basic("me", "s3cret"), "git's credential helper"
    )
    text = asked.read_text()
    assert "get\nprotocol=https\nhost=example.org:8443\n" in text
    assert "path=" not in text
    # Nothing is stored and nothing erased.
    assert "store" not in text
    assert "erase" not in text


def test_a_path_where_git_is_set_to_look_at_it(helper: Callable[..., Path], own_settings: Path) -> None:
    asked = helper("username=me", "password=s3cret")
    with (own_settings / ".gitconfig").open("a") as settings:
        settings.write("\tuseHttpPath = true\n")
    Credentials().from_helper("https://example.org/a/b.git/git-upload-pack")
    assert "path=a/b.git\n" in asked.read_text()
    asked.unlink()
    # What is encoded is not said: git would decode a line break.
    assert Credentials().from_helper("https://example.org/a%0ahost=other/info/refs") == Login("me", "s3cret")
    assert "path=" not in asked.read_text()
    assert "host=other" not in asked.read_text()


def test_an_api_is_asked_for_under_its_servers_name(
    helper: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = helper("username=me", "password=s3cret")
    url = "https://api.github.com/repos/o/r/zipball/main"
    login = Credentials().from_helper(url)
    assert login is not None
    assert "host=github.com\n" in asked.read_text()
    assert Credentials().present(login, url) == Authorization("Bearer s3cret", "git's credential helper")
    monkeypatch.setenv("GH_HOST", "ghe.example.org")
    assert Credentials().server_of("https://ghe.example.org/api/v3/x") == "https://ghe.example.org"
    assert Credentials().server_of("https://api.github.com.evil.org/x") == "https://api.github.com.evil.org"
    assert Credentials().present(Login("me", "no token"), url) is None


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/x",
        "https://exam\u0130ple.org/x",
        "https://example.org%0ahost=github.com/x",
        "https://me:password@example.org/x",
        "https://example.org:port/x",
    ],
)
def test_a_helper_is_not_asked(helper: Callable[..., Path], url: str) -> None:
    asked = helper("username=me", "password=s3cret")
    assert Credentials().from_helper(url) is None
    assert Credentials(anonymous=True).from_helper("https://example.org/x") is None
    assert not asked.exists()
    assert Credentials().from_helper("https://example.org/x") is not None


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (("username=me",), ""),
        (("password=s3cret",), "exit 1"),
        (("quit=1",), ""),
        (("username=me", "password=s3cret", "host=other.org"), ""),
        (("username=me", "password=s3cret", "protocol=http"), ""),
        (("nonsense",), ""),
        ((), "head -c 3000000 /dev/zero"),
        ((), "kill -9 $$"),
    ],
)
def test_answers_that_are_none(helper: Callable[..., Path], answer: tuple[str, ...], text: str) -> None:
    helper(*answer, text=text)
    assert Credentials().from_helper("https://example.org/x") is None


def test_no_helper_and_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Credentials().from_helper("https://example.org/x") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Credentials().from_helper("https://example.org/x") is None
    # A git that lies in the directory where this process happens to stand is nobody's git.
    program(tmp_path / "git", f"touch {tmp_path}/marker")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", ".")
    assert Credentials().from_helper("https://example.org/x") is None
    assert not (tmp_path / "marker").exists()
    (tmp_path / "git").write_bytes(b"\x7fELF no program")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Credentials().from_helper("https://example.org/x") is None


def test_a_repositorys_own_settings_do_not_count(
    helper: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evil, marker = tmp_path / "evil", tmp_path / "marker"
    subprocess.run(["git", "init", "--quiet", str(evil)], check=True)
    settings = ["git", "-C", str(evil), "config"]
    subprocess.run(
        [*settings, "credential.helper", f"!touch {marker}; echo username=e; echo password=e; :"], check=True
    )
    monkeypatch.chdir(evil)
    question = "protocol=https\nhost=example.org\n\n"
    subprocess.run(["git", "credential", "fill"], input=question, text=True, check=True, capture_output=True)
    assert marker.exists()  # it would have run
    marker.unlink()
    for name, value in {"PWD": str(evil), "GIT_DIR": str(evil / ".git"), "GIT_WORK_TREE": str(evil)}.items():
        monkeypatch.setenv(name, value)
        assert Credentials().from_helper("https://example.org/x") is None
    assert not marker.exists()
    helper("username=me", "password=s3cret")
    assert Credentials().from_helper("https://example.org/x") == Login("me", "s3cret")


def test_nobody_is_asked_for_a_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_settings: Path) -> None:
    marker = tmp_path / "marker"
    asker = program(tmp_path / "askpass", f"touch {marker}; echo s3cret")
    for name in ("GIT_ASKPASS", "SSH_ASKPASS"):
        monkeypatch.setenv(name, str(asker))
    (own_settings / ".gitconfig").write_text(f"[core]\n\taskPass = {asker}\n")
    assert Credentials().from_helper("https://example.org/x") is None
    assert not marker.exists()
    question = "protocol=https\nhost=example.org\n\n"
    subprocess.run(["git", "credential", "fill"], input=question, text=True, check=True, capture_output=True)
    assert marker.exists()  # it would have run


def test_a_helper_that_waits_is_ended(
    helper: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    number = tmp_path / "number"
    helper(text=f"echo $$ > {number}.new; mv {number}.new {number}; sleep 600")
    monkeypatch.setattr(credentials, "HELPER_TIMEOUT_S", 0.5)
    assert Credentials().from_helper("https://example.org/x") is None
    # It may have been ended before it said its number.
    assert not number.exists() or eventually(lambda: gone(int(number.read_text())))


def test_tokens_are_in_no_command_line(helper: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret-token")
    asked = helper("username=me", "password=s3cret")
    assert Credentials().from_helper("https://github.com/o/r") is not None
    assert "git credential fill \n" in asked.read_text()
    assert "s3cret" not in asked.read_text()
