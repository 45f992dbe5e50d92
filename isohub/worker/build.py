"""A wheel from a source distribution, in a process that has nothing but that source and what building it needs.

1. It is confined as a worker is, without a network, before it opens the archive. Where Landlock or the filter cannot
   be had it builds nothing.
2. It ends when its caller does.
3. What it gives back is one file, through one descriptor. Its name and content are the source's word.

    stdin    {"caller": <pid>, "source": ..., "packages": [...], "backend": ..., "backend_path": [...],
              "variables": {...}, "limits": {...}}
    answer   {"name": "<file name>", "bytes": N} and a line feed, and then the file

Side: worker's, in a process of its own that the caller starts; runs the source's code. Trust: stdin is the caller's.
Source: PEP 517 (build_wheel), PEP 427.
"""

from __future__ import annotations

import json
import os
import select
import sys
import tarfile
import traceback
import zipfile
from typing import Any, Dict, List, NoReturn

from isohub.sandbox import namespaces
from isohub.sandbox.confine import UNCONFINED, Machine, confine
from isohub.sandbox.kernel import ARCHITECTURES
from isohub.sandbox.policy import DEFAULT_REQUIRED
from isohub.sandbox.processes import die_with_parent

__all__ = ["build"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_CHUNK_BYTES = 1 << 20


def build(directory: str, answer: int) -> NoReturn:
    """Build what stdin says, and end.

    Args:
        directory: Empty, the caller's to remove.
        answer: Descriptor that the wheel is written to.
    """
    request = json.load(sys.stdin)
    place = os.path.join(directory, "root")
    os.mkdir(place, 0o700)
    machine = Machine.look(_PACKAGE, request["packages"], None)
    reason = None
    if machine.name in ARCHITECTURES:
        reason = namespaces.fault(place, machine.name)
    machine = machine._replace(namespaces=reason)
    own = os.path.join(directory, "w1")
    os.mkdir(own)
    parent = os.getpid()
    if machine.namespaces is None:
        namespaces.become_own_user(namespaces.NEW_PID)
        parent = 0
    # After the new user namespace, entering which clears it; the child's own is set by `confine`.
    die_with_parent(request["caller"])
    # In a pid namespace of its own a child sees no parent, dead or alive: the end of this pipe tells it.
    alive, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        _build(machine, request, own, answer, parent, alive)
    os.close(alive)
    os.close(answer)
    _, status = os.waitpid(child, 0)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _build(machine: Machine, request: Dict[str, Any], own: str, answer: int, parent: int, alive: int) -> NoReturn:
    code = 1
    try:
        wanted = {**request["limits"], "level": "full", "network": "none", "read": [], "write": [], "gpu": False}
        wanted["checkout"] = os.path.dirname(request["source"])
        confined = confine(machine, wanted, own, request["variables"], [answer, alive], parent)
        if select.select([alive], [], [], 0)[0]:
            os._exit(1)  # the parent ended before the kernel was told to end this process with it
        os.close(alive)
        lacking = [name for name in DEFAULT_REQUIRED if name not in confined.active]
        if lacking:
            sys.stderr.write(f"nothing is built without {' and '.join(lacking)}\n")
            code = UNCONFINED
        else:
            _send(_wheel(request), answer)
            code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wheel(request: Dict[str, Any]) -> str:
    """Run the source's build backend; the path of the wheel."""
    import importlib

    temporary = os.environ["TMPDIR"]
    source = _unpacked(request["source"], os.path.join(temporary, "source"))
    os.chdir(source)
    # Of the interpreter's own packages none: what building needs was named, and is there.
    sys.path[:] = [*request["packages"], *(entry for entry in sys.path if "site-packages" not in entry)]
    os.environ["PYTHONPATH"] = os.pathsep.join(request["packages"])
    sys.path[:0] = _inside(source, request["backend_path"])
    name, _, attribute = request["backend"].partition(":")
    backend: Any = importlib.import_module(name)  # noqa: TID251 - the source's own, and this process is for it
    for part in filter(None, attribute.split(".")):
        backend = getattr(backend, part)
    out = os.path.join(temporary, "out")
    os.mkdir(out)
    sys.argv[:] = [""]
    return os.path.join(out, backend.build_wheel(out))


def _inside(source: str, paths: List[str]) -> List[str]:
    found = [os.path.realpath(os.path.join(source, path)) for path in paths]
    return [path for path in found if path == source or path.startswith(source + os.sep)]


def _unpacked(archive: str, place: str) -> str:
    """The only directory at the top of an archive. What the archive does here, it does to this process alone."""
    os.mkdir(place)
    if archive.endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            file.extractall(place)  # noqa: S202
    else:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(place, filter="data")
            else:
                tar.extractall(place)  # noqa: S202
    (top,) = os.listdir(place)
    return os.path.realpath(os.path.join(place, top))


def _send(path: str, answer: int) -> None:
    with open(path, "rb") as wheel, os.fdopen(answer, "wb") as out:
        size = os.fstat(wheel.fileno()).st_size
        out.write(json.dumps({"name": os.path.basename(path), "bytes": size}).encode() + b"\n")
        while True:
            chunk = wheel.read(_CHUNK_BYTES)
            if not chunk:
                break
            out.write(chunk)
