"""An HTTP proxy for one worker that has no network: it leads to the hosts that a policy names, and nowhere else.

    CONNECT host:port HTTP/1.1            a tunnel; what goes through it is between the worker and that server
    GET http://host[:port]/path HTTP/1.1  one request, written anew; also HEAD, POST, PUT, PATCH, DELETE, OPTIONS

Rules:

1. It serves a listening socket that the caller was given, which may live in another network namespace. Connections
   to servers are made in the caller's own.
2. One request a connection. What comes after it is not read, and no second target can be named.
3. The name that the policy allowed is the name that is resolved, once; the addresses that the policy allowed are
   those that are dialled. See `isohub.network.border`, whose log has each decision, and at the end the bytes.
4. Whatever a peer does, a connection ends: its head has a time, silence has a time, bytes have a number. So many
   connections are served at once; others wait in the kernel's queue, which is bounded too.
5. `close` ends all of it at once. No thread stays but one that waits for a resolver: nothing can end that, it touches
   nothing, and there are at most as many as connections.

Where the caller's environment names a proxy (HTTPS_PROXY, HTTP_PROXY, NO_PROXY as `requests` reads them), connections
go through that. The name is decided on here all the same, and that very name is what the proxy is asked for. But the
proxy resolves it: what address it leads to is the proxy's to judge, and its own address is the caller's word. A name
that the policy allows can then lead to an address of the network that the proxy is in.

What is within a tunnel cannot be seen: a server that the policy names may itself lead further, as a proxy does, or a
content network that serves another name than the one it was dialled by.

It refuses: everything that is not one of the two forms; chunked requests; proxies in the environment that are no plain
HTTP ones.
Side: caller, in daemon threads. Trust: peers are a worker's, answers are the network's.
Source: RFC 9110, 9.3.6 (CONNECT) and 15 (status codes); RFC 9112, 3.2.2 (absolute form).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time

from isohub.errors import printable
from isohub.network.border import NetworkBorder
from isohub.network.dialer import Dialer
from isohub.network.exchange import Exchange
from isohub.network.relay import ClosedError, Meter, ProxyLimits, Waiter
from isohub.sandbox.hosts import HostPolicy

__all__ = ["AllowListProxy", "ProxyLimits"]

_log = logging.getLogger("isohub.network")
# What accept(2) may say that passes, or was meant for the connection that it did not give.
_PASSING = frozenset(
    {
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EMFILE, errno.ENETDOWN, errno.ENETUNREACH, errno.ENFILE,
        errno.ENOBUFS, errno.ENOMEM, errno.ENONET, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EPERM, errno.EPROTO,
    }
)  # fmt: skip
_PAUSE_S = 0.1


class AllowListProxy:
    """Serves from its construction until `close`; a context manager.

    Args:
        listener: A TCP socket that listens; the proxy's from here on.
        hosts: What it leads to.
        who: Whose requests they are, for the log.
        limits: What it gives at most.

    Raises:
        ValueError: The socket does not listen; it stays the caller's.
    """

    def __init__(
        self, listener: socket.socket, hosts: HostPolicy, *, who: str = "worker", limits: ProxyLimits | None = None
    ) -> None:
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError("expected a socket that listens")
        self._limits = limits or ProxyLimits()
        self._who = printable(who, limit_chars=200, newlines=False)
        self._listener = listener
        host, port = listener.getsockname()[:2]
        self._address = (str(host), int(port))
        self._sent = Meter(self._limits.total_sent_bytes)
        self._received = Meter(self._limits.total_received_bytes)
        self._slots = threading.Semaphore(self._limits.connections)
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        listener.settimeout(0)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waiter = Waiter(self._wake)
        self._dialer = Dialer(NetworkBorder(hosts, who=who), self._waiter, self._limits, self._who)
        self._acceptor = threading.Thread(target=self._accept, name="isohub-proxy", daemon=True)
        try:
            self._acceptor.start()
        except BaseException:
            os.close(self._wake)
            raise

    def __enter__(self) -> AllowListProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens, in the network namespace of the listener."""
        return self._address

    @property
    def sent_bytes(self) -> int:
        """Sent to servers so far."""
        return self._sent.count_bytes

    @property
    def received_bytes(self) -> int:
        """Received from servers so far."""
        return self._received.count_bytes

    def close(self) -> None:
        """End every connection, and wait until they have; twice is once."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        os.eventfd_write(self._wake, 1)
        self._slots.release()  # if the acceptor waits for one
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # whoever shares it cannot hold us in accept(2)
        self._acceptor.join()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._listener.close()
        os.close(self._wake)

    def _accept(self) -> None:
        while True:
            self._slots.acquire()
            try:
                self._waiter.wait({self._listener.fileno(): select.POLLIN}, None)
                client, _ = self._listener.accept()
            except ClosedError:
                return
            except (BlockingIOError, ConnectionAbortedError):  # it went, or somebody else took it
                self._slots.release()
                continue
            except OSError as error:
                if self._closed:
                    return
                if error.errno not in _PASSING:
                    _log.warning("%s: the proxy accepts no more: %s", self._who, error.strerror)
                    return
                self._slots.release()
                time.sleep(_PAUSE_S)
                continue
            thread = threading.Thread(target=self._serve, args=(client,), name="isohub-proxy-connection", daemon=True)
            with self._lock:
                self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # no thread to be had
                client.close()
                self._forget(thread)
                time.sleep(_PAUSE_S)

    def _forget(self, thread: threading.Thread) -> None:
        with self._lock:
            self._threads.discard(thread)
        self._slots.release()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                client.settimeout(0)
                Exchange(client, self._dialer, self._sent, self._received).serve()
        except (ClosedError, OSError):  # this proxy ends, or the peer has
            pass
        finally:
            self._forget(threading.current_thread())
