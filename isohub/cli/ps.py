"""``isohub ps``: the workers of all of this user's sessions on this machine. None of them is asked.

Side: caller. Trust: names and phases hold texts of repos; `output` escapes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from isohub.cli.options import Settings, output_options, pass_settings
from isohub.cli.output import Table
from isohub.cli.units import show_age, show_size

if TYPE_CHECKING:
    from isohub.session.worker_info import WorkerInfo

__all__ = ["ps"]

_COLUMNS = ("worker", "pid", "session", "age", "calls", "cpu", "memory", "state", "confinement", "runs on")

#: Of an environment's key, as of a commit.
_SHOWN_OF_KEY = 12


@click.command("ps")
@output_options
@pass_settings
def ps(settings: Settings) -> None:
    """List the workers of all your sessions on this machine.

    Memory is what is the worker's alone and its share of what it has in common with others, where the kernel tells;
    after ~ it is all that it has mapped and present. With --quiet: numbers of processes.
    """
    from isohub.session.worker_info import all_workers

    found = all_workers()
    table = Table(_COLUMNS, [_row(worker) for worker in found], right=frozenset({1, 2, 3, 4, 5, 6}))
    settings.output.result(
        {"workers": [worker.to_dict() for worker in found]},
        table if found else "no workers",
        quiet=[str(worker.pid) for worker in found],
    )


def _row(worker: WorkerInfo) -> tuple[str, ...]:
    missing = worker.confinement.missing
    return (
        worker.name,
        str(worker.pid),
        str(worker.session_pid),
        _age(worker.age_s),
        str(worker.calls),
        "?" if worker.cpu_s is None else f"{worker.cpu_s:.1f} s",
        _memory(worker),
        f"{worker.doing or 'idle'} {_age(worker.state_s)}",
        f"without {', '.join(missing)}" if missing else "full",
        f"{worker.environment[:_SHOWN_OF_KEY]}, Python {worker.python}, torch {worker.torch}",
    )


def _memory(worker: WorkerInfo) -> str:
    if worker.pss_bytes is not None:
        return show_size(worker.pss_bytes)
    return "?" if worker.rss_bytes is None else f"~{show_size(worker.rss_bytes)}"


def _age(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else show_age(seconds)
