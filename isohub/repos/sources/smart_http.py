"""git's smart HTTP protocol, version 0: `isohub.repos.sources.pkt` carried by two HTTP requests.

A server may send us to another address once, at the first request; what follows goes there.
Runs in the caller.

Source: gitprotocol-http(5).
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from isohub.errors import SourceUnavailableError, printable
from isohub.repos.http import read_limited
from isohub.repos.sources.pkt import ADVERTISEMENT_LIMIT_BYTES, Advertisement, PackRequest, PktStream, read_refs

if TYPE_CHECKING:
    import requests

    from isohub.repos.http import HttpClient

__all__ = ["HttpRemote"]

_TYPE = "application/x-git-upload-pack-advertisement"
_RESULT_TYPE = "application/x-git-upload-pack-result"
_ASKED = "/info/refs"


class HttpRemote:
    """A repository on an HTTP server, as `isohub.repos.sources.pkt.Remote`.

    Args:
        client: Whom to ask with.
        base: Address of the repository, as ``git clone`` takes it.
        taken: What it is taken to say, where that is known. Else it is asked at once.

    Raises:
        SourceUnavailableError: There is no such repository for us, or what answers is no git server.
    """

    def __init__(self, client: HttpClient, base: str, taken: Advertisement | None = None) -> None:
        self._client = client
        # Without a version's header the server answers in version 0, which brings refs with the first request.
        self.advertisement = taken or client.request(
            f"{base}{_ASKED}?service=git-upload-pack", lambda response: _read_advertisement(response, base)
        )

    def receive(self, request: PackRequest, into: IO[bytes]) -> None:
        """Ask for a pack; see `Remote.receive`."""
        base = self.advertisement.base
        headers = {"Content-Type": "application/x-git-upload-pack-request", "Accept": _RESULT_TYPE}
        try:
            self._client.request(
                f"{base}/git-upload-pack",
                lambda response: request.read(PktStream(response.iter_content(1 << 16)), into),
                data=request.body,
                headers=headers,
            )
        except ValueError as error:
            text = f"{base} answers what git's protocol does not allow: {error}"
            raise SourceUnavailableError(text, url=base) from error


def _read_advertisement(response: requests.Response, base: str) -> Advertisement:
    kind = response.headers.get("Content-Type", "nothing")
    if kind.partition(";")[0].strip() != _TYPE:
        shown = printable(kind, limit_chars=80, newlines=False)
        raise SourceUnavailableError(
            f"{base} answers {shown}, which is no git repository's answer", hint="is the address right?", url=base
        )
    effective = response.url.partition("?")[0]
    if not effective.endswith(_ASKED):
        # As git: an address that does not end so has no place for the second request.
        shown = printable(effective, limit_chars=300, newlines=False)
        raise SourceUnavailableError(f"{base} redirects to {shown}, which is no repository's {_ASKED}", url=base)
    stream = PktStream(iter([read_limited(response, ADVERTISEMENT_LIMIT_BYTES)]))
    try:
        if stream.pkt() not in (b"# service=git-upload-pack\n", b"# service=git-upload-pack"):
            raise ValueError("it does not start with the service's name")
        if stream.pkt() is not None:
            raise ValueError("it has no flush behind the service's name")
        advertisement = read_refs(stream, effective.removesuffix(_ASKED))
        if any(stream.rest()):
            raise ValueError("there is data behind the end")
    except ValueError as error:
        raise SourceUnavailableError(f"{base} answers what git's protocol does not allow: {error}", url=base) from error
    return advertisement
