"""From what a caller wants and what a repo asks for to a `Runtime`: looked up, locked, resolved, built, in that order.

1. What the host meets already is the host: no overlay, and the same zygote.
2. What was resolved before is not resolved again, and what was built before is not built again: neither needs uv or a
   network.
3. With a lockfile exactly the packages that it names are built, or none.
4. What is not honoured is said, once, when it is resolved.

Side: caller. Trust: requirements are a repo's text; see `resolver` for what comes of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from isohub.environments.dependencies import installed_version
from isohub.environments.environment import Environment
from isohub.environments.runtime import HOST, Runtime
from isohub.errors import EnvironmentBuildError

if TYPE_CHECKING:
    from isohub.environments.host import HostPackages
    from isohub.repos.lock_format import LockedPackage
    from isohub.repos.lockfile import Lockfile
    from isohub.repos.outline import Outline
    from isohub.repos.pins import Checkout

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """An environment that is ready.

    Attributes:
        runtime: What a zygote is started on.
        name: `Environment.name`, for people.
        packages: What was built for it, by name; none for the host.
        markers: What environment markers are about there.
        host: The packages that it is over; None for one of its own.
        held: A descriptor that keeps it from being removed; the caller's to close.
    """

    runtime: Runtime
    name: str
    packages: tuple[LockedPackage, ...] = ()
    markers: Mapping[str, str] = field(default_factory=dict)
    host: HostPackages | None = None
    held: int | None = None

    def version(self, name: str) -> str | None:
        """The version of a distribution that a worker on it finds; None if there is none."""
        from packaging.utils import canonicalize_name

        if self.runtime is HOST:
            return installed_version(name)
        wanted = canonicalize_name(name)
        found = next((each.version for each in self.packages if each.name == wanted), None)
        return found if found is not None or self.host is None else self.host.version(name)


def prepare(
    environment: Environment,
    root: Path,
    checkout: Checkout | None,
    outline: Outline | None,
    *,
    offline: bool = False,
    progress: bool = False,
    refresh: bool = False,
    lockfile: Lockfile | None = None,
) -> Prepared:
    """Have an environment built, unless it is.

    Args:
        environment: What is wanted.
        root: Directory of the store.
        checkout: Of the repo that is to run on it; None where `environment` says all of it.
        outline: Of its hubconf; None likewise.
        offline: Ask nobody.
        progress: Show on stderr what takes long, if that is a terminal.
        refresh: Resolve again what was resolved before.
        lockfile: What it has to be; the checkout is in it already.

    Raises:
        EnvironmentBuildError: It cannot be built: a requirement that nothing meets, no such interpreter, no uv.
        LockMismatchError: It cannot be what is locked.
        OfflineError: It was not built before, and nobody may be asked.
        SourceUnavailableError: The index did not answer, or the disk refused.
    """
    if environment.is_host:
        return Prepared(HOST, environment.name)
    from isohub.environments.work import Work, as_locked, check_needs
    from isohub.repos.lock_format import LockedEnvironment

    work = Work(environment, root, checkout, outline, offline=offline, progress=progress, refresh=refresh)
    locked = None
    if lockfile is not None and checkout is not None:
        locked = lockfile.environment(checkout.reference, checkout.pin.extras, environment.name)
    if locked is None:
        packages = work.resolved()
    else:
        assert lockfile is not None
        assert checkout is not None
        packages = as_locked(locked, work, lockfile, checkout)
    try:
        prepared = work.built(packages)
    except EnvironmentBuildError as error:
        if locked is None or lockfile is None or checkout is None or error.stderr_tail is None:
            raise
        expected = f"{len(packages)} packages by their hashes"
        raise lockfile.differs(checkout.reference, checkout.pin.extras, expected, error.stderr_tail) from error
    if locked is not None and lockfile is not None and checkout is not None:
        check_needs(prepared, work, lockfile, checkout)
    if lockfile is not None and checkout is not None and locked is None:
        try:
            fresh = LockedEnvironment(environment.name, work.python, work.target.platform, packages)
            lockfile.add_environment(checkout.reference, checkout.pin.extras, fresh)
        except BaseException:
            if prepared.held is not None:
                os.close(prepared.held)
            raise
    return prepared
