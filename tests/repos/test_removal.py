"""isohub.repos.removal: the plan is what happens; what is used stays; nobody sees half."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from isohub.repos.disk import hold
from isohub.repos.inventory import Inventory
from isohub.repos.layout import weights_dir
from isohub.repos.reference import parse
from isohub.repos.removal import Plan, Removal, carry_out, plan_prune, plan_removal, plan_repair
from isohub.repos.store import Store
from isohub.repos.verify import verify
from isohub.repos.weights import Weights
from tests.repos.filled import Filled, fill
from tests.servers.files import FileServer
from tests.servers.github import GitHubServer


@pytest.fixture
def filled(tmp_path: Path, github: GitHubServer) -> Filled:
    with FileServer() as files:
        return fill(tmp_path / "isohub-home", github, files, tmp_path / "git")


def listing(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(root)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in root.rglob("*")
    }


def removed(plan: Plan) -> list[tuple[str, str]]:
    return [(removal.what, removal.path.name) for removal in plan.removals]


def test_a_plan_changes_nothing(filled: Filled) -> None:
    before = listing(filled.root)
    inventory = Inventory(filled.root)
    plan_removal(inventory, everything=True)
    plan_prune(inventory, max_bytes=0, older_than_s=0)
    plan_repair(inventory, verify(filled.root))
    assert listing(filled.root) == before


def test_one_checkout(filled: Filled) -> None:
    inventory = Inventory(filled.root)
    chosen = [each for each in inventory.checkouts() if each.commit == filled.one.commit]
    plan = plan_removal(inventory, chosen)
    assert removed(plan) == [("checkout", filled.one.commit)]
    assert plan.bytes == chosen[0].bytes
    done = carry_out(filled.root, plan)
    assert done == plan
    assert {each.commit for each in Inventory(filled.root).checkouts()} == {filled.two.commit, filled.other.commit}
    assert not filled.one.path.parent.exists()
    assert verify(filled.root) == []
    # What v1 meant is forgotten with it, and only that.
    offline = Store(filled.root, offline=True)
    assert offline.resolve(parse("o/r:main")).commit == filled.two.commit
    with pytest.raises(Exception, match="not in the cache"):
        offline.resolve(parse("o/r:v1"))


def test_a_repo(filled: Filled) -> None:
    (filled.one.path.parent.parent / ".staging-1").mkdir()
    plan = plan_removal(Inventory(filled.root), scopes=[filled.scope])
    assert sorted(what for what, _ in removed(plan)) == ["checkout", "checkout", "staging", "weights", "weights"]
    # The content of `own` goes with its only name, that of `shared` stays with the other repo's.
    assert [removal.blob and removal.blob.name for removal in plan.removals if removal.what == "weights"] == [
        None if removal.path == filled.shared.path.parent else filled.own.sha256
        for removal in plan.removals
        if removal.what == "weights"
    ]
    carry_out(filled.root, plan)
    inventory = Inventory(filled.root)
    assert [each.commit for each in inventory.checkouts()] == [filled.other.commit]
    assert {each.sha256 for each in inventory.weights()} == {filled.shared.sha256, filled.callers.sha256}
    assert inventory.leftovers() == []
    assert verify(filled.root) == []
    assert not filled.own.path.exists()
    assert not filled.shared.path.exists()


def test_everything(filled: Filled) -> None:
    done = carry_out(filled.root, plan_removal(Inventory(filled.root), everything=True))
    assert done.kept == ()
    inventory = Inventory(filled.root)
    assert (inventory.checkouts(), inventory.weights(), inventory.leftovers()) == ([], [], [])
    assert verify(filled.root) == []
    assert (filled.root / "trust.json").exists()
    files = [path for path in filled.root.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.parts[-4:-1] != filled.scope) < 2000


def test_what_is_in_use_stays_and_is_said(filled: Filled) -> None:
    descriptors = [hold(filled.one.path.parent), hold(weights_dir(filled.root, filled.scope))]
    try:
        plan = plan_removal(Inventory(filled.root), everything=True)
        assert {(kept.what, kept.path, kept.reason) for kept in plan.kept} == {
            ("checkout", filled.one.path.parent, "in use"),
            ("weights", filled.shared.path.parent, "in use"),
            ("weights", filled.own.path.parent, "in use"),
        }
        assert carry_out(filled.root, plan) == plan
        assert (filled.one.path / "hubconf.py").read_text() == "one\n"
        assert {file.scope for file in Weights(filled.root).entries()} == {filled.scope}
        assert verify(filled.root) == []
    finally:
        for descriptor in descriptors:
            assert descriptor is not None
            os.close(descriptor)


def test_what_comes_into_use_after_the_plan_stays(filled: Filled) -> None:
    plan = plan_removal(Inventory(filled.root), everything=True)
    assert plan.kept == ()
    descriptors = [hold(filled.one.path.parent), hold(weights_dir(filled.root, filled.scope))]
    repo_dir = filled.other.path.parent.parent
    try:
        with FileLock(repo_dir / ".lock"):
            done = carry_out(filled.root, plan)
    finally:
        for descriptor in descriptors:
            assert descriptor is not None
            os.close(descriptor)
    assert sorted((kept.what, kept.reason) for kept in done.kept) == [
        ("checkout", "in use"),
        ("checkout", "somebody writes there now"),
        ("weights", "in use"),
        ("weights", "in use"),
    ]
    assert verify(filled.root) == []
    assert filled.shared.path.exists()


def test_single_weights(filled: Filled) -> None:
    plan = plan_removal(Inventory(filled.root), files=[filled.shared])
    assert [(removal.path, removal.bytes) for removal in plan.removals] == [(filled.shared.path.parent, 0)]
    assert carry_out(filled.root, plan) == plan
    assert {file.scope for file in Weights(filled.root).entries() if file.sha256 == filled.shared.sha256} == {
        (filled.scope[0], "o", "other")
    }
    plan = plan_removal(Inventory(filled.root), files=[filled.own])
    (removal,) = plan.removals
    assert (removal.bytes > 0, removal.blob) == (True, filled.own.blob)
    assert carry_out(filled.root, plan) == plan
    assert not filled.own.blob.exists()
    assert verify(filled.root) == []


_HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(descriptor, fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.readline()
"""


@contextmanager
def held_elsewhere(path: Path) -> Iterator[None]:
    """Another process uses it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield
        finally:
            holder.kill()


def test_a_tree_that_was_replaced_under_its_user_stays_until_he_is_done(filled: Filled) -> None:
    place = filled.one.path.parent
    with held_elsewhere(place):
        place.chmod(0o755)
        trash = place.with_name(f".trash-{place.name}-0011")
        place.rename(trash)  # as a forced fetch puts it aside
        trash.chmod(0o555)
        (leftover,) = Inventory(filled.root).leftovers()
        assert (leftover.path, leftover.live, leftover.in_use) == (trash, False, True)
        for plan in (
            plan_prune(Inventory(filled.root)),
            plan_removal(Inventory(filled.root), scopes=[filled.scope]),
            plan_removal(Inventory(filled.root), everything=True),
        ):
            assert [(kept.path, kept.what, kept.reason) for kept in plan.kept] == [(trash, "trash", "in use")]
        assert carry_out(filled.root, plan_prune(Inventory(filled.root))).removals == ()
        assert (trash / "tree" / "hubconf.py").read_text() == "one\n"
        # Who came into use after the plan stays as well.
        planned = Plan((Removal(trash, "trash", trash.name, 0, "leftover"),), ())
        assert [kept.reason for kept in carry_out(filled.root, planned).kept] == ["in use"]
        assert (trash / "tree" / "hubconf.py").read_text() == "one\n"
    plan = plan_prune(Inventory(filled.root))
    assert [removal.path for removal in plan.removals] == [trash]
    assert carry_out(filled.root, plan).kept == ()
    assert not trash.exists()


def test_a_checkout_whose_earlier_tree_is_used_is_in_use(filled: Filled, github: GitHubServer) -> None:
    place = filled.one.path.parent
    with held_elsewhere(place):
        hubconf = filled.one.path / "hubconf.py"
        hubconf.chmod(0o644)
        hubconf.write_text("damaged\n")
        Store(filled.root).fetch(filled.one.pin, force_reload=True)
        assert hubconf.read_text() == "one\n"
        (trash,) = place.parent.glob(".trash-*")
        plan = plan_removal(Inventory(filled.root), scopes=[filled.scope])
        assert {(kept.path, kept.reason) for kept in plan.kept} == {(place, "in use"), (trash, "in use")}
        assert {kept.path for kept in carry_out(filled.root, plan).kept} == {place, trash}
        assert (trash / "tree" / "hubconf.py").read_text() == "damaged\n"
    assert carry_out(filled.root, plan_removal(Inventory(filled.root), scopes=[filled.scope])).kept == ()
    assert not place.exists()
    assert not trash.exists()


def test_a_blob_that_somebody_was_given_stays(filled: Filled) -> None:
    blob = filled.own.blob
    plan = plan_removal(Inventory(filled.root), files=[filled.own])
    with held_elsewhere(blob):
        done = carry_out(filled.root, plan)
        assert [(removal.what, removal.bytes) for removal in done.removals] == [("weights", 0)]
        assert [(kept.path, kept.what, kept.reason) for kept in done.kept] == [(blob, "weights", "in use")]
        (leftover,) = Inventory(filled.root).leftovers()
        assert (leftover.path, leftover.what, leftover.in_use) == (blob, "blob", True)
        assert carry_out(filled.root, plan_prune(Inventory(filled.root))).removals == ()
        assert blob.read_bytes() == b"own" * 5000
    assert [removal.path for removal in carry_out(filled.root, plan_prune(Inventory(filled.root))).removals] == [blob]
    assert not blob.exists()


def test_a_blob_of_which_an_entry_has_a_copy_stays_with_it(filled: Filled) -> None:
    content = filled.own.path.read_bytes()
    filled.own.path.unlink()
    filled.own.path.write_bytes(content)  # as where links are not possible
    filled.own.path.chmod(0o444)
    orphan = Plan((Removal(filled.own.blob, "blob", "", 0, "leftover"),), ())
    assert [kept.reason for kept in carry_out(filled.root, orphan).kept] == ["in use"]
    assert verify(filled.root) == []


def test_what_a_killed_remover_left_goes_at_once(filled: Filled) -> None:
    (filled.own.path.parent / "entry.json").unlink()
    assert {each.what for each in Inventory(filled.root).leftovers()} == {"broken", "blob"}
    assert carry_out(filled.root, plan_prune(Inventory(filled.root))).kept == ()
    assert Inventory(filled.root).leftovers() == []


def test_damaged_weights_that_are_in_use_stay(filled: Filled) -> None:
    filled.own.path.chmod(0o644)
    filled.own.path.write_bytes(b"X" * 15000)
    filled.own.path.chmod(0o444)
    with held_elsewhere(weights_dir(filled.root, filled.scope)):
        done = carry_out(filled.root, plan_repair(Inventory(filled.root), verify(filled.root)))
        assert [(kept.what, kept.name, kept.reason) for kept in done.kept] == [("weights", filled.own.url, "in use")]
        assert filled.own.blob.exists()
    assert carry_out(filled.root, plan_repair(Inventory(filled.root), verify(filled.root))).kept == ()
    assert verify(filled.root) == []
    assert not filled.own.blob.exists()


def test_what_somebody_else_removed_is_removed(filled: Filled) -> None:
    plan = plan_removal(Inventory(filled.root), everything=True)
    assert carry_out(filled.root, plan).kept == ()
    again = carry_out(filled.root, plan)
    assert (again.removals, again.kept) == (plan.removals, ())


def test_a_disk_that_refuses_is_said(filled: Filled) -> None:
    plan = plan_removal(Inventory(filled.root), scopes=[filled.scope])
    if os.geteuid() == 0:
        # Root may write everywhere; a file where the lock should be is refused to everybody.
        lock = filled.one.path.parent.parent / ".lock"
        lock.unlink()
        lock.mkdir()
    else:
        filled.one.path.parent.parent.chmod(0o555)
    done = carry_out(filled.root, plan)
    assert {kept.path for kept in done.kept} == {filled.one.path.parent, filled.two.path.parent}
    assert all(kept.reason not in ("", "in use") for kept in done.kept)


def age(filled: Filled) -> None:
    """Ten days each, oldest first: one, own, shared, two, callers, other."""
    now = time.time()
    order = [
        filled.one.path.parent, filled.own.path.parent, filled.shared.path.parent,
        filled.two.path.parent, filled.callers.path.parent, filled.other.path.parent,
    ]  # fmt: skip
    for number, path in enumerate(order):
        days = 10 * (len(order) - number)
        os.utime(path, (now - days * 86400, now - days * 86400))
    for weights in Inventory(filled.root).weights():
        for file in weights.files:
            if file.sha256 == filled.shared.sha256:
                os.utime(file.path.parent, (now - 40 * 86400, now - 40 * 86400))


def test_prune_by_age(filled: Filled) -> None:
    age(filled)
    plan = plan_prune(Inventory(filled.root), older_than_s=45 * 86400)
    assert [(removal.what, removal.why) for removal in plan.removals] == [
        ("checkout", "old"), ("weights", "old")
    ]  # fmt: skip
    assert plan.removals[0].path == filled.one.path.parent
    carry_out(filled.root, plan)
    assert verify(filled.root) == []
    assert {each.commit for each in Inventory(filled.root).checkouts()} == {filled.two.commit, filled.other.commit}


def test_prune_by_size_takes_what_was_used_longest_ago(filled: Filled) -> None:
    age(filled)
    inventory = Inventory(filled.root)
    stored = sorted([*inventory.checkouts(), *inventory.weights()], key=lambda each: each.used)
    sizes = [each.bytes for each in stored]
    for gone in range(len(sizes) + 1):
        plan = plan_prune(inventory, max_bytes=sum(sizes[gone:]))
        assert plan.bytes == sum(sizes[:gone])
        assert all(removal.why == "room" for removal in plan.removals)
    carry_out(filled.root, plan_prune(inventory, max_bytes=sum(sizes[3:])))
    assert [
        each.bytes for each in sorted([*inventory.checkouts(), *inventory.weights()], key=lambda e: e.used)
    ] == sizes[3:]


def test_prune_steps_over_what_is_in_use(filled: Filled) -> None:
    age(filled)
    inventory = Inventory(filled.root)
    total = sum(each.bytes for each in [*inventory.checkouts(), *inventory.weights()])
    descriptor = hold(filled.one.path.parent)
    assert descriptor is not None
    try:
        plan = plan_prune(inventory, max_bytes=total - 1)
        assert filled.own.path.parent in {removal.path for removal in plan.removals}
        assert plan.kept == ()  # there is room without it
        assert [kept.path for kept in plan_prune(inventory, max_bytes=0).kept] == [filled.one.path.parent]
        assert [kept.path for kept in plan_prune(inventory, older_than_s=0).kept] == [filled.one.path.parent]
    finally:
        os.close(descriptor)


def test_prune_without_limits_takes_leftovers_alone(filled: Filled) -> None:
    repo_dir, partial = filled.one.path.parent.parent, filled.root / "weights" / "partial"
    for name in (".staging-1", ".staging-2"):
        (repo_dir / name / "tree").mkdir(parents=True)
        (repo_dir / name / "tree").chmod(0o555)
    for ending in ("part", "part.json", "copy"):
        (partial / f"{'0' * 40}.{ending}").write_bytes(b"x")
    with FileLock(repo_dir / ".lock"):
        plan = plan_prune(Inventory(filled.root))
        assert ([what for what, _ in removed(plan)], plan.kept) == (["partial"], ())  # a living writer's are its own
    assert carry_out(filled.root, plan_prune(Inventory(filled.root))).kept == ()
    assert Inventory(filled.root).leftovers() == []
    assert len(Inventory(filled.root).checkouts()) == 3
    assert not list(partial.glob("0*.part*"))


def test_repair(filled: Filled, github: GitHubServer) -> None:
    for path in (filled.one.path / "hubconf.py", filled.own.path):
        path.chmod(0o644)
        path.write_bytes(b"X" + path.read_bytes()[1:])
    (filled.one.path.parent.parent / "stranger").write_text("?")
    damages = verify(filled.root)
    plan = plan_repair(Inventory(filled.root), damages)
    assert all(removal.why == "damaged" for removal in plan.removals)
    assert carry_out(filled.root, plan).kept == ()
    assert verify(filled.root) == []
    assert filled.two.path.exists()
    assert filled.shared.path.exists()
    store = Store(filled.root)
    assert (store.fetch(filled.one.pin).path / "hubconf.py").read_text() == "one\n"


def test_repair_leaves_what_only_the_user_can_mend(filled: Filled) -> None:
    (filled.root / "trust.json").write_text("{")
    plan = plan_repair(Inventory(filled.root), verify(filled.root))
    assert plan.removals == ()
    assert [kept.path.name for kept in plan.kept] == ["trust.json"]


_REMOVER = """
import sys
from pathlib import Path
from isohub.repos.inventory import Inventory
from isohub.repos.removal import carry_out, plan_removal
root = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
carry_out(root, plan_removal(Inventory(root), everything=True))
"""


def test_a_remover_that_is_killed_leaves_whole_things_or_leftovers(filled: Filled, github: GitHubServer) -> None:
    files = {f"many/file{number}.py": "x\n" for number in range(300)}
    for number in range(8):
        repo = github._repos["o/other"]
        repo.commit({**files, "hubconf.py": f"{number}\n"})
        store = Store(filled.root)
        checkout = store.fetch(store.resolve(parse("o/other")))
        remover = subprocess.Popen(
            [sys.executable, "-c", _REMOVER, str(filled.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with remover:
            assert remover.stdout is not None
            assert remover.stdin is not None
            assert remover.stdout.readline() == "ready\n"
            remover.stdin.write("go\n")
            remover.stdin.flush()
            time.sleep(0.002 * number)
            remover.send_signal(signal.SIGKILL)
        assert verify(filled.root) == []
        again = store.fetch(checkout.pin)
        assert (again.path / "hubconf.py").read_text() == f"{number}\n"
        assert len(list((again.path / "many").iterdir())) == 300
        carry_out(filled.root, plan_prune(Inventory(filled.root)))
        assert Inventory(filled.root).leftovers() == []


_LOADER = """
import os, sys
from pathlib import Path
from isohub.repos.reference import parse
from isohub.repos.store import Store
store, reference = Store(Path(sys.argv[1])), parse(sys.argv[2])
for _ in range(15):
    while True:
        checkout = store.fetch(store.resolve(reference))
        try:
            descriptor = store.hold(checkout)
        except FileNotFoundError:
            continue
        break
    assert len(list((checkout.path / "many").iterdir())) == 50
    os.close(descriptor)
"""


def test_loaders_and_a_remover_at_once(filled: Filled, github: GitHubServer) -> None:
    commit = github._repos["o/other"].commit({f"many/file{number}.py": "x\n" for number in range(50)})
    command = [sys.executable, "-c", _LOADER, str(filled.root), f"o/other:{commit}"]
    loaders = [subprocess.Popen(command) for _ in range(3)]
    while any(loader.poll() is None for loader in loaders):
        carry_out(filled.root, plan_removal(Inventory(filled.root), everything=True))
    assert [loader.returncode for loader in loaders] == [0] * 3
