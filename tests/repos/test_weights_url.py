from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isohub.errors import IntegrityError, InvalidReferenceError, SourceUnavailableError
from isohub.repos.weights_url import Hashes, hash_in_name, is_single_name, parse_weights_url, url_hints

SHA = "ab" * 32


def test_what_is_kept_and_what_is_shown() -> None:
    url = parse_weights_url("https://Host.example:8443/a%20b/model-1.pth?sig=s3cret#part")
    assert url.text == "https://Host.example:8443/a%20b/model-1.pth?sig=s3cret"
    assert url.address == url.shown == "https://Host.example:8443/a%20b/model-1.pth"
    assert (url.name, url.hub_name) == ("model-1.pth", "model-1.pth")
    assert re.fullmatch("[0-9a-f]{40}", url.key)
    assert "s3cret" not in repr(url)


def test_the_key_is_of_the_whole_url_but_its_fragment() -> None:
    urls = ["https://h/a/m.pth", "https://h/b/m.pth", "http://h/a/m.pth", "https://h/a/m.pth?v=1", "https://h/a/m.pth?"]
    assert len({parse_weights_url(url).key for url in urls}) == len(urls)
    assert parse_weights_url("https://h/a/m.pth#x").key == parse_weights_url("https://h/a/m.pth").key


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/model.pth", "model.pth"),
        ("/a/ResNet_18-5c106cde.pth", "ResNet_18-5c106cde.pth"),
        ("/a%20b.pth", "a%20b.pth"),
        ("/a%2e%2e%2fb.pth", "a..%2Fb.pth"),
        ("/%2e%2e", "file"),
        ("/..", "file"),
        ("/.", "file"),
        ("/", "file"),
        ("", "file"),
        ("/a/", "file"),
        ("/.hidden", "%2Ehidden"),
        ("/a%00b.pth", "a%00b.pth"),
        ("/a%1b[31m.pth", "a%1B%5B31m.pth"),
        ("/entry.json", "file-entry.json"),
        ("/ENTRY.JSON", "file-ENTRY.JSON"),
        ("/%65ntry.json", "file-entry.json"),
        ("/%E2%80%AE.pth", "%E2%80%AE.pth"),
        ("/%ff%fe.pth", "%EF%BF%BD%EF%BF%BD.pth"),
        ("/con;x=1.pth", "con%3Bx%3D1.pth"),
    ],
)
def test_a_name_is_one_safe_component(path: str, name: str) -> None:
    assert parse_weights_url("https://h" + path).name == name


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=400))
def test_whatever_the_name_is(text: str) -> None:
    try:
        name = parse_weights_url("https://h/" + text).name
    except InvalidReferenceError:
        return
    assert re.fullmatch(r"[A-Za-z0-9_%=-][A-Za-z0-9._%=-]*", name)
    assert len(name) <= 230
    assert name.casefold() != "entry.json"


def test_long_names_keep_their_extension_and_stay_apart() -> None:
    names = [
        parse_weights_url(f"https://h/{'x' * 300}{end}").name for end in ("1.safetensors", "2.safetensors", ".pth")
    ]
    assert [name.rpartition(".")[2] for name in names] == ["safetensors", "safetensors", "pth"]
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 230


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("", "url"),
        ("https://h/" + "a" * 9000, "url"),
        ("https://h/a b", "url"),
        ("https://h/a\nb", "url"),
        ("https://h/a\x00b", "url"),
        ("https://h/a\u202eb", "url"),
        ("ftp://h/a", "scheme"),
        ("file:///a", "scheme"),
        ("/a", "scheme"),
        ("javascript:x", "scheme"),
        ("https:///a", "host"),
        ("https://h:99999/a", "host"),
        ("https://h:x/a", "host"),
        ("https://[::1/a", "host"),
        ("https://h\\@evil/a", "userinfo"),
        ("https://-/a", "host"),
    ],
)
def test_what_is_no_url(url: str, part: str) -> None:
    with pytest.raises(InvalidReferenceError) as raised:
        parse_weights_url(url)
    assert raised.value.part == part


@pytest.mark.parametrize("url", ["https://user:s3cret@h/a", "https://s3cret@h/a", "https://user:s3c/ret@h/a"])
def test_a_password_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidReferenceError) as raised:
        parse_weights_url(url)
    assert "s3c" not in str(raised.value)
    assert raised.value.reference is None
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(
    ("name", "digits"),
    [
        ("resnet18-5c106cde.pth", "5c106cde"),
        ("model-50.v1-abcdef12.pth", "abcdef12"),
        (f"m-{SHA}.pth", SHA),
        ("model-50.v1.pth", None),
        ("model-abcdef1.pth", None),
        ("model-ABCDEF12.pth", None),
        (f"m-{SHA}a.pth", None),
        ("model-abcdef12", None),
        ("abcdef12.pth", None),
        ("", None),
    ],
)
def test_the_hash_in_a_name(name: str, digits: str | None) -> None:
    assert hash_in_name(name) == digits


def test_names_of_torch_hub() -> None:
    assert parse_weights_url("https://h/a%20b-5c106cde.pth;x?y").hub_name == "a%20b-5c106cde.pth"
    assert parse_weights_url("https://h/..").hub_name == ""
    assert [is_single_name(name) for name in ("a", "", ".", "..", "a/b", "a\0")] == [True, *[False] * 5]


def test_hashes() -> None:
    known = Hashes.of(sha256=SHA.upper(), hash_prefix="ABab")
    assert known == Hashes(SHA, "abab")
    assert known.fit(SHA)
    assert not known.fit("ab" * 31 + "cd")
    assert not Hashes(prefix="ac").fit(SHA)
    assert Hashes().fit(SHA)
    with pytest.raises(IntegrityError) as raised:
        Hashes(prefix="ac").check(SHA, "it")
    assert (raised.value.expected, raised.value.got) == ("ac", SHA)
    assert Hashes.of(sha256=None, hash_prefix="") == Hashes()  # as torch.hub takes it
    for bad in ("xy", "a" * 65, "ab\n", "\x1b[31m"):
        with pytest.raises(InvalidReferenceError, match="no SHA-256") as refused:
            Hashes.of(sha256=None, hash_prefix=bad)
        assert "\x1b" not in str(refused.value)
    for bad in ("", "ab"):
        with pytest.raises(InvalidReferenceError):
            Hashes.of(sha256=bad, hash_prefix=None)


def test_what_helps_where_a_server_knows_no_such_file() -> None:
    for status, hint, expected in (
        (404, None, "look at the URL"),
        (410, None, "look at the URL"),
        (404, "its own", "its own"),
        (403, None, "None"),
        (None, None, "None"),
    ):
        with pytest.raises(SourceUnavailableError, match="no") as raised, url_hints():
            raise SourceUnavailableError("no", hint=hint, status=status)
        assert str(raised.value.hint).startswith(expected)
