"""Downloads for one worker: what its repo asks torch.hub for, the caller brings.

Rules:

1. Nobody's credentials go along: an address that a repo names must not fetch what only the user may see. A
   repository for a nested ``torch.hub.load`` is one that was told to somebody without credentials.
2. A file is asked for where the policy names its host, at every redirect, and at addresses that a public host has;
   what is in the store already is given out on the same terms. See `isohub.network.border`. Where the caller's
   environment names a proxy (HTTPS_PROXY), names are checked all the same and addresses are the proxy's to judge.
3. A file is kept under (repo, URL). A confined worker may read its repo's directory of weights, and is told the path
   and which file that is, so that it gets no descriptor by which a file of the store could be changed. Others get
   one to copy from, and if the file is large the path of its content. A repository is an archive in a descriptor.
4. What a lockfile names must be what comes. A difference is the caller's to hear, whatever the repo makes of it.
5. What cannot be brought is an answer like any other; the worker raises what torch.hub would.
6. It works in a thread of its own. Whoever waits goes with the question's time, the worker's end or Ctrl-C: a
   server that drips bytes holds nobody. What came stays to be resumed.

Refuses: hosts that the policy does not name, addresses that are not of the web, directories and clones of this
machine. The policy is of files; a nested repository comes from the GitHub server alone.
Side: caller. Trust: every wish is the worker's.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isohub.errors import IntegrityError, IsohubError, LockMismatchError, SourceUnavailableError, printable
from isohub.network.border import NetworkBorder
from isohub.network.errand import Errand
from isohub.repos.cancellation import Cancellation
from isohub.sandbox.hosts import WEIGHT_HOSTS, HostPolicy

if TYPE_CHECKING:
    from isohub.repos.lockfile import Lockfile
    from isohub.repos.pins import Pin
    from isohub.repos.weights import Weights
    from isohub.repos.weights_entry import WeightsFile
    from isohub.session.replies import Want

__all__ = ["Broker", "Given"]

# A copy of so much takes about half a second, and harms nobody who writes to it; more is a link to the store.
_LINKED_BYTES = 1 << 30
# A confined worker's copies are in memory, and count to its disk.
_LINKED_BYTES_CONFINED = 64 << 20
# RFC 9110, section 4.1, asks for 8000 octets of URL.
_ADDRESS_LIMIT_CHARS = 8192
# More than any hubconf has; each may be a request to somebody's server, and bytes on the caller's disk.
_MOST_WISHES = 10_000
_WELL_KNOWN = HostPolicy(WEIGHT_HOSTS)


@dataclass(frozen=True)
class Given:
    """The answer to a wish.

    Attributes:
        name: For a repository's directory.
        path: Of a file that is to be opened, or is too large to be copied without need; else None.
        file: Device and inode of what must be there, for a worker that is to open it; else None.
        linked: Whether the worker makes a link to it, and no copy.
        descriptor: Of the file, or of the repository's archive; `drop` closes it.
        error: What the worker raises instead.
        refusal: What the caller has to hear, once the worker has answered.
    """

    name: str | None = None
    path: Path | None = None
    file: tuple[int, int] | None = None
    linked: bool = False
    descriptor: int | None = None
    error: dict[str, Any] | None = None
    refusal: IsohubError | None = None

    def message(self) -> dict[str, Any]:
        """The fields of a ``give``. A path is bytes, in hexadecimal: it need not be text."""
        path = None if self.path is None else os.fsencode(self.path).hex()
        return {"name": self.name, "path": path, "file": self.file, "linked": self.linked, "error": self.error}

    def drop(self) -> None:
        """Close the descriptor."""
        if self.descriptor is not None:
            os.close(self.descriptor)

    @classmethod
    def failed(cls, error: IsohubError) -> Given:
        """For something that could not be brought."""
        status = getattr(error, "status", None)
        kind = "network" if status is None else "http"
        if isinstance(error, IntegrityError) or getattr(error, "part", None) == "hash":
            kind = "hash"
        refusal = error if isinstance(error, LockMismatchError) else None
        return cls(error={"kind": kind, "status": status, "message": str(error)}, refusal=refusal)

    @classmethod
    def interrupted(cls) -> Given:
        """For a caller that does not wait any more."""
        return cls(error={"kind": "network", "status": None, "message": "the caller was interrupted"})

    @classmethod
    def refused(cls) -> Given:
        """For a worker that has no broker."""
        return cls(error={"kind": "network", "status": None, "message": "this worker may download nothing"})


class Broker:
    """Brings things for one worker.

    Args:
        root: The store's directory.
        pin: Whose code runs in the worker.
        offline: Bring only what is in the store.
        lockfile: What weights have to be.
        revalidate: Ask the servers again for what is in the store.
        hosts: Where files may come from, besides the server that the repo itself came from; None for a worker that
            has the caller's own network.
        held: A descriptor that says that the checkout is in use; the broker's from here on.
        granted: Whether the worker may read its repo's directory of weights itself.
    """

    def __init__(
        self,
        root: Path,
        pin: Pin,
        *,
        offline: bool,
        lockfile: Lockfile | None,
        revalidate: bool = False,
        hosts: HostPolicy | None = _WELL_KNOWN,
        held: int | None = None,
        granted: bool = False,
    ) -> None:
        self._root = root
        self._pin = pin
        self._scope = (pin.reference.host, pin.reference.owner, pin.reference.repo)
        self._offline = offline
        self._lockfile = lockfile
        self.revalidate = revalidate
        self._granted = granted
        self._border = None if hosts is None else NetworkBorder(hosts, who=pin.name, own=pin.reference.location)
        self._held = [] if held is None else [held]
        self._kept: set[str] = set()  # contents that this worker has links to
        self._lock = threading.Lock()
        self._closed = False
        self._wishes = 0

    def send(self, want: Want, *, verbose: bool) -> Errand[Given]:
        """Begin to do what a worker wants, in another thread.

        Args:
            want: Trust: worker.
            verbose: Whether progress may be shown.
        """
        cancellation = Cancellation()

        def work() -> Given:
            with cancellation.scope():
                return self._bring(want, verbose=verbose)

        return Errand(work, Given.drop, cancellation.cancel)

    def _bring(self, want: Want, *, verbose: bool) -> Given:
        try:
            self._wishes += 1
            if self._wishes > _MOST_WISHES:
                raise IntegrityError(f"more than {_MOST_WISHES} downloads of one worker")
            if len(want.address) > _ADDRESS_LIMIT_CHARS:
                raise IntegrityError(f"an address of {len(want.address)} characters; at most {_ADDRESS_LIMIT_CHARS}")
            if want.what == "repo":
                return self._repo(want, verbose=verbose)
            return self._file(want, verbose=verbose and want.progress)
        except IsohubError as error:
            return Given.failed(error)
        except OSError as error:
            text = f"{want.what} cannot be brought: {error.strerror or error}"
            return Given.failed(SourceUnavailableError(text, hint="is there room in the cache and in TMPDIR?"))

    def _file(self, want: Want, *, verbose: bool) -> Given:
        # Most workers ask for nothing; requests and what else downloads comes with the first that does.
        from isohub.repos.connections import as_asked
        from isohub.repos.credentials import Credentials
        from isohub.repos.weights import Weights
        from isohub.repos.weights_url import parse_weights_url

        lock, reference, extras = self._lockfile, self._pin.reference, self._pin.extras
        locked = None if lock is None else lock.weights(reference, extras, want.address)
        weights = Weights(self._root, offline=self._offline, border=self._border)
        if self._border is not None:
            self._border.check(as_asked(parse_weights_url(want.address).text))
        with weights.held(self._scope):
            try:
                found = weights.fetch(
                    want.address,
                    self._scope,
                    hash_prefix=want.hash_prefix,
                    sha256=None if locked is None else locked.sha256,
                    progress=verbose,
                    credentials=Credentials(anonymous=True),
                    revalidate=self.revalidate,
                )
            except IntegrityError as error:
                if lock is not None and locked is not None and error.expected == locked.sha256 and error.got:
                    lock.check_weights(reference, extras, want.address, error.got, locked.bytes)
                raise
            if lock is not None:
                found = weights.measured(found)  # what is there now, whatever its entry says
                lock.check_weights(reference, extras, want.address, found.sha256, found.bytes)
            if self._granted:
                status = found.path.stat()
                linked = found.bytes >= _LINKED_BYTES_CONFINED
                return Given(path=found.path, file=(status.st_dev, status.st_ino), linked=linked)
            descriptor = os.open(found.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            if found.bytes < _LINKED_BYTES:
                return Given(descriptor=descriptor)
            try:
                self._keep(weights, found)
            except BaseException:
                os.close(descriptor)
                raise
            return Given(descriptor=descriptor, path=found.blob, linked=True)

    def _repo(self, want: Want, *, verbose: bool) -> Given:
        import tarfile
        import tempfile

        from isohub.repos.credentials import Credentials
        from isohub.repos.reference import parse
        from isohub.repos.store import Store

        store, lock = Store(self._root, offline=self._offline, credentials=Credentials(anonymous=True)), self._lockfile
        reference = parse(want.address, "github")
        pin = store.resolve(reference)  # first: it shows that the repository is anybody's to have
        if lock is not None:
            pin = lock.pin(reference) or pin
        checkout = store.fetch(pin, progress=verbose)
        if lock is not None:
            lock.check(store.measured(checkout))
        with tempfile.TemporaryFile(prefix="isohub-") as stream:
            with tarfile.open(fileobj=stream, mode="w") as archive:
                archive.add(checkout.path, arcname=".")
            stream.seek(0)
            # Another open file description: the worker can only read, and from the start.
            descriptor = os.open(f"/proc/self/fd/{stream.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
        name = f"{pin.reference.owner}_{pin.reference.repo}_{pin.commit}"
        return Given(name=printable(name, newlines=False), descriptor=descriptor)

    def _keep(self, weights: Weights, found: WeightsFile) -> None:
        """Keep `cache rm` and `prune` from a content that the worker gets a link to."""
        with self._lock:
            if self._closed or found.sha256 in self._kept:
                return
            descriptor = weights.hold_blob(found)
            self._kept.add(found.sha256)
            if descriptor is not None:
                self._held.append(descriptor)

    def close(self) -> None:
        """Let go of what the worker used."""
        with self._lock:
            self._closed = True
            while self._held:
                os.close(self._held.pop())
