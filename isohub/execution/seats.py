"""A model that is to be loaded where the work is done, and what is loaded there.

Side: caller, or the caller's own process on another machine. Trust: `Seat` is the caller's; what a model gives is its
worker's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from isohub.errors import FetchError, IsohubError, WorkerError, printable
from isohub.repos.pins import TREE_PREFIX, Checkout

if TYPE_CHECKING:
    from isohub.execution.executor import Executor, Place
    from isohub.session.link import Remote

__all__ = ["Seat", "Seated", "bring", "failure_text", "reference_text", "seat_of", "take_seat"]

#: A line or two; the whole traceback is in the log of the worker and in `isohub run`.
_TEXT_LIMIT_CHARS = 500


@dataclass(frozen=True)
class Seat:
    """What to load.

    Attributes:
        number: Names it among the others.
        repo: A checkout of this machine's, or a reference to exactly that commit.
        commit: Which commit that has to be.
        name: For people: ``org/repo@1a2b3c4``.
        model: The entrypoint.
        args: Its positional arguments.
        kwargs: Its keywords.
        options: Keywords of `Session.load`: ``seed``, ``sandbox``, ``environment``, ``device``, ``timeout_s``.
        extras: Keywords of `Session.fetch`: ``submodules`` and ``lfs``.
    """

    number: int
    repo: str | Checkout
    commit: str
    name: str
    model: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)


class Seated:
    """What an entrypoint gave.

    Attributes:
        built: A handle, or a structure of handles and values.
        load_s: How long it took to fetch and to build.
        more: What the work that uses it left: a handle to something in the same worker.
    """

    def __init__(self, built: Any, load_s: float) -> None:
        self.built = built
        self.load_s = load_s
        self.more: Any = None

    def remotes(self) -> Iterator[Remote]:
        """What its handles stand for."""
        from isohub.session.recipe import remotes_in

        for _, _, remote in remotes_in(self.built):
            yield remote

    def model(self) -> tuple[Any, Remote | None]:
        """What is called: the first module in what the entrypoint gave, else the first object, else what it gave."""
        from isohub.session.recipe import remotes_in

        found = [(handle, remote) for _, handle, remote in remotes_in(self.built)]
        modules = [pair for pair in found if pair[1].sort == "module"]
        return (modules or found)[0] if found else (self.built, None)

    def close(self) -> None:
        """Give all of it back, which ends its worker."""
        from isohub.session.recipe import remotes_in

        for built in (self.more, self.built):
            for _, _, remote in remotes_in(built):
                remote.close()
        self.more = self.built = None


def seat_of(executor: Executor, checkout: Checkout, number: int, model: str, **rest: Any) -> Seat:
    """The seat of a checkout of this process's.

    Args:
        executor: Where it will be loaded.
        checkout: What to load.
        number: See `Seat`.
        model: The entrypoint.
        **rest: The other attributes of `Seat`.
    """
    pin = checkout.pin
    extras = dict.fromkeys(pin.extras, True)
    repo: str | Checkout = checkout
    if not executor.here:
        repo = reference_text(checkout)
    return Seat(number, repo, checkout.commit, pin.name, model, extras=extras, **rest)


def reference_text(checkout: Checkout) -> str:
    """A reference to exactly this commit, for another machine; of a directory as it stands, its path."""
    pin = checkout.pin
    in_place = pin.commit.startswith(TREE_PREFIX)
    return str(pin.reference if in_place else replace(pin.reference, ref=pin.commit))


def bring(place: Place, seat: Seat) -> Checkout:
    """The seat's checkout, brought to this machine if it is not here.

    Raises:
        FetchError: It cannot be brought, or is not that commit.
    """
    if isinstance(seat.repo, Checkout):
        return seat.repo
    # Whoever made the seat has resolved it, and has seen that the commit is the repo's own.
    checkout = place.session.fetch(seat.repo, skip_validation=True, verbose=False, **seat.extras)
    if checkout.commit != seat.commit:
        raise FetchError(
            f"{seat.repo} is {checkout.commit} on this machine, expected {seat.commit}",
            hint="a directory has to be the same on all machines; a commit of a repo is",
            reference=seat.repo,
        )
    return checkout


def take_seat(place: Place, seat: Seat) -> Seated:
    """What the place has of a seat, loaded if need be.

    Raises: as `Session.load`.
    """
    seated: Seated | None = place.kept.get(seat.number)
    if seated is None:
        began = time.perf_counter()
        checkout = bring(place, seat)
        built = place.session.load(
            checkout, seat.model, *seat.args, entry_kwargs=seat.kwargs, verbose=False, **seat.options
        )
        seated = place.kept[seat.number] = Seated(built, time.perf_counter() - began)
    return seated


def failure_text(error: BaseException) -> tuple[str, str]:
    """The kind of an error, and what it says in a line or two, safe to show."""
    message = error.message if isinstance(error, IsohubError) else str(error)
    kind = getattr(error, "remote_type", None) or type(error).__name__
    if isinstance(error, WorkerError) and getattr(error, "remote_message", None) is not None:
        message = error.remote_message  # type: ignore[attr-defined]
    return printable(str(kind), limit_chars=100, newlines=False), printable(
        message, limit_chars=_TEXT_LIMIT_CHARS, newlines=False
    )
