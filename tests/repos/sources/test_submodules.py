from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isohub.errors import IntegrityError, OfflineError, SourceUnavailableError
from isohub.repos.measure import measure
from isohub.repos.pins import Pin
from isohub.repos.reference import parse
from isohub.repos.sources import extras as extras_module
from isohub.repos.sources import source_for
from isohub.repos.sources.submodules import Submodule, locate, owner_of, parse_gitmodules
from tests.servers.git_repo import GitRepo
from tests.servers.github import Fault, GitHubServer

BOTH = ("lfs", "submodules")


def link(repo: GitRepo, gitmodules: str, **commits: str) -> str:
    """Commit gitlinks: ``third_party="<sha>"`` is the path third/party."""
    for path, commit in commits.items():
        repo.git("update-index", "--add", "--cacheinfo", f"160000,{commit},{path.replace('_', '/')}")
    (repo.path / ".gitmodules").write_text(gitmodules)
    repo.git("add", ".gitmodules")
    repo.git("commit", "--quiet", "-m", "link")
    return repo.sha()


def section(path: str, url: str, name: str | None = None) -> str:
    return f'[submodule "{name or path}"]\n\tpath = {path}\n\turl = {url}\n'


@pytest.fixture
def make(github: GitHubServer, git_repo: Callable[..., GitRepo]) -> Callable[[str], GitRepo]:
    """Makes ``owner/repo`` with one file and serves it."""

    def made(name: str) -> GitRepo:
        owner, _, repo = name.rpartition("/")
        new = github.add(owner, repo, git_repo(name.replace("/", "-")))
        new.commit({"name.txt": name})
        return new

    return made


@pytest.fixture
def nested(make: Callable[[str], GitRepo]) -> GitRepo:
    """o/top has third/party (o/mid), which has deep (o/leaf)."""
    leaf, mid, top = make("o/leaf"), make("o/mid"), make("o/top")
    old = leaf.sha()
    leaf.commit({"name.txt": "newer"})
    link(mid, section("deep", "../leaf.git"), deep=old)
    link(top, section("third/party", "./../mid"), third_party=mid.sha())
    return top


def pin_of(text: str, extras: tuple[str, ...] = BOTH) -> Pin:
    reference = parse(text)
    pin = source_for(reference).resolve(reference)
    return Pin(reference, pin.commit, pin.ref_name, pin.validated, extras)


def fetch(pin: Pin | str, tmp_path: Path, name: str = "into") -> Path:
    pin = pin_of(pin) if isinstance(pin, str) else pin
    into = tmp_path / "staging" / name
    into.mkdir(parents=True)
    source_for(pin.reference).fetch(pin, into)
    assert [entry.name for entry in into.parent.iterdir() if entry.name.startswith(".")] == []
    return into


def names(into: Path) -> list[str]:
    return [path.read_text() for path in sorted(into.rglob("name.txt"), key=lambda path: len(path.parts))]


# What the file says.


def test_the_grammar() -> None:
    text = (
        '\ufeff# a comment\n; another\n[core]\n\tpath = no\n[submodule "a b"]path=x ; tail\n'
        'url = "https://h/a b#c" # tail\n'
        '[SubModule "q\\"\\x"]\n\tpath = y/z/\r\n\tURL = https://h/\\\n  q  \n'
        '[submodule "a b"]\n\tbranch\n\turl = later\n[submodule]\n\tpath = none\n[submodule "empty"]\n'
    )
    assert parse_gitmodules(text.encode()) == {
        "x": Submodule("a b", "x", "later"),
        "y/z": Submodule('q"x', "y/z", "https://h/  q"),
    }
    assert parse_gitmodules(b"") == {}
    assert parse_gitmodules(b'[submodule "x"]\n\tpath = p\n') == {"p": Submodule("x", "p", None)}


@pytest.mark.parametrize(
    "text",
    [
        "= 1",
        "[submodule",
        '[submodule "x]\n',
        "???",
        '[submodule "x"]\npath = "open',
        '[submodule "x"]\npath = a\\q',
        section("p", "u", name="../../x"),
        section("p", "u", name="a/../b"),
        section("p", "u", name="/etc"),
        section("p", "u", name="a\\\\..\\\\b"),
        section("p", "u", name="-x"),
        section("-p", "u"),
        section("p", "--upload-pack=touch /tmp/x"),
        section("p", "u\x1b"),
        section("p\u202e", "u"),
        section("p", "x" * 20_000),
        "#" * (2 << 20),
    ],
)
def test_what_git_refuses_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_gitmodules(text.encode())


@given(st.one_of(st.binary(max_size=200), st.text('[submodule "x]\n\\#;= \tpathurl', max_size=100).map(str.encode)))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        parse_gitmodules(data)
    except ValueError:
        pass


# Where it leads.


@pytest.mark.parametrize(
    ("url", "base", "found"),
    [
        ("https://h/o/r.git", "https://github.com/a/b", "https://h/o/r.git"),
        ("https://h/o/r/", "https://github.com/a/b", "https://h/o/r"),
        ("https://h/o/r%20x@y", "https://github.com/a/b", "https://h/o/r%20x%40y"),
        ("../r", "https://github.com/a/b.git", "https://github.com/a/r"),
        ("../../c/r.git", "https://github.com/a/b/", "https://github.com/c/r.git"),
        ("./r", "https://github.com/a/b", "https://github.com/a/b/r"),
        (".././../r", "https://h/g/sub/b", "https://h/g/r"),
        ("../r", "ssh://git@h:22/o/b", "ssh://git@h:22/o/r"),
        ("../r", "git@h:o/b.git", "git@h:o/r"),
        ("git@h:x/y", "ssh://git@h/o/b", "git@h:x/y"),
        ("ssh://git@h/~u/y", "git@h:o/b", "ssh://git@h/~u/y"),
        ("http://127.0.0.1:5/o/r", "http://127.0.0.1:6/a/b", "http://127.0.0.1:5/o/r"),
    ],
)
def test_where_urls_lead(url: str, base: str, found: str) -> None:
    assert locate(url, base) == found


@pytest.mark.parametrize(
    ("url", "base", "why"),
    [
        ("/etc", "https://h/o/r", "path"),
        ("file:///etc", "https://h/o/r", "scheme"),
        ("git://h/o/r", "https://h/o/r", "scheme"),
        ("ext::sh -c id", "https://h/o/r", "path"),
        ("", "https://h/o/r", "path"),
        ("http://h/o/r", "https://h/o/r", "refused"),
        ("http://127.0.0.1/o/r", "https://h/o/r", "not encrypted"),
        ("http://127.0.0.1/o/r", None, "not encrypted"),
        ("git@h:o/r", "https://h/o/r", "ssh"),
        ("ssh://h/o/r", "https://h/o/r", "ssh"),
        ("ssh://h/o/r", None, "ssh"),
        ("ssh://-oProxyCommand=id/o/r", "ssh://h/o/r", "refused"),
        ("-oProxyCommand=id@h:o/r", "ssh://h/o/r", "refused"),
        ("https://me:pw@h/o/r", "https://h/o/r", "refused"),
        ("https://h/o/../r", "https://h/o/r", "refused"),
        ("https://h", "https://h/o/r", "refused"),
        ("https://h/o/r?token=pw", "https://h/o/r", "query"),
        ("https://h?token=pw", "https://h/o/r", "query"),
        ("https://-h/o", "https://h/o/r", "refused"),
        ("../../../../evil.example/r", "https://h/o/r", "above"),
        ("../../../x", "git@h:o/r", "above"),
        ("../r", None, "no server"),
    ],
)
def test_where_urls_must_not_lead(url: str, base: str | None, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        locate(url, base)
    assert "pw" not in str(caught.value)


def test_owners() -> None:
    assert owner_of("https://h/o/r.git") == owner_of("https://H/o/s") != owner_of("https://h/O/s")
    assert owner_of("https://h/g/sub/r") != owner_of("https://h/g/r")
    assert owner_of("https://h:8443/o/r") != owner_of("https://h/o/r")
    assert owner_of("git@h:o/r") == owner_of("ssh://git@h/o/s") != owner_of("other@h:o/r")


# What comes.


@pytest.mark.parametrize("form", ["o/top", "git+{url}/o/top", "git+{url}/o/top.git"])
@pytest.mark.parametrize("able", [True, False])
def test_nested_submodules(github: GitHubServer, nested: GitRepo, tmp_path: Path, form: str, able: bool) -> None:
    for name in ("o/mid", "o/leaf"):  # else a commit that is no tip comes by the way of refs
        served = github.repo(name)
        assert served is not None
        served.git("config", "uploadpack.allowReachableSHA1InWant", str(able).lower())
    into = fetch(form.format(url=github.url), tmp_path)
    assert names(into) == ["o/top", "o/mid", "o/leaf"]
    assert (into / "third" / "party" / "deep" / "name.txt").exists()
    assert measure(into).empty == ()


def test_without_asking_they_stay_empty(github: GitHubServer, nested: GitRepo, tmp_path: Path) -> None:
    for number, text in enumerate(("o/top", f"git+{github.url}/o/top", f"{nested.path}:main")):
        assert measure(fetch(pin_of(text, ()), tmp_path, str(number))).empty == ("third/party",)
    assert github.count("/o/mid") == 0


def test_lfs_files_of_submodules(github: GitHubServer, make: Callable[[str], GitRepo], tmp_path: Path) -> None:
    sub, top = make("o/sub"), make("o/top")
    sub.commit({"w.bin": github.add_lfs("o", "sub", b"weights")})
    link(top, section("sub", "../sub"), sub=sub.sha())
    assert (fetch("o/top", tmp_path) / "sub" / "w.bin").read_bytes() == b"weights"
    assert (fetch(pin_of("o/top", ("submodules",)), tmp_path, "p") / "sub" / "w.bin").read_bytes() != b"weights"


@pytest.mark.parametrize(
    ("gitmodules", "said"),
    [
        ("", "not in .gitmodules"),
        (section("elsewhere", "../leaf"), "not in .gitmodules"),
        (section("sub", "../no-such"), r"'sub' \('../no-such'\).*404"),
        (section("sub", "file:///etc"), "'sub'.*scheme"),
        (section("sub", "/etc"), "'sub'.*path"),
        (section("sub", "git@example.org:o/leaf"), "'sub'.*ssh"),
        ('[submodule "sub"]\n\tpath = sub\n', "'sub'.*URL is not there"),
        (section("sub", "../leaf\x1b[2J"), ".gitmodules cannot be used"),
        (section("sub", "../leaf", name="../../x"), ".gitmodules cannot be used"),
    ],
)
def test_submodules_that_cannot_come(
    make: Callable[[str], GitRepo], tmp_path: Path, gitmodules: str, said: str
) -> None:
    leaf, top = make("o/leaf"), make("o/top")
    link(top, gitmodules, sub=leaf.sha())
    with pytest.raises((SourceUnavailableError, IntegrityError), match=said) as caught:
        fetch("o/top", tmp_path)
    assert caught.value.message.isprintable()
    # The control: without submodules it loads.
    assert names(fetch(pin_of("o/top", ("lfs",)), tmp_path, "without")) == ["o/top"]


@pytest.mark.parametrize("able", [True, False])
def test_an_absent_commit(github: GitHubServer, make: Callable[[str], GitRepo], tmp_path: Path, able: bool) -> None:
    leaf, top = make("o/leaf"), make("o/top")
    leaf.git("config", "uploadpack.allowAnySHA1InWant", str(able).lower())
    link(top, section("sub", "../leaf"), sub="f" * 40)
    with pytest.raises(SourceUnavailableError, match=rf"'sub' \('../leaf'\).*{'f' * 40}"):
        fetch("o/top", tmp_path)


def test_a_server_that_is_gone(github: GitHubServer, make: Callable[[str], GitRepo], tmp_path: Path) -> None:
    leaf, top = make("o/leaf"), make("o/top")
    with GitHubServer() as other:
        pass
    link(top, section("sub", f"{other.url}/o/leaf"), sub=leaf.sha())
    with pytest.raises(SourceUnavailableError, match=r"'sub' \('http://127.*cannot be reached"):
        fetch("o/top", tmp_path)


def test_gitmodules_that_is_a_link(make: Callable[[str], GitRepo], tmp_path: Path) -> None:
    leaf, top = make("o/leaf"), make("o/top")
    link(top, section("sub", "../leaf"), sub=leaf.sha())
    (top.path / ".gitmodules").rename(top.path / "real")
    (top.path / ".gitmodules").symlink_to("real")
    top.git("add", "real", ".gitmodules")
    top.git("commit", "--quiet", "-m", "link")
    with pytest.raises(SourceUnavailableError, match=r"not in \.gitmodules"):
        fetch("o/top", tmp_path)


def test_links_of_submodules_stay_inside(make: Callable[[str], GitRepo], tmp_path: Path) -> None:
    leaf, top = make("o/leaf"), make("o/top")
    (leaf.path / "up").symlink_to("../name.txt")
    leaf.commit()
    link(top, section("sub", "../leaf"), sub=leaf.sha())
    assert (fetch("o/top", tmp_path) / "sub" / "up").read_text() == "o/top"
    (leaf.path / "out").symlink_to("../../name.txt")
    leaf.commit()
    link(top, section("sub", "../leaf"), sub=leaf.sha())
    with pytest.raises(IntegrityError, match="sub/out"):
        fetch("o/top", tmp_path, "out")


def test_bounds(make: Callable[[str], GitRepo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = make("o/r0")
    for number in range(1, 5):
        above = make(f"o/r{number}")
        link(above, section("s", f"../r{number - 1}"), s=below.sha())
        below = above
    assert len(names(fetch("o/r4", tmp_path))) == 5
    with monkeypatch.context() as patched:
        patched.setattr(extras_module, "_NESTED_LIMIT", 3)
        with pytest.raises(IntegrityError, match="'s/s/s/s' is a submodule too many"):
            fetch("o/r4", tmp_path, "depth")
    with monkeypatch.context() as patched:
        patched.setattr(extras_module, "_SUBMODULES_LIMIT", 3)
        with pytest.raises(IntegrityError, match="too many"):
            fetch("o/r4", tmp_path, "count")
    with monkeypatch.context() as patched:
        patched.setattr(extras_module, "PACK_LIMIT_BYTES", 500)
        with pytest.raises(IntegrityError, match="more than"):
            fetch("o/r4", tmp_path, "bytes")


# Who is asked as whom.


def test_credentials_go_to_the_parents_owner_alone(
    github: GitHubServer, make: Callable[[str], GitRepo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "home" / ".netrc"
    netrc.parent.mkdir()
    netrc.write_text("machine 127.0.0.1 login me password s3cret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret")
    monkeypatch.setenv("GITHUB_SERVER_URL", github.url)
    private, theirs, top = make("o/private"), make("stranger/lib"), make("o/top")
    # A stranger's repository names the user's private one: it must not come into the stranger's reach.
    link(theirs, section("loot", "../../o/private"), loot=private.sha())
    link(top, section("a", "../private") + section("b", "../../stranger/lib"), a=private.sha(), b=theirs.sha())
    for number, text in enumerate(("o/top", f"git+{github.url}/o/top")):
        github.forget()
        fetch(text, tmp_path, str(number))
        sent = [(r.path.split(".git")[0].split("/info")[0], "Authorization" in r.headers) for r in github.requests]
        assert ("/o/top", True) in sent
        assert ("/o/private", True) in sent
        assert [authorized for path, authorized in sent if path.startswith("/stranger")] == [False, False]
        # Once for the parent with credentials, once for the stranger without.
        assert [authorized for path, authorized in sent if path.startswith("/o/private")].count(False) == 2


def test_a_pull_requests_submodules_come_without_credentials(
    github: GitHubServer, make: Callable[[str], GitRepo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret")
    private, top = make("o/private"), make("o/top")
    link(top, section("a", "../private.git"), a=private.sha())
    top.ref("refs/pull/1/head")
    skipped = Pin(parse("o/top"), top.sha(), None, validated=False, extras=BOTH)
    for number, pin in enumerate((pin_of("o/top:pull/1"), skipped)):
        github.forget()
        fetch(pin, tmp_path, str(number))
        sent = [("Authorization" in r.headers) for r in github.requests if "/o/private" in r.path]
        assert sent == [False, False]
    github.token = "s3cret"
    with pytest.raises(SourceUnavailableError, match="'a'.*401.*without your credentials") as caught:
        fetch(pin_of("o/top:pull/1"), tmp_path, "refused")
    assert "netrc" not in (caught.value.hint or "")
    fetch(pin_of("o/top"), tmp_path, "own")


# Clones.


def test_a_clones_own_submodules_come_first(github: GitHubServer, nested: GitRepo, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    nested.git("clone", "--quiet", "--recurse-submodules", f"{github.url}/o/top", str(clone))
    github.forget()
    into = fetch(f"{clone}:main", tmp_path)
    assert names(into) == ["o/top", "o/mid", "o/leaf"]
    assert github.count() == 0
    nested.git("-C", str(clone), "worktree", "add", "--quiet", "--detach", str(tmp_path / "linked"))
    assert names(fetch(f"{tmp_path / 'linked'}:HEAD", tmp_path, "linked")) == ["o/top", "o/mid", "o/leaf"]
    assert github.count() == 0
    # What it lacks comes from its remote.
    shutil.rmtree(clone / ".git" / "modules" / "third" / "party" / "modules")
    assert names(fetch(f"{clone}:main", tmp_path, "less")) == ["o/top", "o/mid", "o/leaf"]
    assert github.count("/o/leaf") == 2
    shutil.rmtree(clone / ".git" / "modules")
    assert names(fetch(f"{clone}:main", tmp_path, "none")) == ["o/top", "o/mid", "o/leaf"]


def test_a_clone_gives_credentials_to_its_own_commits_alone(
    github: GitHubServer, make: Callable[[str], GitRepo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull request that was fetched into a clone names the user's private repository."""
    private, top = make("o/private"), make("o/top")
    first = top.sha()
    link(top, section("a", "../private.git"), a=private.sha())
    top.ref("refs/remotes/origin/pr/1")
    top.ref("refs/pull/1/head")
    theirs = top.sha()
    top.git("reset", "--quiet", "--hard", first)
    top.git("remote", "add", "origin", f"{github.url}/o/top.git")
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret")
    github.token = "s3cret"
    for number, ref in enumerate(("refs/remotes/origin/pr/1", "refs/pull/1/head", theirs)):
        github.forget()
        with pytest.raises(SourceUnavailableError, match="'a'.*401.*without your credentials"):
            fetch(f"{top.path}:{ref}", tmp_path, str(number))
        assert ["Authorization" in r.headers for r in github.requests] == [False]
    # The control: what the user's own branches and tags lead to, tip or not.
    top.ref("refs/tags/mine", theirs)
    assert names(fetch(f"{top.path}:refs/pull/1/head", tmp_path, "tag")) == ["o/top", "o/private"]
    top.git("reset", "--quiet", "--hard", "mine")
    top.git("tag", "-d", "mine")
    top.commit({"more": "x"})
    assert names(fetch(f"{top.path}:{theirs}", tmp_path, "behind")) == ["o/top", "o/private"]


def test_a_clone_offline(github: GitHubServer, nested: GitRepo, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    nested.git("clone", "--quiet", "--recurse-submodules", f"{github.url}/o/top", str(clone))
    github.forget()
    reference = parse(f"{clone}:main")
    source = source_for(reference, offline=True)
    pin = replace(source.resolve(reference), extras=BOTH)
    into = tmp_path / "into"
    into.mkdir()
    source.fetch(pin, into)
    assert names(into) == ["o/top", "o/mid", "o/leaf"]
    for below, named in (("third/party/modules", "'third/party/deep'"), ("third", "'third/party'")):
        shutil.rmtree(clone / ".git" / "modules" / below)
        shutil.rmtree(into)
        into.mkdir()
        with pytest.raises(OfflineError, match=f"{named}.*network may not be used") as caught:
            source.fetch(pin, into)
        assert "git submodule update" in (caught.value.hint or "")
    assert github.count() == 0


def test_passwords_that_somebody_wrote_there_are_not_shown(make: Callable[[str], GitRepo], tmp_path: Path) -> None:
    leaf, top = make("o/leaf"), make("o/top")
    urls = (
        "https://me:s3cret@example.org/o/leaf",
        "https://s3cret@example.org/o/leaf",
        "https://example.org/o/leaf?private_token=s3cret",
        "ssh://me:s3cret@example.org/o/leaf",
        "me:s3cret@example.org:o/leaf",
        "me:s3/cret:s3cret@example.org/o/leaf",
    )
    for number, url in enumerate(urls):
        link(top, section("sub", url), sub=leaf.sha())
        with pytest.raises(SourceUnavailableError, match="'sub'.*example.org") as caught:
            fetch("o/top", tmp_path, str(number))
        assert "s3cret" not in str(caught.value) + repr(caught.value.fields), url
    for url in urls[3:]:
        with pytest.raises(ValueError) as refused:
            locate(url, "git@example.org:o/top" if url.startswith("ssh") else "https://example.org/o/top")
        assert "s3cret" not in str(refused.value)


def test_a_submodule_that_may_come_later(github: GitHubServer, make: Callable[[str], GitRepo], tmp_path: Path) -> None:
    leaf, top = make("o/leaf"), make("o/top")
    link(top, section("sub", "../leaf"), sub=leaf.sha())
    pin = pin_of("o/top")
    for number, (status, passing) in enumerate(((503, True), (404, False))):
        github.behave()
        github.fail("/o/leaf.*/info/refs", Fault(status=status))
        with pytest.raises(SourceUnavailableError, match="'sub'") as caught:
            fetch(pin, tmp_path, str(number))
        assert (caught.value.status, caught.value.passing) == (status, passing)


def test_a_clone_without_a_server(make: Callable[[str], GitRepo], tmp_path: Path) -> None:
    leaf, top = make("o/leaf"), make("o/top")
    link(top, section("sub", "../leaf"), sub=leaf.sha())
    with pytest.raises(SourceUnavailableError, match="no server"):
        fetch(f"{top.path}:main", tmp_path)
    # A path beside the clone is no way to another repository of the user's.
    link(top, section("sub", str(leaf.path)), sub=leaf.sha())
    with pytest.raises(SourceUnavailableError, match="is a path"):
        fetch(f"{top.path}:main", tmp_path, "path")


def test_damage_on_the_way(github: GitHubServer, nested: GitRepo, tmp_path: Path) -> None:
    pin = pin_of("o/top")
    for number, body in enumerate((b"", b"0008NAK\nPACK", b"0008NAK\n" + b"PACK\0\0\0\2\0\0\0\1" + b"\0" * 40)):
        github.behave()
        github.fail("/o/mid.*/git-upload-pack$", Fault(body=body))
        with pytest.raises((SourceUnavailableError, IntegrityError), match="'third/party'"):
            fetch(pin, tmp_path, str(number))
