from __future__ import annotations

import base64
import logging
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isohub.errors import FetchError, IntegrityError, IsohubError, RefNotFoundError, SourceUnavailableError
from isohub.repos import http
from isohub.repos.credentials import Credentials
from isohub.repos.measure import measure
from isohub.repos.pins import Pin
from isohub.repos.reference import parse
from isohub.repos.sources import source_for
from isohub.repos.sources.git import GitSource
from isohub.repos.sources.github import GitHubSource
from tests.servers.git_repo import GitRepo
from tests.servers.github import Fault, GitHubServer

REFS, ARCHIVE, COMMIT, API = r"/info/refs", r"/archive/", r"/git-upload-pack$", r"/api/v3/"


@pytest.fixture
def repo(github: GitHubServer, git_repo: Callable[..., GitRepo]) -> GitRepo:
    """o/r: main with three commits, feature/x, v1 (light), v2 (annotated), pull request 7."""
    made = github.add("o", "r", git_repo("r", branch="trunk"))
    made.commit({"hubconf.py": "one\n"}, "one")
    made.tag("v1")
    made.commit({"hubconf.py": "two\n"}, "two")
    made.tag("v2", annotated=True)
    made.branch("feature/x")
    made.commit({"hubconf.py": "feature\n"}, "feature")
    made.branch("theirs")
    made.commit({"hubconf.py": "pull\n"}, "pull")
    made.ref("refs/pull/7/head")
    made.checkout("trunk")
    made.git("branch", "--quiet", "-D", "theirs")
    made.commit({"hubconf.py": "three\n"}, "three")
    return made


def resolve(text: str, **options: bool) -> Pin:
    return GitHubSource().resolve(parse(text), **options)


def fetch(pin: Pin, tmp_path: Path, name: str = "into") -> Path:
    into = tmp_path / "staging" / name
    into.mkdir(parents=True)
    GitHubSource().fetch(pin, into)
    return into


@pytest.mark.parametrize(
    ("ref", "at", "name"),
    [
        (None, "trunk", "refs/heads/trunk"),
        ("HEAD", "trunk", "refs/heads/trunk"),
        ("trunk", "trunk", "refs/heads/trunk"),
        ("feature/x", "feature/x", "refs/heads/feature/x"),
        ("heads/feature/x", "feature/x", "refs/heads/feature/x"),
        ("refs/heads/trunk", "trunk", "refs/heads/trunk"),
        ("v1", "v1", "refs/tags/v1"),
        ("v2", "v2^{commit}", "refs/tags/v2"),
        ("refs/tags/v2", "v2^{commit}", "refs/tags/v2"),
        ("pull/7", "refs/pull/7/head", "refs/pull/7/head"),
        ("pull/7/head", "refs/pull/7/head", "refs/pull/7/head"),
        ("refs/pull/7/head", "refs/pull/7/head", "refs/pull/7/head"),
    ],
)
def test_resolves_names_in_one_request(
    github: GitHubServer, repo: GitRepo, ref: str | None, at: str, name: str
) -> None:
    pin = resolve("o/r" + (f":{ref}" if ref else ""))
    # Anyone can open a pull request: its commit is not the repository's own.
    assert (pin.commit, pin.ref_name, pin.validated) == (repo.sha(at), name, not name.startswith("refs/pull/"))
    assert github.count() == github.count(REFS) == 1


def test_resolves_shas(github: GitHubServer, repo: GitRepo) -> None:
    tip = repo.sha("trunk")
    assert resolve(f"o/r:{tip}").commit == tip
    assert resolve(f"o/r:{tip.upper()}").commit == tip
    assert resolve(f"o/r:{tip[:7]}").commit == tip
    assert resolve(f"o/r:{repo.sha('v2^{commit}')}").ref_name is None
    assert github.count(API) == 0


@pytest.fixture(params=[True, False], ids=["filter", "rest"])
def by_history(request: pytest.FixtureRequest, repo: GitRepo) -> bool:
    """Whether the server can leave files out of a history, as GitHub can; else the REST API is asked."""
    repo.git("config", "uploadpack.allowFilter", str(request.param).lower())
    return bool(request.param)


def test_older_commits_are_shown_to_be_reachable(github: GitHubServer, repo: GitRepo, by_history: bool) -> None:
    repo.git("tag", "-d", "v1")
    old = repo.sha("trunk~2")
    assert resolve(f"o/r:{old}") == Pin(parse(f"o/r:{old}"), old, None)
    assert github.count("/compare/") == (0 if by_history else 1)  # the default branch comes first
    assert resolve(f"o/r:{old[:8]}").commit == old
    side = repo.branch("side", "feature/x")
    repo.commit(message="on top")
    repo.git("checkout", "--quiet", "trunk")
    repo.git("branch", "--quiet", "-D", "feature/x")
    github.forget()
    assert resolve(f"o/r:{side}").commit == side
    assert github.count("/compare/") == (0 if by_history else 2)
    assert github.count() == (2 if by_history else 3)


def test_a_history_beyond_its_bound_is_asked_about_by_rest(
    github: GitHubServer, repo: GitRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.git("config", "uploadpack.allowFilter", "true")
    monkeypatch.setattr("isohub.repos.sources.github.HISTORY_LIMIT_BYTES", 100)
    old = repo.sha("trunk~1")
    repo.git("tag", "-d", "v2")
    assert resolve(f"o/r:{old}").commit == old
    assert github.count("/compare/") == 1


def test_short_shas_in_the_history(github: GitHubServer, repo: GitRepo) -> None:
    repo.git("config", "uploadpack.allowFilter", "true")
    # Two of 2,000 share 16 bits; the dates are fixed, so that it is the same two each time.
    repo.git(
        "fast-import",
        "--quiet",
        stdin="".join(
            f"commit refs/heads/many\ncommitter A <a@b> {number} +0000\ndata 1\nx\n"
            + ("from refs/heads/trunk^0\n" if number == 0 else "")
            for number in range(2000)
        ).encode(),
    )
    by_start: dict[str, list[str]] = {}
    for sha in repo.git("rev-list", "many").splitlines():
        by_start.setdefault(sha[:4], []).append(sha)
    same = next(same for same in by_start.values() if len(same) > 1)
    with pytest.raises(RefNotFoundError, match=f"short for {len(same)} commits") as caught:
        resolve(f"o/r:{same[0][:4]}")
    assert sorted(caught.value.near or []) == sorted(same)
    assert resolve(f"o/r:{same[0][:12]}").commit == same[0]
    assert github.count(API) == 0


@pytest.mark.parametrize("form", ["o/r:{}", "git+{url}/o/r@{}"])
def test_the_id_of_an_annotated_tag_is_told_from_a_commit(github: GitHubServer, repo: GitRepo, form: str) -> None:
    tag, commit = repo.sha("v2"), repo.sha("v2^{commit}")
    repo.commit(message="on top")
    for ref, skip_validation in ((tag, False), (tag, True), (tag[:8], False)):
        reference = parse(form.format(ref, url=github.url))
        with pytest.raises(RefNotFoundError, match="id of the annotated tag v2, which is no commit") as caught:
            source_for(reference).resolve(reference, skip_validation=skip_validation)
        assert commit in (caught.value.hint or "")
        assert "fork" not in str(caught.value)
    assert github.count(API) == 0
    reference = parse(form.format(commit, url=github.url))
    assert source_for(reference).resolve(reference).commit == commit


def test_a_forks_commit_is_refused(
    github: GitHubServer, repo: GitRepo, caplog: pytest.LogCaptureFixture, by_history: bool
) -> None:
    fork = repo.orphan({"hubconf.py": "evil"}, parent=repo.sha("trunk"))
    unrelated = repo.orphan({"hubconf.py": "evil"})
    for sha in (fork, unrelated, fork[:10]):
        with pytest.raises(RefNotFoundError, match="may live only in a fork") as caught:
            resolve(f"o/r:{sha}")
        assert "skip_validation" in (caught.value.hint or "")
    assert github.count(API) == 0 or not by_history
    with caplog.at_level(logging.WARNING, "isohub.repos"):
        github.forget()
        pin = resolve(f"o/r:{fork}", skip_validation=True)
        assert github.count(API) == 0
        assert resolve(f"o/r:{fork[:10]}", skip_validation=True).commit == fork
    assert (pin.commit, pin.validated) == (fork, False)
    assert fork in caplog.text


def test_a_pull_requests_commit_is_not_the_repositorys(github: GitHubServer, repo: GitRepo, by_history: bool) -> None:
    pull = repo.sha("refs/pull/7/head")
    for sha in (pull, pull[:9]):
        with pytest.raises(RefNotFoundError) as caught:
            resolve(f"o/r:{sha}")
        assert "o/r:pull/7" in (caught.value.hint or "")


def test_the_search_for_a_commit_is_bounded(
    github: GitHubServer, repo: GitRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isohub.repos.sources.github._COMPARE_LIMIT", 2)
    repo.git("config", "uploadpack.allowFilter", "false")
    fork = repo.orphan({"hubconf.py": "evil"})
    with pytest.raises(RefNotFoundError, match="none of the first 2 of its 4 branches and tags"):
        resolve(f"o/r:{fork}")
    assert github.count("/compare/") == 2


def test_unknown_and_ambiguous_shas(github: GitHubServer, repo: GitRepo) -> None:
    repo.git("config", "uploadpack.allowFilter", "false")
    for sha in ("f" * 40, "fffffff"):
        with pytest.raises(RefNotFoundError, match="no branch, tag or commit"):
            resolve(f"o/r:{sha}")
    github.fail("/commits/", Fault(body=b'{"sha": "%s"}' % (b"0" * 40)))
    with pytest.raises(RefNotFoundError):
        resolve("o/r:ffff123")
    github.fail("/commits/", Fault(body=b"[]"))
    by_start: dict[str, list[str]] = {}
    number = 0
    while not any(len(same) > 1 for same in by_start.values()):
        sha = repo.orphan({"n": str(number)})
        by_start.setdefault(sha[:4], []).append(sha)
        number += 1
        if number > 400:  # two of 400 share 16 bits with a chance of 0.7; then we make our own
            break
    same = next((same for same in by_start.values() if len(same) > 1), None)
    if same is not None:
        for index, sha in enumerate(same):
            repo.ref(f"refs/heads/same{index}", sha)
        with pytest.raises(RefNotFoundError, match=f"short for {len(same)} commits") as caught:
            resolve(f"o/r:{same[0][:4]}")
        assert sorted(caught.value.near or []) == sorted(same)


def test_a_name_that_looks_like_hex_wins(github: GitHubServer, repo: GitRepo) -> None:
    repo.ref("refs/heads/deadbeef", "v1")
    short = repo.sha("trunk")[:6]
    repo.ref(f"refs/heads/{short}", "v1")
    assert resolve("o/r:deadbeef").commit == repo.sha("v1")
    assert resolve(f"o/r:{short}").ref_name == f"refs/heads/{short}"
    assert resolve(f"o/r:{short[:5]}").commit == repo.sha("trunk")
    whole = repo.sha("trunk")
    repo.ref(f"refs/heads/{whole}", "v1")
    assert resolve(f"o/r:{whole}") == Pin(parse(f"o/r:{whole}"), whole, None)


def test_a_tag_wins_over_a_branch_with_a_warning(
    github: GitHubServer, repo: GitRepo, caplog: pytest.LogCaptureFixture
) -> None:
    repo.ref("refs/heads/v1", "trunk")
    with caplog.at_level(logging.WARNING, "isohub.repos"):
        assert resolve("o/r:v1").ref_name == "refs/tags/v1"
    assert "refs/tags/v1" in caplog.text
    assert "refs/heads/v1" in caplog.text
    caplog.clear()
    repo.ref("refs/heads/v1", "v1")
    resolve("o/r:v1")
    resolve("o/r:refs/heads/v1")
    assert caplog.text == ""


def test_near_names(github: GitHubServer, repo: GitRepo) -> None:
    with pytest.raises(RefNotFoundError) as caught:
        resolve("o/r:truck")
    assert caught.value.near == ["trunk"]
    assert caught.value.ref == "truck"
    assert "near names: trunk" in str(caught.value)
    with pytest.raises(RefNotFoundError, match="no such pull request") as caught:
        resolve("o/r:pull/99")
    assert caught.value.near == []


def test_an_empty_repository(github: GitHubServer, git_repo: Callable[..., GitRepo]) -> None:
    github.add("o", "empty", git_repo("empty"))
    with pytest.raises(RefNotFoundError, match="no commits yet"):
        resolve("o/empty")


def test_a_missing_repository(github: GitHubServer) -> None:
    with pytest.raises(SourceUnavailableError, match="o/nope") as caught:
        resolve("o/nope")
    assert caught.value.status == 404
    assert "GITHUB_TOKEN" in (caught.value.hint or "")


def test_fetches_the_tree(github: GitHubServer, repo: GitRepo, tmp_path: Path) -> None:
    into = fetch(resolve("o/r:v1"), tmp_path)
    assert (into / "hubconf.py").read_text() == "one\n"
    assert list(into.parent.iterdir()) == [into]


@pytest.mark.parametrize("path", [REFS, ARCHIVE])
@pytest.mark.parametrize(
    "fault", [Fault(status=500), Fault(status=503, headers={"Retry-After": "0"}), Fault(truncate=20)]
)
def test_stumbles_are_retried(github: GitHubServer, repo: GitRepo, tmp_path: Path, path: str, fault: Fault) -> None:
    github.fail(path, fault, times=2)
    assert (fetch(resolve("o/r:v1"), tmp_path) / "hubconf.py").read_text() == "one\n"
    assert github.count(path) == 3


@pytest.mark.parametrize("path", [REFS, ARCHIVE])
@pytest.mark.parametrize(
    ("fault", "status"), [(Fault(status=502), 502), (Fault(truncate=20), None), (Fault(status=403), 403)]
)
def test_lasting_faults_are_clear_errors(
    github: GitHubServer, repo: GitRepo, tmp_path: Path, path: str, fault: Fault, status: int | None
) -> None:
    pin = resolve("o/r:v1")
    github.forget()
    github.fail(path, fault)
    with pytest.raises(SourceUnavailableError) as caught:
        fetch(resolve("o/r:v1") if path == REFS else pin, tmp_path)
    assert caught.value.status == status
    assert github.host in str(caught.value)
    assert github.count(path) == (1 if status == 403 else 3)
    assert caught.value.hint or status == 502


def test_a_stalled_server_is_given_up(
    github: GitHubServer, repo: GitRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 0.1)
    pin = resolve("o/r:v1")
    github.fail(ARCHIVE, Fault(stall=threading.Event()))
    with pytest.raises(SourceUnavailableError, match=r"cannot be reached|nothing came for 0\.1 s"):
        fetch(pin, tmp_path)
    assert github.count(ARCHIVE) == 3


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with GitHubServer() as server:
        monkeypatch.setenv("GITHUB_SERVER_URL", server.url)
    with pytest.raises(SourceUnavailableError, match="cannot be reached") as caught:
        resolve("o/r")
    assert "network" in (caught.value.hint or "")


def test_rate_limits(github: GitHubServer, repo: GitRepo) -> None:
    reset = str(int(time.time()) + 3000)
    github.fail(REFS, Fault(status=403, headers={"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset}), times=1)
    with pytest.raises(SourceUnavailableError, match=r"limits the rate.*UTC") as caught:
        resolve("o/r")
    assert github.count() == 1
    assert "GITHUB_TOKEN" in (caught.value.hint or "")
    github.fail(REFS, Fault(status=429, headers={"Retry-After": "3600"}), times=1)
    with pytest.raises(SourceUnavailableError, match="3600 s"):
        resolve("o/r")
    github.fail(REFS, Fault(status=429, headers={"Retry-After": "0"}), times=1)
    assert resolve("o/r").commit == repo.sha("trunk")


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Sign in</html>",
        b"",
        b"zzzz",
        b"001e# service=git-upload-pack\n",
        b"001e# service=git-upload-pack\n0000",
        b"001e# service=git-upload-pack\n0000ffff",
        b"001e# service=git-upload-pack\n00000008none0000",
        b"001e# service=git-upload-pack\n00000003",
        b"001e# service=git-upload-pack\n0000000cERR no\n0000",
    ],
)
def test_answers_that_are_no_advertisement(github: GitHubServer, repo: GitRepo, body: bytes) -> None:
    github.fail(REFS, Fault(body=body, headers={"Content-Type": "application/x-git-upload-pack-advertisement"}))
    with pytest.raises(SourceUnavailableError, match="protocol does not allow"):
        resolve("o/r")
    github.behave()
    github.fail(REFS, Fault(body=body, headers={"Content-Type": "text/html"}))
    with pytest.raises(SourceUnavailableError, match="text/html"):
        resolve("o/r")


def test_an_archive_of_another_commit(github: GitHubServer, repo: GitRepo, tmp_path: Path) -> None:
    github.fail(ARCHIVE, Fault(comment=b"b" * 40))
    with pytest.raises(IntegrityError, match="says that it is of commit"):
        fetch(resolve("o/r:v1"), tmp_path)


def test_an_answer_that_is_no_archive(github: GitHubServer, repo: GitRepo, tmp_path: Path) -> None:
    github.fail(ARCHIVE, Fault(body=b"<html></html>"))
    with pytest.raises(IntegrityError, match="no sound zip"):
        fetch(resolve("o/r:v1"), tmp_path)


@pytest.fixture
def other() -> Iterator[GitHubServer]:
    with GitHubServer() as server:
        yield server


def test_tokens_stay_with_their_host(
    github: GitHubServer,
    other: GitHubServer,
    repo: GitRepo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    github.token = "s3cret"
    with pytest.raises(SourceUnavailableError) as caught:
        resolve("o/r")
    assert "GITHUB_TOKEN" in (caught.value.hint or "")
    monkeypatch.setenv("GH_TOKEN", "wrong")
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret")
    pin = resolve("o/r:v1")
    old = repo.sha("feature/x~1")
    assert resolve(f"o/r:{old}").commit == old
    with caplog.at_level(logging.WARNING, "isohub.repos"):
        into = fetch(pin, tmp_path)
    assert (into / "hubconf.py").read_text() == "one\n"
    assert github.count("/zipball/") == 1
    assert caplog.text == ""  # the commit is shown as well
    # A redirect to another port is a redirect to another host.
    github.fail(ARCHIVE, Fault(redirect=other.url + "{path}"))
    other.add("o", "r", repo)
    fetch(pin, tmp_path, "redirected")
    assert [r.headers.get("Authorization") for r in other.requests] == [None]
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret-and-wrong")
    with caplog.at_level(logging.DEBUG), pytest.raises(IsohubError) as refused:
        resolve("o/r")
    text = str(refused.value) + repr(refused.value.fields) + caplog.text
    assert "s3cret" not in text
    assert base64.b64encode(b"x-access-token:s3cret").decode()[:20] not in text
    # Another server than the one in the environment gets none.
    monkeypatch.setenv("GITHUB_SERVER_URL", other.url)
    monkeypatch.delenv("GITHUB_API_URL")
    other.forget()
    with pytest.raises(SourceUnavailableError):
        resolve("o/no-such")
    assert "Basic" in other.requests[0].headers["Authorization"]
    other.forget()
    GitHubSource().resolve(parse(f"{other.url}/o/r"))
    assert "Authorization" in other.requests[0].headers
    assert all(other.url in address for address in Credentials().tokens())


def test_a_private_repository_by_a_credential_helper(
    github: GitHubServer, repo: GitRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    helper, home = tmp_path / "helper", tmp_path / "home"
    helper.write_text("#!/bin/sh\necho username=me\necho password=s3cret\n")
    helper.chmod(0o755)
    home.mkdir()
    github.token = "s3cret"
    with pytest.raises(SourceUnavailableError, match="for you"):
        resolve("o/r:v1")
    (home / ".gitconfig").write_text(f"[credential]\n\thelper = {helper}\n")
    pin = resolve("o/r:v1")
    assert (fetch(pin, tmp_path) / "hubconf.py").read_text() == "one\n"
    # As the API wants it: the password is a token.
    assert [r.headers["Authorization"] for r in github.requests if "/zipball/" in r.path] == ["Bearer s3cret"]


def test_a_repository_that_nobody_asks_for_by_name_has_a_hint_of_its_own(
    github: GitHubServer, repo: GitRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    github.token = "s3cret"
    monkeypatch.setenv("GITHUB_TOKEN", "wrong")
    for credentials, said in ((Credentials(), "GITHUB_TOKEN"), (Credentials(anonymous=True), "without anybody's")):
        with pytest.raises(SourceUnavailableError, match="for you") as caught:
            GitHubSource(credentials).resolve(parse("o/r:v1"))
        assert said in (caught.value.hint or "")
        assert ("token" in (caught.value.hint or "")) is (said == "GITHUB_TOKEN")


def test_tokens_are_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret")
    assert set(Credentials().tokens()) == {"https://github.com", "https://api.github.com"}
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://ghe.example.org")
    assert set(Credentials().tokens()) == {"https://ghe.example.org", "https://ghe.example.org/api/v3"}
    monkeypatch.setenv("GITHUB_SERVER_URL", "http://ghe.example.org")
    assert Credentials().tokens() == {}
    monkeypatch.setenv("GITHUB_TOKEN", "line\nbreak")
    assert Credentials().tokens() == {}


def test_renamed_repositories_are_followed(
    github: GitHubServer, repo: GitRepo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    github.fail("/old/", Fault(redirect=f"{github.url}/o/r.git/info/refs?service=git-upload-pack"), times=1)
    pin = resolve("old/name:v1")
    # GitHub redirects a POST by 301 or 302 too, and what follows it is a GET.
    github.fail("/old/.*/archive/", Fault(redirect=f"{github.url}/o/r/archive/{pin.commit}.zip"), times=1)
    github.fail("/old/.*/git-upload-pack", Fault(redirect=f"{github.url}/o/r.git/git-upload-pack"), times=1)
    github.fail("/old/", Fault(redirect=f"{github.url}/o/r.git/info/refs?service=git-upload-pack"), times=1)
    with caplog.at_level(logging.WARNING, "isohub.repos"):
        assert (fetch(pin, tmp_path) / "hubconf.py").read_text() == "one\n"
    assert caplog.text == ""


def test_redirects_end(github: GitHubServer, repo: GitRepo) -> None:
    github.fail(REFS, Fault(redirect=f"{github.url}{{path}}"))
    with pytest.raises(FetchError, match="redirects more than"):
        resolve("o/r")


def test_redirects_to_other_schemes_are_refused(github: GitHubServer, repo: GitRepo) -> None:
    github.fail(REFS, Fault(redirect="file:///etc/passwd"))
    with pytest.raises(SourceUnavailableError):
        resolve("o/r")


def test_a_missing_repository_that_is_a_directory_here(
    github: GitHubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceUnavailableError, match=r"\./some/model"):
        resolve("some/model")


# The archive, and the commit that it should be.


def archive_of(repo: GitRepo, what: str, *, comment: bytes = b"") -> bytes:
    """A zip of a tree or a commit; git writes the commit's id into the comment, and nothing for a tree."""
    place = repo.path.parent / "made.zip"
    repo.git("archive", "--format=zip", "--prefix=top/", f"--output={place}", repo.tree(what))
    if comment:
        with zipfile.ZipFile(place, "a") as opened:
            opened.comment = comment
    return place.read_bytes()


def tree_of(into: Path) -> str:
    return measure(into, algorithm="sha1").digest


def test_one_more_request_shows_the_commits_tree(
    github: GitHubServer, repo: GitRepo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pin = resolve("o/r:v1")
    github.forget()
    with caplog.at_level(logging.INFO, "isohub.repos"):
        assert tree_of(fetch(pin, tmp_path)) == repo.tree("v1")
    assert [(r.method, r.path.rpartition("/")[2]) for r in github.requests] == [
        ("GET", f"{pin.commit}.zip"),
        ("POST", "git-upload-pack"),
    ]
    assert caplog.text == ""
    # A commit that is no tip any more.
    old = repo.sha("trunk~1")
    repo.git("tag", "-d", "v2")
    with caplog.at_level(logging.WARNING, "isohub.repos"):
        assert tree_of(fetch(resolve(f"o/r:{old}"), tmp_path, "old")) == repo.tree(old)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "attributes",
    ["data export-ignore", "version.py export-subst", "lines.txt text eol=crlf", "lines.txt ident", "submodule"],
)
def test_a_commit_is_one_tree_whatever_its_attributes(
    github: GitHubServer, repo: GitRepo, tmp_path: Path, attributes: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"data/x": "1", "version.py": "V = '$Format:%h$'\n", "lines.txt": "$Id$\na\n"}
    if attributes == "submodule":
        repo.git("update-index", "--add", "--cacheinfo", f"160000,{repo.sha()},third/party")
        repo.git("commit", "--quiet", "-m", "submodule")
    else:
        repo.commit({**files, ".gitattributes": f"{attributes}\n"})
    with caplog.at_level(logging.INFO, "isohub.repos"):
        into = fetch(resolve("o/r"), tmp_path)
    by_git = tmp_path / "by-git"
    by_git.mkdir()
    GitSource().fetch(resolve("o/r"), by_git)
    assert measure(into) == measure(by_git)
    assert "the git protocol brings the commit's" in caplog.text
    assert list(into.parent.iterdir()) == [into]


def test_an_archive_that_lies_about_its_commit(github: GitHubServer, repo: GitRepo, tmp_path: Path) -> None:
    pin = resolve("o/r:v1")
    github.fail(ARCHIVE, Fault(body=archive_of(repo, "feature/x", comment=pin.commit.encode())))
    assert (fetch(pin, tmp_path) / "hubconf.py").read_text() == "one\n"
    # What says nothing needs not say it, where the commit does.
    github.behave()
    github.fail(ARCHIVE, Fault(body=archive_of(repo, "v1")))
    github.forget()
    assert (fetch(pin, tmp_path, "silent") / "hubconf.py").read_text() == "one\n"
    assert github.count() == 2


@pytest.mark.parametrize(
    "fault",
    [
        None,
        Fault(status=404),
        Fault(status=403),
        Fault(status=405),
        Fault(body=b""),
        Fault(body=b"0011ERR go away\n"),
        Fault(body=b"0034shallow " + b"a" * 40 + b"00000008NAK\n" + b"0000"),
    ],
)
def test_a_server_that_does_not_show_the_commit(
    github: GitHubServer, repo: GitRepo, tmp_path: Path, fault: Fault | None, caplog: pytest.LogCaptureFixture
) -> None:
    pin = resolve("o/r:v1")
    if fault is None:
        repo.git("config", "uploadpack.allowFilter", "false")
    else:
        github.fail(COMMIT, fault)
    if fault is not None and fault.body is not None and b"NAK" in fault.body:
        with pytest.raises(IntegrityError, match="damaged pack"):
            fetch(pin, tmp_path)
        return
    with caplog.at_level(logging.WARNING, "isohub.repos"):
        assert (fetch(pin, tmp_path) / "hubconf.py").read_text() == "one\n"
    assert "TLS alone vouches" in caplog.text
    # Nothing but its comment says of which commit it is, so it has to.
    github.fail(ARCHIVE, Fault(body=archive_of(repo, "feature/x")))
    with pytest.raises(IntegrityError, match="does not say of which commit"):
        fetch(pin, tmp_path, "silent")


def test_another_commit_is_not_the_one_that_was_asked_about(
    github: GitHubServer, repo: GitRepo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pin, other = resolve("o/r:v1"), repo.sha("feature/x")
    pack = subprocess.run(
        ["git", "pack-objects", "--stdout", "--quiet"],
        cwd=repo.path,
        input=f"{other}\n".encode(),
        capture_output=True,
        check=True,
    ).stdout
    line = b"\1" + pack
    body = b"0034shallow %s00000008NAK\n%04x%s0000" % (other.encode(), len(line) + 4, line)
    github.fail(COMMIT, Fault(body=body))
    github.fail(ARCHIVE, Fault(body=archive_of(repo, "feature/x", comment=pin.commit.encode())), times=1)
    with caplog.at_level(logging.WARNING, "isohub.repos"):
        fetch(pin, tmp_path)
    assert "TLS alone vouches" in caplog.text
    # More than a commit is no answer either.
    caplog.clear()
    github.behave()
    with caplog.at_level(logging.WARNING, "isohub.repos"), pytest.MonkeyPatch.context() as patched:
        patched.setattr("isohub.repos.sources.packs._COMMIT_LIMIT_BYTES", 50)
        fetch(pin, tmp_path, "more")
    assert "TLS alone vouches" in caplog.text


def test_what_a_commit_is_does_not_depend_on_the_weather(github: GitHubServer, repo: GitRepo, tmp_path: Path) -> None:
    pin = resolve("o/r:v1")
    github.fail(COMMIT, Fault(status=503))
    with pytest.raises(SourceUnavailableError) as caught:
        fetch(pin, tmp_path)
    assert (caught.value.passing, caught.value.status, caught.value.reference) == (True, 503, "o/r:v1")
    github.behave()
    github.fail(COMMIT, Fault(status=503, headers={"Retry-After": "0"}), times=2)
    assert tree_of(fetch(pin, tmp_path, "again")) == repo.tree("v1")


def test_a_commit_of_a_sha256_repository(
    github: GitHubServer, git_repo: Callable[..., GitRepo], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = github.add("o", "wide", git_repo("wide", object_format="sha256"))
    wide.commit({"hubconf.py": "one\n"})
    pin = resolve("o/wide")
    github.forget()
    with caplog.at_level(logging.WARNING, "isohub.repos"):
        assert measure(fetch(pin, tmp_path)).digest == wide.tree()
    assert caplog.text == ""
    assert github.count() == 2


@pytest.mark.parametrize(
    ("fault", "passing"),
    [
        (Fault(status=429, headers={"Retry-After": "99"}), True),
        (Fault(status=403, headers={"X-RateLimit-Remaining": "0"}), True),
        (Fault(status=403), False),
        (Fault(status=404), False),
        (Fault(status=502), True),
        (Fault(truncate=20), True),
        (Fault(body=b"garbage"), None),
    ],
)
def test_what_passes_is_said(github: GitHubServer, repo: GitRepo, fault: Fault, passing: bool | None) -> None:
    github.fail(REFS, fault)
    for source, text in ((GitHubSource(), "o/r"), (GitSource(), f"git+{github.url}/o/r")):
        with pytest.raises(SourceUnavailableError) as caught:
            source.resolve(parse(text))
        assert caught.value.passing is passing
        assert caught.value.reference == text
