from __future__ import annotations

import hashlib
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from isohub.errors import IntegrityError, OfflineError, RefNotFoundError, SourceUnavailableError
from isohub.repos.measure import measure
from isohub.repos.pins import Pin
from isohub.repos.reference import parse
from isohub.repos.sources import source_for
from isohub.repos.store import Store
from tests.servers.git_repo import GitRepo
from tests.servers.github import Fault, GitHubServer

TYPE = "application/x-git-upload-pack-advertisement"
SHALLOW = b"0034shallow %s0000"


def fill(repo: GitRepo) -> GitRepo:
    """Three commits, a branch, a light and an annotated tag, a link, an executable."""
    (repo.path / "run.sh").write_text("#!/bin/sh\n")
    (repo.path / "run.sh").chmod(0o755)
    (repo.path / "link").symlink_to("pkg/a.py")
    repo.commit({"hubconf.py": "one\n", "pkg/a.py": "a\n"}, "one")
    repo.tag("v1")
    repo.commit({"hubconf.py": "two\n", "large.bin": bytes(range(256)) * 4000}, "two")
    repo.tag("v2", annotated=True)
    repo.branch("feature/x")
    repo.commit({"hubconf.py": "feature\n"}, "feature")
    repo.checkout("main")
    repo.commit({"hubconf.py": "three\n"}, "three")
    return repo


@pytest.fixture
def repo(git_repo: Callable[..., GitRepo]) -> GitRepo:
    return fill(git_repo("clone"))


@pytest.fixture
def url(github: GitHubServer, repo: GitRepo) -> str:
    github.add("group", "clone", repo)
    return f"git+{github.url}/group/clone.git"


def resolve(text: str, **options: bool) -> Pin:
    reference = parse(text)
    return source_for(reference).resolve(reference, **options)


def fetch(pin: Pin, tmp_path: Path, name: str = "into") -> Path:
    into = tmp_path / "staging" / name
    into.mkdir(parents=True)
    source_for(pin.reference).fetch(pin, into)
    return into


NAMES = [
    ("main", "main", "refs/heads/main"),
    ("feature/x", "feature/x", "refs/heads/feature/x"),
    ("HEAD", "main", "refs/heads/main"),
    ("v1", "v1", "refs/tags/v1"),
    ("v2", "v2^{commit}", "refs/tags/v2"),
    ("refs/tags/v2", "v2^{commit}", "refs/tags/v2"),
]


@pytest.mark.parametrize(("ref", "at", "name"), NAMES)
def test_resolves_names(repo: GitRepo, url: str, ref: str, at: str, name: str) -> None:
    for text in (f"{url}@{ref}", f"{repo.path}:{ref}"):
        pin = resolve(text)
        assert (pin.commit, pin.ref_name) == (repo.sha(at), name)


def test_resolves_shas(repo: GitRepo, url: str) -> None:
    for at in ("main", "main~1", "v2^{commit}", "main~2"):
        sha = repo.sha(at)
        for ref in (sha, sha[:9], sha.upper()):
            for text in (f"{url}@{ref}", f"{repo.path}:{ref}"):
                assert resolve(text).commit == sha
    # A tag object's own id is no commit's: a second load by a lockfile would find another than is written.
    for ref in (repo.sha("v2"), repo.sha("v2")[:9]):
        for text in (f"{url}@{ref}", f"{repo.path}:{ref}"):
            with pytest.raises(
                RefNotFoundError, match="id of (?:the|an) annotated tag.*, which is no commit"
            ) as caught:
                resolve(text)
            assert repo.sha("v2^{commit}") in (caught.value.hint or "")


def test_a_full_temporary_directory_is_named_and_not_the_store(
    repo: GitRepo, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    older = repo.sha("main~2")
    repo.git("tag", "-d", "v1")  # which has it
    for text in (f"{url}@{older}", f"{url}@{older[:9]}"):
        with pytest.raises(SourceUnavailableError, match="gone while it is read: No such file") as caught:
            Store(tmp_path / "store").resolve(parse(text))
        assert "TMPDIR" in (caught.value.hint or "")
        assert "ISOHUB_HOME" not in str(caught.value)
    assert resolve(f"{url}@main").commit == repo.sha("main")


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("ref", ["main", "v2", "main~1", "main~2"])
def test_what_is_written_is_the_commits_tree(
    repo: GitRepo, url: str, tmp_path: Path, able: bool, ref: str, github: GitHubServer
) -> None:
    # Without these a server gives no single older commit, and no history without files.
    for setting in ("allowReachableSHA1InWant", "allowFilter"):
        repo.git("config", f"uploadpack.{setting}", str(able).lower())
    sha = repo.sha(f"{ref}^{{commit}}")
    for number, text in enumerate((f"{url}@{sha}", f"{repo.path}:{sha}")):
        into = fetch(resolve(text), tmp_path, str(number))
        assert measure(into, algorithm="sha1").digest == repo.tree(sha)
        assert list(into.parent.glob(".*")) == []


def test_a_commit_is_fetched_without_its_history(repo: GitRepo, url: str, tmp_path: Path) -> None:
    into = fetch(resolve(f"{url}@v2"), tmp_path)
    assert (into / "hubconf.py").read_text() == "two\n"
    assert (into / "link").read_text() == "a\n"
    assert (into / "run.sh").stat().st_mode & 0o111


def test_only_branches_and_tags_are_a_repositorys_own(repo: GitRepo, url: str, tmp_path: Path) -> None:
    for name in ("refs/pull/1/head", "refs/merge-requests/2/head", "refs/changes/01/1/1"):
        repo.ref(name, "feature/x")
        for text in (f"{url}@{name}", f"{repo.path}:{name}"):
            pin = resolve(text)
            assert (pin.commit, pin.ref_name, pin.validated) == (repo.sha("feature/x"), name, False)
    for ref in ("HEAD", "main", "v1", "v2", repo.sha("main~1")):
        assert resolve(f"{url}@{ref}").validated
        assert resolve(f"{repo.path}:{ref}").validated
    # A server's remotes are not ours; a clone's are where its branches came from.
    repo.ref("refs/remotes/origin/x", "feature/x")
    assert not resolve(f"{url}@refs/remotes/origin/x").validated
    assert resolve(f"{repo.path}:origin/x").validated
    repo.git("checkout", "--quiet", "--detach", "v1")
    assert resolve(f"{url}@HEAD").validated


def test_offline_asks_no_server(repo: GitRepo, url: str, github: GitHubServer, tmp_path: Path) -> None:
    for text in (f"{url}@main", "group/clone:main"):
        with pytest.raises(OfflineError, match="on a server"):
            source_for(parse(text), offline=True)
    reference = parse(f"{repo.path}:main")
    source = source_for(reference, offline=True)
    (tmp_path / "into").mkdir()
    source.fetch(source.resolve(reference), tmp_path / "into")
    assert (tmp_path / "into" / "hubconf.py").read_text() == "three\n"
    assert github.count() == 0


def test_refs_that_are_not_there(repo: GitRepo, url: str) -> None:
    orphan = repo.orphan({"x": "y"})
    for base in (f"{url}@", f"{repo.path}:"):
        with pytest.raises(RefNotFoundError) as caught:
            resolve(f"{base}feature/y")
        assert caught.value.near == ["feature/x"]
        with pytest.raises(RefNotFoundError):
            resolve(f"{base}{'f' * 40}")
    # On the server it is nobody's; in the user's own clone it is the user's.
    with pytest.raises(RefNotFoundError, match="no commit on its branches"):
        resolve(f"{url}@{orphan}")
    assert not resolve(f"{url}@{orphan}", skip_validation=True).validated
    assert resolve(f"{repo.path}:{orphan}").commit == orphan


def test_only_what_a_tip_leads_to_is_a_repositorys(repo: GitRepo, url: str, github: GitHubServer) -> None:
    """A server that adds a fork's commits to the pack does not make them the repository's."""
    repo.git("config", "uploadpack.allowFilter", "true")
    stranger = repo.orphan({"hubconf.py": "evil"}, parent=repo.sha("main"))
    lines = repo.git("rev-list", "--objects", "main", "feature/x", "v1", "v2", stranger).splitlines()
    pack = subprocess.run(
        ["git", "pack-objects", "--stdout", "--quiet"],
        cwd=repo.path,
        input="".join(f"{line.partition(' ')[0]}\n" for line in [*lines, repo.sha("v2")]).encode(),
        capture_output=True,
        check=True,
    ).stdout
    bands = [b"\1" + pack[at : at + 60_000] for at in range(0, len(pack), 60_000)]
    body = b"0008NAK\n" + b"".join(b"%04x" % (len(band) + 4) + band for band in bands) + b"0000"
    github.fail("/git-upload-pack$", Fault(body=body))
    for sha in (stranger, stranger[:10]):
        for text in (f"{url}@{sha}", f"group/clone:{sha}"):
            with pytest.raises(RefNotFoundError, match="none of its|no commit on its"):
                resolve(text)
    # The control: the same pack shows what does belong.
    old = repo.sha("main~2")
    for text in (f"{url}@{old[:10]}", f"group/clone:{old[:10]}"):
        assert resolve(text).commit == old


@pytest.mark.parametrize("suffix", ["", ".git"])
def test_groups_with_several_slashes(repo: GitRepo, github: GitHubServer, tmp_path: Path, suffix: str) -> None:
    github.add("group/sub/deep", "project", repo)
    pin = resolve(f"git+{github.url}/group/sub/deep/project{suffix}@v2")
    assert (pin.reference.owner, pin.reference.repo) == ("group/sub/deep", "project")
    assert (fetch(pin, tmp_path) / "hubconf.py").read_text() == "two\n"


def test_redirects_to_the_address_with_its_suffix(repo: GitRepo, github: GitHubServer, tmp_path: Path) -> None:
    """As GitLab answers where `.git` is left out."""
    github.add("group/sub", "project", repo)
    there = f"{github.url}/group/sub/project.git/info/refs?service=git-upload-pack"
    github.fail(r"/project/info/refs", Fault(redirect=there))
    pin = resolve(f"git+{github.url}/group/sub/project@v2")
    github.forget()
    assert (fetch(pin, tmp_path) / "hubconf.py").read_text() == "two\n"
    assert github.count("/group/sub/project.git/git-upload-pack") == 1
    github.behave()
    elsewhere = f"{github.url}/group/sub/project.git/info/refs/x?service=git-upload-pack"
    github.fail(r"/project/info/refs", Fault(redirect=elsewhere))
    github.fail(
        r"/info/refs/x",
        Fault(body=b"001e# service=git-upload-pack\n00000000", headers={"Content-Type": TYPE}),
    )
    with pytest.raises(SourceUnavailableError, match="no repository's /info/refs"):
        resolve(f"git+{github.url}/group/sub/project@v2")


def test_packs_that_inflate_without_end(repo: GitRepo, url: str, github: GitHubServer, tmp_path: Path) -> None:
    pin = resolve(f"{url}@v1")
    zeros = zlib.compressobj(9)
    large = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(64)) + zeros.flush()

    def header(kind: int, size: int) -> bytes:
        first, size = (kind << 4) | (size & 15), size >> 4
        digits = [first]
        while size:
            digits[-1] |= 0x80
            digits.append(size & 0x7F)
            size >>= 7
        return bytes(digits)

    def sent(*objects: bytes) -> bytes:
        pack = b"PACK\0\0\0\2" + len(objects).to_bytes(4, "big") + b"".join(objects)
        pack += hashlib.sha1(pack).digest()
        bands = [b"\1" + pack[at : at + 60_000] for at in range(0, len(pack), 60_000)]
        return b"".join(b"%04x" % (len(band) + 4) + band for band in bands) + b"0000"

    delta = bytes([1]) + b"\x80\x80\x80\x80\x10" + b"\1x"  # from one byte to 4 GiB
    cases = {
        "an object of": sent(header(3, 64 << 20) + large),
        "more than it says": sent(header(3, 100) + large),
        "an object of 4294967296": sent(
            header(3, 1) + zlib.compress(b"x"), header(7, len(delta)) + bytes(20) + zlib.compress(delta)
        ),
        "damaged pack": sent(header(3, 64 << 20) + large[:1000]),
        "no sizes|damaged": sent(header(6, 2) + b"\1" + zlib.compress(b"\x80\x80")),
    }
    for number, (said, body) in enumerate(cases.items()):
        github.behave()
        github.fail("/git-upload-pack$", Fault(body=SHALLOW % repo.sha("v1").encode() + b"0008NAK\n" + body))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("isohub.repos.sources.packs._OBJECT_LIMIT_BYTES", 32 << 20)
            with pytest.raises(IntegrityError, match=said):
                fetch(pin, tmp_path, str(number))


def test_servers_that_fail(repo: GitRepo, url: str, github: GitHubServer, tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailableError) as caught:
        resolve(f"git+{github.url}/no/such.git")
    assert caught.value.status == 404
    pin = resolve(f"{url}@v1")
    github.fail("/git-upload-pack$", Fault(truncate=100), times=2)
    assert (fetch(pin, tmp_path) / "hubconf.py").read_text() == "one\n"
    for number, body in enumerate(
        (b"", b"nonsense", b"0008NAK\n", b"00000008NAK\n0009\1PACK0000", b"0011ERR go away\n")
    ):
        github.behave()
        github.fail("/git-upload-pack$", Fault(body=body))
        with pytest.raises((SourceUnavailableError, IntegrityError)):
            fetch(pin, tmp_path, str(number))
    github.behave()
    gone = Pin(pin.reference, "f" * 40, None)
    with pytest.raises(SourceUnavailableError):
        fetch(gone, tmp_path, "gone")


def test_passwords_come_from_netrc(
    repo: GitRepo, url: str, github: GitHubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    github.token = "s3cret"
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    with pytest.raises(SourceUnavailableError, match="401") as caught:
        resolve(f"{url}@v1")
    assert "netrc" in (caught.value.hint or "")
    netrc = tmp_path / "home" / ".netrc"
    netrc.parent.mkdir()
    netrc.write_text("machine 127.0.0.1 login me password s3cret\n")
    netrc.chmod(0o600)
    assert (fetch(resolve(f"{url}@v1"), tmp_path) / "hubconf.py").read_text() == "one\n"


def test_sha256_repositories(git_repo: Callable[..., GitRepo], github: GitHubServer, tmp_path: Path) -> None:
    repo = fill(git_repo("wide", object_format="sha256"))
    github.add("group", "wide", repo)
    for number, text in enumerate((f"git+{github.url}/group/wide@v2", f"{repo.path}:v2")):
        pin = resolve(text)
        assert pin.commit == repo.sha("v2^{commit}")
        assert len(pin.commit) == 64
        assert measure(fetch(pin, tmp_path, str(number))).digest == repo.tree("v2")


def test_clones_of_every_kind(repo: GitRepo, tmp_path: Path) -> None:
    base = tmp_path / "kinds"
    base.mkdir()
    repo.git("clone", "--quiet", "--bare", ".", str(base / "bare"))
    repo.git("clone", "--quiet", ".", str(base / "cloned"))
    repo.git("worktree", "add", "--quiet", str(base / "linked"), "feature/x")
    repo.git("clone", "--quiet", "--separate-git-dir", str(base / "elsewhere"), ".", str(base / "separate"))
    repo.git("clone", "--quiet", "--shared", ".", str(base / "shared"))
    for kind in ("bare", "cloned", "linked", "separate", "shared"):
        pin = resolve(f"{base / kind}:feature/x")
        assert pin.commit == repo.sha("feature/x"), kind
        assert (fetch(pin, tmp_path, kind) / "hubconf.py").read_text() == "feature\n"
    assert resolve(f"{base / 'cloned'}:feature/x").ref_name == "refs/remotes/origin/feature/x"
    assert resolve(f"{base / 'linked'}:HEAD").commit == repo.sha("feature/x")
    # Packed refs and objects, which is how clones of any age look.
    repo.git("gc", "--quiet")
    assert resolve(f"{repo.path}:v2").commit == repo.sha("v2^{commit}")


def test_uncommitted_changes_are_not_seen(repo: GitRepo, tmp_path: Path) -> None:
    (repo.path / "hubconf.py").write_text("dirty\n")
    assert (fetch(resolve(f"{repo.path}:main"), tmp_path) / "hubconf.py").read_text() == "three\n"


def test_submodules_are_left_empty(repo: GitRepo, tmp_path: Path) -> None:
    repo.git("update-index", "--add", "--cacheinfo", f"160000,{repo.sha()},third/party")
    repo.git("commit", "--quiet", "-m", "submodule")
    into = fetch(resolve(f"{repo.path}:main"), tmp_path)
    assert measure(into).empty == ("third/party",)


def test_no_clone(tmp_path: Path, repo: GitRepo) -> None:
    (tmp_path / "plain").mkdir()
    for path in (tmp_path / "plain", repo.path / "pkg"):
        with pytest.raises(SourceUnavailableError, match="no git clone"):
            resolve(f"{path}:main")
    (repo.path / ".git" / "config").write_text(
        "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tunknownThing = 1\n"
    )
    with pytest.raises(SourceUnavailableError, match="cannot be read"):
        resolve(f"{repo.path}:main")


def test_an_unborn_branch(git_repo: Callable[..., GitRepo]) -> None:
    with pytest.raises(RefNotFoundError, match="no commits yet"):
        resolve(f"{git_repo('new').path}:HEAD")


def test_damaged_objects(repo: GitRepo, tmp_path: Path) -> None:
    pin = resolve(f"{repo.path}:main")
    blob = repo.sha("main:hubconf.py")
    place = repo.path / ".git" / "objects" / blob[:2] / blob[2:]
    good = place.read_bytes()
    place.chmod(0o644)
    # Well formed, of the same length, and not what the id says.
    for number, content in enumerate((zlib.compress(b"blob 6\0THREE\n"), b"garbage", good[:10], b"")):
        place.write_bytes(content)
        with pytest.raises((IntegrityError, SourceUnavailableError)):
            fetch(pin, tmp_path, str(number))
    place.unlink()
    with pytest.raises(SourceUnavailableError, match="lacks object"):
        fetch(pin, tmp_path, "missing")


def raw_tree(repo: GitRepo, entries: list[tuple[bytes, bytes, str]]) -> str:
    """Commit a tree as git would never write it."""
    data = b"".join(mode + b" " + name + b"\0" + bytes.fromhex(sha) for mode, name, sha in entries)
    return repo.git("commit-tree", write_object(repo, b"tree", data), "-m", "evil")


def write_object(repo: GitRepo, kind: bytes, data: bytes) -> str:
    whole = b"%s %d\0" % (kind, len(data)) + data
    sha = hashlib.sha1(whole).hexdigest()
    place = repo.path / ".git" / "objects" / sha[:2] / sha[2:]
    place.parent.mkdir(exist_ok=True)
    if not place.exists():
        place.write_bytes(zlib.compress(whole))
    return sha


def test_evil_trees(repo: GitRepo, tmp_path: Path) -> None:
    file = write_object(repo, b"blob", b"x")
    out = write_object(repo, b"blob", b"../../outside")
    absolute = write_object(repo, b"blob", b"/etc/passwd")
    inner = write_object(repo, b"tree", b"100644 x\0" + bytes.fromhex(file))
    here = write_object(repo, b"blob", b".")
    cases: list[list[tuple[bytes, bytes, str]]] = [
        [(b"100644", b"..", file)],
        [(b"40000", b"..", inner)],
        [(b"40000", b".", inner)],
        [(b"40000", b".git", inner)],
        [(b"40000", b".GIT", inner)],
        [(b"100644", b"a/b", file)],
        [(b"100644", b"../x", file)],
        [(b"100644", b"/x", file)],
        [(b"100644", b"a\\b", file)],
        [(b"100644", b"", file)],
        [(b"100644", b"\xff\xfe", file)],
        [(b"100644", b"A", file), (b"100644", b"a", file)],
        [(b"100644", b"a", file), (b"100644", b"a", file)],
        [(b"120000", b"a", here), (b"40000", b"a", inner)],
        [(b"120000", b"a", out)],
        [(b"120000", b"a", absolute)],
        [(b"20000", b"a", file)],
        [(b"9", b"a", file)],
        [(b"100644", b"a", inner)],
        [(b"40000", b"a", file)],
        [],
    ]
    for number, entries in enumerate(cases):
        sha = raw_tree(repo, entries)
        with pytest.raises(IntegrityError) as caught:
            fetch(Pin(parse(f"{repo.path}:{sha}"), sha, None), tmp_path, str(number))
        assert caught.value.message.isprintable(), entries
    assert not (tmp_path / "outside").exists()
    # The control: the same way of making them, nothing evil.
    sha = raw_tree(repo, [(b"40000", b"a", inner), (b"120000", b"b", here)])
    assert (fetch(Pin(parse(f"{repo.path}:{sha}"), sha, None), tmp_path, "good") / "b" / "a" / "x").read_text() == "x"


def test_a_tree_that_multiplies_is_stopped(repo: GitRepo, tmp_path: Path) -> None:
    tree = write_object(repo, b"tree", b"")
    for _ in range(12):
        data = b"".join(b"40000 %d\0" % n + bytes.fromhex(tree) for n in range(8))
        tree = write_object(repo, b"tree", data)
    sha = repo.git("commit-tree", tree, "-m", "bomb")
    import isohub.repos.tree as module

    class Few(module.TreeWriter):
        def __init__(self, root: Path, *, origin: str) -> None:
            super().__init__(root, origin=origin, limits=module.Limits(entries=5_000))

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr("isohub.repos.sources.extras.TreeWriter", Few)
        with pytest.raises(IntegrityError, match="5000 entries"):
            fetch(Pin(parse(f"{repo.path}:{sha}"), sha, None), tmp_path)
