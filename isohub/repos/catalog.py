"""From what a user wrote to a checkout, under one session's rules: offline, lockfile, extras.

The store knows commits, the lockfile knows what they have to be; here is the order in which they are
asked. Runs in the caller; executes nothing of a repo's.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isohub.errors import SourceUnavailableError
from isohub.repos.pins import Checkout
from isohub.repos.reference import SourceName, parse

if TYPE_CHECKING:
    from pathlib import Path

    from isohub.repos.lockfile import Lockfile
    from isohub.repos.pins import Pin

__all__ = ["Catalog", "Wanted", "is_offline"]

_log = logging.getLogger("isohub.repos")
#: What means no; everything else that ISOHUB_OFFLINE may hold means yes.
_OFF = frozenset({"", "0", "false", "no", "off"})
_TRIES = 3


@dataclass(frozen=True)
class Wanted:
    """What every way into a repo is given.

    Attributes:
        repo: The reference, as the user wrote it; or a checkout, for exactly that commit.
        source: How it is to be read; None decides by its form.
        force_reload: Ask the source again and download again.
        skip_validation: Accept a commit that is not shown to belong to the repo.
        verbose: Show progress on a terminal.
        submodules: Bring them; None leaves that to the catalog.
        lfs: Bring the files behind Git LFS pointers; None leaves that to the catalog.
    """

    repo: str | os.PathLike[str] | Checkout
    source: SourceName | None = None
    force_reload: bool = False
    skip_validation: bool = False
    verbose: bool = True
    submodules: bool | None = None
    lfs: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, str):  # torch.hub takes it in any case of letters
            object.__setattr__(self, "source", self.source.lower())


def is_offline(offline: bool | None) -> bool:
    """Whether the network may not be used: what was said, else ``ISOHUB_OFFLINE``."""
    return os.environ.get("ISOHUB_OFFLINE", "").strip().lower() not in _OFF if offline is None else offline


class Catalog:
    """Checkouts under a session's rules.

    Args:
        root: The store's directory.
        offline: Use the cache alone.
        lockfile: What commits and trees have to be; None binds nothing.
        submodules: Bring them where nothing else is said.
        lfs: Bring the files behind LFS pointers where nothing else is said.
    """

    def __init__(
        self,
        root: Path,
        *,
        offline: bool = False,
        lockfile: Lockfile | None = None,
        submodules: bool = False,
        lfs: bool = False,
    ) -> None:
        # Once a repo is asked for, by when a zygote may have been started.
        from isohub.repos.store import Store  # noqa: PLC0415

        self.store = Store(root, offline=offline)
        self.lockfile = lockfile
        self._submodules = submodules
        self._lfs = lfs

    def checkout(self, wanted: Wanted) -> Checkout:
        """Resolve and fetch, or take from the cache.

        Raises:
            InvalidReferenceError, FetchError: It cannot be brought.
            LockMismatchError: It is not what the lockfile names.
        """
        checkout, held = self.hold(wanted)
        if held is not None:
            os.close(held)
        return checkout

    def hold(self, wanted: Wanted) -> tuple[Checkout, int | None]:
        """A checkout that nothing removes as long as the descriptor, if there is one, stays open.

        Raises: as `checkout`.
        """
        pin, locked = self._pin(wanted)
        for attempt in range(_TRIES):
            try:
                checkout = self.store.fetch(
                    pin, force_reload=wanted.force_reload and attempt == 0, progress=wanted.verbose
                )
            except SourceUnavailableError as error:
                if locked is None or error.status not in (404, 410):
                    raise
                raise SourceUnavailableError(
                    f"{error.message}; {locked} locks this commit for {pin.reference}",
                    hint=f"if its history was rewritten: isohub lock --upgrade '{pin.reference}' --lockfile {locked}",
                    **error.fields,
                ) from error
            try:
                held = self.store.hold(checkout)
            except FileNotFoundError:
                _log.info("%s was removed by somebody; bringing it again", pin.name)
                continue
            try:
                if self.lockfile is not None:
                    checkout = self.store.measured(checkout)
                    self.lockfile.check(checkout)
            except BaseException:
                if held is not None:
                    os.close(held)
                raise
            return checkout, held
        raise SourceUnavailableError(
            f"{pin.name} is removed from {self.store.root} as soon as it is there",
            hint="is `isohub cache rm` or `prune` running in a loop?",
            reference=str(pin.reference),
        )

    def _pin(self, wanted: Wanted) -> tuple[Pin, Path | None]:
        """The pin, and the lockfile that names it."""
        if isinstance(wanted.repo, Checkout):
            return wanted.repo.pin, None  # `hold` holds it against the lockfile
        reference = parse(wanted.repo, wanted.source)
        submodules = self._submodules if wanted.submodules is None else wanted.submodules
        lfs = self._lfs if wanted.lfs is None else wanted.lfs
        extras = ("lfs",) * lfs + ("submodules",) * submodules
        if reference.source == "local" and reference.ref is None:
            extras = ()  # the directory as it stands
        locked = None if self.lockfile is None else self.lockfile.pin(reference, extras)
        if locked is not None and self.lockfile is not None:
            return self.store.shown(locked), self.lockfile.path
        pin = self.store.resolve(
            reference,
            force_reload=wanted.force_reload,
            skip_validation=wanted.skip_validation,
            extras=extras,
        )
        return pin, None
