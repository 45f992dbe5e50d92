"""System calls that Python has no function for, by ctypes: each checked, each error with its number.

`libc.syscall` and `errno` are used as they are: the bindings on PyPI for this layer were read and found wrong
(docs/decisions/0013-own-ctypes-for-the-kernel.md).

Side: both. Runs on Python 3.8 and up, on x86_64 and aarch64. Source: syscall(2), prctl(2), capabilities(7).
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any, Tuple

__all__ = [
    "ARCHITECTURES",
    "architecture",
    "drop_capabilities",
    "keep_capabilities",
    "libc_call",
    "prctl",
    "system_call",
]

#: Machines whose system call tables are here.
ARCHITECTURES: Tuple[str, ...] = ("x86_64", "aarch64")

_PR_SET_NO_NEW_PRIVS = 38
_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
_PR_SET_SECUREBITS = 28
# SECBIT_NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE, each with its lock; KEEP_CAPS locked off.
_SECUREBITS = 0b11101111
_CAPABILITY_VERSION_3 = 0x20080522
_MOST_CAPABILITIES = 64
_EINVAL = 22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def architecture() -> str:
    """The machine's name, as ``uname -m`` has it, if this process runs its own instructions: else what it is."""
    machine = os.uname().machine
    if struct.calcsize("P") != 8:
        return f"{machine}, 32 bits"
    return machine


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def system_call(name: str, number: int, *args: Any) -> int:
    """One system call by its number.

    Args:
        name: For errors.
        number: Of this architecture.
        *args: Whole numbers, or ctypes pointers.

    Raises:
        OSError: The kernel refused.
    """
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        raise _failed(name)
    return result


def libc_call(name: str, *args: Any) -> int:
    """A function of the C library's that answers -1 and sets errno.

    Raises:
        OSError: It did.
    """
    result = int(getattr(_libc, name)(*args))
    if result < 0:
        raise _failed(name)
    return result


def prctl(option: int, *values: int) -> int:
    """Set or ask something of this process; arguments that are not given are zero, as some options insist on."""
    return libc_call("prctl", option, *values, *[0] * (4 - len(values)))


def keep_capabilities() -> None:
    """Have the program that this process executes next hold the capabilities that this process holds.

    Root's programs have them anyway; an ordinary user's, also in a user namespace of its own, have none but ambient
    ones: capabilities(7).

    Raises:
        OSError: The kernel refused.
    """
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    held = ctypes.create_string_buffer(24)
    libc_call("capget", ctypes.c_char_p(header), held)
    # Effective, permitted, inheritable: of the low 32, and of the high.
    words = struct.unpack("6I", held.raw)
    libc_call(
        "capset",
        ctypes.c_char_p(header),
        ctypes.c_char_p(struct.pack("6I", *words[:2], *words[1:2], *words[3:5], *words[4:5])),
    )
    permitted = words[1] | words[4] << 32
    for capability in range(_MOST_CAPABILITIES):
        if permitted >> capability & 1:
            prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)


def drop_capabilities() -> None:
    """Give up every capability, also of the programs that this process will execute, for good.

    Root without capabilities is a user who owns root's files and no more: capabilities(7).
    """
    for capability in range(_MOST_CAPABILITIES):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == _EINVAL:
                break  # beyond the last that this kernel has
            # EPERM: without CAP_SETPCAP there is nothing that could be gained by execve either.
            if capability == 0:
                break
            raise
    try:
        prctl(_PR_SET_SECUREBITS, _SECUREBITS)
    except OSError:
        pass  # needs CAP_SETPCAP; no_new_privs does the same for execve
    try:
        prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    except OSError:
        pass  # Linux 4.3; without ambient capabilities there are none to clear
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    nothing = bytes(24)
    libc_call("capset", ctypes.c_char_p(header), ctypes.c_char_p(nothing))
