from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from isohub.errors import SourceUnavailableError
from isohub.repos import http
from isohub.repos.credentials import Credentials
from isohub.repos.http import HttpClient, read_limited
from isohub.repos.http_errors import TryAgain
from isohub.repos.naming import shown
from tests.servers.files import Fault, FileServer, basic
from tests.servers.proxy import ProxyServer
from tests.servers.tls import authority

if TYPE_CHECKING:
    from requests import Response

CONTENT = b"content"


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home directory of its own, and no other settings of git, proxies or certificates."""
    names = "GH_HOST GH_ENTERPRISE_TOKEN GITLAB_TOKEN GITLAB_HOST NETRC NO_PROXY no_proxy GIT_CONFIG_COUNT GIT_DIR"
    for name in (*names.split(), "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as made:
        made.add("/file", CONTENT)
        yield made


@pytest.fixture
def other() -> Iterator[FileServer]:
    """Another host, not only another port."""
    with FileServer("127.0.0.2") as made:
        made.add("/file", CONTENT)
        yield made


@pytest.fixture
def client() -> Iterator[HttpClient]:
    with HttpClient(Credentials()) as made:
        yield made


def content(response: Response) -> bytes:
    return read_limited(response, 1000)


def get(url: str, *, anonymous: bool = False) -> bytes:
    with HttpClient(Credentials(anonymous=anonymous)) as client:
        return client.request(url, content)


def told(error: SourceUnavailableError) -> str:
    """All that a traceback shows of an error and its causes, less the lines of code."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(line for line in lines if not line.startswith("  ")) + repr(error.fields)


def sent(server: FileServer) -> list[str | None]:
    return [request.headers.get("Authorization") for request in server.requests]


def fill(home: Path, *answers: str) -> Path:
    """A credential helper that counts how often it is asked."""
    asked = home / "asked"
    lines = "\n".join(f"echo {line}" for line in answers)
    (home / "helper").write_text(f"#!/bin/sh\ngrep ^host= >> {asked}\n{lines}\n")
    (home / "helper").chmod(0o755)
    (home / ".gitconfig").write_text(f"[credential]\n\thelper = {home / 'helper'}\n")
    return asked


# --- tries


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=502),
        Fault(status=503, headers={"Retry-After": "0"}),
        Fault(status=429, headers={"Retry-After": "0"}),
        Fault(status=403, headers={"Retry-After": "0"}),
        Fault(status=408),
        Fault(truncate=3),
        Fault(reset=3),
        Fault(reset=0),
        Fault(length=1000),
    ],
)
def test_stumbles_are_retried(server: FileServer, fault: Fault) -> None:
    server.fail("file", fault, times=2)
    assert get(server.url + "/file") == CONTENT
    assert server.count() == 3
    server.fail("file", fault)
    server.forget()
    with pytest.raises(SourceUnavailableError) as caught:
        get(server.url + "/file")
    assert server.host in str(caught.value)
    assert caught.value.status == fault.status
    assert server.count() == 3


@pytest.mark.parametrize("status", [204, 206, 304, 400, 404, 410, 416, 451, 505])
def test_other_answers_are_errors_at_once(server: FileServer, status: int) -> None:
    server.fail("file", Fault(status=status, body=b""))
    with pytest.raises(SourceUnavailableError, match=f"HTTP {status}") as caught:
        get(server.url + "/file")
    assert caught.value.status == status
    assert server.count() == 1


def test_an_ambiguous_name(server: FileServer) -> None:
    server.fail("file", Fault(status=300, body=b"the given path has multiple possibilities"))
    with pytest.raises(SourceUnavailableError, match="several things") as caught:
        get(server.url + "/file")
    assert caught.value.status == 300
    assert "full commit id" in (caught.value.hint or "")


def test_statuses_that_are_asked_for(server: FileServer, client: HttpClient) -> None:
    for status in (206, 304, 416):
        server.fail("file", Fault(status=status, body=b""), times=1)
        assert client.request(server.url + "/file", lambda r: r.status_code, accept=frozenset({status})) == status


def test_a_rate_limit_says_when_it_ends(server: FileServer) -> None:
    reset = str(int(time.time()) + 3000)
    server.fail("file", Fault(status=403, headers={"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset}))
    with pytest.raises(SourceUnavailableError, match=r"limits the rate.*answers again at .* UTC") as caught:
        get(server.url + "/file")
    assert "GITHUB_TOKEN" not in (caught.value.hint or "")  # this is no GitHub
    assert server.count() == 1
    server.behave()
    for value, words in (("3600", "3600 s"), ("Wed, 21 Oct 2999 07:28:00 GMT", "asks to wait"), ("soon", "limits")):
        server.forget()
        server.fail("file", Fault(status=429, headers={"Retry-After": value}), times=1 if value != "soon" else 3)
        with pytest.raises(SourceUnavailableError, match=words):
            get(server.url + "/file")
        assert server.count() == (1 if value != "soon" else 3)


def test_a_try_that_advances_starts_the_count_anew(server: FileServer, client: HttpClient) -> None:
    steps = iter(range(20))
    kept: list[str] = []

    def read(response: Response) -> bytes:
        if next(steps) < 9:
            raise TryAgain(SourceUnavailableError("no"))
        return content(response)

    def headers() -> dict[str, str]:
        kept.append("")
        return {"X-Step": str(len(kept))}

    assert client.request(server.url + "/file", read, headers=headers, advanced=lambda: True) == CONTENT
    assert [request.headers["X-Step"] for request in server.requests] == [str(n) for n in range(1, 11)]


def test_a_stalled_server_is_given_up(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 0.1)
    server.fail("file", Fault(stall=3))
    with pytest.raises(SourceUnavailableError, match=r"^[0-9.:]+: nothing came for 0\.1 s\n"):
        get(server.url + "/file")
    assert server.count() == 3


def test_a_request_is_ended_from_another_thread(server: FileServer, client: HttpClient) -> None:
    fault = server.fail("file", Fault(stall=3))
    thread = threading.Thread(target=lambda: (fault.stalled.wait(), client.abort()), daemon=True)
    thread.start()
    # Without an end from there, this would last for READ_TIMEOUT_S.
    with pytest.raises(SourceUnavailableError, match="given up"):
        client.request(server.url + "/file", content)
    thread.join()
    with pytest.raises(SourceUnavailableError, match="given up"):
        client.request(server.url + "/file", content)
    assert server.count() == 1


# --- what may not be asked


@pytest.mark.parametrize(
    "url",
    ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://[::1", "https://", "http:x", "no address", "", "http://h:99999/"],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(SourceUnavailableError):
        get(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:s3cret@127.0.0.1/x?s3cret",
        "http://me:s3/cr@127.0.0.1/s",
        "http://me:s3?cr@127.0.0.1/s",
        "http://me:s3#@h/",
        "https://s3cret@h",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(SourceUnavailableError) as caught:
        get(url)
    assert "s3" not in told(caught.value)
    # Where the sign is in a query or a fragment, nobody can tell; what is no port is not repeated either.
    assert ("holds a user name or a password" in str(caught.value)) == ("@" in url.partition("#")[0].partition("?")[0])


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "gzip,gzip,gzip", "x\x7f"])
def test_codings_that_nobody_asked_for(server: FileServer, coding: str) -> None:
    server.fail("file", Fault(body=b"x", headers={"Content-Encoding": coding}))
    with pytest.raises(SourceUnavailableError, match="not asked for"):
        get(server.url + "/file")
    assert server.requests[0].headers["Accept-Encoding"] == "gzip, deflate"


def test_an_answer_has_a_limit(server: FileServer) -> None:
    server.add("/zeros", bytes(20_000_000))
    server.fail("zeros", Fault(gzip=True))
    with pytest.raises(SourceUnavailableError, match="more than 1000 bytes"):
        get(server.url + "/zeros")
    server.add("/some", bytes(1000))
    server.fail("some", Fault(gzip=True))
    assert get(server.url + "/some") == bytes(1000)


# --- redirects


def test_redirects_are_followed_to_an_end(server: FileServer, other: FileServer) -> None:
    server.fail("a", Fault(redirect=other.url + "/file"))
    assert get(server.url + "/a") == CONTENT
    server.fail("round", Fault(redirect=server.url + "{path}"))
    with pytest.raises(SourceUnavailableError, match="redirects more than 5 times"):
        get(server.url + "/round")


@pytest.mark.parametrize(
    "to", ["file:///etc/passwd", "ftp://127.0.0.1/", "http://[::1", "http://\xff\xfe/", "//", "http://h:x/"]
)
def test_redirects_to_what_is_no_address(server: FileServer, to: str) -> None:
    server.fail("file", Fault(status=302, headers={"Location": to}))
    with pytest.raises(SourceUnavailableError):
        get(server.url + "/file")


def test_a_redirects_body_has_a_limit(server: FileServer) -> None:
    server.fail("a", Fault(status=302, headers={"Location": "/file"}, body=bytes(10_000)))
    assert get(server.url + "/a") == CONTENT
    server.fail("b", Fault(status=302, headers={"Location": "/file"}, body=bytes(100_000)))
    with pytest.raises(SourceUnavailableError, match="redirects with more than"):
        get(server.url + "/b")
    assert server.count("/file") == 1


def test_no_redirect_into_the_clear(tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, context = authority(tmp_path / "authority")
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    with FileServer(tls=context) as secure:
        secure.fail("file", Fault(redirect=server.url + "/file?signature=s3cret"))
        with pytest.raises(SourceUnavailableError, match="redirects to an unencrypted address") as caught:
            get(secure.url + "/file")
    assert "s3cret" not in str(caught.value)
    assert server.count() == 0


# --- who is asked as whom


def test_netrc_is_for_the_host_that_was_named(server: FileServer, other: FileServer, own_settings: Path) -> None:
    (own_settings / ".netrc").write_text("default login me password s3cret\n")
    server.fail("^/here", Fault(redirect=server.url + "/file"))
    server.fail("there", Fault(redirect=other.url + "/file"))
    get(server.url + "/here")
    assert sent(server) == [basic("me", "s3cret")] * 2
    with HttpClient(Credentials()) as client:
        client.request(server.url + "/there", content)
        assert sent(other) == [None]
        # Git's second request goes where the first was sent.
        client.request(other.url + "/file", content)
        assert sent(other) == [None, None]
        other.authorization = basic("me", "s3cret")
        with pytest.raises(SourceUnavailableError, match="401"):
            client.request(other.url + "/file", content)
    get(server.url + "/file", anonymous=True)
    assert sent(server)[-1] is None


def test_a_token_stays_when_a_third_redirects_to_its_host(
    server: FileServer, other: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_SERVER_URL", other.url)
    monkeypatch.setenv("GITHUB_TOKEN", "t")
    server.fail("there", Fault(redirect=other.url + "/file"))
    with HttpClient(Credentials()) as client:
        for url in (other.url + "/file", server.url + "/there", other.url + "/file"):
            client.request(url, content)
    assert sent(other) == [basic("x-access-token", "t"), None, basic("x-access-token", "t")]
    assert sent(server) == [None]


def test_every_hop_is_one_that_a_redirect_named(server: FileServer, other: FileServer, own_settings: Path) -> None:
    (own_settings / ".netrc").write_text("machine 127.0.0.2 login me password s3cret\n")
    server.fail("a", Fault(redirect=other.url + "/b"))
    other.fail("b", Fault(redirect=server.url + "/file"))
    with HttpClient(Credentials()) as client:
        client.request(server.url + "/a", content)
        client.request(other.url + "/file", content)
    assert sent(other) == [None, None]


@pytest.mark.parametrize("refusal", [401, 403, 404])
def test_a_helper_is_asked_when_the_server_refuses(server: FileServer, own_settings: Path, refusal: int) -> None:
    asked = fill(own_settings, "username=me", "password=s3cret")
    get(server.url + "/file")
    assert not asked.exists()
    server.authorization, server.refusal = basic("me", "s3cret"), refusal
    server.forget()
    with HttpClient(Credentials()) as client:
        assert not client.has_credentials(server.url + "/file")
        assert client.request(server.url + "/file", content) == CONTENT
        assert client.request(server.url + "/file", content) == CONTENT
        assert client.has_credentials(server.url + "/file")
    assert sent(server) == [None, basic("me", "s3cret"), basic("me", "s3cret")]
    assert asked.read_text() == f"host={server.host}\n"
    with pytest.raises(SourceUnavailableError, match=str(refusal)):
        get(server.url + "/file", anonymous=True)
    assert asked.read_text() == f"host={server.host}\n"


def test_a_helper_is_asked_once(server: FileServer, own_settings: Path) -> None:
    asked = fill(own_settings, "username=me", "password=old")
    server.authorization = basic("me", "new")
    with HttpClient(Credentials()) as client:
        for _ in range(3):
            with pytest.raises(SourceUnavailableError, match="401") as caught:
                client.request(server.url + "/file", content)
            assert "git's credential helper" in (caught.value.hint or "")
    assert server.count() == 4
    assert asked.read_text().count("host=") == 1


def test_a_helper_that_has_nothing(server: FileServer, own_settings: Path) -> None:
    asked = fill(own_settings)
    server.authorization, server.refusal = basic("me", "new"), 404
    with HttpClient(Credentials()) as client:
        for _ in range(2):
            with pytest.raises(SourceUnavailableError, match="404"):
                client.request(server.url + "/file", content)
    assert server.count() == 2
    assert asked.read_text().count("host=") == 1


def test_a_helper_follows_a_refused_token_but_not_what_is_missing(
    server: FileServer, own_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_SERVER_URL", server.url)
    monkeypatch.setenv("GITHUB_TOKEN", "expired")
    asked = fill(own_settings, "username=me", "password=s3cret")
    with pytest.raises(SourceUnavailableError, match="404"):
        get(server.url + "/missing")
    assert not asked.exists()
    server.authorization = basic("me", "s3cret")
    assert get(server.url + "/file") == CONTENT
    server.authorization = "Bearer s3cret"
    server.add("/api/v3/repos", CONTENT)
    assert get(server.url + "/api/v3/repos") == CONTENT
    assert sent(server)[-2:] == ["Bearer expired", "Bearer s3cret"]


def test_a_spent_rate_is_tried_with_a_helpers_password(server: FileServer, own_settings: Path) -> None:
    limited = Fault(status=403, headers={"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "9999999999"})
    server.fail("file", limited, times=1)
    fill(own_settings, "username=me", "password=s3cret")
    assert get(server.url + "/file") == CONTENT
    assert sent(server) == [None, basic("me", "s3cret")]


def test_a_helper_is_not_asked_for_whom_a_redirect_named(
    server: FileServer, other: FileServer, own_settings: Path
) -> None:
    asked = fill(own_settings, "username=me", "password=s3cret")
    other.authorization = basic("me", "s3cret")
    server.fail("there", Fault(redirect=other.url + "/file"))
    with HttpClient(Credentials()) as client:
        for url in (server.url + "/there", other.url + "/file"):
            with pytest.raises(SourceUnavailableError, match="401"):
                client.request(url, content)
    assert sent(other) == [None, None]
    assert not asked.exists()


def test_hints_fit_the_host(server: FileServer, monkeypatch: pytest.MonkeyPatch, own_settings: Path) -> None:
    server.authorization = basic("me", "s3cret")

    def hint() -> str:
        with pytest.raises(SourceUnavailableError, match="401") as caught:
            get(server.url + "/file")
        return caught.value.hint or ""

    assert "netrc" in hint()
    assert "GITHUB_TOKEN" not in hint()
    monkeypatch.setenv("GITLAB_HOST", server.url)
    assert "GITLAB_TOKEN" in hint()
    monkeypatch.setenv("GITLAB_TOKEN", "g")
    assert "refuses what GITLAB_TOKEN gives" in hint()
    monkeypatch.delenv("GITLAB_TOKEN")
    (own_settings / ".netrc").write_text("machine 127.0.0.1 login me password x\n")
    assert "refuses what netrc gives" in hint()


def test_secrets_are_in_no_message_and_no_log(
    server: FileServer, own_settings: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GITHUB_SERVER_URL", server.url)
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret-token")
    fill(own_settings, "username=me", "password=s3cret-word")
    (own_settings / ".netrc").write_text("default login me password s3cret-netrc\n")
    server.authorization = "another"
    faults = [Fault(), Fault(status=500), Fault(reset=0), Fault(redirect="http://127.0.0.1:1/x?s3cret")]
    faults += [
        Fault(redirect="http://u:s3cret@127.0.0.1:1/x"),
        Fault(status=302, headers={"Location": "http://[s3cret"}),
        Fault(redirect="ftp://127.0.0.1/x?s3cret"),
    ]
    text = ""
    with caplog.at_level(logging.DEBUG, "isohub"):
        for fault in faults:
            server.behave()
            server.fail("file", fault)
            with pytest.raises(SourceUnavailableError) as caught:
                get(server.url + "/file?signature=s3cret")
            text += told(caught.value)
            server.authorization = None  # the first fault was that nothing fits
    text += caplog.text
    for secret in ("s3cret", basic("x-access-token", "s3cret-token")[6:], basic("me", "s3cret-word")[6:]):
        assert secret not in text
    assert "s3cret" not in Path("/proc/self/cmdline").read_text()


def test_addresses_as_they_are_shown() -> None:
    assert shown("https://example.org/o/r@v1/a.pth?sig=s#f") == "https://example.org/o/r@v1/a.pth"
    assert shown("https://me:pass@example.org/a") == "https://***@example.org/a"
    assert shown("https://example.org/\x1b[31m") == "https://example.org/\\x1b[31m"


# --- proxies and certificates


def test_a_proxy_in_the_clear(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with ProxyServer() as proxy:
        monkeypatch.setenv("http_proxy", f"http://user:word@{proxy.host}")
        assert get(server.url + "/file") == CONTENT
        assert proxy.requests == [f"GET {server.url}/file"]
        assert proxy.authorizations == [basic("user", "word")]
        assert "Proxy-Authorization" not in server.requests[0].headers
        monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
        assert get(server.url + "/file") == CONTENT
        assert len(proxy.requests) == 1
        assert server.count() == 2


def test_a_proxy_and_an_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_settings: Path) -> None:
    (own_settings / ".netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    bundle, context = authority(tmp_path / "authority")
    with FileServer(tls=context) as server, ProxyServer() as proxy:
        server.add("/file", CONTENT)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
        assert get(server.url + "/file") == CONTENT
        assert proxy.requests == [f"CONNECT {server.host}"]
        assert proxy.authorizations == [None]
        assert sent(server) == [basic("me", "s3cret")]
        proxy.refuses = True
        with pytest.raises(SourceUnavailableError, match="407") as caught:
            get(server.url + "/file")
        assert "HTTPS_PROXY" in (caught.value.hint or "")
        monkeypatch.setenv("no_proxy", server.host.partition(":")[0])
        assert get(server.url + "/file") == CONTENT


def test_a_proxys_password_is_not_repeated(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with ProxyServer() as proxy:
        gone = proxy.host
    for address in (
        f"http://user:s3cret@{gone}",
        "http://user:s3/cret@x:99999",
        "user:s3cret@[x",
        "http://user:s3cret@:1",
    ):
        monkeypatch.setenv("http_proxy", address)
        with pytest.raises(SourceUnavailableError) as caught:
            get(server.url + "/file")
        text = told(caught.value)
        assert "s3cret" not in text
        assert "cret@" not in text
    assert server.count() == 0


def test_authorities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, context = authority(tmp_path / "authority")
    foreign, _ = authority(tmp_path / "foreign")
    empty = tmp_path / "empty"
    empty.write_text("no certificate\n")
    with FileServer(tls=context) as server:
        url = server.add("/file", CONTENT)
        with pytest.raises(SourceUnavailableError, match="certificate that is not trusted") as caught:
            get(url)
        assert "REQUESTS_CA_BUNDLE" in (caught.value.hint or "")
        assert server.count() == 0
        for name in ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):  # each above those before
            monkeypatch.setenv(name, str(foreign))
            with pytest.raises(SourceUnavailableError, match="certificate that is not trusted"):
                get(url)
            monkeypatch.setenv(name, str(tmp_path / "missing"))
            with pytest.raises(SourceUnavailableError, match=f"{name} names .*missing.*not there") as caught:
                get(url)
            assert caught.value.hint
            monkeypatch.setenv(name, str(empty))
            with pytest.raises(SourceUnavailableError, match=f"{name} names .*empty.*holds no certificates"):
                get(url)
            monkeypatch.setenv(name, str(bundle))
            assert get(url) == CONTENT
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "")
        assert get(url) == CONTENT
        # A certificate for another name is not trusted either.
        with FileServer("127.0.0.2", tls=context) as renamed:
            with pytest.raises(SourceUnavailableError, match="certificate that is not trusted"):
                get(renamed.url + "/file")


def test_no_tls_where_it_is_expected(server: FileServer) -> None:
    with pytest.raises(SourceUnavailableError, match="TLS"):
        get(server.url.replace("http:", "https:") + "/file")


# --- what passes


@pytest.mark.parametrize(
    ("fault", "passing"),
    [
        (Fault(status=500), True),
        (Fault(status=507), True),
        (Fault(status=503, headers={"Retry-After": "0"}), True),
        (Fault(status=408), True),
        (Fault(status=429, headers={"Retry-After": "99"}), True),
        (Fault(status=403, headers={"Retry-After": "99"}), True),
        (Fault(status=403), False),
        (Fault(status=401), False),
        (Fault(status=404), False),
        (Fault(status=410), False),
        (Fault(reset=0), True),
        (Fault(reset=3), True),
        (Fault(truncate=3), True),
        (Fault(headers={"Content-Encoding": "br"}), None),
        (Fault(redirect="file:///etc/passwd"), None),
    ],
)
def test_what_passes_is_said(server: FileServer, fault: Fault, passing: bool | None) -> None:
    server.fail("file", fault)
    with pytest.raises(SourceUnavailableError) as caught:
        get(server.url + "/file")
    assert caught.value.passing is passing


@contextlib.contextmanager
def raw(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """A server that answers each connection with bytes of its own."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # ends the wait for the next
        thread.join()
        listener.close()


def test_what_does_not_speak_http_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[str, Callable[[socket.socket], object], bool]] = [
        ("http", lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), False),
        ("https", lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), False),
        ("http", lambda connection: None, True),
        ("https", lambda connection: None, True),
    ]
    for scheme, answer, passing in cases:
        with raw(answer) as host, pytest.raises(SourceUnavailableError, match=host) as caught:
            get(f"{scheme}://{host}/file")
        assert caught.value.passing is passing, (scheme, str(caught.value))
    with pytest.raises(SourceUnavailableError, match="cannot be reached") as caught:
        get(f"http://{host}/file")  # nobody listens any more
    assert caught.value.passing is True
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 0.1)
    wait = threading.Event()
    with raw(lambda connection: wait.wait()) as host:
        with pytest.raises(SourceUnavailableError, match="nothing came") as caught:
            get(f"http://{host}/file")
        wait.set()
    assert caught.value.passing is True


@pytest.mark.parametrize("size", [b"-5", b"-0x10", b"-1"])
def test_a_chunk_of_a_size_below_zero(size: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    monkeypatch.setattr(http, "TRIES", 1)
    answer = head + size + b"\r\ncontent\r\n0\r\n\r\n"
    with raw(lambda connection: connection.sendall(answer)) as host:
        with pytest.raises(SourceUnavailableError, match="a chunk has a size below zero") as caught:
            get(f"http://{host}/file")
    assert caught.value.passing is False
    with raw(lambda connection: connection.sendall(answer.replace(size, b"7", 1))) as host:
        assert get(f"http://{host}/file") == CONTENT


@pytest.mark.parametrize("endless", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n"])
def test_a_head_without_end(monkeypatch: pytest.MonkeyPatch, endless: bytes) -> None:
    sent = 0

    def answer(connection: socket.socket) -> None:
        nonlocal sent
        for _ in range(2000):  # 50 MB: it would end all the same, after the test has failed
            connection.sendall(endless * 1000)
            sent += len(endless) * 1000

    monkeypatch.setattr(http, "TRIES", 1)
    with raw(answer) as host, pytest.raises(SourceUnavailableError, match="bytes before a body") as caught:
        get(f"http://{host}/file")
    assert caught.value.passing is False
    assert sent < 20_000_000
    # The control: one of them is what a server may send.
    good = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\ncontent"
    with raw(lambda connection: connection.sendall(good)) as host:
        assert get(f"http://{host}/file") == CONTENT
