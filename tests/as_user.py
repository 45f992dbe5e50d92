"""The attack suite as an ordinary user: ``python tests/as_user.py [arguments of pytest]``, or ``make test-user``.

As root it leaves the machine as it is: in mounts of its own it lays an empty directory over whatever an ordinary user
may not enter (``/root``) and what the tests need of it there again, adds a user to a copy of ``/etc/passwd``, becomes
that user, without groups, with a home and a temporary directory that go afterwards, and runs the tests. For anybody
else it just runs them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER, NAME = 54321, "isohub-test"
TESTS = ("tests/attacks", "tests/sandbox")
_PASSED = ("HOME", "ISOHUB_EXPECT", "LANG", "LC_ALL", "PATH", "TERM", "TZ")

_NEW_NS = 0x00020000
_BIND, _REC, _PRIVATE = 0x1000, 0x4000, 0x40000


def _libc(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _mount(source: object, target: object, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else ctypes.c_char_p(os.fsencode(str(text))) for text in (source, target, kind, data)]
    _libc("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def _shut(path: Path) -> Path | None:
    """The first directory on the way to a path that others may not enter."""
    for directory in reversed([path, *path.parents]):
        if not directory.stat().st_mode & stat.S_IXOTH:
            return directory
    return None


def _open_the_way(needed: list[Path], aside: Path) -> None:
    """Show what is needed where an ordinary user can reach it, and nothing else of what is shut."""
    shut: dict[Path, list[Path]] = {}
    for path in needed:
        directory = _shut(path)
        if directory is not None:
            shut.setdefault(directory, []).append(path)
    for number, (directory, paths) in enumerate(shut.items()):
        kept = []
        for place, path in enumerate(paths):
            kept.append(aside / f"{number}-{place}")
            kept[-1].mkdir()
            _mount(path, kept[-1], None, _BIND | _REC)
        _mount("tmpfs", directory, "tmpfs", 0, "mode=0755")
        for place, path in zip(kept, paths, strict=False):
            path.mkdir(parents=True, exist_ok=True)
            _mount(place, path, None, _BIND | _REC)


def _become_user(place: Path) -> None:
    """For good; in a process of one thread."""
    _libc("unshare", ctypes.c_int(_NEW_NS))
    _mount("none", "/", None, _REC | _PRIVATE)
    aside = place / "aside"
    aside.mkdir()
    needed = {
        Path(sys.prefix).resolve(),
        Path(sys.base_prefix).resolve(),
        Path(sys.executable).resolve().parents[1],
        ROOT,
    }
    _open_the_way(sorted(needed, key=lambda path: len(path.parts)), aside)
    for name, line in (
        ("passwd", f"{NAME}:x:{NUMBER}:{NUMBER}::{place / 'home'}:/bin/sh\n"),
        ("group", f"{NAME}:x:{NUMBER}:\n"),
    ):
        copy = place / name
        copy.write_text(Path("/etc", name).read_text() + line)
        copy.chmod(0o644)
        _mount(copy, f"/etc/{name}", None, _BIND)
    os.setgroups([])
    os.setresgid(NUMBER, NUMBER, NUMBER)
    os.setresuid(NUMBER, NUMBER, NUMBER)


def main(arguments: list[str]) -> int:
    """Run the tests; their exit status."""
    chosen = [
        argument for argument in arguments if not argument.startswith("-") and (ROOT / argument.split("::")[0]).exists()
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *([] if chosen else TESTS), *arguments]
    if os.geteuid():
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    place = Path(tempfile.mkdtemp(prefix="isohub-user-"))
    try:
        place.chmod(0o755)
        environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
        for variable, name in (("HOME", "home"), ("TMPDIR", "tmp"), ("HYPOTHESIS_STORAGE_DIRECTORY", "hypothesis")):
            (place / name).mkdir(mode=0o700)
            os.chown(place / name, NUMBER, NUMBER)
            environment[variable] = str(place / name)
        for name in (".bashrc", ".profile"):
            (place / "home" / name).write_text("# of an ordinary user\n")
            os.chown(place / "home" / name, NUMBER, NUMBER)
        environment.update(PYTHONDONTWRITEBYTECODE="1", USER=NAME, LOGNAME=NAME)
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            check=False,
            preexec_fn=lambda: _become_user(place),
        ).returncode
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
