"""Where code comes from: one `Source` for each kind of place, and the choice between them.

A source resolves references to pins and writes a pin's tree. It holds no cache and takes no
lock; that is the store's work. Runs in the caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from isohub.errors import OfflineError

if TYPE_CHECKING:
    from pathlib import Path

    from isohub.repos.credentials import Credentials
    from isohub.repos.pins import Pin
    from isohub.repos.reference import Reference

__all__ = ["Source", "source_for"]


class Source(Protocol):
    """A kind of place that code comes from."""

    def resolve(self, reference: Reference, *, skip_validation: bool = False) -> Pin:
        """Find the commit that a reference means now.

        Args:
            reference: What to look for. Trust: the caller.
            skip_validation: Accept a SHA that was not shown to belong to the repository.

        Raises:
            RefNotFoundError: The repository has no such ref. `near` names what it has.
            SourceUnavailableError: It could not be asked.
        """
        ...

    def fetch(self, pin: Pin, into: Path, *, progress: bool = False) -> None:
        """Write a pin's tree into a directory that exists and is empty.

        Temporary files go beside `into`, never elsewhere.

        Args:
            pin: What to bring.
            into: An empty directory of the caller's, in a directory that is also the caller's.
            progress: Draw a bar on stderr, if that is a terminal.

        Raises:
            IntegrityError: What arrived is not that commit, or may not be unpacked.
            SourceUnavailableError: It could not be brought.
        """
        ...


def source_for(reference: Reference, credentials: Credentials | None = None, *, offline: bool = False) -> Source:
    """The source that serves a reference.

    Args:
        reference: What will be asked for.
        credentials: Whom to ask as; the user unless given.
        offline: Ask nothing of the network. What a clone lacks is an `OfflineError` then.

    Raises:
        OfflineError: The reference is of a server, and the network may not be used.
    """
    if offline and reference.source != "local":
        raise OfflineError(
            f"{reference} is on a server, and the network may not be used",
            hint=f"isohub fetch {reference}",
            reference=str(reference),
            url=reference.location,
        )
    # Imported late: a local directory needs neither an HTTP client nor a git implementation.
    if reference.source == "github":
        from isohub.repos.sources.github import GitHubSource  # noqa: PLC0415

        return GitHubSource(credentials)
    if reference.source == "git":
        from isohub.repos.sources.git import GitSource  # noqa: PLC0415

        return GitSource(credentials)
    if reference.ref is not None:
        from isohub.repos.sources.git import CloneSource  # noqa: PLC0415

        return CloneSource(credentials, offline=offline)
    from isohub.repos.sources.local import DirectorySource  # noqa: PLC0415

    return DirectorySource()
