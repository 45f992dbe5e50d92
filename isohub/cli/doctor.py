"""``isohub doctor``: what this machine can give a worker, tried.

Side: caller.
"""

from __future__ import annotations

import click

from isohub.cli.options import Settings, output_options, pass_settings

__all__ = ["doctor"]


@click.command("doctor", short_help="Say what this machine can give a worker, by trying it.")
@click.option("--require", type=click.Choice(["default", "all"]), default="default", help="What has to hold.")
@output_options
@pass_settings
def doctor(settings: Settings, /, require: str) -> None:
    """Confine a process, have it try what it must not do, and say what this machine can give a worker.

    The exit status is 1 where untrusted repos are refused; with --require all, where any layer is missing.
    """
    from isohub.hub import doctor as diagnose

    found = diagnose()
    holds = found.all_holds if require == "all" else found.default_holds
    settings.output.result(found.to_dict(), str(found), quiet=[*found.active])
    click.get_current_context().exit(0 if holds else 1)
