"""A commit written with what it names elsewhere: its submodules, and the files behind its LFS pointers.

All goes through one `TreeWriter`, so the limits on bytes, entries and depth hold for the whole,
and a link of a submodule may lead anywhere in the whole tree and nowhere else. Submodules come at
the very commits that the trees name, hashed like everything else, from a clone's own copies or
from their servers.

The user's credentials go to a submodule's server only if server and owner are its parent's, and
the commit is on the repository's own branches and tags: anyone may write ``.gitmodules`` into a
pull request or a repository of theirs, and could otherwise have a private repository of the user's
brought into their code's reach. ssh has no other credentials than the user's, so it is not
used for others at all. Runs in the caller; executes nothing but ssh.

Source: gitsubmodules(7), git-submodule(1) (update --init --recursive), githooks(5) (none runs).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from dulwich.errors import NotGitRepository
from dulwich.repo import Repo

from isohub.errors import IntegrityError, OfflineError, SourceUnavailableError, printable
from isohub.repos.credentials import Credentials
from isohub.repos.naming import shown
from isohub.repos.sources.lfs import LfsFile, LfsStore, parse_pointer
from isohub.repos.sources.objects import DAMAGE, Objects
from isohub.repos.sources.packs import PACK_LIMIT_BYTES, connected, received
from isohub.repos.sources.ssh import is_ssh
from isohub.repos.sources.submodules import Submodule, locate, owner_of, parse_gitmodules
from isohub.repos.tree import TreeWriter

__all__ = ["Home", "write_commit"]

# Boost has 170 of them; git's own limit is the number of processes.
_SUBMODULES_LIMIT = 500
# PyTorch's go three deep.
_NESTED_LIMIT = 10
_BY_HAND = "`git clone --recurse-submodules` it, look at it, and name the clone: ./clone:ref"


@dataclass(frozen=True)
class Home:
    """Where a repository's relative URLs, submodules and LFS files are sought.

    Attributes:
        location: Its address as it was named; None for a clone that has no server.
        credentials: Whom to ask its server as.
        own: Whether what it names may be asked for with its credentials.
        directories: Git directories of its clone on this machine.
        base: Its address with redirects followed, which may have led to another server.
    """

    location: str | None
    credentials: Credentials
    own: bool
    directories: tuple[Path, ...] = ()
    base: str | None = None

    @property
    def lfs(self) -> str | None:
        """Where to ask for LFS files: a redirect is followed, but the credentials are the named server's."""
        if self.base is None or self.location is None or owner_of(self.base)[0] != owner_of(self.location)[0]:
            return self.location
        return self.base


def write_commit(
    objects: Objects,
    commit: str,
    into: Path,
    *,
    origin: str,
    extras: tuple[str, ...],
    home: Home,
    scratch: Path,
    offline: bool,
    progress: bool,
) -> None:
    """Write a commit's tree, with extras.

    Args:
        objects: Of its repository.
        commit: Its id.
        into: An empty directory of the caller's.
        origin: Where the tree comes from, for messages.
        extras: As in `Pin.extras`.
        home: Of its repository.
        scratch: A directory for temporary files.
        offline: Ask no server.
        progress: Draw bars for LFS files on stderr, if that is a terminal.

    Raises:
        IntegrityError: Something is damaged, is not what was named, or may not be written.
        SourceUnavailableError: A submodule or an LFS file cannot be brought; both are named.
        OfflineError: It would have to be asked for; it is named.
    """
    writer = TreeWriter(into, origin=origin)
    writing = _Writing(writer, extras, scratch, offline=offline, progress=progress)
    writing.repository(objects, commit, home, prefix="", depth=0)
    writer.finish()


class _Writing:
    def __init__(
        self, writer: TreeWriter, extras: tuple[str, ...], scratch: Path, *, offline: bool, progress: bool
    ) -> None:
        self._writer = writer
        self._extras = extras
        self._scratch = scratch
        self._offline = offline
        self._progress = progress
        self._submodules = 0
        self._left_bytes = PACK_LIMIT_BYTES

    def repository(self, objects: Objects, commit: str, home: Home, *, prefix: str, depth: int) -> None:
        pointers: list[LfsFile] = []

        def set_aside(path: str, content: bytes, executable: bool) -> bool:
            pointer = parse_pointer(content)
            if pointer is not None:
                pointers.append(LfsFile(path, pointer, executable))
            return pointer is not None

        wanted = set_aside if "lfs" in self._extras else None
        links = objects.write_tree(commit, self._writer, prefix=prefix, set_aside=wanted)
        if pointers:
            clones = [directory / "lfs" / "objects" for directory in home.directories]
            store = LfsStore(
                home.lfs, home.credentials, clones, self._scratch, offline=self._offline, progress=self._progress
            )
            store.write(pointers, self._writer)
        if links and "submodules" in self._extras:
            named = _read_gitmodules(objects, commit, prefix)
            for path, target in links.items():
                self._submodule(path, target, named.get(path.removeprefix(prefix)), home, depth + 1)

    def _submodule(self, path: str, commit: str, submodule: Submodule | None, home: Home, depth: int) -> None:
        self._submodules += 1
        if depth > _NESTED_LIMIT or self._submodules > _SUBMODULES_LIMIT:
            raise self._writer.refusal(
                path, f"is a submodule too many: at most {_SUBMODULES_LIMIT}, nested {_NESTED_LIMIT} deep"
            )
        if submodule is None:
            raise SourceUnavailableError(
                f"the submodule {_shown(path)} is not in .gitmodules, so nobody knows where it is",
                hint="load it without submodules; its directory is then left empty, and named",
            )
        with ExitStack() as stack:
            try:
                objects, inner = self._opened(stack, commit, submodule, home)
            except (SourceUnavailableError, IntegrityError, OfflineError) as error:
                url = "no URL" if submodule.url is None else _without_password(submodule.url)
                text = f"the submodule {_shown(path)} ({_shown(url)}): {error.message}"
                raise type(error)(text, hint=error.hint, **error.fields) from error
            self.repository(objects, commit, inner, prefix=f"{path}/", depth=depth)

    def _opened(self, stack: ExitStack, commit: str, submodule: Submodule, home: Home) -> tuple[Objects, Home]:
        """Objects of a submodule that hold its commit, and where what it names is sought."""
        location, problem = None, None
        try:
            if submodule.url is None:
                raise ValueError("is not there")
            location = locate(submodule.url, home.location)
        except ValueError as error:
            problem = str(error)
        same_owner = (
            location is not None and home.location is not None and owner_of(location) == owner_of(home.location)
        )
        own = home.own and same_owner
        credentials = home.credentials if own else Credentials(anonymous=True)
        inner = Home(location, credentials, own)
        for directory in home.directories:
            # Its name has no "..", and the directory is the user's own git's.
            place = directory / "modules" / submodule.name
            objects = _clone_with(place, commit, stack)
            if objects is not None:
                return objects, replace(inner, directories=(place,))
        if self._offline:
            raise OfflineError(
                f"the clone does not have its commit {commit[:12]}, and the network may not be used",
                hint="run `git submodule update --init --recursive` in the clone while there is a network",
                url=None if location is None else shown(location),
            )
        if location is None:
            raise SourceUnavailableError(
                f"its URL {problem}",
                hint=_BY_HAND,
            )
        if is_ssh(location) and not own:
            raise SourceUnavailableError(
                "ssh would use your keys for what may be anyone's: another owner's, or named by a commit on no branch",
                hint=_BY_HAND,
            )
        try:
            remote = stack.enter_context(connected(location, credentials))
        except SourceUnavailableError as error:
            if own or error.status not in (401, 403, 404):
                raise
            text = f"{error.message}; it was asked without your credentials, since it may be anyone's"
            raise SourceUnavailableError(text, **{**error.fields, "hint": _BY_HAND}) from error
        wants, depth = remote.advertisement.wants(commit)
        if not wants:
            raise SourceUnavailableError("it has no commits", url=location)
        objects, size_bytes = stack.enter_context(
            received(remote, wants, self._scratch, depth=depth, limit_bytes=self._left_bytes)
        )
        self._left_bytes -= size_bytes
        try:
            objects.read(commit)
        except KeyError:
            raise SourceUnavailableError(f"it has no commit {commit}", url=location) from None
        return objects, replace(inner, base=remote.advertisement.base)


def _read_gitmodules(objects: Objects, commit: str, prefix: str) -> dict[str, Submodule]:
    data = objects.top_file(commit, ".gitmodules")
    try:
        return {} if data is None else parse_gitmodules(data)
    except ValueError as error:
        raise IntegrityError(f"{prefix}.gitmodules cannot be used: {error}") from error


def _clone_with(directory: Path, commit: str, stack: ExitStack) -> Objects | None:
    """A submodule's clone on this machine, if it is there and holds a commit."""
    try:
        repo = Repo(str(directory))
    except (NotGitRepository, OSError, *DAMAGE):
        return None
    stack.callback(repo.close)
    algorithm = getattr(getattr(repo, "object_format", None), "name", "sha1")
    objects = Objects(repo.object_store, where=str(directory), algorithm=algorithm)
    try:
        objects.read(commit)
    except KeyError:
        return None
    return objects


def _without_password(url: str) -> str:
    """A URL as ``.gitmodules`` has it, for a message: nobody should have written a password there, and some do."""
    name, sign, rest = url.rpartition("@")
    return shown(url) if "://" in url or ":" not in name else f"***{sign}{rest}"


def _shown(text: str) -> str:
    return repr(printable(text, limit_chars=300, newlines=False))
