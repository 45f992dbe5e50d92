"""Whose word a request carries: tokens and passwords, each for the server that it belongs to.

Tokens come from the environment, passwords from netrc, and what neither has from git's credential
helpers, which the system's git asks. Nothing here is put into a message, a log, a command line, a URL
or a worker's environment, and nothing goes over a connection that others can read. Helpers are only
read: git's ``approve`` and ``reject`` would store or erase what is the user's, on the word of a server
that may refuse for other reasons. Runs in the caller.

Source: GitHub's documentation of ``GITHUB_TOKEN``; the environment of gh and of glab; git-credential(1),
gitcredentials(7); RFC 7617 (Basic), RFC 6750 (Bearer).
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from isohub.repos.naming import host_of
from isohub.repos.reference import github_api, github_server

__all__ = ["Authorization", "Credentials", "Login"]

#: A helper may ask a keyring or renew a token; one that waits for somebody has nobody to wait for.
HELPER_TIMEOUT_S = 30.0
_GITHUB = "https://github.com"
_GITLAB = "gitlab.com"
# What git writes and reads is lines: a host that holds one could ask for another (CVE-2020-5260, CVE-2024-52006).
_HOST = re.compile(r"[A-Za-z0-9._-]+(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?")
# Without a percent sign: git would decode what is encoded.
_PATH = re.compile(r"/([!-$&-~]+)/(?:info/refs|git-upload-pack)")
# git-rev-parse(1), --local-env-vars, less the two that carry the user's own settings: what would make
# git look at a repository, such as the one whose hook runs this process.
_LOCAL_VARIABLES = frozenset(
    {
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_COMMON_DIR",
        "GIT_CONFIG",
        "GIT_GRAFT_FILE",
        "GIT_IMPLICIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_NO_REPLACE_OBJECTS",
        "GIT_OBJECT_DIRECTORY",
        "GIT_PREFIX",
        "GIT_REPLACE_REF_BASE",
        "GIT_SHALLOW_FILE",
        "GIT_WORK_TREE",
    }
)


@dataclass(frozen=True)
class Authorization:
    """A request's ``Authorization``.

    Attributes:
        value: Of the header. A secret.
        given_by: Where it is from, in words for a hint.
    """

    value: str = field(repr=False)
    given_by: str


@dataclass(frozen=True)
class Login:
    """What a credential helper gives for a server. Secrets."""

    user: str = field(repr=False)
    password: str = field(repr=False)


class Credentials:
    """The user's own, looked up anew for every operation.

    Args:
        anonymous: Have none at all: for what is fetched on a worker's word.
    """

    def __init__(self, *, anonymous: bool = False) -> None:
        self.anonymous = anonymous

    def tokens(self) -> dict[str, Authorization]:
        """Tokens of the environment by the address they belong to.

        ``GITHUB_TOKEN`` or ``GH_TOKEN`` belong to the server of ``GITHUB_SERVER_URL`` and its API,
        ``GH_ENTERPRISE_TOKEN`` or ``GITHUB_ENTERPRISE_TOKEN`` to ``GH_HOST`` and its API, ``GITLAB_TOKEN``
        to ``GITLAB_HOST``. They go nowhere else.
        """
        if self.anonymous:
            return {}
        found: dict[str, Authorization] = {}
        for name in ("GITHUB_TOKEN", "GH_TOKEN"):
            _add_github(found, github_server(), name)
        for origin in _enterprise_origins():
            for name in ("GH_ENTERPRISE_TOKEN", "GITHUB_ENTERPRISE_TOKEN"):
                _add_github(found, origin, name)
        token = _token("GITLAB_TOKEN")
        if token is not None:
            for origin in _origins(os.environ.get("GITLAB_HOST", "").strip() or _GITLAB):
                found.setdefault(origin, Authorization(_basic("oauth2", token), "GITLAB_TOKEN"))
        return {address: value for address, value in found.items() if _is_private(address)}

    def token_name(self, url: str) -> str | None:
        """The variable that would hold a token for a URL, for a hint; None where no variable would."""
        names = dict.fromkeys(_origins(os.environ.get("GITLAB_HOST", "").strip() or _GITLAB), "GITLAB_TOKEN")
        for origin in _enterprise_origins():
            names |= {origin: "GH_ENTERPRISE_TOKEN", github_api(origin): "GH_ENTERPRISE_TOKEN"}
        names |= {github_server(): "GITHUB_TOKEN", github_api(github_server()): "GITHUB_TOKEN"}
        matching = [address for address in names if _is_below(url, address)]
        return names[max(matching, key=len)] if matching and not self.anonymous else None

    def from_netrc(self, url: str) -> Authorization | None:
        """What netrc has for a URL's host, as requests reads it: ``$NETRC``, ``~/.netrc``, ``~/_netrc``."""
        if self.anonymous or not _is_private(url):
            return None
        host = urlsplit(url).hostname or ""
        # The host alone: older versions of requests take what stands before a colon for it (CVE-2024-47081).
        from requests.utils import get_netrc_auth  # noqa: PLC0415 - requests, where a server is asked alone

        found = get_netrc_auth(f"https://[{host}]/" if ":" in host else f"https://{host}/")
        return None if found is None else Authorization(_basic(found[0] or "", found[1] or ""), "netrc")

    def server_of(self, url: str) -> str:
        """Origin whose helpers know the password for a URL: the URL's own, or for a GitHub API its server's."""
        for api, server in _apis().items():
            if _is_below(url, api):
                return server
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc}"

    def from_helper(self, url: str) -> Login | None:
        """Ask git's credential helpers for the server of a URL.

        Starts the system's git, and through it what the user's own git settings name. Settings of a
        repository do not count, wherever this process stands.

        Args:
            url: What a server refused. Trust: the caller; its host is checked here.
        """
        git = shutil.which("git")
        server = urlsplit(self.server_of(url))
        if self.anonymous or not _is_private(url) or not _is_private(server.geturl()):
            return None
        if git is None or not _HOST.fullmatch(server.netloc):
            return None
        question = [f"protocol={server.scheme}", f"host={server.netloc}"]
        path = _PATH.fullmatch(urlsplit(url).path)
        if path is not None:  # looked at where credential.useHttpPath is set
            question.append(f"path={path[1]}")
        answer = _ask(git, "\n".join([*question, "", ""]))
        if answer.get("protocol") != server.scheme or answer.get("host") != server.netloc:
            return None
        if "username" not in answer or "password" not in answer:
            return None
        return Login(answer["username"], answer["password"])

    def present(self, login: Login, url: str) -> Authorization | None:
        """The header for a login: for a GitHub server's API the password is a token, else it is Basic."""
        given_by = "git's credential helper"
        if not any(_is_below(url, api) for api in _apis()):
            return Authorization(_basic(login.user, login.password), given_by)
        token = login.password
        return Authorization(f"Bearer {token}", given_by) if _is_token(token) else None


def _add_github(found: dict[str, Authorization], server: str, name: str) -> None:
    token = _token(name)
    if token is not None:
        # git's endpoints take Basic with this user name for every kind of token; the API takes Bearer.
        found.setdefault(server, Authorization(_basic("x-access-token", token), name))
        found.setdefault(github_api(server), Authorization(f"Bearer {token}", name))


def _token(name: str) -> str | None:
    token = os.environ.get(name, "").strip()
    return token if _is_token(token) else None


def _is_token(text: str) -> bool:
    return re.fullmatch("[!-~]+", text) is not None


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode("utf-8", "surrogateescape")).decode("ascii")


def _apis() -> dict[str, str]:
    """Addresses of the known GitHub servers' APIs, with the servers."""
    return {github_api(server): server for server in (github_server(), *_enterprise_origins(), _GITHUB)}


def _enterprise_origins() -> list[str]:
    host = os.environ.get("GH_HOST", "").strip().lower()
    # gh: what is GitHub's own service takes the other tokens.
    own = host in ("", "github.com", "github.localhost") or host.endswith(".ghe.com")
    return [] if own else _origins(host)


def _origins(host: str) -> list[str]:
    """The origins of what a variable names, a host or an address; a loopback host's without TLS too."""
    scheme, _, netloc = host.rstrip("/").rpartition("://")
    try:
        name = host_of(scheme or "https", netloc)
    except ValueError:
        return []
    if scheme:
        return [f"{scheme}://{name}"]
    return [f"https://{name}", *([f"http://{name}"] if _is_loopback(f"http://{name}") else [])]


def _is_below(url: str, address: str) -> bool:
    return url == address or url.startswith(f"{address}/")


def _is_private(url: str) -> bool:
    """Whether nobody else reads what is sent there."""
    scheme = urlsplit(url).scheme
    return scheme == "https" or (scheme == "http" and _is_loopback(url))


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _ask(git: str, question: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _LOCAL_VARIABLES}
    environment |= {
        "GIT_DIR": os.devnull,  # no repository: its settings may name helpers of its own
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "",  # set and empty: neither core.askPass nor SSH_ASKPASS is started
        "GCM_INTERACTIVE": "never",
    }
    try:
        process = subprocess.Popen(
            [git, "credential", "fill"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",  # where nothing relative on PATH leads to a repository's files
            env=environment,
            start_new_session=True,  # without a terminal, and a group that can be ended
        )
    except OSError:  # no process can be started: the same as no git
        return {}
    with process:
        try:
            answer, _ = process.communicate(question.encode("ascii"), timeout=HELPER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return {}
        except BaseException:
            with contextlib.suppress(ProcessLookupError):  # Ctrl-C reached it too
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode != 0:
        return {}
    lines = answer.decode("utf-8", "surrogateescape").split("\n")
    return {key: value for key, separator, value in (line.partition("=") for line in lines) if separator}
