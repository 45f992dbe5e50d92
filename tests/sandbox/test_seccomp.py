"""The filter, run instruction by instruction against a statement of the policy that is written here once more."""

from __future__ import annotations

import errno
import itertools
import platform
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from isohub.sandbox import seccomp
from isohub.sandbox.seccomp import ALLOW, KILL, Traits, program
from isohub.sandbox.syscalls import MACHINES, numbers

ROOT = Path(__file__).parents[2]
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "i386": 0x40000003, "arm": 0x40000028, "x86_64 big": 0x8000003E}
PID = 4242
EPERM, ENOSYS, ENOTTY = (0x50000 | number for number in (errno.EPERM, errno.ENOSYS, errno.ENOTTY))
TRAITS = [
    Traits(private, scoped, network, truncation)
    for private, scoped, network, truncation in itertools.product(
        (True, False), (True, False), ("none", "proxy", "open"), (True, False)
    )
]

# What must never be allowed, whatever the traits: from the manual pages, and what container runtimes block.
NEVER = frozenset(["acct", "add_key", "adjtimex", "afs_syscall", "bpf", "capset", "chown", "chroot", "clock_adjtime", "clock_settime", "clone3", "create_module", "delete_module", "fanotify_init", "fanotify_mark", "fchown", "fchownat", "finit_module", "fremovexattr", "fsconfig", "fsetxattr", "fsmount", "fsopen", "fspick", "get_kernel_syms", "getpmsg", "init_module", "io_cancel", "io_destroy", "io_getevents", "io_pgetevents", "io_setup", "io_submit", "io_uring_enter", "io_uring_register", "io_uring_setup", "ioperm", "iopl", "ioprio_set", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "lchown", "lookup_dcookie", "lremovexattr", "lsetxattr", "memfd_secret", "migrate_pages", "modify_ldt", "mount", "mount_setattr", "move_mount", "move_pages", "mq_getsetattr", "mq_notify", "mq_open", "mq_timedreceive", "mq_timedsend", "mq_unlink", "msgctl", "msgget", "msgrcv", "msgsnd", "name_to_handle_at", "nfsservctl", "open_by_handle_at", "open_tree", "perf_event_open", "personality", "pidfd_getfd", "pivot_root", "process_madvise", "process_mrelease", "process_vm_readv", "process_vm_writev", "ptrace", "query_module", "quotactl", "quotactl_fd", "reboot", "remap_file_pages", "removexattr", "request_key", "sched_setattr", "sched_setparam", "sched_setscheduler", "seccomp", "semctl", "semget", "semop", "semtimedop", "setdomainname", "setfsgid", "setfsuid", "setgid", "setgroups", "sethostname", "setns", "setregid", "setresgid", "setresuid", "setreuid", "settimeofday", "setuid", "setxattr", "shmat", "shmctl", "shmdt", "shmget", "splice", "swapoff", "swapon", "syslog", "sysfs", "_sysctl", "tee", "tuxcall", "umount2", "unshare", "uselib", "userfaultfd", "ustat", "vhangup", "vmsplice"])  # fmt: skip
ATTRIBUTES = frozenset(["chmod", "fchmod", "fchmodat", "fchmodat2", "utime", "utimes", "futimesat", "utimensat"])
SIGNALS = frozenset(["kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal"])
SOCKETS = frozenset(["connect", "bind", "listen", "accept", "accept4"])
# Calls whose arguments decide: which one, and values for it, some of them with bits that the kernel does not look at.
HIGH = 1 << 32
LOOKED_AT = {
    "clone": (0, (0, 17, 0x003D0F00, 0x10000000, 0x20000011, 0x40000000, 0x00020000, 0x02000000, 0x08000000, 0x04000000, HIGH | 0x10000000)),
    "ioctl": (1, (0x5401, 0x5421, 0x541B, 0x5412, 0x541C, 0x541D, 0x5423, 0x8901, 0x8902, 0x40086602, 0x80086601, 0x401C5820, 0x40806685,
                  0x5000940E, 0x40049409, 0x40087602, HIGH | 0x5412, 0x5412 | 0xABCD << 32, 0xC0384600)),
    "fcntl": (1, (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 15, 16, 1024, 1025, 1030, 1033, HIGH | 8, HIGH | 1024)),
    "memfd_create": (1, (0, 1, 3, 4, 7, 0x10, HIGH | 4)),
    "prlimit64": (0, (0, 1, PID, HIGH, HIGH | 1, 0xFFFFFFFF)),
    "setpriority": (0, (0, 1, 2, HIGH, HIGH | 1)),
    "prctl": (0, (1, 3, 4, 15, 16, 22, 23, 24, 28, 35, 36, 38, 47, 59, 0x59616D61, HIGH | 4, HIGH | 22)),
    "kill": (0, (0, 1, PID, PID + 1, 0xFFFFFFFF, HIGH | PID, HIGH | 1)),
    "tgkill": (0, (0, 1, PID, PID + 1)),
    "rt_sigqueueinfo": (0, (0, 1, PID, PID + 1)),
    "rt_tgsigqueueinfo": (0, (0, 1, PID, PID + 1)),
    "socket": (0, (0, 1, 2, 10, 16, 17, 38, 40, HIGH | 2, HIGH | 16)),
    "socketpair": (0, (1, 2, 16, HIGH | 1)),
    "open": (1, (0, 1, 2, 3, 0o1000, 0o1001, 0o1002, 0o1003, 0o101, 0o1101, HIGH | 3, HIGH | 0o1000)),
    "openat": (2, (0, 1, 2, 3, 0o1000, 0o1001, 0o1002, 0o1003, 0o101, 0o1101, HIGH | 3, HIGH | 0o1000)),
}  # fmt: skip


def run(instructions, data):
    """Classic BPF, as far as seccomp(2) takes it: the verdict."""
    place, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = instructions[place]
        place += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            assert value % 4 == 0
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == 0x54:  # BPF_ALU | BPF_AND | BPF_K
            accumulator &= value
        elif code == 0x05:  # BPF_JMP | BPF_JA
            place += value
        elif code == 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
            place += if_true if accumulator == value else if_false
        elif code == 0x35:  # BPF_JMP | BPF_JGE | BPF_K
            place += if_true if accumulator >= value else if_false
        elif code == 0x06:  # BPF_RET | BPF_K
            return value
        else:
            raise AssertionError(f"an instruction {code:#x}")


def call(number, args=(), architecture="x86_64"):
    """struct seccomp_data."""
    words = [arg & (1 << 64) - 1 for arg in (*args, *[0] * (6 - len(args)))]
    return struct.pack("<IIQ6Q", number & 0xFFFFFFFF, AUDIT[architecture], 0x7FFF00000000, *words)


def expected(name, traits, args):
    """The policy, in words of this file."""
    low = [arg & 0xFFFFFFFF for arg in args]
    private, network = traits.private, traits.network
    signals_are_its_own = private or traits.scoped
    if name is None or name == "clone3":
        return ENOSYS
    if name in NEVER:
        return EPERM
    if name in ATTRIBUTES:
        return ALLOW if private else EPERM
    if name in SIGNALS and not signals_are_its_own:
        return ALLOW if name not in ("tkill", "pidfd_send_signal") and low[0] == PID else EPERM
    if name in SOCKETS:
        return ALLOW if private or network != "none" else EPERM
    if name == "openat2":
        return ALLOW if private else ENOSYS
    if name == "truncate":
        return ALLOW if private or traits.truncation else EPERM
    if name in ("open", "openat"):
        flags = low[1 if name == "open" else 2]
        empties = flags & 3 == 0 and flags & 0o1000 and not traits.truncation
        return EPERM if not private and (flags & 3 == 3 or empties) else ALLOW
    if name == "clone":
        return EPERM if low[0] & 0x7E020000 else ALLOW
    if name == "ioctl":
        if low[1] >> 8 & 0xFF in (0x66, 0x58, 0x76, 0x94):
            return ENOTTY
        return EPERM if low[1] in (0x5412, 0x541C, 0x541D, 0x5423, 0x8901, 0x8902) else ALLOW
    if name == "fcntl":
        return EPERM if low[1] in (8, 10, 15, 1024) else ALLOW
    if name == "memfd_create":
        return EPERM if low[1] & 4 else ALLOW
    if name == "prlimit64":
        return EPERM if low[0] else ALLOW
    if name == "setpriority":
        return EPERM if low[0] or (low[1] and not private) else ALLOW
    if name == "prctl":
        if low[0] in (4, 22, 28, 35, 0x59616D61):
            return EPERM
        return EPERM if low[0] == 1 and not private and low[1] != signal.SIGKILL else ALLOW
    if name == "socketpair":
        kinds = (1, 5) if not private else range(16)
        return ALLOW if low[0] == 1 and low[1] & 15 in kinds else EPERM
    if name == "socket":
        if low[0] == 1:
            return ALLOW if private else EPERM
        if low[0] in (2, 10):
            tcp = low[1] & 15 == 1 and low[2] in (0, 6)
            return ALLOW if network == "open" or (network == "proxy" and tcp) else EPERM
        return EPERM
    return ALLOW


def vectors(name):
    """Arguments to try a call with."""
    if name == "prctl":
        yield from ((option, value) for option in LOOKED_AT[name][1] for value in (0, 9, 15, HIGH | 9))
    elif name == "setpriority":
        yield from ((which, who) for which in LOOKED_AT[name][1] for who in (0, PID, HIGH))
    elif name in ("socket", "socketpair"):
        for family in LOOKED_AT[name][1]:
            for kind in (1, 2, 3, 5, 10, 1 | 0o2000000, 2 | 0o4000, HIGH | 1):
                for protocol in (0, 1, 6, 17, 132, 262, HIGH | 6):
                    yield family, kind, protocol
    elif name in LOOKED_AT:
        place, values = LOOKED_AT[name]
        yield from ((0,) * place + (value,) for value in values)
    yield (0,) * 6
    yield ((1 << 64) - 1,) * 6


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("traits", TRAITS, ids=str)
def test_every_call_meets_its_fate(machine, traits):
    instructions = program(machine, traits, PID)
    name_of = {number: name for name, number in numbers(machine).items()}
    for number in range(1101):
        name = name_of.get(number)
        for args in vectors(name):
            padded = (*args, *[0] * (6 - len(args)))
            got = run(instructions, call(number, padded, machine))
            assert got == expected(name, traits, padded), (number, name, [hex(arg) for arg in args])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("traits", TRAITS, ids=str)
def test_every_instruction_is_one_that_the_kernel_takes(machine, traits):
    instructions = program(machine, traits, PID)
    assert len(instructions) < 4096  # BPF_MAXINSNS
    for place, (code, if_true, if_false, value) in enumerate(instructions):
        assert code in (0x20, 0x54, 0x05, 0x15, 0x35, 0x06)
        assert 0 <= if_true < 256
        assert 0 <= if_false < 256
        assert 0 <= value < 1 << 32
        if code == 0x05:
            assert place + 1 + value < len(instructions)
        if code in (0x15, 0x35):
            assert place + 1 + max(if_true, if_false) < len(instructions)
        if code == 0x20:
            assert value in (0, 4, *range(16, 64, 4))
    assert instructions[-1][0] == 0x06  # nothing runs off the end


@pytest.mark.parametrize("machine", MACHINES)
def test_a_call_of_another_architecture_kills(machine):
    instructions = program(machine, TRAITS[0], PID)
    for other in AUDIT:
        if other != machine:
            for number in (0, 1, 39, 60, 1000, 0xFFFFFFFF):
                assert run(instructions, call(number, architecture=other)) == KILL, other
    assert run(instructions, call(numbers(machine)["getpid"], architecture=machine)) == ALLOW  # the control


def test_x32_kills():
    instructions = program("x86_64", TRAITS[0], PID)
    for number in (0x40000000, 0x40000000 | 39, 0x40000000 | 512, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        assert run(instructions, call(number)) == KILL
    assert run(instructions, call(0x3FFFFFFF)) == ENOSYS  # the control: an ordinary number, of nothing


def test_no_traits_allow_what_more_confined_ones_do_not():
    """A worker with a narrower network never has a socket that one with a wider has not."""
    for private, scoped, truncation in itertools.product((True, False), repeat=3):
        filters = [
            program("x86_64", Traits(private, scoped, network, truncation), PID)
            for network in ("none", "proxy", "open")
        ]
        for name in ("socket", "connect", "bind", "socketpair"):
            for args in vectors(name):
                data = call(numbers("x86_64")[name], args)
                verdicts = [run(one, data) == ALLOW for one in filters]
                assert verdicts == sorted(verdicts), (name, args)


def test_nothing_is_made_for_a_machine_without_tables():
    assert not seccomp.is_available("riscv64")
    with pytest.raises((KeyError, ValueError)):
        program("riscv64", TRAITS[0], PID)


@pytest.mark.skipif(platform.machine() not in MACHINES, reason="no tables for this machine")
@pytest.mark.parametrize("private", [True, False])
def test_the_kernel_takes_it_and_holds_it(private):
    code = (
        "import errno, os, socket, sys\n"
        "from isohub.sandbox.seccomp import Traits, install\n"
        "import platform\n"
        "socket.socket(socket.AF_NETLINK, 3).close()\n"  # the control
        f"install(platform.machine(), Traits({private}, True, 'none'), os.getpid())\n"
        "try: socket.socket(socket.AF_NETLINK, 3); print('open')\n"
        "except OSError as error: print(errno.errorcode[error.errno])\n"
        "os.kill(os.getpid(), 0)\n"
        "import subprocess\n"
        "print(subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True, text=True).stdout.strip())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["EPERM", "1"]
