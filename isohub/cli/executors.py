"""Where a command's work is done: on this machine, or with ``--ray`` on a cluster.

Side: caller. Trust: the user's own options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from isohub.errors import IsohubError

if TYPE_CHECKING:
    from isohub.execution.executor import Executor
    from isohub.hub import Session

__all__ = ["as_usage", "check_executor", "executor_of", "ray_option"]

_F = TypeVar("_F", bound=Callable[..., Any])


def ray_option(command: _F) -> _F:
    """--ray, for what can be done on a cluster."""
    return click.option("--ray", metavar="ADDRESS", help="Do it on this Ray cluster: auto, or host:port.")(command)


def check_executor(workers: int | None, ray: str | None) -> None:
    """Refuse what belongs to different places.

    Raises:
        click.UsageError: Both were given.
    """
    if ray is not None and workers is not None:
        raise click.UsageError("--workers is for this machine; a cluster places as many as it has room for")


def executor_of(session: Session, workers: int | None, ray: str | None) -> Executor:
    """What ``--workers`` and ``--ray`` stand for."""
    if ray is None:
        from isohub.execution.executor import LocalExecutor

        return LocalExecutor(workers, session)
    from isohub.distributed import RayExecutor

    return RayExecutor(ray, session=session)


def as_usage(error: Exception) -> Exception:
    """A mistake of the user's as words; isohub's own errors are shown by `main`."""
    return error if isinstance(error, IsohubError) else click.UsageError(str(error))
