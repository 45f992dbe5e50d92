"""C18, C19: what of the caller's files a worker reads and changes. None; by no way that there is."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import isohub
from isohub import errors
from tests.attacks import acts
from tests.attacks.acts import DONE
from tests.servers.files import FileServer
from tests.servers.git_repo import GitRepo

ROOT = Path(__file__).parents[2]
BELONGINGS = (
    ".bashrc", ".netrc", ".ssh/id_ed25519", ".ssh/authorized_keys", ".aws/credentials", ".config/gh/hosts.yml",
    ".cache/huggingface/token", ".docker/config.json", "project/.env",
)  # fmt: skip
HUBCONF = "import torch\n\ndef model():\n    return torch.nn.Identity()\n"
ROOT_ALONE = "only root can, in the control"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Somebody's home directory."""
    place = tmp_path_factory.mktemp("somebody")
    for name in BELONGINGS:
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"secret of {name}")
        file.chmod(0o600)
    return place


@pytest.fixture
def place(tmp_path):
    """Something to change."""
    return filled(tmp_path / "place")


def tiny(tmp_path):
    """A repo in a directory."""
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "hubconf.py").write_text(HUBCONF)
    return repo


_controls = {}


def control(way, path):
    """What becomes of an act in a process that is not confined; once for each way."""
    if way not in _controls:
        _controls[way] = acts.beside(way, path)
    return _controls[way]


def snapshot(directory):
    """Everything that can be changed about a directory and what is in it."""
    seen = {}
    for path in sorted([directory, *directory.rglob("*")]):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        names = tuple(os.listxattr(path, follow_symlinks=False))
        seen[str(path)] = (
            status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_mtime_ns, status.st_ctime_ns,
            content, names,
        )  # fmt: skip
    return seen


# C18: reading.


@pytest.mark.parametrize("way", acts.READS, ids=lambda way: way.__name__)
def test_c18_no_way_leads_to_the_callers_files(jail, home, way):
    for name in BELONGINGS[:1] if way is not acts.read else BELONGINGS:
        path = str(home / name)
        assert jail.attempt(way, path) != DONE
    assert (home / ".bashrc").read_text() == "secret of .bashrc"
    if way is acts.read_by_the_root_of_the_first_process:
        return  # the control is that of /proc/self/root
    if way is acts.read_by_a_handle and os.geteuid():
        pytest.skip(f"{way.__name__}: {ROOT_ALONE}")
    shutil.copy(home / ".bashrc", home / "copy")
    assert control(way, str(home / "copy")) == DONE


def test_c18_nor_to_the_real_home(jail):
    names = [".bashrc", ".profile", ".netrc", ".gitconfig", ".ssh", ".aws", ".config", ".docker", ".bash_history"]
    there = [str(Path.home() / name) for name in names if (Path.home() / name).exists()]
    there += [
        path for path in ("/etc/shadow", "/etc/sudoers", "/etc/hostname", "/etc/machine-id") if os.path.exists(path)
    ]
    assert there  # the control: something is
    for path in there:
        act = acts.read if os.path.isfile(path) else os.listdir
        assert jail.attempt(act, path) != DONE, path


def test_c18_what_the_policy_names_is_read(jail, home, hub):
    with jail.session.load(hub("good"), "mlp", sandbox=isohub.Sandbox(read=[home])) as handle:
        assert handle.run(acts.attempt, acts.read, str(home / ".bashrc")) == DONE
        assert handle.run(acts.attempt, acts.overwrite, str(home)) != DONE


def test_c18_a_hubconf_finds_nothing_as_it_is_imported(jail, free, home, tmp_path):
    repo = tmp_path / "reads_home"
    shutil.copytree(ROOT / "tests/hubs/reads_home", repo)
    (repo / "targets").write_text("\n".join(str(home / name) for name in BELONGINGS))
    assert jail.session.load(repo, "found") == {}
    stolen = free.session.load(repo, "found", trust_repo=True)  # the control
    assert {str(home / name) for name in BELONGINGS} <= set(stolen)


def test_c18_a_symlink_in_a_checkout_leads_nowhere(jail, home, tmp_path):
    repo = tiny(tmp_path)
    (repo / "keys").symlink_to(home / ".ssh")
    (repo / "key").symlink_to(home / ".ssh" / "id_ed25519")
    (repo / "inside").symlink_to("hubconf.py")
    with jail.session.load(repo, "model") as handle:
        for name in ("key", "keys/id_ed25519"):
            assert (repo / name).read_text()  # the control
            assert handle.run(acts.attempt, acts.read, str(repo / name)) != DONE
        assert handle.run(acts.attempt, acts.read, str(repo / "inside")) == DONE


@pytest.mark.parametrize("form", ["directory", "file"])
def test_c18_the_git_directory_of_a_checkout_is_hidden(jail, tmp_path, form):
    repo = tiny(tmp_path)
    (repo / "package").mkdir()
    (repo / "package" / "data").write_text("x")
    secret = repo / ".git"
    if form == "directory":
        secret.mkdir()
        secret = secret / "config"
    secret.write_text("url = https://token@host/org/repo")
    with jail.session.load(repo, "model") as handle:
        assert not handle.run(_says_token, str(secret))
        assert _says_token(None, str(secret))  # the control
        for name in ("hubconf.py", "package/data"):
            assert handle.run(acts.attempt, acts.read, str(repo / name)) == DONE
        assert handle.run(acts.attempt, os.listdir, str(repo)) == DONE


def _says_token(module, path):
    try:
        with open(path) as file:
            return "token" in file.read()
    except OSError:
        return False


def test_c18_neighbours_of_an_editable_install_are_not_read(jail):
    package = Path(isohub.__file__).parent
    assert jail.attempt(acts.read, str(package / "errors.py")) == DONE
    hidden = [ROOT / "pyproject.toml", ROOT / "SECURITY.md", ROOT / "tests" / "conftest.py", ROOT / ".git" / "HEAD"]
    hidden = [path for path in hidden if path.exists()]
    assert hidden
    for path in hidden:
        assert path.read_bytes()  # the control
        assert jail.attempt(acts.read, str(path)) != DONE, path


def test_c18_another_repos_checkout_and_weights_and_the_list_of_trust_are_not_read(jail, tmp_path, loopback_weights):
    store = {}
    for name in ("one", "two"):
        repo = GitRepo(tmp_path / name)
        repo.commit({"hubconf.py": f"{HUBCONF}# {name}\n"})
        store[name] = jail.session.fetch(f"git+file://{repo.path}").path
    home = jail.home
    jail.session.trust(jail.session.fetch(f"git+file://{tmp_path / 'one'}"))
    with FileServer() as server:
        server.add("/w.bin", b"w" * 5000)
        url = f"http://{server.host}/w.bin"
        one = jail.session.load(f"git+file://{tmp_path / 'one'}", "model")
        two = jail.session.load(f"git+file://{tmp_path / 'two'}", "model")
        with one, two:
            one.run(_download, url)
            files = [path for path in home.rglob("*") if path.is_file() and store["one"] not in path.parents]
            weights = [path for path in files if path.read_bytes() == b"w" * 5000]
            assert weights
            read = {path for path in files if two.run(acts.attempt, acts.read, str(path)) == DONE}
            assert {path for path in read if store["two"] not in path.parents} == set()
            assert two.run(acts.attempt, acts.read, str(store["one"] / "hubconf.py")) != DONE
            # The controls: its own checkout; its own weights.
            assert one.run(acts.attempt, acts.read, str(store["one"] / "hubconf.py")) == DONE
            assert one.run(acts.attempt, acts.read, str(store["two"] / "hubconf.py")) != DONE
            assert any(one.run(acts.attempt, acts.read, str(path)) == DONE for path in weights)
            assert any(path.name == "trust.json" for path in files)
            # It may lock what it sees, and keeps nobody else waiting by that.
            assert one.run(acts.attempt, acts.lock, str(store["one"]), True) == DONE
            assert acts.attempt(None, acts.lock, str(store["one"])) == "EAGAIN"  # the control
            with jail.session.load(f"git+file://{tmp_path / 'one'}", "model", timeout_s=10):
                pass
            for path in weights:  # what it may read it may not change
                assert one.run(acts.attempt, acts.append_to, str(path)) != DONE


def _download(module, url):
    import torch

    torch.hub.download_url_to_file(url, "w.bin", progress=False)


# C19: writing.


@pytest.mark.parametrize("way", acts.WRITES, ids=lambda way: way.__name__)
def test_c19_no_way_changes_the_callers_files(jail, place, way):
    before = snapshot(place)
    assert jail.attempt(way, str(place)) != DONE
    assert snapshot(place) == before


@pytest.mark.parametrize("way", acts.WRITES, ids=lambda way: way.__name__)
def test_c19_nor_what_a_worker_may_read(jail, readable, way):
    handle, place = readable
    before = snapshot(place)
    assert handle.run(acts.attempt, way, str(place)) != DONE
    assert snapshot(place) == before
    # The control.
    if way in (acts.make_a_device, acts.write_by_a_handle) and os.geteuid():
        pytest.skip(f"{way.__name__}: {ROOT_ALONE}")
    outcome = control(way, str(place))
    if outcome in ("ENOTSUP", "ENOTTY", "ENOSYS"):
        pytest.skip(f"{way.__name__}: this file system or kernel has none")
    assert outcome == DONE


@pytest.fixture(scope="module")
def granted(jail, tmp_path_factory):
    """A worker, what it may read, and what it may change."""
    reads, writes = tmp_path_factory.mktemp("reads"), tmp_path_factory.mktemp("writes")
    repo = tiny(tmp_path_factory.mktemp("granted"))
    with jail.session.load(repo, "model", sandbox=isohub.Sandbox(read=[reads], write=[writes])) as handle:
        yield handle, reads, writes


def filled(place):
    (place / "sub").mkdir(parents=True)
    (place / "file").write_text("whole")
    return place


@pytest.fixture
def readable(granted, request):
    """A worker that may read a directory which it would like to change."""
    handle, reads, _ = granted
    place = filled(reads / request.node.callspec.id)
    assert handle.run(acts.attempt, acts.read, str(place / "file")) == DONE
    return handle, place


@pytest.fixture
def writable(granted, request):
    """A worker that may change a directory."""
    handle, _, writes = granted
    return handle, filled(writes / request.node.callspec.id)


def test_c18_nothing_is_opened_for_neither_reading_nor_writing(jail, place):
    """Landlock lets that pass; with the descriptor come locks, leases and ioctls."""
    assert jail.attempt(acts.open_for_neither, str(place)) != DONE
    assert control(acts.open_for_neither, str(place)) == DONE


@pytest.mark.parametrize("way", [acts.overwrite, acts.truncate, acts.create, acts.make_directory, acts.remove, acts.rename,
                                 acts.link_beside, acts.symlink_into, acts.make_a_pipe, acts.write_by_a_symlink],
                         ids=lambda way: way.__name__)  # fmt: skip
def test_c19_what_the_policy_names_is_changed(jail, writable, way):
    handle, place = writable
    if jail.name.endswith("Landlock 1") and way is acts.truncate:
        assert handle.run(acts.attempt, way, str(place)) == "EPERM"  # the oldest Landlock cannot tell whose
        return
    before = snapshot(place)
    assert handle.run(acts.attempt, way, str(place)) == DONE
    assert snapshot(place) != before


def places_of_the_callers(store, home):
    purelib = sysconfig.get_path("purelib")
    return {
        "home": str(home),
        "keys": str(home / ".ssh"),
        "store": str(store),
        "site-packages": purelib,
        "site-packages of isohub": os.path.dirname(isohub.__file__),
        "tmp": "/tmp",
        "shared memory": "/dev/shm",
        "cwd": os.getcwd(),
        "checkout": str(ROOT / "tests" / "hubs" / "good"),
        "interpreter": os.path.dirname(sys.executable),
        "root": "/",
        "etc": "/etc",
        "var": "/var/tmp",
    }


def test_c19_nothing_appears_in_any_directory_of_the_callers(jail, home, tmp_path):
    for name, directory in places_of_the_callers(jail.home, home).items():
        for file in ("isohub-attack.pth", "isohub-attack.py"):
            path = os.path.join(directory, file)
            outcome = jail.attempt(acts.create_file, path)
            seen = os.path.exists(path)
            if seen:
                os.unlink(path)
            own = jail.namespaced and directory == "/dev/shm"
            assert not seen, name
            assert own or outcome != DONE, name
    assert acts.attempt(None, acts.create_file, str(tmp_path / "control")) == DONE


def test_c19_files_that_are_there_stay_as_they_are(jail, home):
    own = [
        ROOT / "tests/hubs/good/hubconf.py",
        Path(isohub.__file__),
        Path(isohub.__file__).parent / "worker" / "start.py",
        Path(os.path.realpath(sys.executable)),
        Path(sysconfig.get_path("stdlib")) / "os.py",
    ]
    for path in own:
        before = path.stat()
        for act in (acts.append_to, acts.shorten, acts.open_mode, acts.touch):  # which would do no harm
            assert jail.attempt(act, str(path)) != DONE, (path, act)
        assert path.stat() == before


def test_c19_a_link_left_in_its_own_directory_does_no_harm_when_that_is_removed(jail, place, hub):
    def trap(module, target):
        for directory in (os.environ["TMPDIR"], os.environ["HOME"], os.getcwd()):
            os.symlink(target, os.path.join(directory, "link"))
            os.makedirs(os.path.join(directory, "a", "b"))
            os.symlink(target, os.path.join(directory, "a", "b", "c"))

    before = snapshot(place)
    with jail.session.load(hub("relative_files"), "model") as handle:
        handle.run(trap, str(place))
    assert snapshot(place) == before


def test_c19_memory_that_a_worker_gets_is_no_file_of_the_callers(jail):
    """Every descriptor that a worker has: by none is a file of the caller's written, also after it was opened anew."""

    def reopen(module):
        written = {}
        for name in os.listdir("/proc/self/fd"):
            path = f"/proc/self/fd/{name}"
            try:
                target = os.readlink(path)
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                written[target] = True
            except OSError:
                pass
        return list(written)

    targets = jail.handle.run(reopen)
    assert [target for target in targets if not target.startswith(("pipe:", "/memfd:", "/dev/null"))] == []
    assert targets  # the control: some it has


def test_c19_huge_pages_are_not_taken_by_memory_files(jail):
    assert jail.attempt(acts.huge_memory) == "EPERM"


def test_c18_a_local_directory_that_is_no_home_is_named_by_the_caller_alone(whole, home):
    """What a policy names and is not there is said, and gives nothing."""
    with pytest.raises(errors.PolicyError):
        whole.load(str(ROOT / "tests/hubs/good"), "mlp", sandbox=isohub.Sandbox(read=[home / "nothing"]))


def test_c19_permission_is_not_what_refuses(jail, place):
    """As any other process of this user's, the control can: it is no question of owner and mode."""
    os.chmod(place / "file", 0o666)
    assert jail.attempt(acts.overwrite, str(place)) in {
        errno.errorcode[n] for n in (errno.EACCES, errno.ENOENT, errno.EROFS)
    }
    assert subprocess.run(["sh", "-c", f"echo x > '{place}/file'"], check=False).returncode == 0
