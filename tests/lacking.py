"""A machine that has less, for real: a filter takes a layer of confinement away from this process and all it starts.

``python tests/lacking.py landlock,namespaces -- command ...``; or `take_away` in a process that is to be so. The kernel
then answers as one that has no such thing, or as one whose administrator does not give it to ordinary users.
Standard library alone: zygotes start with it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

LAYERS = ("landlock", "seccomp", "namespaces")

_LOAD, _IF_EQUAL, _IF_ANY, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NEW_USER = 0x10000000
_NUMBERS = {
    "x86_64": {"seccomp": 317, "unshare": 272, "clone": 56, "clone3": 435, "landlock_create_ruleset": 444},
    "aarch64": {"seccomp": 277, "unshare": 97, "clone": 220, "clone3": 435, "landlock_create_ruleset": 444},
}


def take_away(*layers: str) -> None:
    """For good, and for every child."""
    numbers = _NUMBERS[platform.machine()]
    program = [(_LOAD, 0, 0, 0)]

    def refuse(name: str, number: int) -> None:
        program.extend([(_IF_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, _ERRNO | number)])

    for layer in layers:
        if layer == "landlock":
            refuse("landlock_create_ruleset", errno.EOPNOTSUPP)  # built in and switched off
        elif layer == "seccomp":
            refuse("seccomp", errno.ENOSYS)
        elif layer == "namespaces":
            refuse("clone3", errno.ENOSYS)
            for name in ("unshare", "clone"):
                refused = [(_LOAD, 0, 0, 16), (_IF_ANY, 0, 1, _NEW_USER), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
                program.extend([(_IF_EQUAL, 0, 4, numbers[name]), *refused, (_LOAD, 0, 0, 0)])
        else:
            raise ValueError(f"{layer!r} is none of {LAYERS}")
    program.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(38, ctypes.c_ulong(1), zero, zero, zero) or libc.prctl(
        22, ctypes.c_ulong(2), ctypes.c_char_p(header)
    ):
        raise OSError(ctypes.get_errno(), "a layer could not be taken away")


def start_without(directory: object, *layers: str, landlock_abi: int | None = None) -> str:
    """A file to start zygotes with in place of isohub's own (``isohub.session.spawn.START``).

    Args:
        directory: Where the file is written.
        *layers: What the kernel does not have.
        landlock_abi: What an older kernel would have.
    """
    from isohub.session.spawn import START

    lines = [
        "import sys",
        f"sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})",
        "import lacking, runpy",
        "del sys.path[0]",
        f"lacking.take_away(*{layers!r})",
        f"START = {os.fspath(START)!r}",
        "sys.argv[0] = START",
    ]
    if landlock_abi is None:
        lines.append("runpy.run_path(START, run_name='__main__')")
    else:
        lines += [
            "start = runpy.run_path(START)",
            "start['_package']()",
            "from isohub.sandbox import landlock",
            f"landlock.abi = lambda: {landlock_abi}",
            "runpy.run_path(START, run_name='__main__')",
        ]
    place = os.path.join(os.fspath(directory), f"start_without_{'_'.join(layers)}_{landlock_abi}.py")  # type: ignore[call-overload]
    with open(place, "w") as file:
        file.write("\n".join(lines) + "\n")
    return place


if __name__ == "__main__":
    take_away(*filter(None, sys.argv[1].split(",")))
    os.execvp(sys.argv[3], sys.argv[3:])
