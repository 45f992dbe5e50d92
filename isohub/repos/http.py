"""HTTP for the sources and for downloads: retries, limits, and credentials that stay with their host.

One `HttpClient` serves one operation in one thread. Proxies are as `requests` has them; so are
certificates, and ``SSL_CERT_FILE`` counts too. A token or a password is sent to the addresses it was
given for and to no other, never to a host that only a redirect named; it is in no message. A body comes
plain or under one well-known compression; anything else is refused. Runs in the caller.

Source: RFC 9110 (status codes, Retry-After in 10.2.3, redirects in 15.4), RFC 7617 (Basic).
"""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from isohub.errors import SourceUnavailableError, printable
from isohub.repos.cancellation import ends_by
from isohub.repos.connections import Adapter, Border
from isohub.repos.http_errors import (
    TryAgain,
    authorities,
    host_in,
    reason,
    require_plain,
    status_error,
    stumble,
    tls_error,
    without_secrets,
)
from isohub.repos.naming import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from isohub.repos.credentials import Authorization, Credentials, Login

__all__ = ["HttpClient", "read_limited"]

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
#: Between two packets, not for the whole.
READ_TIMEOUT_S = 60.0
TRIES = 3
#: Doubled at each try.
BACKOFF_S = 0.5
#: A server that asks for a longer wait gets none: the user is told instead.
WAIT_LIMIT_S = 10.0
_REDIRECTS = 5  # curl's and Go's default is 10; GitHub needs 2
_CHUNK_BYTES = 1 << 16
_OK = frozenset({200})
# One layer that zlib undoes, which grows at most a thousandfold: a chunk of it fits into memory.
_CODINGS = frozenset({"", "identity", "gzip", "x-gzip", "deflate"})


class _Session(requests.Session):
    """`requests.Session` that is stricter about redirects and about what comes before a body."""

    def __init__(self, border: Border | None) -> None:
        super().__init__()
        self._border = border
        self.max_redirects = _REDIRECTS
        self.headers["User-Agent"] = "isohub"
        self.headers["Accept-Encoding"] = "gzip, deflate"
        self.hooks["response"].append(_bound_redirect)
        for scheme in ("http://", "https://"):
            self.mount(scheme, Adapter(border))

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        if self._border is not None:  # each redirect comes through here too
            self._border.check(request.url or "")
        return super().send(request, **options)

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        # requests keeps the header on some changes of port and scheme; here any change drops it,
        # and netrc is not asked for a host that only a redirect named.
        before, after = response.request.url or "", prepared_request.url or ""
        if _origin(before) != _origin(after):
            prepared_request.headers.pop("Authorization", None)
        if urlsplit(before).scheme == "https" and urlsplit(after).scheme != "https":
            raise SourceUnavailableError(
                f"{host_in(before)} redirects to an unencrypted address on {host_in(after)}", url=shown(before)
            )


def _bound_redirect(response: requests.Response, *_: object, **__: object) -> None:
    """Read a redirect's body here, for requests would read and unpack all of it."""
    if not response.is_redirect:
        return
    try:
        body = response.raw.read(_CHUNK_BYTES + 1, decode_content=False)
    except HTTPError:  # where it leads is known all the same
        response.close()
        return
    if len(body) > _CHUNK_BYTES:
        url = response.url
        raise SourceUnavailableError(f"{host_in(url)} redirects with more than {_CHUNK_BYTES} bytes", url=shown(url))


class HttpClient:
    """GET and POST with retries; a context manager, for one thread at a time.

    Args:
        credentials: Whom to ask as.
        border: Which servers may be asked, where a URL is not the caller's own word; None is all.
        certificates: File of authorities, where the environment names none; None is those of requests.
    """

    def __init__(self, credentials: Credentials, border: Border | None = None, certificates: str | None = None) -> None:
        self._certificates = certificates
        self._credentials = credentials
        self._tokens = credentials.tokens()
        self._logins: dict[str, Login | None] = {}  # by origin: what helpers gave, each asked once
        self._named: set[str] = set()  # origins that the caller named
        self._redirected_to: set[str] = set()  # origins that only a redirect named
        self._session = _Session(border)
        self._aborted = threading.Event()
        self._open = ExitStack()
        self._response: requests.Response | None = None

    def __enter__(self) -> HttpClient:
        self._open.enter_context(ends_by(self.abort))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._session.close()

    def request(
        self,
        url: str,
        read: Callable[[requests.Response], T],
        *,
        data: bytes | None = None,
        headers: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None,
        accept: frozenset[int] = _OK,
        advanced: Callable[[], bool] | None = None,
    ) -> T:
        """Send a request and read its answer, again if the network or the server stumbles.

        Args:
            url: Without credentials.
            read: Gets an answer with its body unread; called once a try. May raise `TryAgain`.
            data: Body of a POST; None is a GET.
            headers: More headers, or what gives them at each try.
            accept: Statuses of the answers that `read` gets.
            advanced: Asked after a try that failed: whether it brought the work forward. Tries are
                counted anew then.

        Raises:
            SourceUnavailableError: No such answer came. `status` is the server's, if it gave one.
        """
        require_plain(url)
        attempt = 1
        while True:
            self._require_wanted(url)
            try:
                given = headers() if callable(headers) else headers
                return self._once(url, read, data, given or {}, accept)
            except _Refused:
                continue  # with a helper's password; helpers are asked once for each origin
            except TryAgain as again:
                if advanced is not None and advanced():
                    attempt = 1
                wait_s = again.wait_s
                if wait_s is None:
                    # Jitter: many processes that fail together should not return together.
                    wait_s = BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)  # noqa: S311
                if attempt == TRIES or wait_s > WAIT_LIMIT_S:
                    raise again.error from again.__cause__
                self._aborted.wait(wait_s)
                attempt += 1

    def has_credentials(self, url: str) -> bool:
        """Whether a request to this URL would carry any, as far as is known without asking a helper."""
        return self._authorization(url) is not None

    @property
    def aborted(self) -> bool:
        """Whether `abort` was called."""
        return self._aborted.is_set()

    def abort(self) -> None:
        """End the request under way, and refuse others; for another thread than the one that asks.

        A body ends at once; what waits for a connection or for the first line ends at its timeout.
        """
        self._aborted.set()
        response = self._response
        # urllib3 2.3 and later; before that the next packet or the timeout ends it.
        end = getattr(response.raw, "shutdown", None) if response is not None else None
        if end is not None:
            try:
                end()
            except (OSError, RuntimeError, ValueError):  # it ended by itself
                pass

    def _require_wanted(self, url: str) -> None:
        if self._aborted.is_set():
            raise SourceUnavailableError(f"{shown(url)} was given up", url=shown(url))

    def _once(
        self,
        url: str,
        read: Callable[[requests.Response], T],
        data: bytes | None,
        headers: Mapping[str, str],
        accept: frozenset[int],
    ) -> T:
        sent = self._authorization(url)
        try:
            with self._send(url, data, headers, sent) as response:
                self._note_redirects(url, response)
                if response.status_code not in accept:
                    if self._was_refused(url, response, sent) and self._ask_helper(url):
                        raise _Refused
                    raise status_error(url, response, sent, self._credentials)
                coding = response.headers.get("Content-Encoding", "").strip().lower()
                if coding not in _CODINGS:
                    coding = printable(coding, limit_chars=80, newlines=False)
                    raise SourceUnavailableError(
                        f"{host_in(url)} encodes its answer as {coding!r}, which was not asked for", url=shown(url)
                    )
                self._response = response
                try:
                    self._require_wanted(url)  # `abort` either sees the answer or was before this
                    return read(response)
                finally:
                    self._response = None
        except requests.exceptions.SSLError as error:
            raise tls_error(url, error) from without_secrets(error)
        except requests.exceptions.TooManyRedirects as error:
            text = f"{host_in(url)} redirects more than {_REDIRECTS} times"
            raise SourceUnavailableError(text, url=shown(url)) from without_secrets(error)
        except requests.exceptions.Timeout as error:
            what = f"nothing came for {READ_TIMEOUT_S:g} s"
            if isinstance(error, requests.exceptions.ConnectTimeout):
                what = f"no connection within {CONNECT_TIMEOUT_S:g} s"
            raise stumble(f"{host_in(url)}: {what}", url, error) from without_secrets(error)
        except requests.exceptions.ConnectionError as error:
            text = f"{host_in(url)} cannot be reached, or ended the connection early: {reason(error)}"
            if any(isinstance(each, ReadTimeoutError) for each in error.args):  # in the middle of a body
                text = f"{host_in(url)}: nothing came for {READ_TIMEOUT_S:g} s"
            raise stumble(text, url, error) from without_secrets(error)
        except requests.exceptions.ChunkedEncodingError as error:
            text = f"{host_in(url)} ended its answer early: {reason(error)}"
            raise stumble(text, url, error) from without_secrets(error)
        except requests.exceptions.RequestException as error:
            raise SourceUnavailableError(f"{host_in(url)}: {reason(error)}", url=shown(url)) from without_secrets(error)

    def _send(
        self, url: str, data: bytes | None, headers: Mapping[str, str], authorization: Authorization | None
    ) -> requests.Response:
        def authorize(prepared: requests.PreparedRequest) -> requests.PreparedRequest:
            if authorization is not None:
                prepared.headers["Authorization"] = authorization.value
            return prepared

        try:
            return self._session.request(
                "GET" if data is None else "POST",
                url,
                data=data,
                headers=dict(headers),
                auth=authorize,  # never None: requests would look into netrc by itself, and into the URL
                stream=True,
                timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
                verify=_either(authorities(url), self._certificates),
            )
        except requests.exceptions.RequestException:
            raise
        except ValueError as error:  # from the standard library, which requests does not translate
            text = f"{host_in(url)} redirects to what is no address: {reason(error)}"
            raise SourceUnavailableError(text, url=shown(url)) from without_secrets(error)

    def _authorization(self, url: str) -> Authorization | None:
        if _origin(url) in self._redirected_to:
            # A server may send us anywhere; it must not have the user's password for there sent along.
            return None
        login = self._logins.get(self._credentials.server_of(url))
        if login is not None:
            return self._credentials.present(login, url)
        matching = [prefix for prefix in self._tokens if url == prefix or url.startswith(prefix + "/")]
        if matching:
            return self._tokens[max(matching, key=len)]
        return self._credentials.from_netrc(url)

    def _ask_helper(self, url: str) -> bool:
        server = self._credentials.server_of(url)
        if server in self._logins:
            return False
        login = self._logins[server] = self._credentials.from_helper(url)
        return login is not None and self._credentials.present(login, url) is not None

    def _note_redirects(self, url: str, response: requests.Response) -> None:
        if _origin(url) not in self._redirected_to:
            self._named.add(_origin(url))
        origins = {_origin(each.url) for each in (*response.history, response)}
        self._redirected_to |= origins - self._named

    def _was_refused(self, url: str, response: requests.Response, sent: Authorization | None) -> bool:
        """Whether the server that the caller named wants to know who asks, or whether that is somebody else."""
        status = response.status_code
        if _origin(response.url) != _origin(url) or _origin(url) in self._redirected_to:
            return False
        # GitHub's API answers 404 for what is private, and 403 for a rate that is spent.
        return status == 401 or (status in (403, 404) and sent is None)


class _Refused(Exception):  # noqa: N818  # a signal between two functions, not an error
    pass


def _either(named: str | bool, certificates: str | None) -> str | bool:
    """What the environment names, else what the client was given."""
    return certificates if named is True and certificates is not None else named


def read_limited(response: requests.Response, limit_bytes: int) -> bytes:
    """The body of an answer, refused beyond a limit.

    Args:
        response: With its body unread. Trust: the network.
        limit_bytes: Counted after decompression.
    """
    parts: list[bytes] = []
    count = 0
    for chunk in response.iter_content(_CHUNK_BYTES):
        count += len(chunk)
        if count > limit_bytes:
            url = shown(response.url)
            raise SourceUnavailableError(f"{host_in(url)} answers more than {limit_bytes} bytes", url=url)
        parts.append(chunk)
    return b"".join(parts)


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()
