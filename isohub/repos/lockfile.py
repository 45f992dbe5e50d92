"""isohub.lock: which commit, tree, weights and packages each reference meant, for a run elsewhere or later.

Rules:
  1. What is locked is loaded so or not at all: any difference is a `LockMismatchError`.
  2. What is not locked yet is added, in one rename under a lock; with `frozen` it is refused instead.
  3. Reading fails closed: of a file with anything amiss nothing is used.
  4. No credential: a URL is locked as the repo names it, never an address that a server sent us on to. Its
     query may be a signature: it is left out, and a key tells it from others.
  5. A local path below the lockfile's directory is written relative to it, so that a project can move.

The text is `isohub.repos.lock_format`'s. It asks nobody and fetches nothing. Runs in the caller. Trust: the
file may come with somebody's project.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shlex
import stat
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from isohub.errors import LockMismatchError, SourceUnavailableError, TrustError, printable
from isohub.repos.disk import gives_no_locks, locked
from isohub.repos.lock_format import (
    LIMIT_BYTES,
    Entries,
    Key,
    LockedEnvironment,
    LockedRepo,
    LockedWeights,
    decode_lock,
    encode_lock,
)
from isohub.repos.naming import near_names
from isohub.repos.pins import TREE_PREFIX, Pin
from isohub.repos.reference import Reference, parse
from isohub.repos.weights_url import WeightsUrl, parse_weights_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from isohub.repos.pins import Checkout

__all__ = ["LOCKFILE", "LockedRepo", "LockedWeights", "Lockfile"]

#: The name that the command line and `Session` use unless they are told another.
LOCKFILE = "isohub.lock"

_CLONE_HERE = "git+file:./"
_HEX = re.compile(r"[0-9a-f]{4,64}")
#: A file that is younger may be written again without a new time stamp. Source: git's racy-git.txt.
_RACY_NS = 2_000_000_000
_Seen = tuple[int, ...]


class Lockfile:
    """A lockfile, read anew when it has changed. Safe between threads and processes.

    Args:
        path: Where; need not exist yet. Links are followed.
        frozen: Add nothing: what is not locked is a `LockMismatchError`.
    """

    def __init__(self, path: str | os.PathLike[str], *, frozen: bool = False) -> None:
        self.path = Path(os.path.realpath(Path(path).expanduser()))  # unlike Path.resolve no error for a loop
        self.frozen = frozen
        self._read_last: tuple[_Seen, Entries] | None = None

    def require(self) -> None:
        """Refuse to go on without a file.

        Raises:
            SourceUnavailableError: There is none.
        """
        if not os.path.lexists(self.path):
            raise SourceUnavailableError(
                f"there is no lockfile {self._shown}", hint=printable(f"isohub lock REPO{self._option}", newlines=False)
            )

    def entries(self) -> tuple[LockedRepo, ...]:
        """Everything, sorted by reference.

        Raises:
            TrustError: The file is damaged, or another isohub's.
            SourceUnavailableError: It cannot be read.
        """
        entries = self._read()
        return tuple(entries[key] for key in sorted(entries))

    def find(self, reference: Reference, extras: Sequence[str] = ()) -> LockedRepo | None:
        """The entry of a reference, or None; raises as `entries` does."""
        return self._read().get(self._key(reference, extras))

    def reference(self, entry: LockedRepo) -> Reference:
        """An entry's reference, parsed where the lockfile is.

        Raises:
            InvalidReferenceError: It is none, or the directory that it names is not there.
            TrustError: It is not in its canonical form, so that no load would find it.
        """
        directory, text = self.path.parent, entry.reference
        if text.startswith("./"):
            found = parse(directory / text[2:])
        elif text.startswith(_CLONE_HERE):
            found = parse(f"git+file://{quote(str(directory), safe='/')}/{text.removeprefix(_CLONE_HERE)}")
        else:
            found = parse(text)
        canonical = self._key(found, entry.extras)[0]
        if canonical != text:
            raise self._damaged(f"{printable(text, newlines=False)} is written {printable(canonical, newlines=False)}")
        return found

    def pin(self, reference: Reference, extras: Sequence[str] = ()) -> Pin | None:
        """The commit that is locked for a reference.

        Returns:
            None if it is not locked yet; and for a directory as it stands, whose content is what `check` compares.

        Raises:
            LockMismatchError: It is not locked, and the lockfile is frozen; or the lock contradicts the reference.
            TrustError: The file is damaged, or another isohub's.
        """
        entry = self.find(reference, extras)
        if entry is None:
            if self.frozen:
                raise self._absent(reference, extras)
            return None
        if entry.commit.startswith(TREE_PREFIX) != _is_directory(reference):
            wanted = "the content of a directory" if _is_directory(reference) else "a commit"
            raise self._mismatch(reference, extras, "commit", wanted, entry.commit)
        if _is_directory(reference):
            return None
        ref = (reference.ref or "").lower()
        is_commit = len(ref) in (40, 64) or entry.ref is None  # a branch may be named like the start of one
        if is_commit and _HEX.fullmatch(ref) and not entry.commit.startswith(ref):
            raise self._mismatch(reference, extras, "commit", reference.ref or "", entry.commit)
        return Pin(reference, entry.commit, entry.ref, entry.validated, entry.extras)

    def check(self, checkout: Checkout) -> None:
        """Hold a checkout against the lock, or add it.

        Raises:
            LockMismatchError: Its commit or its tree is not the locked one; or it is not locked, and the
                lockfile is frozen.
            TrustError: The file is damaged, or another isohub's.
            SourceUnavailableError: It cannot be written.
        """
        reference, extras = checkout.reference, checkout.pin.extras
        entry = self.find(reference, extras)
        if entry is None:
            if self.frozen:
                raise self._absent(reference, extras)
            entry = self._change(checkout, lambda known: known)
        for what, expected, got in (("commit", entry.commit, checkout.commit), ("tree", entry.tree, checkout.tree)):
            if expected != got:
                raise self._mismatch(reference, extras, what, expected, got)

    def update(self, checkout: Checkout, weights: Mapping[tuple[str, str], LockedWeights | None] | None = None) -> None:
        """Lock a checkout in place of what was locked; its weights stay locked only if the commit is the same.

        Environments are locked no longer: the next load locks what it builds.

        Args:
            checkout: What is locked from now on.
            weights: What takes the place of locked weights, by `LockedWeights.which`; None unlocks them.

        Raises:
            TrustError: The lockfile is frozen, damaged, or another isohub's.
            SourceUnavailableError: It cannot be written.
        """
        if self.frozen:
            raise self._absent(checkout.reference, checkout.pin.extras)
        fresh, changed = self._entry(checkout), weights or {}

        def replaced(known: LockedRepo) -> LockedRepo:
            stay = known.weights if known.commit == fresh.commit else ()
            kept = (changed.get(each.which, each) for each in stay)
            return msgspec.structs.replace(fresh, weights=tuple(each for each in kept if each is not None))

        self._change(checkout, replaced)

    def weights(self, reference: Reference, extras: Sequence[str], url: str) -> LockedWeights | None:
        """What is locked for a URL of a repo.

        Args:
            reference: The repo that asks.
            extras: As in its `Pin`.
            url: The whole. Trust: the repo.

        Returns:
            None if it is not locked yet.

        Raises:
            LockMismatchError: It is not locked, and the lockfile is frozen.
            InvalidReferenceError: It is no URL.
            TrustError: The file is damaged, or another isohub's.
        """
        address = parse_weights_url(url)
        entry = self.find(reference, extras)
        found = None if entry is None else entry.weights_of(address)
        if found is None and self.frozen:
            raise self._absent(reference, extras, address if entry else None)
        return found

    def check_weights(self, reference: Reference, extras: Sequence[str], url: str, sha256: str, bytes: int) -> None:  # noqa: A002 - the entry's word
        """Hold a downloaded file against the lock, or add it.

        Args:
            reference: The repo that asked; locked already.
            extras: As in its `Pin`.
            url: The whole. Trust: the repo.
            sha256: Of what arrived.
            bytes: Its size.

        Raises:
            LockMismatchError: It is not the locked one; or it is not locked, and the lockfile is frozen, or the
                repo itself is not locked.
            InvalidReferenceError: It is no URL.
            TrustError: The file is damaged, or another isohub's.
            SourceUnavailableError: It cannot be written.
        """
        found = self.weights(reference, extras, url)
        if found is None:
            address = parse_weights_url(url)
            key = self._key(reference, extras)
            with self._writing():
                entries = self._read()
                if key not in entries:
                    raise self._absent(reference, extras)
                found = entries[key].weights_of(address)
                if found is None:
                    found = LockedWeights.of(address, sha256, bytes)
                    weights = tuple(sorted((*entries[key].weights, found), key=lambda each: each.which))
                    self._write({**entries, key: msgspec.structs.replace(entries[key], weights=weights)})
        self.compare_weights(reference, extras, found, sha256, bytes)

    def compare_weights(
        self,
        reference: Reference,
        extras: Sequence[str],
        locked: LockedWeights,
        sha256: str,
        bytes: int,  # noqa: A002 - the entry's word
    ) -> None:
        """Hold a file against what is locked for it; `check_weights` finds that by the whole URL.

        Raises:
            LockMismatchError: It is not the locked one.
        """
        if (locked.sha256, locked.bytes) != (sha256, bytes):
            expected, got = f"sha256 {locked.sha256} ({locked.bytes} bytes)", f"sha256 {sha256} ({bytes} bytes)"
            raise self._mismatch(reference, extras, "weights", expected, got, locked.url)

    def environment(self, reference: Reference, extras: Sequence[str], name: str) -> LockedEnvironment | None:
        """What is locked for an environment of a reference, by `Environment.name`; None if it is not locked yet.

        Raises:
            LockMismatchError: It is not locked, and the lockfile is frozen.
            TrustError: The file is damaged, or another isohub's.
        """
        entry = self.find(reference, extras)
        found = None if entry is None else entry.environment_of(name)
        if found is None and self.frozen:
            raise self._absent(reference, extras, None if entry is None else f"environment {name}")
        return found

    def add_environment(self, reference: Reference, extras: Sequence[str], environment: LockedEnvironment) -> None:
        """Lock what an environment consists of; one that is locked by then stays.

        Args:
            reference: Of the repo; locked already.
            extras: As in its `Pin`.
            environment: What was built.

        Raises:
            LockMismatchError: The repo itself is not locked, or another was locked meanwhile.
            TrustError: The file is damaged, or another isohub's.
            SourceUnavailableError: It cannot be written.
        """
        key = self._key(reference, extras)
        with self._writing():
            entries = self._read()
            if key not in entries:
                raise self._absent(reference, extras)
            known = entries[key].environment_of(environment.name)
            if known is None:
                added = tuple(sorted((*entries[key].environment, environment), key=lambda each: each.name))
                self._write({**entries, key: msgspec.structs.replace(entries[key], environment=added)})
        if known is not None and known != environment:
            raise self.differs(reference, extras, f"the packages of {known.name}", "other packages")

    def differs(self, reference: Reference, extras: Sequence[str], expected: str, got: str) -> LockMismatchError:
        """The error for an environment that cannot be what is locked."""
        return self._mismatch(reference, extras, "environment", expected, got)

    # The file.

    def _change(self, checkout: Checkout, replace: Callable[[LockedRepo], LockedRepo]) -> LockedRepo:
        """Write one entry; `replace` decides from the one that is there by then."""
        key = self._key(checkout.reference, checkout.pin.extras)
        with self._writing():
            entries = self._read()
            known = entries.get(key)
            entry = self._entry(checkout) if known is None else replace(known)
            if entry != known:
                self._write({**entries, key: entry})
        return entry

    def _entry(self, checkout: Checkout) -> LockedRepo:
        pin = checkout.pin
        text, extras = self._key(pin.reference, pin.extras)
        return LockedRepo(
            reference=text,
            commit=pin.commit,
            validated=pin.validated,
            tree=checkout.tree,
            extras=extras,
            ref=pin.ref_name,
        )

    def _key(self, reference: Reference, extras: Sequence[str]) -> Key:
        text = str(reference)
        if reference.source == "local":
            try:
                inside = Path(reference.location).relative_to(self.path.parent).as_posix()
            except ValueError:
                pass
            else:
                inside = "" if inside == "." else inside
                if reference.ref is None:
                    text = f"./{inside}"
                else:
                    behind = text.removeprefix(f"git+file://{quote(reference.location, safe='/')}")
                    text = f"{_CLONE_HERE}{quote(inside, safe='/')}{behind}"
        return text, tuple(sorted(set(extras)))

    def _read(self) -> Entries:
        try:
            # NONBLOCK: a FIFO would hang.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._unusable("read", error) from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise self._damaged("it is no regular file")
            seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            last = self._read_last
            if last is not None and last[0] == seen:
                return last[1]
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                content = stream.read(LIMIT_BYTES + 1)
        except OSError as error:
            raise self._unusable("read", error) from error
        finally:
            os.close(descriptor)
        try:
            entries = decode_lock(content)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        if time.time_ns() - status.st_ctime_ns > _RACY_NS:
            self._read_last = (seen, entries)
        return entries

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            if not self.path.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, f"there is no directory {self.path.parent}")
            with locked(self.path.parent, f".{self.path.name}.lock"):
                yield
        except (OSError, NotImplementedError) as error:  # the second is filelock's word for a disk without locks
            raise self._unusable("written", error) from error

    def _write(self, entries: Entries) -> None:
        """Replace the file; under the lock."""
        try:
            content = encode_lock(entries)
        except ValueError as error:
            raise TrustError(f"the lockfile {self._shown} cannot be written: {error}") from error
        stale = re.compile(re.escape(f".{self.path.name}-") + "[0-9a-f]{16}")
        for path in self.path.parent.iterdir():
            if stale.fullmatch(path.name):  # a killed writer's
                path.unlink(missing_ok=True)
        staging = self.path.with_name(f".{self.path.name}-{secrets.token_hex(8)}")
        try:
            with staging.open("xb") as stream:
                if self.path.exists():
                    os.fchmod(stream.fileno(), stat.S_IMODE(self.path.stat().st_mode))
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            staging.replace(self.path)
        finally:
            staging.unlink(missing_ok=True)

    # What is said.

    @property
    def _shown(self) -> str:
        return printable(str(self.path), newlines=False)

    def _command(self, reference: Reference, extras: Sequence[str], *flags: str) -> str:
        parts = ["isohub", "lock", *flags, str(reference), *(f"--{extra}" for extra in extras)]
        return printable(shlex.join(parts) + self._option, newlines=False)

    @property
    def _option(self) -> str:
        return "" if self.path == Path.cwd() / LOCKFILE else f" --lockfile {shlex.quote(str(self.path))}"

    def _absent(
        self, reference: Reference, extras: Sequence[str], part: WeightsUrl | str | None = None
    ) -> LockMismatchError:
        key = self._key(reference, extras)
        entries = self._read()
        named = printable(_named(*key), newlines=False)
        if not os.path.lexists(self.path):
            said = f"{named} is not locked: there is no lockfile {self._shown}"
            hint = self._command(reference, key[1])
        elif part is not None:
            said = f"{part}, which {named} runs on, is not locked in {self._shown}"
            if isinstance(part, WeightsUrl):
                said = f"{part.shown}, which {named} downloads, is not locked in {self._shown}"
            hint = "load it once with the lockfile and without frozen, and review what that adds"
        else:
            said = f"{named} is not locked in {self._shown}"
            near = [_named(*known) for known in sorted(entries) if known[0] == key[0]]
            near = near or near_names(key[0], sorted({text for text, _ in entries}))
            said += f", where there is {', '.join(printable(name, newlines=False) for name in near)}" if near else ""
            hint = self._command(reference, key[1])
        return LockMismatchError(
            said,
            hint=hint,
            reference=key[0],
            what="reference" if part is None else "weights" if isinstance(part, WeightsUrl) else "environment",
            got=key[0] if part is None else part.shown if isinstance(part, WeightsUrl) else part,
            lockfile=str(self.path),
            repo=f"{reference.owner}/{reference.repo}",
        )

    def _mismatch(
        self,
        reference: Reference,
        extras: Sequence[str],
        what: str,
        expected: str,
        got: str,
        url: str | None = None,
    ) -> LockMismatchError:
        text = self._key(reference, extras)[0]
        subject = text if url is None else f"{text}: {url}"
        return LockMismatchError(
            printable(f"{subject} is not what {self.path} locks: {what} {got}, expected {expected}", newlines=False),
            hint=f"look at what changed before you lock it anew: {self._command(reference, extras, '--upgrade')}",
            reference=text,
            what=what,
            expected=expected,
            got=got,
            lockfile=str(self.path),
            repo=f"{reference.owner}/{reference.repo}",
        )

    def _damaged(self, why: str) -> TrustError:
        return TrustError(
            f"the lockfile {self._shown} cannot be relied on: {why}; nothing is loaded by it",
            hint="take it from version control again, or move it away and lock again: isohub lock REPO",
        )

    def _unusable(self, done: str, error: OSError | NotImplementedError) -> SourceUnavailableError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = "make it readable, or name another: --lockfile PATH"
        if done == "written":
            hint = "name a file in a directory that can be written: --lockfile PATH"
            if gives_no_locks(error):
                hint = "this file system gives no locks: name a file on a local disk: --lockfile PATH"
        return SourceUnavailableError(
            f"the lockfile {self._shown} cannot be {done}: {printable(reason, newlines=False)}", hint=hint
        )


def _is_directory(reference: Reference) -> bool:
    return reference.source == "local" and reference.ref is None


def _named(text: str, extras: Sequence[str]) -> str:
    return f"{text} with {' and '.join(extras)}" if extras else text
