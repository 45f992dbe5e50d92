"""A border by itself: what a URL's server is, and what the repo's own may do."""

from __future__ import annotations

import pytest

from isohub.errors import SourceUnavailableError
from isohub.network.border import NetworkBorder, look_up
from isohub.sandbox.hosts import HostPolicy, Refused, Target


@pytest.mark.parametrize(
    "url",
    ["", "a.example", "//a.example/", "ftp://a.example/", "file:///etc/passwd", "http://", "http:///x", "https://u@a.example/", "http://b\u00fc.example/",
     "http://a.example/\u00fc", "http://a.example/ x", "http://a.example\n/", "http://a.example:port/", "http:a.example", "http:/a.example"],
)  # fmt: skip
def test_a_url_that_reads_in_two_ways_is_refused(url):
    border = NetworkBorder(HostPolicy(("a.example",)), who="them")
    with pytest.raises(SourceUnavailableError):
        border.check(url)
    border.check("HTTPS://A.example/x?q#f")  # the control


@pytest.mark.parametrize(
    ("own", "yes", "no"),
    [
        ("https://git.example/o/r", ["https://git.example/x", "https://git.example:443/"], ["http://git.example/", "https://git.example:444/"]),
        ("http://10.0.0.1:8080/o/r", ["http://10.0.0.1:8080/x"], ["https://10.0.0.1:8080/x", "http://10.0.0.1/x", "http://10.0.0.2:8080/"]),
        ("ssh://git@git.example/o/r", [], ["https://git.example/", "http://git.example:22/"]),
        ("git@git.example:o/r", [], ["https://git.example/"]),
        ("/home/somebody/r", [], ["https://home/"]),
        ("", [], ["https://git.example/"]),
    ],
)  # fmt: skip
def test_the_repo_s_own_server_is_a_scheme_a_host_and_a_port(own, yes, no):
    border = NetworkBorder(HostPolicy(()), who="them", own=own)
    for url in yes:
        border.check(url)
    for url in no:
        with pytest.raises(SourceUnavailableError, match="not named"):
            border.check(url)


def test_the_repo_s_own_server_has_whatever_address():
    border = NetworkBorder(HostPolicy(("b.example",)), who="them", own="http://a.example/")
    found = ("127.0.0.1", "10.0.0.1")
    assert border.judge("http", Target("a.example", 80), found) == found
    assert isinstance(border.judge("https", Target("a.example", 80), found), Refused)
    assert isinstance(border.judge("http", Target("b.example", 80), found), Refused)


def test_a_border_decides_again_when_it_is_to_connect(monkeypatch):
    asked = []
    monkeypatch.setattr("isohub.network.border.look_up", lambda target: asked.append(target) or ("8.8.8.8",))
    border = NetworkBorder(HostPolicy(("a.example",)), who="them")
    assert border.addresses("https", "a.example", 443) == ("8.8.8.8",)
    for host, port in (("b.example", 443), ("a.example", 444), ("a.example.", 443), ("a.example@b.example", 443)):
        with pytest.raises(SourceUnavailableError):
            border.addresses("https", host, port)
    assert len(asked) == 1


def test_an_address_is_not_looked_up(monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asked"))
    assert look_up(Target("10.0.0.1", 80)) == ("10.0.0.1",)
    assert look_up(Target("fd00::1", 80)) == ("fd00::1",)
