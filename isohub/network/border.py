"""Where requests of a worker's may lead: its policy's decisions, made on names, then on addresses, and logged.

Rules:

1. A name is decided on before anybody is asked for its address: a resolver is a server too.
2. A name is resolved once. What is decided on is what is connected to, in the order that the resolver gave.
3. The server that the repo itself came from is allowed besides, whatever its address: the caller has named it. It is
   that scheme, host and port, and no other.
4. Every decision is in the log `isohub.network`: INFO for allowed, WARNING for refused.

Side: caller. Trust: URLs and targets are the worker's and, by redirects, the network's; so are addresses.
Source: RFC 3986, 3.2 (what the host of a URL is); getaddrinfo(3).
"""

from __future__ import annotations

import logging
import re
import socket
from typing import NoReturn

from isohub.errors import SourceUnavailableError, printable
from isohub.repos.naming import shown
from isohub.sandbox.hosts import Allowed, HostPolicy, Refused, Target, parse_target

__all__ = ["NetworkBorder", "look_up"]

_log = logging.getLogger("isohub.network")
# Anything but visible ASCII is what URL parsers disagree about.
_URL = re.compile(r"(https?)://([^/?#]*)(?:[/?#][!-~]*)?", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}
# What is tried one after the other, each until a timeout.
_ADDRESS_LIMIT = 8


class NetworkBorder:
    """The `isohub.repos.connections.Border` of one worker; also for its proxy.

    Args:
        hosts: What is allowed.
        who: Whose requests they are, for the log.
        own: A URL whose server is allowed besides, or anything else.
    """

    def __init__(self, hosts: HostPolicy, *, who: str, own: str = "") -> None:
        self._hosts = hosts
        self._who = printable(who, limit_chars=200, newlines=False)
        found = _server(own)
        self._own = found if isinstance(found, tuple) else None

    def check(self, url: str) -> None:
        """Refuse a URL whose server may not be asked.

        Raises:
            SourceUnavailableError: It may not. The hint says what would allow it.
        """
        found = _server(url)
        decided = self.refused(found) if isinstance(found, Refused) else self.decide(*found)
        if isinstance(decided, Refused):
            _fail(decided, shown(url))

    def addresses(self, scheme: str, host: str, port: int) -> tuple[str, ...]:
        """Resolve a server's name to the addresses that may be connected to.

        The name is decided on again: it is what a connection was made for, whoever read the URL.

        Raises:
            SourceUnavailableError: There is none that may.
            OSError: It cannot be resolved.
        """
        text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        target = parse_target(text)
        decided = self.refused(target) if isinstance(target, Refused) else self._decided(scheme, target)
        if isinstance(decided, Refused):
            _fail(decided, text)
        found = self.judge(scheme, decided.target, look_up(decided.target))
        if isinstance(found, Refused):
            _fail(found, text)
        return found

    def decide(self, scheme: str, target: Target) -> Allowed | Refused:
        """Whether a target may be asked, by its name; logged.

        Args:
            scheme: ``http``, ``https``, or another word that no server of a repo has.
            target: Trust: worker.
        """
        decided = self._decided(scheme, target)
        if isinstance(decided, Refused):
            return self.refused(decided)
        _log.info("%s: %s is allowed by %s", self._who, target, decided.by)
        return decided

    def judge(self, scheme: str, target: Target, addresses: tuple[str, ...]) -> tuple[str, ...] | Refused:
        """Which addresses of an allowed target may be connected to; logged.

        Args:
            scheme: As for `decide`.
            target: What `decide` allowed.
            addresses: Of `look_up`. Trust: network.
        """
        if (scheme, target) == self._own:
            kept = list(addresses)
        else:
            decisions = [self._hosts.decide_address(target, address) for address in addresses]
            kept = [decided.target.host for decided in decisions if isinstance(decided, Allowed)]
            refusals = [decided for decided in decisions if isinstance(decided, Refused)]
            if not kept:
                return self.refused(refusals[0] if refusals else Refused(f"{target.host} has no address"))
        _log.info("%s: %s is at %s", self._who, target, ", ".join(kept))
        return tuple(kept)

    def refused(self, refusal: Refused) -> Refused:
        """Log a refusal."""
        _log.warning("%s: refused: %s", self._who, printable(refusal.reason, newlines=False))
        return refusal

    def _decided(self, scheme: str, target: Target) -> Allowed | Refused:
        if (scheme, target) == self._own:
            return Allowed(target, "being where the repo came from")
        return self._hosts.decide(target)


def look_up(target: Target) -> tuple[str, ...]:
    """The addresses of a name, in the resolver's order; of an address, itself. It may take as long as it takes.

    Raises:
        OSError: It cannot be resolved.
    """
    if target.is_address:
        return (target.host,)
    found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return tuple(dict.fromkeys(str(place[0]) for *_, place in found))[:_ADDRESS_LIMIT]


def _server(url: str) -> tuple[str, Target] | Refused:
    matched = _URL.fullmatch(url)
    if matched is None:
        return Refused(f"{shown(url)!r} is no address that reads in one way only; expected https://host/path in ASCII")
    scheme = matched[1].lower()
    target = parse_target(matched[2], _PORTS[scheme])
    return target if isinstance(target, Refused) else (scheme, target)


def _fail(refused: Refused, url: str) -> NoReturn:
    raise SourceUnavailableError(refused.reason, hint=refused.hint, url=url)
