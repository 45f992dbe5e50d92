"""A view of the system of a process's own: no other processes, no network, and few files.

1. A zygote owns a user namespace, in which it may make the others; a worker's fork is put into a pid namespace of its
   own (`isohub.worker.keeper`), leaves the rest by one unshare(2), and then enters a user namespace that owns none of
   them: whatever it could gain there, it could change nothing.
2. Its tree of files is a small tmpfs, read-only, with what `grants` names bound at its own place, read-only, without
   setuid and devices; a fresh ``/proc``; five devices; and one tmpfs, of a size, for its own directories and
   ``/dev/shm``.
3. All of it or none: `fault` tries the whole on this machine before anything rests on it.

Side: zygote's and worker's, in processes of one thread. Source: user_namespaces(7), pid_namespaces(7),
mount_namespaces(7), pivot_root(2), mount_setattr(2) (Linux 5.12), setns(2) with a pidfd (Linux 5.8).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
from typing import Dict, List, Optional, Sequence, Set

from isohub.sandbox.grants import is_below
from isohub.sandbox.kernel import libc_call, system_call
from isohub.sandbox.landlock import Rule

__all__ = [
    "NEW_PID",
    "NEW_USER",
    "SHARED_MEMORY",
    "Tree",
    "become_own_user",
    "enter",
    "fault",
    "leave_host",
    "listen_on_loopback",
    "unshare",
]

_NEW_NS, _NEW_UTS, _NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
#: Where POSIX shared memory and semaphores are: shm_overview(7).
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - in a worker's tree it is the worker's own
_HOST_NAME = b"isohub"
_ROOT_BYTES = "16m"
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_MOST_STEPS = 4096  # components of a path and of the symlinks on its way


def unshare(flags: int) -> None:
    """Leave namespaces; Python has a function for it from 3.12 on."""
    libc_call("unshare", ctypes.c_int(flags))


def enter(descriptor: int, kind: int) -> None:
    """setns(2): by a pidfd, or a namespace's file."""
    libc_call("setns", ctypes.c_int(descriptor), ctypes.c_int(kind))


def become_own_user(flags: int = 0, process: Optional[int] = None) -> None:
    """Enter a new user namespace, and others with it, as the same user and group.

    Args:
        flags: Of other namespaces.
        process: Descriptor of this process's directory in a ``/proc`` that can be written to; else that is opened.

    Raises:
        OSError: The kernel, or a security module of this machine, does not allow it.
    """
    user, group = os.geteuid(), os.getegid()  # the overflow user's once inside
    own = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if process is None else process
    try:
        unshare(NEW_USER | flags)
        for name, text in (
            ("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")
        ):  # fmt: skip
            with open(os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=own), "w") as file:
                file.write(text)
    finally:
        os.close(own)


def leave_host(*, network: bool) -> None:
    """Leave the host's mounts, IPC and names, and its network unless that is to stay."""
    unshare(_NEW_NS | _NEW_IPC | _NEW_UTS | (0 if network else _NEW_NET))
    libc_call("sethostname", ctypes.c_char_p(_HOST_NAME), ctypes.c_size_t(len(_HOST_NAME)))


def listen_on_loopback() -> socket.socket:
    """A listening socket on the loopback interface of this network namespace, which is brought up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
    except BaseException:
        listener.close()
        raise
    return listener


def _mount(source: str, target: str, kind: Optional[str], flags: int, data: Optional[str] = None) -> None:
    try:
        libc_call(
            "mount",
            ctypes.c_char_p(os.fsencode(source)),
            ctypes.c_char_p(os.fsencode(target)),
            None if kind is None else ctypes.c_char_p(kind.encode()),
            ctypes.c_ulong(flags),
            None if data is None else ctypes.c_char_p(data.encode()),
        )
    except OSError as error:
        raise OSError(error.errno, f"mount {kind or source} on {target}: {os.strerror(error.errno or 0)}") from None


def _set_attributes(path: str, attributes: int, *, recursive: bool = True) -> None:
    words = struct.pack("QQQQ", attributes, 0, 0, 0)
    system_call(
        "mount_setattr",
        _MOUNT_SETATTR,
        _AT_FDCWD,
        ctypes.c_char_p(os.fsencode(path)),
        _AT_RECURSIVE if recursive else 0,
        ctypes.c_char_p(words),
        len(words),
    )


class Tree:
    """A root of files in the making, in a mount namespace of this process's own.

    Args:
        place: An empty directory, on which it is put together.
        machine: For the number of pivot_root(2).
    """

    def __init__(self, place: str, machine: str) -> None:
        self._root = place
        self._machine = machine
        self._bound: Dict[str, str] = {}  # real path: kind
        self._made: Set[str] = set()  # directories that are there, as they will be called
        self._plain: Set[str] = set()  # paths that are no symlinks
        self._process = -1
        _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
        _mount("tmpfs", place, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={_ROOT_BYTES},mode=0755")

    def own(self, directory: str, size_bytes: int) -> None:
        """A tmpfs of that size for a directory of the worker's own, with ``/dev/shm`` in it."""
        inside = self._directory(directory)
        _mount("tmpfs", inside, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size_bytes},mode=0700")
        shared = os.path.join(inside, "shm")
        os.mkdir(shared, 0o700)
        _mount(shared, self._directory(SHARED_MEMORY), None, _MS_BIND)
        self._bound[directory] = self._bound[SHARED_MEMORY] = "write"

    @property
    def root(self) -> str:
        """Where it is put together."""
        return self._root

    def bind(self, rules: Sequence[Rule]) -> None:
        """Show what the rules name, each at its own place.

        What a later call names and lies around what an earlier one named is put over that, and shows it again.
        """
        for path, kind in sorted(rules, key=lambda rule: rule.path.count("/")):
            if path != "/proc" and not path.startswith("/proc/"):
                self._show(path, kind)

    def hide(self, path: str) -> None:
        """Put nothing in place of a file or directory that is shown with its parent."""
        inside = self._root + path
        if not os.path.lexists(inside):
            return
        if os.path.islink(inside):  # its target, if that is shown
            target = os.path.realpath(path)
            if target != path and any(is_below(target, bound) for bound in self._bound):
                self.hide(target)
            return
        if os.path.isdir(inside):
            _mount("tmpfs", inside, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_RDONLY, "size=4k,mode=0555")
        else:
            _mount("/dev/null", inside, None, _MS_BIND)

    def show_processes(self) -> None:
        """A ``/proc`` of this pid namespace, and what of ``/dev`` leads there.

        What its init shows there is the host's network and mounts, so that is covered.
        """
        proc = self._directory("/proc")
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        _mount("proc", proc, "proc", flags)
        self._process = os.open(os.path.join(proc, "self"), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        libc_call("umount2", ctypes.c_char_p(os.fsencode(proc)), ctypes.c_int(_MNT_DETACH))
        _mount("proc", proc, "proc", flags)
        if os.getpid() != 1:
            _mount("tmpfs", os.path.join(proc, "1"), "tmpfs", flags | _MS_RDONLY, "size=4k,mode=0555")
        for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
            os.symlink(target, os.path.join(self._directory("/dev"), name))

    def pivot(self, *, names_threads: bool = False) -> int:
        """Finish: all of it is read-only but its own directories, and there is no other root from here on.

        Args:
            names_threads: Whether this process may write to the files of its own threads in ``/proc``.

        Returns:
            A descriptor of this process's directory in a ``/proc`` that can be written to, for `become_own_user`.
        """
        proc = self._directory("/proc")
        if names_threads:
            threads = os.path.join(proc, str(os.getpid()), "task")
            _mount(threads, threads, None, _MS_BIND)
        _set_attributes(proc, _ATTR_RDONLY, recursive=False)
        _set_attributes(self._root, _ATTR_RDONLY, recursive=False)
        os.chdir(self._root)
        here = ctypes.c_char_p(b".")
        system_call("pivot_root", _PIVOT_ROOT[self._machine], here, here)
        libc_call("umount2", here, ctypes.c_int(_MNT_DETACH))
        os.chdir("/")
        return self._process

    def _show(self, path: str, kind: str) -> None:
        real = self._links(path)
        if kind == "list":
            self._directory(real)  # of what is shown in it, the names are there
            return
        if any(is_below(real, bound) and _includes(had, kind) for bound, had in self._bound.items()):
            return
        if stat.S_ISDIR(os.stat(real).st_mode):
            inside = self._directory(real)
        else:
            inside = os.path.join(self._directory(os.path.dirname(real)), os.path.basename(real))
            if not os.path.lexists(inside):
                os.close(os.open(inside, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444))
        _mount(real, inside, None, _MS_BIND | _MS_REC)
        attributes = _ATTR_NOSUID
        if kind != "write":
            attributes |= _ATTR_RDONLY  # devices too: what is written to one does not need a mount that can be changed
        attributes |= _ATTR_NOEXEC if kind == "device" else _ATTR_NODEV
        _set_attributes(inside, attributes)
        self._bound[real] = kind

    def _links(self, path: str) -> str:
        """The real path; each symlink on the way to it is made in the tree too."""
        done, left = "/", path.split("/")
        for _ in range(_MOST_STEPS):
            if not left:
                return done
            name = left.pop(0)
            if name in ("", "."):
                continue
            here = os.path.dirname(done) if name == ".." else os.path.join(done, name)
            if here in self._plain or not os.path.islink(here):
                self._plain.add(here)
                done = here
                continue
            target = os.readlink(here)
            if not any(is_below(done, bound) for bound in self._bound):
                inside = os.path.join(self._directory(done), name)
                if not os.path.lexists(inside):
                    os.symlink(target, inside)
            if target.startswith("/"):
                done = "/"
            left = target.split("/") + left
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)

    def _directory(self, path: str) -> str:
        inside = self._root + path if path != "/" else self._root
        if path not in self._made:
            os.makedirs(inside, 0o755, exist_ok=True)
            self._made.add(path)
        return inside


def _includes(had: str, kind: str) -> bool:
    return had == kind or (kind == "read" and had == "write")


def fault(place: str, machine: str) -> Optional[str]:
    """Why this machine gives an ordinary process no namespaces, in words; None where it does.

    Args:
        place: An empty directory.
        machine: As `Tree` has it.

    Side: a process of one thread, which is forked twice.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        words = _try(place, machine)
        os.write(write, words.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        words = answer.read().decode()
    os.waitpid(pid, 0)
    if words == "ok":
        return None
    return words or "the attempt ended without a word"


def _try(place: str, machine: str) -> str:
    try:
        step = "a user namespace"
        become_own_user(NEW_PID)
        step = "a process in a pid namespace"
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(write, _try_inside(place, machine).encode()[:4000])
            os._exit(0)
        os.close(write)
        os.waitpid(pid, 0)
        return os.read(read, 4096).decode()
    except OSError as error:
        return f"{step}: {error.strerror or error}{_advice()}"


def _try_inside(place: str, machine: str) -> str:
    try:
        step = "mount, net, ipc and uts namespaces"
        leave_host(network=False)
        step = "a tree of files"
        tree = Tree(place, machine)
        tree.bind([Rule("/usr", "read"), Rule("/dev/null", "device")])
        tree.show_processes()
        tree.own("/own", 1 << 20)
        process = tree.pivot()
        step = "a second user namespace"
        become_own_user(process=process)
    except OSError as error:
        return f"{step}: {error.strerror or error}{_advice()}"
    return "ok"


def _advice() -> str:
    """What on this machine is known to be in the way."""
    switches: List[str] = []
    for name, bad in (
        ("kernel/apparmor_restrict_unprivileged_userns", "1"),
        ("kernel/unprivileged_userns_clone", "0"),
        ("user/max_user_namespaces", "0"),
    ):
        try:
            with open(f"/proc/sys/{name}") as file:
                if file.read().strip() == bad:
                    switches.append(f"{name.replace('/', '.')}={bad}")
        except OSError:
            pass
    return f" ({', '.join(switches)})" if switches else ""
