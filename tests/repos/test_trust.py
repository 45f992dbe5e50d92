"""isohub.repos.trust: exact comparison, reading that fails closed, writing that cannot be torn."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isohub.errors import InvalidReferenceError, TrustError
from isohub.repos.reference import parse
from isohub.repos.trust import Trust, TrustEntry, trust_location, trust_target

HOST = "github.com"
C1, C2 = "1" * 40, "2" * 40


@pytest.fixture
def trust(tmp_path):
    return Trust(tmp_path / "home")


def test_nothing_is_trusted_at_first(trust):
    assert trust.entries() == ()
    assert not trust.allows(HOST, "pytorch", "vision", C1)  # torch.hub trusts this owner by name
    assert not trust.file.exists()


def test_a_whole_repo(trust):
    assert trust.add(HOST, "a", "b_c")
    assert not trust.add(HOST, "a", "b_c")
    assert trust.allows(HOST, "a", "b_c", C1)
    assert trust.allows(HOST, "a", "b_c", None)
    assert trust.entries() == (TrustEntry(HOST, "a", "b_c"),)


@pytest.mark.parametrize(
    ("host", "owner", "repo"),
    [
        (HOST, "a_b", "c"),  # torch.hub: both are "a_b_c"
        (HOST, "a", "b-c"),
        (HOST, "a", "b_c "),
        (HOST, "A", "b_c"),
        (HOST, "a/b_c", ""),
        (HOST, "", "a/b_c"),
        ("github.com.evil.example", "a", "b_c"),
        ("GitHub.com", "a", "b_c"),
        ("", "a", "b_c"),
    ],
)
def test_nothing_but_the_very_repo(trust, host, owner, repo):
    trust.add(HOST, "a", "b_c")
    assert not trust.allows(host, owner, repo, C1)
    assert not trust.allows(host, owner, repo, None)


def test_slashes_do_not_move_between_the_parts(trust):
    trust.add(HOST, "group/sub", "repo")
    assert trust.allows(HOST, "group/sub", "repo", C1)
    assert not trust.allows(HOST, "group", "sub/repo", C1)


def test_one_commit(trust):
    trust.add(HOST, "a", "b", C1)
    assert trust.allows(HOST, "a", "b", C1)
    assert not trust.allows(HOST, "a", "b", C2)
    assert not trust.allows(HOST, "a", "b", C1[:7])
    assert not trust.allows(HOST, "a", "b", "")
    assert not trust.allows(HOST, "a", "b", None)


def test_a_commit_that_is_on_no_branch_needs_an_entry_of_its_own(trust):
    trust.add(HOST, "a", "b")
    assert trust.allows(HOST, "a", "b", C1)
    assert not trust.allows(HOST, "a", "b", C1, whole=False)
    assert not trust.allows(HOST, "a", "b", None, whole=False)
    trust.add(HOST, "a", "b", C1)
    assert trust.allows(HOST, "a", "b", C1, whole=False)
    assert not trust.allows(HOST, "a", "b", C2, whole=False)


def test_removing_a_repo_removes_all_of_it(trust):
    trust.add(HOST, "a", "b")
    trust.add(HOST, "a", "b", C1)
    trust.add(HOST, "a", "other")
    with pytest.raises(TrustError, match="as a whole"):
        trust.remove(HOST, "a", "b", C1)
    assert trust.remove(HOST, "a", "b")
    assert not trust.allows(HOST, "a", "b", C1)
    assert trust.allows(HOST, "a", "other", C1)
    assert not trust.remove(HOST, "a", "b")


def test_removing_one_commit(trust):
    trust.add(HOST, "a", "b", C1)
    trust.add(HOST, "a", "b", C2)
    assert trust.remove(HOST, "a", "b", C1)
    assert not trust.allows(HOST, "a", "b", C1)
    assert trust.allows(HOST, "a", "b", C2)


@pytest.mark.parametrize(
    "parts",
    [
        ("", "a", "b"), (HOST, "", "b"), (HOST, "a", ""), (HOST, "a", " b"), (HOST, "a\n", "b"),
        (HOST, "a", "b\u202e"), (HOST, "a", None), (HOST, "a", "b", C1[:7]), (HOST, "a", "b", ""),
        (HOST, "a", "b", "A" * 40), (HOST, "a", "b", C1 + "\n"), (HOST, "a", "b", 3),
    ],
)  # fmt: skip
def test_what_cannot_be_trusted(trust, parts):
    with pytest.raises(TrustError, match="cannot trust"):
        trust.add(*parts)
    assert trust.entries() == ()


def test_the_file_is_for_its_user_alone(trust):
    old = os.umask(0)
    try:
        trust.add(HOST, "a", "b")
    finally:
        os.umask(old)
    assert stat.S_IMODE(trust.file.stat().st_mode) == 0o600
    assert json.loads(trust.file.read_text())["version"] == 2
    assert sorted(path.name for path in trust.file.parent.iterdir() if not path.name.endswith(".lock")) == [
        "trust.json"
    ]


ENTRY = {"host": HOST, "owner": "a", "repo": "b", "commit": None}
GOOD = {"version": 1, "trusted": [ENTRY]}


def write(trust, content):
    trust.file.parent.mkdir(exist_ok=True)
    trust.file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    trust.file.chmod(0o600)


def test_a_file_of_version_1_is_read_and_sealed_at_the_next_change(trust):
    # The positive control of the damaged ones below.
    write(trust, GOOD)
    assert trust.allows(HOST, "a", "b", C1)
    assert json.loads(trust.file.read_text())["version"] == 1
    assert trust.add(HOST, "c", "d")
    document = json.loads(trust.file.read_text())
    assert (document["version"], len(document["trusted"]), len(document["sha256"])) == (2, 2, 64)
    assert trust.allows(HOST, "a", "b", C1)


@given(st.data())
def test_any_flipped_byte_is_found(tmp_path_factory, data):
    trust = Trust(tmp_path_factory.mktemp("trust"))
    trust.add(HOST, "a", "b", C1)
    trust.add(HOST, "a", "c")
    whole = trust.file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(1, 255))
    flipped = whole[:place] + bytes([whole[place] ^ other]) + whole[place + 1 :]
    trust.file.write_bytes(flipped)
    with pytest.raises(TrustError, match="is damaged"):
        trust.allows(HOST, "a", "b", C1)
    trust.file.write_bytes(whole)
    assert trust.allows(HOST, "a", "b", C1)


def test_what_was_reformatted_is_not_read(trust):
    trust.add(HOST, "a", "b")
    trust.file.write_text(json.dumps(json.loads(trust.file.read_text())))
    with pytest.raises(TrustError, match="not written as isohub writes it"):
        trust.entries()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b" " * (1 << 20) + b"{}",
        b'{"version": 1, "version": 1, "trusted": []}',
        [],
        {},
        {"trusted": []},
        {"version": 1},
        {**GOOD, "version": 2},
        {**GOOD, "version": 3},
        {**GOOD, "sha256": "0" * 64},
        {**GOOD, "version": 2, "sha256": "0" * 64},
        {**GOOD, "version": 2, "sha256": None},
        {**GOOD, "version": True},
        {**GOOD, "version": 1.0},
        {**GOOD, "version": "1"},
        {**GOOD, "more": 1},
        {**GOOD, "trusted": {}},
        {**GOOD, "trusted": ["a/b"]},
        {**GOOD, "trusted": [{"host": HOST, "owner": "a", "repo": "b"}]},
        {**GOOD, "trusted": [{**ENTRY, "also": 1}]},
        {**GOOD, "trusted": [{**ENTRY, "location": 3}]},
        {**GOOD, "trusted": [{**ENTRY, "location": ""}]},
        {**GOOD, "trusted": [{**ENTRY, "location": "/a\x1b[2J"}]},
        {**GOOD, "trusted": [{**ENTRY, "owner": 3}]},
        {**GOOD, "trusted": [{**ENTRY, "owner": ["a"]}]},
        {**GOOD, "trusted": [{**ENTRY, "repo": ""}]},
        {**GOOD, "trusted": [{**ENTRY, "commit": False}]},
        {**GOOD, "trusted": [{**ENTRY, "commit": ""}]},
        {**GOOD, "trusted": [ENTRY, {**ENTRY, "commit": "short"}]},
    ],
    ids=lambda content: repr(content)[:60],
)
def test_a_damaged_file_is_an_error_for_every_question(trust, content):
    write(trust, content)
    before = trust.file.read_bytes()
    for ask in (
        trust.entries,
        lambda: trust.allows(HOST, "a", "b", C1),
        lambda: trust.add(HOST, "c", "d"),
        lambda: trust.remove(HOST, "a", "b"),
    ):
        with pytest.raises(TrustError, match=r"trust\.json"):
            ask()
    assert trust.file.read_bytes() == before


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_an_error(trust, mode):
    write(trust, GOOD)
    trust.file.chmod(mode)
    with pytest.raises(TrustError, match=r"written by others.*"):
        trust.allows(HOST, "a", "b", C1)


def test_a_file_of_another_user_is_an_error(trust):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    write(trust, GOOD)
    os.chown(trust.file, 12345, -1)
    with pytest.raises(TrustError, match="belongs to user 12345"):
        trust.allows(HOST, "a", "b", C1)


def test_links_fifos_and_directories_are_errors(trust, tmp_path):
    write(trust, GOOD)
    trust.file.rename(tmp_path / "elsewhere.json")
    trust.file.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(TrustError, match=r"trust\.json"):
        trust.entries()
    trust.file.unlink()
    os.mkfifo(trust.file, 0o600)
    with pytest.raises(TrustError, match="regular file"):
        trust.entries()
    trust.file.unlink()
    trust.file.mkdir()
    with pytest.raises(TrustError, match=r"trust\.json"):
        trust.entries()


_PART = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=4)
_REPO = st.tuples(_PART, _PART, _PART)


@given(st.sets(_REPO, max_size=4), _REPO)
def test_allows_exactly_what_was_added(tmp_path_factory, added, asked):
    directory = tmp_path_factory.mktemp("trust")
    trust = Trust(directory)
    for parts in added:
        trust.add(*parts)
    assert trust.allows(*asked, C1) is (asked in added)
    assert {(entry.host, entry.owner, entry.repo) for entry in Trust(directory).entries()} == added


def test_writers_in_many_processes_lose_nothing(trust):
    code = (
        "import sys; from pathlib import Path; from isohub.repos.trust import Trust\n"
        "for i in range(5): Trust(Path(sys.argv[1])).add('h', sys.argv[2], f'r{i}')"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(trust.file.parent), f"owner{number}"]) for number in range(6)
    ]
    assert [process.wait(60) for process in processes] == [0] * 6
    assert len(trust.entries()) == 30


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("a/b", (HOST, "a", "b", None)),
        (f"a/b:{C1}", (HOST, "a", "b", C1)),
        (f"a/b:{'A' * 40}", (HOST, "a", "b", "a" * 40)),
        (f"a/b:{'c' * 64}", (HOST, "a", "b", "c" * 64)),
        (f"https://example.org/g/sub/r@{C1}", ("example.org", "g/sub", "r", C1)),
        ("a/b#subdirectory=hub", (HOST, "a", "b", None)),
    ],
)
def test_what_a_reference_trusts(trust, text, target):
    assert trust_target(parse(text)) == target
    trust.add(*trust_target(parse(text)))
    assert trust.allows(*target)
    assert trust.remove(*trust_target(parse(text)))


@pytest.mark.parametrize(
    "text", [f"{HOST}/a/b@{C1}", f"a/b:{C1}", f"https://{HOST}/a/b@{C1}", f"{HOST}/a/b", "a/b", f"https://{HOST}/a/b"]
)
def test_names_as_they_are_shown_and_references_end_trust(trust, text):
    trust.add(HOST, "a", "b", C1)
    trust.add(HOST, "a", "c", C1)
    assert trust.named(text).whole_name == f"{HOST}/a/b"
    assert trust.remove_text(text)
    assert [entry.name for entry in trust.entries()] == [f"{HOST}/a/c@{C1}"]


def test_names_of_all_entries_end_trust(trust):
    trust.add("ssh:git@host", "~/group/sub", "repo")
    trust.add(HOST, "a", "b", C1)
    trust.add("local", "0123456789abcdef", "a clone")
    for entry in trust.entries():
        assert trust.named(entry.name) == entry
        assert trust.remove_text(entry.name)
    assert trust.entries() == ()
    assert not trust.remove_text("a/b")


@pytest.mark.parametrize(
    "text", ["", "/nowhere/at/all", f"{HOST}/a/b@{C2}", "\0", "~nobody/x", "https://u:hunter2@h/r"]
)
def test_what_names_nothing_is_no_answer(trust, text):
    trust.add(HOST, "a", "b")
    with pytest.raises(InvalidReferenceError) as raised:
        trust.remove_text(text)
    assert "isohub trust ls" in raised.value.hint
    assert "hunter2" not in str(raised.value)
    with pytest.raises(InvalidReferenceError, match="expected a full SHA"):
        trust.remove_text("a/b:main")
    assert len(trust.entries()) == 1


def test_a_local_repo_is_shown_by_its_place_and_compared_without(trust, tmp_path):
    place = tmp_path / "a\u202eb\u00a0c" / "models"
    place.mkdir(parents=True)
    reference = parse(place)
    location = trust_location(reference)
    assert location.isprintable()
    assert location.endswith("/models")
    assert trust_location(parse("a/b")) is None
    identity = reference.host, reference.owner, reference.repo
    assert trust.add(*identity)
    assert trust.entries()[0].location is None
    assert not trust.add(*identity, location=location)  # it was trusted; now it is known where it was
    assert trust.entries()[0].location == location
    assert not trust.add(*identity)
    assert trust.entries()[0].location == location
    assert trust.allows(*identity, C1)
    # What the file says of the place decides nothing.
    assert not trust.allows("local", "0" * 16, "models", C1)
    assert TrustEntry(*identity) == TrustEntry(*identity, location="/elsewhere")
    place.rmdir()
    assert trust.named(str(place)) == TrustEntry(*identity)
    assert trust.remove_text(str(place))
    assert trust.entries() == ()


def test_entries_without_a_place_are_written_as_before(trust):
    trust.add(HOST, "a", "b")
    assert set(json.loads(trust.file.read_text())["trusted"][0]) == {"host", "owner", "repo", "commit"}


@pytest.mark.parametrize("ref", ["main", "v1.0", "refs/heads/main", "pull/7", C1[:7], C1[:39], C1 + "1", "HEAD"])
def test_a_ref_that_may_move_cannot_be_trusted(ref):
    with pytest.raises(InvalidReferenceError, match="expected a full SHA, or no ref") as raised:
        trust_target(parse(f"a/b:{ref}"))
    assert raised.value.part == "ref"
    assert "leave the ref out" in (raised.value.hint or "")


def test_a_disk_without_locks_is_an_error(trust, monkeypatch):
    trust.add(HOST, "a", "b")

    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as NFS without its lock daemon answers
    with pytest.raises(TrustError, match="cannot be locked and written"):
        trust.add(HOST, "c", "d")
    assert trust.allows(HOST, "a", "b", C1)
    assert not trust.allows(HOST, "c", "d", C1)


def test_a_list_that_cannot_be_written_stays_as_it_is_and_says_so(trust, monkeypatch):
    trust.add(HOST, "a", "b")
    real = os.open

    def full(path, flags, *rest, **options):
        if flags & os.O_EXCL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", full)
    for change in (lambda: trust.add(HOST, "c", "d"), lambda: trust.remove(HOST, "a", "b")):
        with pytest.raises(TrustError, match="No space left on device; it is as it was") as raised:
            change()
        # Whoever takes trust back must not read that nothing is trusted; nor is there anything to delete.
        assert "nothing is trusted" not in str(raised.value)
        assert "delete" not in (raised.value.hint or "")
    assert trust.allows(HOST, "a", "b", C1)
