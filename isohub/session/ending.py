"""What becomes of threads that ask while Python ends.

Python waits for threads that are no daemons, then runs the exit handlers, of which ours ends every worker, then
stops daemons wherever they are. A daemon that asks in between would print the traceback of a `SessionClosedError`
that nobody can do anything about; it ends quietly instead, as by ``sys.exit()``: its ``finally`` blocks run, and
who joins it is not left waiting. The main thread, in an exit handler of the user's, hears the error.

A fork is the other end of a handle: the process that made it has the conversation, and a copy would mix into it.

Side: caller. Source: Python's ``threading._shutdown`` and ``threading.excepthook``, which passes over SystemExit.
"""

from __future__ import annotations

import threading

from isohub.errors import SessionClosedError

__all__ = ["fork_hint", "refused"]


def refused(error: SessionClosedError) -> BaseException:
    """What to raise for a session that is closed: the error, or what ends this thread where Python ends."""
    ending = not threading.main_thread().is_alive()
    return SystemExit() if ending and threading.current_thread().daemon else error


def fork_hint() -> str:
    """What helps who uses a handle in a fork of the process that made it."""
    from torch.utils.data import get_worker_info

    if get_worker_info() is not None:
        return (
            "this is a worker of a DataLoader: num_workers=0 keeps the dataset in the process that loaded the model; "
            "or call isohub.load() in here, at the first __getitem__ or in worker_init_fn"
        )
    return "load the model in the process that uses it, or start that process by 'spawn'"
