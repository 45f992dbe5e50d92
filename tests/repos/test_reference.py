from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isohub.errors import InvalidReferenceError
from isohub.repos.naming import encode_component, near_names, ref_problem
from isohub.repos.reference import Reference, parse

SHA = "0123456789abcdef0123456789abcdef01234567"


def fields(reference: Reference) -> tuple[object, ...]:
    r = reference
    return (r.source, r.host, r.owner, r.repo, r.location, r.ref, r.subdirectory)


GITHUB = ("github", "github.com", "o", "r", "https://github.com/o/r")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("o/r", (*GITHUB, None, None)),
        ("o/r:main", (*GITHUB, "main", None)),
        ("o/r.git", (*GITHUB, None, None)),
        ("o/r:feature/with/slashes", (*GITHUB, "feature/with/slashes", None)),
        ("o/r:user@branch", (*GITHUB, "user@branch", None)),
        ("o/r:v1.0#2", (*GITHUB, "v1.0#2", None)),
        ("o/r:refs/pull/1/head", (*GITHUB, "refs/pull/1/head", None)),
        ("o/r:pull/123", (*GITHUB, "pull/123", None)),
        (f"o/r:{SHA}", (*GITHUB, SHA, None)),
        ("o/r:main#subdirectory=a/b", (*GITHUB, "main", "a/b")),
        ("https://github.com/o/r", (*GITHUB, None, None)),
        ("https://github.com/o/r/", (*GITHUB, None, None)),
        ("https://GitHub.com:443/o/r.git:v1", (*GITHUB, "v1", None)),
        ("https://github.com/o/r@feature/x@2", (*GITHUB, "feature/x@2", None)),
        ("https://github.com/o/r:a%23b", (*GITHUB, "a#b", None)),
        (
            "git+https://github.com/o/r.git@v1#subdirectory=d",
            ("git", "github.com", "o", "r", "https://github.com/o/r.git", "v1", "d"),
        ),
        (
            "https://gitlab.com/group/sub/r.git:v1",
            ("git", "gitlab.com", "group/sub", "r", "https://gitlab.com/group/sub/r.git", "v1", None),
        ),
        ("https://h.org:8443/r", ("git", "h.org:8443", "", "r", "https://h.org:8443/r", None, None)),
        ("https://h.org/@me/r@v1", ("git", "h.org", "@me", "r", "https://h.org/%40me/r", "v1", None)),
        ("http://127.0.0.1:80/o/r", ("git", "127.0.0.1", "o", "r", "http://127.0.0.1/o/r", None, None)),
        ("https://[::1]:80/o/r", ("git", "[::1]:80", "o", "r", "https://[::1]:80/o/r", None, None)),
        ("ssh://git@h.org/o/r.git@v1", ("git", "ssh:git@h.org", "o", "r", "ssh://git@h.org/o/r.git", "v1", None)),
        ("git@github.com:o/r.git", ("git", "ssh:git@github.com", "~/o", "r", "git@github.com:o/r.git", None, None)),
        ("me@h.org:r@v1", ("git", "ssh:me@h.org", "~", "r", "me@h.org:r", "v1", None)),
        ("me@h.org:/srv/o/r@a/b", ("git", "ssh:me@h.org", "srv/o", "r", "ssh://me@h.org/srv/o/r", "a/b", None)),
        ("me@h.org:o/r@v1#subdirectory=x/y", ("git", "ssh:me@h.org", "~/o", "r", "me@h.org:o/r", "v1", "x/y")),
        ("git+https://h.org/o/r@v1#egg=x", ("git", "h.org", "o", "r", "https://h.org/o/r", "v1", None)),
        ("git+https://h.org/o/r#subdirectory=d&egg=x[a,b]", ("git", "h.org", "o", "r", "https://h.org/o/r", None, "d")),
        ("git+ssh://git@h.org/o/r", ("git", "ssh:git@h.org", "o", "r", "ssh://git@h.org/o/r", None, None)),
    ],
)
def test_grammar(text: str, expected: tuple[object, ...]) -> None:
    reference = parse(text)
    assert fields(reference) == expected
    assert reference.text == text
    assert parse(str(reference)) == reference


def test_short_text_is_canonical() -> None:
    assert str(parse("https://github.com/o/r.git@v1")) == "o/r:v1"
    assert str(parse("o/r")) == "o/r"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "text"),
        ("name", "repository"),
        ("a/b/c", "repository"),
        ("a:b:c", "repository"),
        ("/:x", "path"),
        ("o/", "repo"),
        ("/r:", "path"),
        ("o/.git", "repo"),
        ("o/r.git.git", "repo"),
        ("./..:x:y", "ref"),
        ("o/..", "repo"),
        ("-o/r", "owner"),
        ("o o/r", "owner"),
        ("o/r\u00e9", "repo"),
        ("o/" + "r" * 101, "repo"),
        ("o/r:", "ref"),
        ("o/r:b:c", "ref"),
        ("o/r:a..b", "ref"),
        ("o/r:-a", "ref"),
        ("o/r:a b", "ref"),
        ("o/r:a\u00a0b", "ref"),
        ("o/r:a\u202eb", "ref"),
        ("o/r:a//b", "ref"),
        ("o/r:/a", "ref"),
        ("o/r:a/", "ref"),
        ("o/r:a/.b", "ref"),
        ("o/r:a.lock", "ref"),
        ("o/r:a.lock/b", "ref"),
        ("o/r:a.", "ref"),
        ("o/r:@", "ref"),
        ("o/r:a@{1}", "ref"),
        *((f"o/r:a{char}b", "ref") for char in "~^?*[\\"),
        ("o/r:" + "a" * 256, "ref"),
        ("o/r:main#subdirectory=../x", "subdirectory"),
        ("o/r#subdirectory=", "subdirectory"),
        ("o/r\n", "text"),
        ("o/r\0", "text"),
        ("o/r\udc80", "text"),
        ("x" * 9000, "text"),
        ("https://github.com/o", "path"),
        ("https://github.com/o/r/tree/main", "path"),
        ("https://github.com/o/r:", "ref"),
        ("https://github.com/o/r?x=1", "fragment"),
        ("https://github.com/o/r#egg=x y", "fragment"),
        ("https://github.com/o/r#sha1=0", "fragment"),
        ("https://github.com/o/r?egg=x", "fragment"),
        ("https://github.com:port/o/r", "host"),
        ("https:///o/r", "host"),
        ("https://ex\u00e4mple.org/o/r", "host"),
        ("https://gitlab.com", "path"),
        ("https://gitlab.com/a//r", "path"),
        ("https://gitlab.com/a/../r", "path"),
        ("https://gitlab.com/a/%2e%2e/r", "path"),
        ("https://gitlab.com/a/%2fb/r", "path"),
        ("https://gitlab.com/a/%ff/r", "path"),
        ("https://gitlab.com/a/%00/r", "path"),
        ("https://gitlab.com/a/%e2%80%ae/r", "path"),
        ("http://gitlab.com/o/r", "scheme"),
        ("git://github.com/o/r", "scheme"),
        ("file:///tmp", "scheme"),
        ("ftp://h/o/r", "scheme"),
        ("ssh://-oProxyCommand=x@h/o/r", "user"),
        ("ssh://git@-h/o/r", "host"),
        ("git+file://host/tmp", "path"),
        ("git+file:///no/such/directory@main", "path"),
        ("./no-such-directory", "path"),
        ("~no-such-user-at-all/x", "path"),
        ("/", "path"),
    ],
)
def test_refused(text: str, part: str) -> None:
    with pytest.raises(InvalidReferenceError) as caught:
        parse(text)
    assert caught.value.part == part
    assert "expected" in str(caught.value)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("text", [None, 3, b"o/r", ["o/r"]])
def test_refuses_other_types(text: object) -> None:
    with pytest.raises(InvalidReferenceError, match="expected a str"):
        parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "https://user:s3cret@github.com/o/r",
        "https://s3cret@github.com/o/r",
        "git+https://user:s3cret@h.org/o/r@v1",
        "https://user:pa/s3cret@github.com/o/r",
        "ssh://git:s3cret@h.org/o/r",
        "nonsense://user:s3cret@h.org/o/r",
    ],
)
def test_credentials_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidReferenceError) as caught:
        parse(text)
    assert "s3cret" not in str(caught.value) + repr(caught.value.fields)


def test_the_server_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://ghe.example.org/")
    short = parse("o/r:v1")
    assert fields(short)[:5] == ("github", "ghe.example.org", "o", "r", "https://ghe.example.org/o/r")
    assert str(short) == "o/r:v1"
    public = parse("https://github.com/o/r:v1")
    assert public.source == "github"
    assert str(public) == "https://github.com/o/r@v1"
    assert parse(str(public)) == public
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://user:s3cret@ghe.example.org/sub")
    with pytest.raises(InvalidReferenceError) as caught:
        parse("o/r")
    assert caught.value.part == "GITHUB_SERVER_URL"
    assert "s3cret" not in str(caught.value)


def test_source_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o" / "r").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse("o/r").source == "github"
    assert parse("o/r", source="git").source == "git"
    assert parse("o/r", source="local").location == str(tmp_path / "o" / "r")
    assert parse("https://github.com/o/r", source="git").source == "git"
    for text, source in [
        ("./o", "github"),
        ("https://gitlab.com/o/r", "github"),
        ("git+file:///tmp", "github"),
        ("o/r", "svn"),
    ]:
        with pytest.raises(InvalidReferenceError) as caught:
            parse(text, source=source)  # type: ignore[arg-type]
        assert caught.value.part in ("source", "host")
    with pytest.raises(InvalidReferenceError, match=r"write \./o or pass"):
        parse("o")


def test_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    (tmp_path / "link").symlink_to(clone)
    monkeypatch.chdir(tmp_path)
    plain = parse("./clone")
    assert (plain.source, plain.host, plain.repo, plain.location) == ("local", "local", "clone", str(clone))
    assert plain.ref is None
    assert plain == parse(clone) == parse(str(clone)) == parse("clone", source="local") == parse("./link/")
    assert str(plain) == str(clone)
    with_ref = parse("./clone:feature/x")
    assert with_ref.ref == "feature/x"
    assert with_ref == parse(f"git+file://{clone}@feature/x") == parse(str(with_ref))
    assert parse(f"git+file://{clone}").ref == "HEAD"
    assert parse("./clone", source="git").ref == "HEAD"
    assert parse(f"git+file://{clone}@v1#subdirectory=a").subdirectory == "a"
    for bad in ("./clone:", "./clone:a:b", "./clone:a..b"):
        with pytest.raises(InvalidReferenceError) as caught:
            parse(bad)
        assert caught.value.part == "ref"
    monkeypatch.chdir(clone)
    assert parse(".") == plain
    assert parse("../clone") == plain
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("~/clone") == plain


def test_the_longest_directory_wins(tmp_path: Path) -> None:
    for name in ("a", "a:b", "a@b"):
        (tmp_path / name).mkdir()
    assert parse(f"{tmp_path}/a:b").repo == "a:b"
    assert parse(f"{tmp_path}/a:b").ref is None
    assert (parse(f"{tmp_path}/a:b:c").repo, parse(f"{tmp_path}/a:b:c").ref) == ("a:b", "c")
    assert (parse(f"{tmp_path}/a:c").repo, parse(f"{tmp_path}/a:c").ref) == ("a", "c")
    for text in ("a", "a:b", "a:x@y", "a:b:x", "a@b:main"):
        reference = parse(f"{tmp_path}/{text}")
        assert parse(str(reference)) == reference
    assert parse(f"git+file://{tmp_path}/a@b@c").repo == "a@b"


def test_directories_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent / "models").mkdir(parents=True)
    one, other = (parse(tmp_path / parent / "models") for parent in ("x", "y"))
    assert one.repo == other.repo == "models"
    assert one.owner != other.owner


def test_missing_directory_names_the_near_ones(tmp_path: Path) -> None:
    (tmp_path / "pytorch-unet").mkdir()
    with pytest.raises(InvalidReferenceError) as caught:
        parse(tmp_path / "pytorch_unet")
    assert "pytorch-unet" in (caught.value.hint or "")


def test_a_file_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "model.py").touch()
    with pytest.raises(InvalidReferenceError, match="path is a file; expected a directory") as caught:
        parse(tmp_path / "model.py")
    assert caught.value.hint is None


def test_a_vanished_cwd_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(InvalidReferenceError):
        parse(".")


PIECES = st.sampled_from(
    [
        *"/:@#.~-_%? ",
        "..",
        "o",
        "r",
        "main",
        ".git",
        "https://",
        "git+",
        "ssh://",
        "github.com",
        "gitlab.com",
        "%2F",
        "%40",
        "#subdirectory=",
        "refs/heads/",
        "\u00e9",
        "\u202e",
        "\0",
        "\ud800",
    ]
)


@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=12).map("".join)))
@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    refused = None
    try:
        reference = parse(text)
    except InvalidReferenceError as error:
        refused = error
    if refused is not None:
        assert refused.part
        assert refused.message.isprintable()
        return
    assert parse(str(reference)) == reference
    assert str(parse(str(reference))) == str(reference)


names = st.text("abcXYZ019-_.", min_size=1, max_size=12).filter(
    lambda n: n not in (".", "..") and not n.startswith("-") and not n.lower().endswith(".git")
)
refs = st.text(min_size=1, max_size=20).filter(lambda r: ref_problem(r) is None)
folders = st.lists(st.text("ab %#@:+\u00e9", min_size=1, max_size=5), min_size=1, max_size=3).map("/".join)


@given(names, names, st.none() | refs, st.none() | folders, st.sampled_from(["github", "git"]))
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_round_trip(owner: str, repo: str, ref: str | None, folder: str | None, source: str) -> None:
    reference = Reference(
        text="",
        source=source,  # type: ignore[arg-type]
        host="github.com",
        owner=owner,
        repo=repo,
        location=f"https://github.com/{owner}/{repo}",
        ref=ref,
        subdirectory=folder,
    )
    assert parse(str(reference)) == reference


@given(refs)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_local_round_trip(ref: str) -> None:
    base = Path(os.environ["ISOHUB_HOME"]).parent / "x@y:z %41"
    base.mkdir(exist_ok=True)
    reference = parse(f"{base}:{ref}")
    assert reference.ref == ref
    assert parse(str(reference)) == reference


@given(st.text(max_size=300), st.text(max_size=300))
def test_encoding_is_injective_and_safe(one: str, other: str) -> None:
    encoded = encode_component(one)
    assert (encoded == encode_component(other)) == (one == other)
    assert encoded.isascii()
    assert encoded.isprintable()
    assert "/" not in encoded
    assert not encoded.startswith(".")
    assert 0 < len(encoded) <= 255


def test_encoding_keeps_names_readable() -> None:
    assert encode_component("My-Repo_1.0") == "My-Repo_1.0"
    assert encode_component("a/b") == "a%2Fb"
    assert encode_component("..") == "%2E."
    assert encode_component("A") != encode_component("a")


def test_near_names() -> None:
    assert near_names("mian", ["main", "master", "develop"])[0] == "main"
    assert near_names("V2", ["v1", "v2", "x"])[0] == "v2"
    assert near_names("zzz", ["main"]) == []
    assert near_names("attention", ["feature/attention-heads"]) == ["feature/attention-heads"]


@pytest.mark.parametrize("text", ["o/r:HEAD~1", "o/r:v1^", "o/r:main@{1}", "./clone:HEAD~2"])
def test_a_revision_s_suffix_gets_a_hint(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clone").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidReferenceError) as caught:
        parse(text)
    assert "git rev-parse" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["o/r@v1", "o/r@feature/x", "o/r@v1#subdirectory=d"])
def test_a_ref_after_an_at_sign_gets_a_hint(text: str) -> None:
    with pytest.raises(InvalidReferenceError) as caught:
        parse(text)
    written = text.replace("@", ":")
    assert caught.value.hint == f"a ref follows a colon: {written}"
    assert str(parse(written)) == written


def test_an_at_sign_for_a_colon_gets_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clone").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidReferenceError) as caught:
        parse("./clone@v1.0")
    assert caught.value.hint == "for a clone at a ref, write ./clone:v1.0"
