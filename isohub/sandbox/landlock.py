"""Which files a process may reach, by Landlock: every right that the kernel knows is handled, and few are given.

A ruleset holds what is allowed below which paths. What is not in it is refused with EACCES, whatever the
file's owner and mode say. It cannot be undone, and every child has it.

What Landlock does not hold is `seccomp`'s and `namespaces`' to hold: stat, chmod and utime by path, UDP, MPTCP, raw
and netlink sockets, Unix sockets by path, io_uring, and descriptors that are open already.

Side: worker, in the fork, before any thread. Source: landlock(7), landlock_create_ruleset(2),
Documentation/userspace-api/landlock.rst of Linux 6.18 (ABI 7).
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from typing import Iterable, NamedTuple, Sequence, Tuple

from isohub.sandbox.kernel import prctl, system_call

__all__ = ["NEWEST_ABI", "Rule", "Ruleset", "abi", "handled_rights"]

# The same numbers on every architecture.
_CREATE_RULESET = 444
_ADD_RULE = 445
_RESTRICT_SELF = 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_RULE_NET_PORT = 2
_PR_SET_NO_NEW_PRIVS = 38

_EXECUTE = 1 << 0
_WRITE_FILE = 1 << 1
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_REMOVE_DIR = 1 << 4
_REMOVE_FILE = 1 << 5
_MAKE_CHAR = 1 << 6
_MAKE_DIR = 1 << 7
_MAKE_REG = 1 << 8
_MAKE_SOCK = 1 << 9
_MAKE_FIFO = 1 << 10
_MAKE_BLOCK = 1 << 11
_MAKE_SYM = 1 << 12
_REFER = 1 << 13
_TRUNCATE = 1 << 14
_IOCTL_DEV = 1 << 15

_BIND_TCP = 1 << 0
_CONNECT_TCP = 1 << 1
_SCOPE_ABSTRACT_UNIX = 1 << 0
_SCOPE_SIGNAL = 1 << 1

#: The newest ABI whose rights are known here; a newer kernel is asked for these.
NEWEST_ABI = 7

# The rights on files that each ABI added.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: _REFER, 3: _TRUNCATE, 5: _IOCTL_DEV}
_READING = _EXECUTE | _READ_FILE | _READ_DIR
_WRITING = (
    _READING | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _MAKE_FIFO
    | _MAKE_SYM | _REFER | _TRUNCATE
)  # fmt: skip
_DEVICE = _READ_FILE | _WRITE_FILE | _IOCTL_DEV
_LISTING = _READ_DIR
#: What a rule on something that is no directory may hold: landlock_add_rule(2) answers EINVAL to more.
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_RIGHTS = {"read": _READING, "write": _WRITING, "device": _DEVICE, "list": _LISTING}


class Rule(NamedTuple):
    """What may be done below a path.

    Attributes:
        path: A file or directory that exists.
        kind: "read" (and execute), "write" (and all of that), "device" (read, write and ioctl), "list" (names alone).
    """

    path: str
    kind: str


def abi() -> int:
    """The kernel's Landlock ABI; 0 where it has none or it is switched off."""
    try:
        return system_call("landlock_create_ruleset", _CREATE_RULESET, 0, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def handled_rights(version: int) -> Tuple[int, int, int]:
    """All that an ABI can refuse: rights on files, on TCP ports, and scopes."""
    files = 0
    for since, rights in _FILE_RIGHTS.items():
        if version >= since:
            files |= rights
    net = _BIND_TCP | _CONNECT_TCP if version >= 4 else 0
    scopes = _SCOPE_ABSTRACT_UNIX | _SCOPE_SIGNAL if version >= 6 else 0
    return files, net, scopes


class Ruleset:
    """What is to be allowed, in the making; it confines nobody before `restrict`.

    Args:
        version: The kernel's ABI, at least 1.
        tcp: Whether TCP is confined too, to the ports that are allowed.

    Raises:
        OSError: The kernel refused.
    """

    def __init__(self, version: int, *, tcp: bool = True) -> None:
        files, net, scopes = handled_rights(min(version, NEWEST_ABI))
        self._files, self._net = files, net if tcp else 0
        attributes = struct.pack("QQQ", files, self._net, scopes)
        # The kernel of an ABI takes no more than that ABI's fields, unless the rest is zero.
        size = 8 if version < 4 else 16 if version < 6 else 24
        self._descriptor = system_call(
            "landlock_create_ruleset", _CREATE_RULESET, ctypes.c_char_p(attributes[:size]), size, 0
        )

    def allow(self, rules: Iterable[Rule], root: str = "") -> None:
        """Allow what the rules say.

        Args:
            rules: A path that is missing is an error, for a rule that is not there protects nobody.
            root: What stands before each path: where the tree is whose root this process is going to have.

        Raises:
            OSError: The kernel refused, or a path cannot be opened.
        """
        for path, kind in rules:
            _allow_path(self._descriptor, root + path, _RIGHTS[kind] & self._files)

    def allow_connecting(self, ports: Sequence[int]) -> None:
        """Allow TCP connections to these ports, where TCP is confined."""
        for port in ports if self._net else ():
            _add_rule(self._descriptor, _RULE_NET_PORT, struct.pack("QQ", _CONNECT_TCP, port))

    def restrict(self) -> None:
        """Confine this thread and all that it starts.

        Raises:
            OSError: The kernel refused.
        """
        prctl(_PR_SET_NO_NEW_PRIVS, 1)
        system_call("landlock_restrict_self", _RESTRICT_SELF, self._descriptor, 0)
        os.close(self._descriptor)


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        if rights:
            # struct landlock_path_beneath_attr is packed: a 64-bit mask and a 32-bit descriptor.
            _add_rule(ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, descriptor))
    finally:
        os.close(descriptor)


def _add_rule(ruleset: int, kind: int, attribute: bytes) -> None:
    system_call("landlock_add_rule", _ADD_RULE, ruleset, kind, ctypes.c_char_p(attribute), 0)
