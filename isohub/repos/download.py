"""Downloads: one URL into one file, and several at once.

What a transfer checks and keeps is in `isohub.repos.transfer`. Locks are the caller's: one process at a
time may write to a path. ``file://`` is not asked for. Runs in the caller; executes nothing.
"""

from __future__ import annotations

import contextlib
import queue
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from isohub.repos.transfer import Downloaded, Transfer, Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from isohub.repos.http import HttpClient

__all__ = ["Downloaded", "Wanted", "download", "download_all"]


def download(
    client: HttpClient,
    url: str,
    into: Path,
    *,
    name: str,
    limit_bytes: int,
    progress: bool = False,
    hash_prefix: str | None = None,
    sha256: str | None = None,
    if_none_match: str | None = None,
) -> Downloaded:
    """Download a URL into a file; the arguments are as in `Wanted`.

    Raises:
        SourceUnavailableError: The server or the network failed. What came stays if it can be continued.
        IntegrityError: It is larger than allowed, or its hash is another. Nothing stays.
        OSError: The disk refused.
    """
    wanted = Wanted(url, into, name, limit_bytes, progress, hash_prefix, sha256, if_none_match)
    return Transfer(client, wanted).run()


def download_all(
    make_client: Callable[[], HttpClient], wanted: Sequence[Wanted], *, workers: int = 4
) -> list[Downloaded]:
    """Download several files at once.

    Args:
        make_client: Gives a client for each thread; closed at the end.
        wanted: With different paths.
        workers: How many at once.

    Returns:
        In the order of `wanted`.

    Raises:
        FetchError: The first failure, as `download` raises it. The others are ended.
    """
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(make_client()) for _ in range(min(workers, len(wanted)))]
        if not clients:
            return []
        free: queue.SimpleQueue[HttpClient] = queue.SimpleQueue()
        for client in clients:
            free.put(client)
        failures: list[BaseException] = []

        def run(one: Wanted) -> Downloaded:
            client = free.get()
            try:
                return Transfer(client, one).run()
            except BaseException as error:
                failures.append(error)  # before the others fail of it
                _abort(clients)
                raise
            finally:
                free.put(client)

        with ThreadPoolExecutor(len(clients), thread_name_prefix="isohub-download") as pool:
            futures = [pool.submit(run, one) for one in wanted]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # all are done; or one failed; or Ctrl-C came
                _abort(clients)
        if failures:
            raise failures[0]
        return [future.result() for future in futures]


def _abort(clients: Sequence[HttpClient]) -> None:
    for client in clients:
        client.abort()
