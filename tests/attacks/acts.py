"""What a hostile repo tries, one function each: by the system call itself, so that not Python but the kernel refuses.

Run in a worker by ``handle.run(attempt, act, ...)``, and as the control in this process, in one of its own
(`beside`), or in a worker without confinement. An act raises OSError where it is refused. The standard library alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time

from isohub.sandbox.syscalls import numbers

DONE = "done"
NUMBERS = numbers(platform.machine()) if platform.machine() in ("x86_64", "aarch64") else {}

AT_FDCWD = -100
NEW_USER, NEW_NET = 0x10000000, 0x40000000
PTRACE_TRACEME, PTRACE_ATTACH, PTRACE_SEIZE, PTRACE_DETACH = 0, 16, 0x4206, 17


def attempt(module, act, *args):
    """Which errno an act got, by name, or that it was done; for ``handle.run``."""
    try:
        act(*args)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return DONE


def attempts(module, act, arguments):
    """`attempt` with each of several arguments."""
    return [attempt(module, act, *args) for args in arguments]


def beside(act, *args):
    """`attempt` in a process of its own, which is neither confined nor this one; a signal's name if it was ended.

    As root, mounts, queues and names are a copy of its own: what a control does there ends with it.
    """
    code = (
        "import sys, ast; sys.path[:0] = sys.argv[1:2]\n"
        "from tests.attacks import acts\n"
        "args = [getattr(acts, arg[1:]) if str(arg).startswith('@') else arg for arg in ast.literal_eval(sys.argv[3])]\n"
        "acts.leave_the_mounts_alone()\n"
        "print(acts.attempt(None, getattr(acts, sys.argv[2]), *args))"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    words = ["@" + arg.__name__ if callable(arg) else arg for arg in args]
    done = subprocess.run(
        [sys.executable, "-c", code, root, act.__name__, repr(words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def leave_the_mounts_alone():
    """For controls that could hurt the machine, if what they try is allowed, as it is to root."""
    if os.geteuid() == 0:
        call("unshare", 0x00020000 | 0x08000000 | 0x04000000)  # mounts, IPC, names
        call("mount", "none", "/", None, 0x4000 | 0x40000, None)  # recursive, private


def in_fork(act, *args):
    """An act in a child of the worker's; raises what it raised, and ChildProcessError naming a signal."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act(*args)
            os.write(write, b"0")
        except OSError as error:
            os.write(write, str(error.errno).encode())
        finally:
            os._exit(0)
    os.close(write)
    word = os.read(read, 16)
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        raise OSError(signal.Signals(os.WTERMSIG(status)).name)
    if word != b"0":
        raise OSError(int(word), os.strerror(int(word)))


def call(name, *args):
    """One system call, by its name or number."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    number = NUMBERS[name] if isinstance(name, str) else name
    words = [ctypes.c_char_p(os.fsencode(word)) if isinstance(word, (str, bytes)) else word for word in args]
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in words]
    result = libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def own(name="x"):
    """A path in this process's own temporary directory."""
    return os.path.join(os.environ.get("TMPDIR", "/tmp"), f"{name}-{os.getpid()}-{time.monotonic_ns()}")


# Reading.


def read(path):
    with open(path, "rb") as file:
        return file.read()


def read_by_a_path_descriptor(path):
    descriptor = os.open(path, os.O_PATH)
    try:
        return read(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def read_by_a_symlink(path):
    link = own()
    os.symlink(path, link)
    try:
        return read(link)
    finally:
        os.unlink(link)


def read_by_a_hard_link(path):
    link = own()
    os.link(path, link)
    try:
        return read(link)
    finally:
        os.unlink(link)


def read_by_the_root_of_a_process(path):
    return read(f"/proc/self/root{path}")


def read_by_the_root_of_the_first_process(path):
    return read(f"/proc/1/root{path}")


def read_by_dots(path):
    return read("../" * 40 + path.lstrip("/"))


def read_by_openat2(path):
    how = ctypes.create_string_buffer(struct.pack("QQQ", os.O_RDONLY, 0, 0))
    descriptor = call("openat2", AT_FDCWD, path, ctypes.byref(how), 24)
    try:
        return os.read(descriptor, 1 << 16)
    finally:
        os.close(descriptor)


def read_by_a_program(path):
    if subprocess.run(["cat", path], capture_output=True, check=False).returncode:
        raise PermissionError(errno.EACCES, "cat(1) failed")


def read_by_a_handle(path):
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    mount = ctypes.c_int()
    call("name_to_handle_at", AT_FDCWD, path, ctypes.byref(handle), ctypes.byref(mount), 0)
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.close(call("open_by_handle_at", root, ctypes.byref(handle), os.O_RDONLY))
    finally:
        os.close(root)


def read_by_moving(path):
    os.rename(path, own())


def list_directory(path):
    return os.listdir(os.path.dirname(path))


READS = (
    read, read_by_a_path_descriptor, read_by_a_symlink, read_by_a_hard_link, read_by_the_root_of_a_process,
    read_by_the_root_of_the_first_process, read_by_dots, read_by_openat2, read_by_a_program, read_by_a_handle,
    list_directory,
)  # fmt: skip


# Writing. Each gets a directory that holds `file`, `link` to it, and `sub/`.


def _open(path, flags, mode=0o600):
    descriptor = os.open(path, flags, mode)
    os.write(descriptor, b"x")
    os.close(descriptor)


def overwrite(place):
    _open(f"{place}/file", os.O_WRONLY)


def append(place):
    _open(f"{place}/file", os.O_WRONLY | os.O_APPEND)


def empty(place):
    os.close(os.open(f"{place}/file", os.O_WRONLY | os.O_TRUNC))


def empty_while_reading(place):
    os.close(os.open(f"{place}/file", os.O_RDONLY | os.O_TRUNC))


def truncate(place):
    os.truncate(f"{place}/file", 1)


def write_by_openat2(place):
    how = ctypes.create_string_buffer(struct.pack("QQQ", os.O_WRONLY, 0, 0))
    descriptor = call("openat2", AT_FDCWD, f"{place}/file", ctypes.byref(how), 24)
    os.write(descriptor, b"x")
    os.close(descriptor)


def empty_by_openat2(place):
    how = ctypes.create_string_buffer(struct.pack("QQQ", os.O_RDONLY | os.O_TRUNC, 0, 0))
    os.close(call("openat2", AT_FDCWD, f"{place}/file", ctypes.byref(how), 24))


def write_by_a_symlink(place):
    link = own()
    os.symlink(f"{place}/file", link)
    _open(link, os.O_WRONLY)


def write_by_a_symlink_to_the_directory(place):
    link = own()
    os.symlink(place, link)
    _open(f"{link}/new", os.O_WRONLY | os.O_CREAT)


def create(place):
    _open(f"{place}/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def create_without_a_name(place):
    _open(place, os.O_TMPFILE | os.O_WRONLY)


def make_directory(place):
    os.mkdir(f"{place}/new")


def remove_directory(place):
    os.rmdir(f"{place}/sub")


def remove(place):
    os.unlink(f"{place}/file")


def rename(place):
    os.rename(f"{place}/file", f"{place}/new")


def rename_into(place):
    source = own()
    _open(source, os.O_WRONLY | os.O_CREAT)
    os.rename(source, f"{place}/new")


def rename_out(place):
    os.rename(f"{place}/file", own())


def exchange(place):
    call("renameat2", AT_FDCWD, f"{place}/file", AT_FDCWD, f"{place}/sub", 2)


def link_into(place):
    source = own()
    _open(source, os.O_WRONLY | os.O_CREAT)
    os.link(source, f"{place}/new")


def link_beside(place):
    os.link(f"{place}/file", f"{place}/new")


def link_out_and_write(place):
    link = own()
    os.link(f"{place}/file", link)
    _open(link, os.O_WRONLY)


def symlink_into(place):
    os.symlink("file", f"{place}/new")


def make_a_pipe(place):
    os.mkfifo(f"{place}/new")


def make_a_socket(place):
    os.mknod(f"{place}/new", stat.S_IFSOCK | 0o600)


def make_a_device(place):
    os.mknod(f"{place}/new", stat.S_IFCHR | 0o600, os.makedev(1, 3))


def change_mode(place):
    os.chmod(f"{place}/file", 0o777)


def change_mode_of_a_descriptor(place):
    descriptor = os.open(f"{place}/file", os.O_RDONLY)
    try:
        os.fchmod(descriptor, 0o777)
    finally:
        os.close(descriptor)


def change_mode_of_a_path_descriptor(place):
    descriptor = os.open(f"{place}/file", os.O_PATH)
    try:
        os.chmod(f"/proc/self/fd/{descriptor}", 0o777)
    finally:
        os.close(descriptor)


def change_mode_by_fchmodat2(place):
    call("fchmodat2", AT_FDCWD, f"{place}/file", 0o777, 0)


def change_owner(place):
    os.chown(f"{place}/file", os.geteuid(), os.getegid())


def change_times(place):
    os.utime(f"{place}/file", (1, 1))


def change_times_of_a_descriptor(place):
    descriptor = os.open(f"{place}/file", os.O_RDONLY)
    try:
        os.utime(descriptor, (1, 1))
    finally:
        os.close(descriptor)


def set_an_attribute(place):
    os.setxattr(f"{place}/file", "user.isohub", b"x")


def set_a_flag(place):
    descriptor = os.open(f"{place}/file", os.O_RDONLY)
    try:
        flags = struct.unpack("l", fcntl.ioctl(descriptor, 0x80086601, bytes(8)))[0]
        fcntl.ioctl(descriptor, 0x40086602, struct.pack("l", flags | 0x80))  # no access times
    finally:
        os.close(descriptor)


def take_a_lease(place):
    """Whoever opens the file for writing waits for this process, for 45 seconds."""
    descriptor = os.open(f"{place}/file", os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    finally:
        os.close(descriptor)


def write_by_reopening(place):
    descriptor = os.open(f"{place}/file", os.O_RDONLY)
    try:
        _open(f"/proc/self/fd/{descriptor}", os.O_WRONLY)
    finally:
        os.close(descriptor)


def write_by_mapping(place):
    descriptor = os.open(f"{place}/file", os.O_RDWR)
    try:
        with mmap.mmap(descriptor, 1) as memory:
            memory[0] = 120
    finally:
        os.close(descriptor)


def open_for_neither(place):
    """Access mode 3: for what is neither read nor written."""
    os.close(os.open(f"{place}/file", 3))


def empty_for_neither(place):
    os.close(os.open(f"{place}/file", 3 | os.O_TRUNC))


def write_by_a_handle(place):
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    mount = ctypes.c_int()
    call("name_to_handle_at", AT_FDCWD, f"{place}/file", ctypes.byref(handle), ctypes.byref(mount), 0)
    root = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        descriptor = call("open_by_handle_at", root, ctypes.byref(handle), os.O_WRONLY)
        os.write(descriptor, b"x")
        os.close(descriptor)
    finally:
        os.close(root)


def write_by_a_program(place):
    if subprocess.run(["sh", "-c", f"echo x > '{place}/file'"], capture_output=True, check=False).returncode:
        raise PermissionError(errno.EACCES, "sh(1) failed")


def lock(path, keep=False):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        if not keep:
            os.close(descriptor)


def create_file(path):
    _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def append_to(path):
    os.close(os.open(path, os.O_WRONLY | os.O_APPEND))


def shorten(path):
    os.truncate(path, os.stat(path).st_size)


def open_mode(path):
    os.chmod(path, os.stat(path).st_mode & 0o7777)


def touch(path):
    os.utime(path)


WRITES = (
    overwrite, append, empty, empty_while_reading, truncate, write_by_openat2, empty_by_openat2, write_by_a_symlink,
    write_by_a_symlink_to_the_directory, create, create_without_a_name, make_directory, remove_directory, remove,
    rename, rename_into, rename_out, exchange, link_into, link_beside, link_out_and_write, symlink_into, make_a_pipe,
    make_a_socket, make_a_device, change_mode, change_mode_of_a_descriptor, change_mode_of_a_path_descriptor,
    change_mode_by_fchmodat2, change_owner, change_times, change_times_of_a_descriptor, set_an_attribute, set_a_flag,
    take_a_lease, write_by_reopening, write_by_mapping, empty_for_neither, write_by_a_handle, write_by_a_program,
)  # fmt: skip


# The network.


def tcp(port, host="127.0.0.1"):
    with socket.create_connection((host, port), timeout=5) as made:
        made.sendall(b"tcp")


def connect_by_number(port, protocol=0, kind=socket.SOCK_STREAM):
    """TCP, or what `protocol` is (262 is MPTCP), by system calls alone."""
    descriptor = call("socket", socket.AF_INET, kind, protocol)
    try:
        address = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, bytes([127, 0, 0, 1]))
        call("connect", descriptor, address and ctypes.create_string_buffer(address), 16)
        os.write(descriptor, b"number")
    finally:
        os.close(descriptor)


def mptcp(port):
    connect_by_number(port, 262)


def udp(port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.sendto(b"udp", ("127.0.0.1", port))


def ask_a_name_server(port):
    question = struct.pack("!6H", 1, 0x100, 1, 0, 0, 0) + b"\x06secret\x07invalid\0" + struct.pack("!2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.sendto(question, ("127.0.0.1", port))


def make_socket(family, kind, protocol=0):
    os.close(call("socket", family, kind, protocol))


def io_uring():
    parameters = ctypes.create_string_buffer(120)
    os.close(call("io_uring_setup", 1, ctypes.byref(parameters)))


def connect_to_a_path(path, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_UNIX, kind) as made:
        made.connect(path)
        made.send(b"path")


def send_to_a_path(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.sendto(b"path", path)


def send_to_a_path_from_a_pair(path):
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.sendto(b"pair", path)


def connect_a_pair_to_a_path(path):
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.connect(path)
        one.send(b"pair")


# Other processes. Each gets the number of one.


def signal_nothing(pid):
    os.kill(pid, 0)


def signal_kill(pid):
    os.kill(pid, signal.SIGKILL)


def signal_thread(pid):
    call("tgkill", pid, pid, signal.SIGKILL)


def signal_old_thread(pid):
    call("tkill", pid, signal.SIGKILL)


def signal_with_a_value(pid):
    info = ctypes.create_string_buffer(struct.pack("iii", signal.SIGKILL, 0, -1) + bytes(116))
    call("rt_sigqueueinfo", pid, signal.SIGKILL, ctypes.byref(info))


def signal_thread_with_a_value(pid):
    info = ctypes.create_string_buffer(struct.pack("iii", signal.SIGKILL, 0, -1) + bytes(116))
    call("rt_tgsigqueueinfo", pid, pid, signal.SIGKILL, ctypes.byref(info))


def signal_by_descriptor(pid):
    descriptor = call("pidfd_open", pid, 0)
    try:
        call("pidfd_send_signal", descriptor, signal.SIGKILL, None, 0)
    finally:
        os.close(descriptor)


def signal_group(pid):
    os.killpg(os.getpgid(pid), signal.SIGKILL)


def _signal_at_input(tell):
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with one, other:
        tell(one)
        fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        other.send(b"x")
        time.sleep(0.05)


def signal_at_input(pid):
    """F_SETOWN: SIGIO, which ends who does not expect it."""
    _signal_at_input(lambda end: fcntl.fcntl(end, fcntl.F_SETOWN, pid))


def signal_at_input_by_ioctl(pid):
    """FIOSETOWN, the same by another name."""
    _signal_at_input(lambda end: fcntl.ioctl(end, 0x8901, struct.pack("i", pid)))


def signal_at_input_by_the_other_ioctl(pid):
    """SIOCSPGRP, and by a third."""
    _signal_at_input(lambda end: fcntl.ioctl(end, 0x8902, struct.pack("i", pid)))


KILLS = (
    signal_kill, signal_thread, signal_old_thread, signal_with_a_value, signal_thread_with_a_value,
    signal_by_descriptor, signal_group, signal_at_input, signal_at_input_by_ioctl,
    signal_at_input_by_the_other_ioctl,
)  # fmt: skip


def read_memory(pid):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        memory.seek(int(maps.readline().split("-")[0], 16))
        memory.read(16)


def write_memory(pid):
    with open(f"/proc/{pid}/mem", "r+b", 0):
        pass


def read_environment(pid):
    if not read(f"/proc/{pid}/environ"):
        raise OSError(errno.ENOENT, "nothing")


def read_open_files(pid):
    for name in os.listdir(f"/proc/{pid}/fd"):
        os.readlink(f"/proc/{pid}/fd/{name}")


def read_root(pid):
    os.listdir(os.path.join(f"/proc/{pid}", "root", ""))


def read_directory(pid):
    os.listdir(f"/proc/{pid}/cwd/")


def _vectors(address):
    buffer = ctypes.create_string_buffer(16)
    local = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(buffer), 16))
    remote = ctypes.create_string_buffer(struct.pack("QQ", address, 16))
    return buffer, local, remote


def vm_read(pid, address):
    _, local, remote = _vectors(address)
    call("process_vm_readv", pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)


def vm_write(pid, address):
    kept, local, remote = _vectors(address)
    call("process_vm_readv", pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    assert kept.raw
    call("process_vm_writev", pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)  # what was there


def trace(pid):
    call("ptrace", PTRACE_SEIZE, pid, 0, 0)


def attach(pid):
    call("ptrace", PTRACE_ATTACH, pid, 0, 0)
    os.waitpid(pid, 0x40000000)
    call("ptrace", PTRACE_DETACH, pid, 0, 0)


def steal_a_descriptor(pid):
    descriptor = call("pidfd_open", pid, 0)
    try:
        os.close(call("pidfd_getfd", descriptor, 0, 0))
    finally:
        os.close(descriptor)


def compare_kernel_objects(pid):
    call("kcmp", os.getpid(), pid, 0, 0, 0)


def change_limits(pid):
    limits = ctypes.create_string_buffer(struct.pack("QQ", 0, 0))
    call("prlimit64", pid, 4, ctypes.byref(limits), None)  # no core dumps


def read_limits(pid):
    limits = ctypes.create_string_buffer(16)
    call("prlimit64", pid, 4, None, ctypes.byref(limits))


def change_priority(pid):
    os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid))


def change_scheduler(pid):
    os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))


def change_io_priority(pid):
    call("ioprio_set", 1, pid, 0)


def move_pages(pid):
    call("move_pages", pid, 0, None, None, None, 0)


def advise(pid):
    descriptor = call("pidfd_open", pid, 0)
    try:
        vector = ctypes.create_string_buffer(struct.pack("QQ", 0x1000, 0))
        call("process_madvise", descriptor, ctypes.byref(vector), 1, 20, 0)
    finally:
        os.close(descriptor)


def robust_list(pid):
    head, size = ctypes.c_void_p(), ctypes.c_size_t()
    call("get_robust_list", pid, ctypes.byref(head), ctypes.byref(size))


PEEKS = (
    read_memory, write_memory, read_environment, read_open_files, read_root, read_directory, trace, attach,
    steal_a_descriptor, compare_kernel_objects, robust_list,
)  # fmt: skip
CHANGES = (change_limits, read_limits, change_priority, change_scheduler, change_io_priority, move_pages)


# Powers.


def new_user_namespace():
    call("unshare", NEW_USER)


def new_network_namespace():
    call("unshare", NEW_USER | NEW_NET)


def clone_user_namespace():
    pid = call("clone", NEW_USER | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def clone3_user_namespace():
    arguments = ctypes.create_string_buffer(struct.pack("11Q", NEW_USER, 0, 0, 0, signal.SIGCHLD, *[0] * 6))
    pid = call(435, ctypes.byref(arguments), 88)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def enter_own_namespace():
    descriptor = os.open("/proc/self/ns/uts", os.O_RDONLY)
    try:
        call("setns", descriptor, 0)
    finally:
        os.close(descriptor)


def mount():
    place = own()
    os.mkdir(place)
    call("mount", "none", place, "tmpfs", 0, None)


def mount_anew():
    call("fsopen", "tmpfs", 0)


def unmount():
    place = own()
    os.mkdir(place)
    call("umount2", place, 0)  # nothing is mounted there: who may unmount gets EINVAL


def change_root():
    os.chroot("/")


def pivot():
    call("pivot_root", ".", ".")


def open_tree():
    os.close(call("open_tree", AT_FDCWD, "/", 1))


def bpf():
    attributes = ctypes.create_string_buffer(struct.pack("IIII", 2, 4, 4, 1) + bytes(112))
    os.close(call("bpf", 0, ctypes.byref(attributes), 128))


def perf():
    attributes = ctypes.create_string_buffer(struct.pack("IIQ", 1, 112, 0) + bytes(96))
    os.close(call("perf_event_open", ctypes.byref(attributes), 0, -1, -1, 0))


def user_faults():
    os.close(call("userfaultfd", 1))


def add_a_key():
    call("add_key", "user", "isohub", b"x", 1, -2)  # the process's own keyring


def ask_for_a_key():
    call("request_key", "user", "isohub-nothing", None, -2)


def search_a_keyring():
    call("keyctl", 0, -3, 1)


def trace_me():
    call("ptrace", PTRACE_TRACEME, 0, 0, 0)


def own_fault():
    call("modify_ldt", 0, None, 0)


def another_personality():
    call("personality", 0x0040000)


def become(user=0):
    call("setresuid", user, user, user)


def kernel_log():
    call("syslog", 10, None, 0)


def secret_memory():
    os.close(call("memfd_secret", 0))


def shared_memory_by_key():
    call("shmctl", call("shmget", 0, 4096, 0o1600), 0, None)  # made, and removed again


def message_queue():
    os.close(call("mq_open", "isohub-attack", os.O_CREAT | os.O_RDWR, 0o600, None))
    call("mq_unlink", "isohub-attack")


def watch_everything():
    os.close(call("fanotify_init", 0, 0))


def huge_memory():
    os.close(call("memfd_create", "x", 4))


POWERS = (
    new_user_namespace, new_network_namespace, clone_user_namespace, clone3_user_namespace, enter_own_namespace,
    mount, mount_anew, unmount, change_root, pivot, open_tree, bpf, perf, user_faults, add_a_key, ask_for_a_key,
    search_a_keyring, trace_me, own_fault, another_personality, become, kernel_log,
    secret_memory, shared_memory_by_key, message_queue, watch_everything,
)  # fmt: skip


def prctl(option, *values):
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(value) for value in (*values, *[0] * (4 - len(values)))]
    if libc.prctl(ctypes.c_int(option), *words) < 0:
        raise OSError(ctypes.get_errno(), "prctl")


def type_for_a_terminal(high=0):
    """TIOCSTI, on a terminal of this process's own; `high` is what the kernel does not look at."""
    letter = ctypes.c_char(b"x")
    descriptor = 0
    try:
        _, descriptor = os.openpty()
        if os.getpid() != os.getsid(0):
            os.setsid()
        fcntl.ioctl(descriptor, 0x540E, 0)
    except OSError:
        pass
    call("ioctl", descriptor, 0x5412 | high << 32, ctypes.byref(letter))


def x32_call():
    call(0x40000000 | 39)  # getpid


def i386_call():
    """``int 0x80`` with 20, which is getpid there."""
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as memory:
        memory.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if ctypes.CFUNCTYPE(ctypes.c_int)(address)() != os.getpid():
            os._exit(3)
        os._exit(0)


def wait_for_nothing():
    """A process to try things on: it says where a page of its own is, and sleeps."""
    try:
        prctl(0x59616D61, ctypes.c_ulong(-1).value)  # where ptrace is restricted (Yama), anybody may trace it
    except OSError:
        pass
    buffer = ctypes.create_string_buffer(b"isohub-secret-isohub-secret", 64)
    signal.signal(signal.SIGURG, lambda *_: os.write(1, b"hit"))
    print(ctypes.addressof(buffer), flush=True)
    select.select([0], [], [], 600)
