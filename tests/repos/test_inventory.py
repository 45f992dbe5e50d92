"""isohub.repos.inventory: what a store holds, what is used, what is left over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from isohub.repos.credentials import Credentials
from isohub.repos.disk import hold
from isohub.repos.inventory import Inventory, decode_component
from isohub.repos.layout import weights_dir
from isohub.repos.naming import encode_component
from isohub.repos.reference import parse
from isohub.repos.store import Store
from isohub.repos.weights import Weights
from tests.repos.filled import Filled, fill
from tests.servers.files import FileServer
from tests.servers.github import GitHubServer


@pytest.fixture
def filled(tmp_path: Path, github: GitHubServer) -> Filled:
    with FileServer() as files:
        return fill(tmp_path / "isohub-home", github, files, tmp_path / "git")


def disk_usage(path: Path) -> int:
    """As du(1) counts."""
    seen = {}
    for each in [path, *path.rglob("*")]:
        status = each.lstat()
        seen[status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def test_nothing(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path / "nowhere")
    assert (inventory.checkouts(), inventory.weights(), inventory.leftovers()) == ([], [], [])
    assert not inventory.root.exists()


def test_checkouts(filled: Filled) -> None:
    found = {checkout.commit: checkout for checkout in Inventory(filled.root).checkouts()}
    assert set(found) == {filled.one.commit, filled.two.commit, filled.other.commit}
    one = found[filled.one.commit]
    assert one.scope == filled.scope
    assert one.path == filled.one.path.parent
    assert (one.refs, one.ref_name, one.reference, one.extras) == (("v1",), "refs/tags/v1", "o/r:v1", ())
    assert (one.files, one.bytes, one.in_use) == (4, disk_usage(one.path), False)
    assert found[filled.other.commit].refs == ("",)
    assert time.time() - one.used < 100
    assert one.created.endswith("Z")


def test_extras_are_checkouts_of_their_own(filled: Filled) -> None:
    store = Store(filled.root)
    reference = parse("o/r:v1")
    plain = store.resolve(reference, extras=("lfs",))
    assert store.fetch(plain).path == filled.one.path  # there is nothing to bring
    assert len(Inventory(filled.root).checkouts()) == 3


def test_use_is_seen_and_noted(filled: Filled) -> None:
    place = filled.one.path.parent
    os.utime(place, (1, 1))
    assert next(each.used for each in Inventory(filled.root).checkouts() if each.path == place) == 1
    Store(filled.root).fetch(filled.one.pin)
    descriptor = hold(place)
    assert descriptor is not None
    try:
        found = {each.path: each for each in Inventory(filled.root).checkouts()}
        assert [path for path, each in found.items() if each.in_use] == [place]
        assert found[place].used > 1
    finally:
        os.close(descriptor)
    assert not any(each.in_use for each in Inventory(filled.root).checkouts())


def test_a_time_in_the_future_is_now(filled: Filled) -> None:
    os.utime(filled.one.path.parent, (1 << 40, 1 << 40))
    os.utime(filled.own.path.parent, (1 << 40, 1 << 40))
    inventory = Inventory(filled.root)
    assert all(each.used <= time.time() for each in [*inventory.checkouts(), *inventory.weights()])


def test_weights(filled: Filled) -> None:
    found = {weights.sha256: weights for weights in Inventory(filled.root).weights()}
    assert set(found) == {filled.shared.sha256, filled.own.sha256, filled.callers.sha256}
    shared = found[filled.shared.sha256]
    assert [file.url.rpartition("/")[0][-1] for file in shared.files] == ["a", "b"]
    assert shared.bytes == shared.blob.lstat().st_blocks * 512  # three names of one file
    assert shared.blob.samefile(filled.shared.path)
    assert shared.in_use == frozenset()
    descriptor = hold(weights_dir(filled.root, shared.files[1].scope))
    assert descriptor is not None
    try:
        found = {weights.sha256: weights for weights in Inventory(filled.root).weights()}
        assert found[filled.shared.sha256].in_use == {shared.files[1].scope}
        assert not found[filled.own.sha256].in_use
    finally:
        os.close(descriptor)


def test_leftovers(filled: Filled) -> None:
    root, repo_dir = filled.root, filled.one.path.parent.parent
    assert Inventory(root).leftovers() == []
    (repo_dir / ".staging-0011").mkdir()
    (repo_dir / ".staging-0011" / "half").write_bytes(b"x" * 5000)
    (repo_dir / ".trash-aa-bb").mkdir()
    (repo_dir / ".refs.json-0011").write_text("")
    (repo_dir / ("f" * 40)).mkdir()
    blob = root / "weights" / "blobs" / "ff" / ("f" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"orphan")
    (root / "weights" / "blobs" / "ff" / ".0011").write_bytes(b"half")
    key = "0" * 40
    partial = root / "weights" / "partial"
    (partial / f"{key}.part").write_bytes(b"x" * 9000)
    (partial / f"{key}.part.json").write_text("{}")
    broken = weights_dir(root, filled.scope) / key
    broken.mkdir()
    (root / ".trust.json.0011").write_text("")
    found = {each.path.relative_to(root).parts[-1]: each for each in Inventory(root).leftovers()}
    assert {name: each.what for name, each in found.items()} == {
        ".staging-0011": "staging",
        ".trash-aa-bb": "trash",
        ".refs.json-0011": "file",
        "f" * 40: "broken",
        "f" * 64: "blob",
        ".0011": "blob",
        f"{key}.part": "partial",
        key: "broken",
        ".trust.json.0011": "file",
    }
    assert not any(each.live for each in found.values())
    assert found[".staging-0011"].bytes >= 5000
    assert found[f"{key}.part"].bytes >= 9000
    with FileLock(repo_dir / ".lock"), FileLock(partial / f"{key}.lock"):
        live = {each.path.name for each in Inventory(root).leftovers() if each.live}
    assert live == {".staging-0011", ".trash-aa-bb", "f" * 40, "f" * 64, ".0011", f"{key}.part", key}


def test_a_damaged_record_makes_a_leftover(filled: Filled) -> None:
    record = filled.one.path.parent / "checkout.json"
    record.chmod(0o644)
    record.write_bytes(record.read_bytes().replace(b"v1", b"v2"))
    inventory = Inventory(filled.root)
    assert filled.one.commit not in {each.commit for each in inventory.checkouts()}
    assert [(each.path, each.what) for each in inventory.leftovers()] == [(filled.one.path.parent, "broken")]


def test_links_are_not_followed(filled: Filled, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"x" * 100_000)
    (filled.root / "checkouts" / "host").symlink_to(outside)
    (filled.one.path.parent.parent / ".staging-1").symlink_to(outside)
    inventory = Inventory(filled.root)
    assert len(inventory.checkouts()) == 3
    assert [each.bytes < 100_000 for each in inventory.leftovers()] == [True]


def test_a_partial_download_that_was_cut(tmp_path: Path) -> None:
    from isohub.errors import IsohubError
    from tests.servers.files import Fault

    root = tmp_path / "isohub-home"
    with FileServer() as files:
        url = files.add("/model.pth", b"x" * 500_000)
        files.fail("model", Fault(truncate=300_000), times=1)
        files.fail("model", Fault(status=404))
        with pytest.raises(IsohubError):
            Weights(root).fetch(url, ("h", "o", "r"), credentials=Credentials(anonymous=True))
    (leftover,) = Inventory(root).leftovers()
    assert (leftover.what, leftover.live) == ("partial", False)


@given(st.text())
def test_names_are_decoded(text: str) -> None:
    encoded = encode_component(text)
    assert decode_component(encoded) == (encoded if "%=" in encoded else text)


@given(st.text(alphabet="%0123456789abcdefABCDEF=~/."))
def test_names_that_are_none_of_ours(name: str) -> None:
    decoded = decode_component(name)
    assert decoded is None or decoded == name or encode_component(decoded) == name
