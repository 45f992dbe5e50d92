"""Iterators that nobody holds any more end in their worker at once, and not with the next question.

A ``for`` that is left by ``break`` drops its iterator. The worker hears of that with the next question, whatever that
is; where none comes, a thread asks one that does nothing, so that what a generator has after ``finally`` runs.

Side: caller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from isohub.errors import IsohubError, ProtocolError
from isohub.session.question import Faulted, Question

if TYPE_CHECKING:
    from isohub.session.link import Remote

__all__ = ["prompt_end"]


def prompt_end(remote: Remote) -> Callable[[], None] | None:
    """What to do once the handle is gone, in the session's thread; None where that is nothing special."""
    if remote.sort not in ("iterator", "stream"):
        return None
    worker, pool, timeout_s = remote.worker, remote.link.pool, remote.link.timeout_s

    def tidy() -> None:
        try:
            if remote.prompt and worker.alive:
                question = Question("tidy", (), "closing an iteration", timeout_s=timeout_s)
                worker.ask(question, _nothing, _nothing)
        except (IsohubError, Faulted):
            pass  # whoever asks it next is told
        finally:
            pool.drop(worker)

    # The session's thread empties what workers print, and may not wait for one.
    return lambda: threading.Thread(target=tidy, name="isohub-iterations", daemon=True).start()


def _nothing(*_: Any) -> Any:
    raise ProtocolError("a handle where nothing was asked for")
