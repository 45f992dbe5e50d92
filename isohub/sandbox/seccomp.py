"""Which system calls a process may make, by a seccomp filter: a list of what is allowed, and no other.

1. What programs of this kind use is allowed (`syscalls.GROUPS`); what is known to reach beyond them answers EPERM.
2. What is in no list answers ENOSYS, as on an older kernel, so that a C library falls back: ``clone3``, whose flags
   a filter cannot see, and every call that is newer than this file.
3. Calls whose arguments decide are looked at: which namespaces a clone wants, which kind of socket.
4. A call by the tables of another architecture (32 bits, x32) ends the process.

The filter is the classic BPF that the kernel takes, made as a balanced tree over the numbers. It cannot be removed,
and every child has it.

Side: worker, in the fork, after Landlock, last. Source: seccomp(2), Documentation/userspace-api/seccomp_filter.rst,
``linux/bpf_common.h``, ``linux/audit.h``; socket(2), unix(7), clone(2), prctl(2), ioctl_tty(2).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import struct
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from isohub.sandbox.kernel import prctl, system_call
from isohub.sandbox.syscalls import GROUPS, numbers

__all__ = ["ALLOW", "KILL", "Traits", "deny", "install", "is_available", "is_everybodys", "prepare", "program"]

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_X32_BIT = 0x40000000
_SET_MODE_FILTER = 1
_GET_ACTION_AVAIL = 2
_PR_SET_NO_NEW_PRIVS = 38

#: Verdicts, as the kernel has them.
ALLOW = 0x7FFF0000
KILL = 0x80000000
_ERRNO = 0x00050000

# Where struct seccomp_data has things.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

_FARTHEST = 255
_LOAD, _JUMP, _IF_EQUAL, _IF_AT_LEAST, _AND, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x54, 0x06

# NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET (NEWTIME is clone3's alone), and PARENT: a child of the
# zygote's would be nobody's that counts, and outlive the worker.
_CLONE_REFUSED = 0x7E028000
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_SOCK_TYPE_MASK, _SOCK_STREAM, _SOCK_SEQPACKET = 0xF, 1, 5
_IPPROTO_TCP = 6
_SIGKILL = 9
_PR_SET_PDEATHSIG = 1
# SET_DUMPABLE, SET_SECCOMP, SET_SECUREBITS, SET_MM, SET_PTRACER: what would loosen this.
_REFUSED_PRCTL = (4, 22, 28, 35, 0x59616D61)
# TIOCSTI types for somebody else; TIOCLINUX, TIOCSETD and TIOCCONS do the like on consoles. FIOSETOWN and SIOCSPGRP
# are F_SETOWN by other names.
_REFUSED_IOCTL = (0x5412, 0x541C, 0x5423, 0x541D, 0x8901, 0x8902)
# What file systems take, on descriptors that can only be read too, and Landlock does not look at: 'f' and 'X' change
# flags and attributes, make a file immutable (verity), freeze; 'v' are older ones; 0x94 are Btrfs's, which makes
# subvolumes in any directory, and clones: who wants one of these copies instead.
_FILE_SYSTEM_IOCTL = (0x6600, 0x5800, 0x7600, 0x9400)
_IOCTL_TYPE_MASK = 0xFF00
# F_SETOWN, F_SETSIG, F_SETOWN_EX: a signal for another process at the next input. F_SETLEASE: whoever opens a file
# that this one may read waits for the lease, 45 seconds.
_REFUSED_FCNTL = (8, 10, 15, 1024)
# Access mode 3 opens what Landlock lets nobody read or write, for ioctls and locks: open(2), NOTES.
_O_ACCESS_MASK, _O_TRUNC = 3, 0o1000
_O_CREAT, _O_TMPFILE = 0o100, 0o20000000
_S_ISUID_ISGID = 0o6000
_MFD_HUGETLB = 4


class Traits(NamedTuple):
    """What of a worker its filter has to know.

    Attributes:
        private: It has pid and mount namespaces of its own: all that it can name is its own.
        scoped: Landlock keeps its signals within (ABI 6).
        network: "none"; "proxy": TCP in a network namespace of its own; "open": the system's.
        truncation: Landlock keeps it from emptying files (ABI 3).
    """

    private: bool
    scoped: bool
    network: str
    truncation: bool = True


class _Test(NamedTuple):
    """An argument's low half, or those bits of it, against values; the verdict goes to what matches."""

    argument: int
    values: Tuple[int, ...]
    matching: Union[_Test, int]
    others: Union[_Test, int]
    mask: Optional[int] = None


_Decision = Union[_Test, int]


def deny(number: int) -> int:
    """The verdict that makes a call fail with this errno."""
    return _ERRNO | number


_EPERM = deny(errno.EPERM)
_ENOSYS = deny(errno.ENOSYS)
_ENOTTY = deny(errno.ENOTTY)


def is_available(machine: str) -> bool:
    """Whether this kernel has filters, and this file the machine's numbers."""
    if machine not in _SECCOMP:
        return False
    action = struct.pack("I", KILL)
    try:
        system_call("seccomp", _SECCOMP[machine], _GET_ACTION_AVAIL, 0, ctypes.c_char_p(action))
    except OSError:
        return False
    return True


def _decisions(machine: str, traits: Traits, pid: int) -> Dict[int, _Decision]:
    """What becomes of every call that is known, by its number."""
    number_of = numbers(machine)
    allowed = ("files", "names", "memory", "waiting", "time", "signals", "processes", "sockets_of_a_pair")
    fate: Dict[str, _Decision] = {}
    for group, names in GROUPS.items():
        for name in names:
            fate[name] = ALLOW if group in allowed else _EPERM
    if traits.private:  # what is not its own is mounted read-only
        fate.update(dict.fromkeys(GROUPS["attributes"], ALLOW))
    if traits.private or traits.scoped:
        fate.update(dict.fromkeys(GROUPS["others"], ALLOW))
    else:
        itself = _Test(0, (pid,), ALLOW, _EPERM)
        fate.update(dict.fromkeys(("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"), itself))
    fate.update(_opening(traits))
    if traits.private:
        fate.update(_modes("chmod", "fchmod", "fchmodat", "fchmodat2"))
    fate.update(_modes("creat", "mknod", "mknodat"))
    fate.update(_sockets(traits))
    fate["clone"] = _Test(0, (0,), ALLOW, _EPERM, _CLONE_REFUSED)
    fate["ioctl"] = _Test(1, _FILE_SYSTEM_IOCTL, _ENOTTY, _Test(1, _REFUSED_IOCTL, _EPERM, ALLOW), _IOCTL_TYPE_MASK)
    fate["fcntl"] = _Test(1, _REFUSED_FCNTL, _EPERM, ALLOW)
    fate["memfd_create"] = _Test(1, (0,), ALLOW, _EPERM, _MFD_HUGETLB)
    fate["prlimit64"] = _Test(0, (0,), ALLOW, _EPERM)  # another process's limits
    itself_or_any: _Decision = ALLOW if traits.private else _Test(1, (0,), ALLOW, _EPERM)
    fate["setpriority"] = _Test(0, (0,), itself_or_any, _EPERM)  # neither of groups nor of users
    others: _Decision = ALLOW
    if not traits.private:  # nothing else ends a worker whose zygote was killed
        others = _Test(0, (_PR_SET_PDEATHSIG,), _Test(1, (_SIGKILL,), ALLOW, _EPERM), ALLOW)
    fate["prctl"] = _Test(0, _REFUSED_PRCTL, _EPERM, others)
    return {number_of[name]: decision for name, decision in fate.items() if name in number_of}


def _opening(traits: Traits) -> Dict[str, _Decision]:
    """Without read-only mounts no opening that passes Landlock by; and no file is made that runs as its owner."""
    refused = [_O_ACCESS_MASK, _O_ACCESS_MASK | _O_TRUNC]
    fate: Dict[str, _Decision] = {"openat2": _ENOSYS}  # its flags are in memory, where a filter cannot look
    if not traits.private and not traits.truncation:
        refused.append(_O_TRUNC)  # with O_RDONLY: it empties what may be read
        fate["truncate"] = _EPERM
    for name, argument in (("open", 1), ("openat", 2)):
        plain = _Test(argument + 1, (0,), ALLOW, _EPERM, _S_ISUID_ISGID)
        unnamed = _Test(argument, (_O_TMPFILE,), plain, ALLOW, _O_TMPFILE)
        made: _Decision = _Test(argument, (_O_CREAT,), plain, unnamed, _O_CREAT)  # else there is no mode
        if not traits.private:
            made = _Test(argument, tuple(refused), _EPERM, made, _O_ACCESS_MASK | _O_TRUNC)
        fate[name] = made
    return fate


def _modes(*names: str) -> Dict[str, _Decision]:
    """Calls that set a mode: a file that another user executes must not run as its owner, root perhaps."""
    at = {"fchmodat", "fchmodat2", "mknodat"}
    return {name: _Test(2 if name in at else 1, (0,), ALLOW, _EPERM, _S_ISUID_ISGID) for name in names}


def _sockets(traits: Traits) -> Dict[str, _Decision]:
    """No packet, netlink, vsock or other family whatever the policy; Unix ones where there is nobody's but its own."""
    fate: Dict[str, _Decision] = {}
    inet: _Decision = _EPERM
    if traits.network == "proxy":
        inet = _Test(1, (_SOCK_STREAM,), _Test(2, (0, _IPPROTO_TCP), ALLOW, _EPERM), _EPERM, _SOCK_TYPE_MASK)
    elif traits.network == "open":
        inet = ALLOW
    families = _Test(0, (_AF_INET, _AF_INET6), inet, _EPERM)
    if traits.private:
        # Processes of a DataLoader pass descriptors by them, under names in the worker's own directories.
        families = _Test(0, (_AF_UNIX,), ALLOW, families)
        fate["socketpair"] = _Test(0, (_AF_UNIX,), ALLOW, _EPERM)
    else:
        # A datagram socket of a pair would send to any other by its path or name: unix(7).
        kinds = _Test(1, (_SOCK_STREAM, _SOCK_SEQPACKET), ALLOW, _EPERM, _SOCK_TYPE_MASK)
        fate["socketpair"] = _Test(0, (_AF_UNIX,), kinds, _EPERM)
    if traits.private or traits.network != "none":
        fate.update(dict.fromkeys(GROUPS["sockets"], ALLOW))
        fate["socket"] = families
    return fate


class _Instruction(NamedTuple):
    code: int
    if_true: int
    if_false: int
    value: int


def program(machine: str, traits: Traits, pid: int) -> Tuple[Tuple[int, int, int, int], ...]:
    """The filter: instructions as (code, jump if true, jump if false, value).

    Args:
        machine: One of `isohub.sandbox.syscalls.MACHINES`.
        traits: Of the worker.
        pid: Of the worker, in the namespace that it sees.
    """
    decisions = _decisions(machine, traits, pid)
    # Neighbours of one fate are one leaf: (first number, decision).
    leaves: List[Tuple[int, _Decision]] = []
    for number in range(max(decisions) + 2):
        decision = decisions.get(number, _ENOSYS)
        if not leaves or leaves[-1][1] != decision:
            leaves.append((number, decision))
    head = [
        _Instruction(_LOAD, 0, 0, _ARCHITECTURE),
        _Instruction(_IF_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        _Instruction(_RETURN, 0, 0, KILL),
        _Instruction(_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        head += [_Instruction(_IF_AT_LEAST, 0, 1, _X32_BIT), _Instruction(_RETURN, 0, 0, KILL)]
    return (*head, *_tree(leaves))


def _tree(leaves: Sequence[Tuple[int, _Decision]]) -> List[_Instruction]:
    if len(leaves) == 1:
        return _leaf(leaves[0][1])
    middle = len(leaves) // 2
    low, high = _tree(leaves[:middle]), _tree(leaves[middle:])
    # A conditional jump reaches 255 instructions, the other one any number. The fewer there are the sooner the kernel
    # has compiled them.
    if len(low) <= _FARTHEST:
        return [_Instruction(_IF_AT_LEAST, len(low), 0, leaves[middle][0]), *low, *high]
    return [
        _Instruction(_IF_AT_LEAST, 0, 1, leaves[middle][0]),
        _Instruction(_JUMP, 0, 0, len(low)),
        *low,
        *high,
    ]


def _leaf(decision: _Decision) -> List[_Instruction]:
    if isinstance(decision, int):
        return [_Instruction(_RETURN, 0, 0, decision)]
    matching, others = _leaf(decision.matching), _leaf(decision.others)
    code = [_Instruction(_LOAD, 0, 0, _ARGUMENTS + 8 * decision.argument)]  # little-endian: the low half is first
    if decision.mask is not None:
        code.append(_Instruction(_AND, 0, 0, decision.mask))
    last = len(decision.values) - 1
    for place, value in enumerate(decision.values):
        code.append(_Instruction(_IF_EQUAL, last - place, len(matching) if place == last else 0, value))
    return [*code, *matching, *others]


def prepare(machine: str, traits: Traits, pid: int) -> bytes:
    """The filter as the kernel takes it: instructions of eight bytes. Made once, for a zygote's forks.

    Args:
        machine: As `program` has it.
        traits: Of the worker.
        pid: Of the worker, for the filters that differ from process to process (`is_everybodys`).
    """
    return _prepared(machine, traits, 0 if is_everybodys(traits) else pid)


def is_everybodys(traits: Traits) -> bool:
    """Whether a filter is the same for every process: its signals are kept within by others."""
    return traits.private or traits.scoped


@functools.lru_cache(maxsize=8)
def _prepared(machine: str, traits: Traits, pid: int) -> bytes:
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program(machine, traits, pid))


def install(machine: str, traits: Traits, pid: int) -> None:
    """Put the filter on this thread and all that it starts.

    Raises:
        OSError: The kernel refused.
    """
    code = prepare(machine, traits, pid)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a length, and after padding a pointer.
    header = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    system_call("seccomp", _SECCOMP[machine], _SET_MODE_FILTER, 0, ctypes.c_char_p(header))
