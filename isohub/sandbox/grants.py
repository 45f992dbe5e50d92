"""Which paths a worker may reach: what an interpreter, its packages and a C program need, and no more.

1. Directories of the system, and of the interpreter its programs and libraries, read-only; a few files of ``/etc``;
   none of ``/home``, ``/root``, ``/run``, ``/var``, ``/tmp``, ``/opt``, ``/srv`` or ``/mnt`` but an interpreter's.
2. Of an entry of ``sys.path`` outside of those (an editable install): its modules and packages alone, nothing that
   begins with a dot, and the names of the rest.
3. The checkout without its ``.git``, which may hold tokens in remotes' addresses.

Side: worker's: a zygote for the first two, a fork for the rest. Trust: the caller's environment, and the paths that
it sends.
"""

from __future__ import annotations

import glob
import os
import sys
from typing import Any, Iterator, List, Mapping, Sequence, Set

from isohub.sandbox.landlock import Rule

__all__ = ["DEVICES", "interpreter_rules", "is_below", "worker_rules"]

#: Devices that hold nothing of anybody's.
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store")
_SETTINGS = (
    "/etc/alternatives", "/etc/fonts", "/etc/group", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
    "/etc/localtime", "/etc/mime.types", "/etc/nsswitch.conf", "/etc/passwd", "/etc/pki/tls/certs",
    "/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/timezone", "/etc/vulkan", "/etc/OpenCL",
)  # fmt: skip
_MACHINE = ("/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/kernel/mm/transparent_hugepage")
# For CUDA, and ROCm as torch brings it.
_GPU_READ = (
    "/etc/nvidia", "/proc/driver/nvidia", "/run/nvidia-persistenced", "/sys/bus/pci", "/sys/class/drm",
    "/sys/class/kfd", "/sys/devices", "/sys/module/nvidia", "/usr/local/nvidia",
)  # fmt: skip
# Of a prefix, which may hold more than an interpreter (a home, a project): sysconfig's own places, and conda's.
_OF_PREFIX = ("bin", "etc", "include", "lib", "lib64", "libexec", "share", "ssl", "pyvenv.cfg")
_GPU_DEVICES = ("/dev/nvidia*", "/dev/nvidia-caps/*", "/dev/dri/*", "/dev/kfd", "/dev/dxg")
_NETWORK = ("/etc/hosts", "/etc/resolv.conf", "/etc/services", "/etc/host.conf", "/etc/gai.conf")
# Ends of names that Python imports.
_MODULES = (".py", ".pyc", ".so", ".pth", ".egg-link", ".dist-info", ".egg-info")
# A repo with more entries beside its .git gets one rule for each of these and none for the rest.
_MOST_ENTRIES = 4096


def is_below(path: str, directory: str) -> bool:
    """Whether a path is that directory or in it; both absolute and without symlinks."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def interpreter_rules(package: str, packages: Sequence[str] = ()) -> List[Rule]:
    """What every worker of this interpreter may read. Asks the disk; for a zygote, once.

    Args:
        package: isohub's own directory.
        packages: Directories of an overlay's packages, which need not be on ``sys.path`` yet.
    """
    prefixes = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    prefixes.append(os.path.dirname(os.path.dirname(os.path.realpath(sys.executable))))
    # With -S a virtual environment's interpreter takes its base's prefix for its own.
    own = os.path.dirname(os.path.dirname(os.path.abspath(sys.executable)))
    if os.path.isfile(os.path.join(own, "pyvenv.cfg")):
        prefixes.append(own)
    roots = [*_SYSTEM, *_places_of(prefixes), package, *packages]
    rules = [Rule(path, "read") for path in dict.fromkeys(map(os.path.abspath, roots)) if _is_one_s_own(path)]
    rules += [Rule(path, "read") for path in (*_SETTINGS, *_MACHINE) if os.path.exists(path)]
    known = {os.path.realpath(rule.path) for rule in rules}
    for entry in sys.path:
        place = os.path.realpath(entry) if entry else ""
        if place and os.path.exists(place) and not any(is_below(place, path) for path in known):
            rules += _path_entry_rules(place)
    rules += [Rule(path, "device") for path in DEVICES if os.path.exists(path)]
    return rules


def _places_of(prefixes: Sequence[str]) -> Iterator[str]:
    """What an interpreter has in its prefixes."""
    for prefix in prefixes:
        if prefix in _SYSTEM:
            yield prefix
        else:
            yield from (os.path.join(prefix, name) for name in _OF_PREFIX)


def _is_one_s_own(path: str) -> bool:
    """Whether it is there and no directory that holds everything."""
    return path != "/" and os.path.exists(path)


def _path_entry_rules(place: str) -> List[Rule]:
    if not os.path.isdir(place):
        return [Rule(place, "read")]  # a zip of modules
    rules = [Rule(place, "list")]
    for name in sorted(os.listdir(place)):
        path = os.path.join(place, name)
        if name.startswith(".") or os.path.islink(path):
            continue
        if name.endswith(_MODULES) or os.path.isfile(os.path.join(path, "__init__.py")):
            rules.append(Rule(path, "read"))
    return rules


def worker_rules(wanted: Mapping[str, Any], private: Sequence[str]) -> List[Rule]:
    """The rules of one worker beside `interpreter_rules`.

    Args:
        wanted: ``checkout``, ``read``, ``write``, ``gpu``, ``network`` of the caller's request.
        private: Its own directories, which exist or will.

    Raises:
        OSError: A path that the caller names is not there.
    """
    rules = _checkout_rules(wanted["checkout"])
    rules += [Rule(path, "read") for path in wanted["read"]]
    rules += [Rule(path, "write") for path in (*wanted["write"], *private)]
    for path in (*wanted["read"], *wanted["write"]):
        os.stat(path)
    if wanted["network"] != "none":
        rules += [Rule(path, "read") for path in _NETWORK if os.path.exists(path)]
    if wanted["gpu"]:
        rules += [Rule(path, "read") for path in _GPU_READ if os.path.exists(path)]
        devices: Set[str] = {path for pattern in _GPU_DEVICES for path in glob.glob(pattern)}
        rules += [Rule(path, "device") for path in sorted(devices) if not os.path.isdir(path)]
    return rules


def _checkout_rules(checkout: str) -> List[Rule]:
    if not os.path.lexists(os.path.join(checkout, ".git")):
        return [Rule(checkout, "read")]
    hidden = {".git"}
    target = os.path.realpath(os.path.join(checkout, ".git"))
    if is_below(target, os.path.realpath(checkout)):  # a symlink to another place in it
        hidden.add(os.path.relpath(target, os.path.realpath(checkout)).split(os.sep)[0])
    names = [name for name in sorted(os.listdir(checkout)) if name not in hidden][:_MOST_ENTRIES]
    paths = [os.path.join(checkout, name) for name in names]
    # No symlinks: a rule is on what they lead to, and a repo says where that is.
    return [Rule(checkout, "list"), *[Rule(path, "read") for path in paths if not os.path.islink(path)]]
