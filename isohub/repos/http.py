"""HTTP for the sources: retries, limits, and credentials that stay with their host.

One `HttpClient` serves one operation. Proxies, certificates and netrc are as `requests` has
them. A token is sent to the addresses it was given for and to no other; it is in no message.
Runs in the caller.

Source: RFC 9110 (status codes, Retry-After in 10.2.3, redirects in 15.4), RFC 7617 (Basic).
"""

from __future__ import annotations

import email.utils
import random
import re
import time
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import requests

from isohub.errors import SourceUnavailableError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from isohub.repos.credentials import Credentials

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
_RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_USERINFO = re.compile(r"://[^/\s@]*@")


class _Again(Exception):  # noqa: N818  # a signal between two functions, not an error
    def __init__(self, error: SourceUnavailableError, wait_s: float | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s


class _Session(requests.Session):
    """`requests.Session` that is stricter about redirects."""

    def __init__(self) -> None:
        super().__init__()
        self.max_redirects = _REDIRECTS
        self.headers["User-Agent"] = "isohub"

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        # requests keeps the header on some changes of port and scheme; here any change drops it,
        # and netrc is not asked for a host that only a redirect named.
        before, after = urlsplit(response.request.url or ""), urlsplit(prepared_request.url or "")
        if (before.scheme, before.netloc) != (after.scheme, after.netloc):
            prepared_request.headers.pop("Authorization", None)
        if before.scheme == "https" and after.scheme != "https":
            raise SourceUnavailableError(
                f"{_host(before.geturl())} redirects to an unencrypted address on {_host(after.geturl())}",
                url=_shown(before.geturl()),
            )


class HttpClient:
    """GET and POST with retries; a context manager.

    Args:
        credentials: Whom to ask as.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._authorization = credentials.tokens()
        self._redirected_to: set[str] = set()  # origins that only a redirect named
        self._session = _Session()

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def request(
        self,
        url: str,
        read: Callable[[requests.Response], T],
        *,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Send a request and read its answer, again if the network or the server stumbles.

        Args:
            url: Without credentials.
            read: Gets an answer of status 200 with its body unread; called once a try.
            data: Body of a POST; None is a GET.
            headers: More headers.

        Raises:
            SourceUnavailableError: No such answer came. `status` is the server's, if it gave one.
        """
        for attempt in range(1, TRIES + 1):
            try:
                return self._once(url, read, data, headers)
            except _Again as again:
                wait_s = again.wait_s
                if wait_s is None:
                    # Jitter: many processes that fail together should not return together.
                    wait_s = BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)  # noqa: S311
                if attempt == TRIES or wait_s > WAIT_LIMIT_S:
                    raise again.error from again.__cause__
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    def _once(
        self,
        url: str,
        read: Callable[[requests.Response], T],
        data: bytes | None,
        headers: Mapping[str, str] | None,
    ) -> T:
        try:
            with self._session.request(
                "GET" if data is None else "POST",
                url,
                data=data,
                headers=dict(headers or {}),
                auth=self._auth(url),
                stream=True,
                timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
            ) as response:
                if _origin(response.url) != _origin(url):
                    self._redirected_to.add(_origin(response.url))
                if response.status_code != 200:
                    raise self._status_error(url, response)
                return read(response)
        except requests.exceptions.SSLError as error:
            raise SourceUnavailableError(
                f"{_host(url)} has a certificate that is not trusted here: {_reason(error)}",
                hint="behind a proxy with its own authority, set REQUESTS_CA_BUNDLE to its certificate file",
                url=_shown(url),
            ) from error
        except requests.exceptions.TooManyRedirects as error:
            raise SourceUnavailableError(
                f"{_host(url)} redirects more than {_REDIRECTS} times", url=_shown(url)
            ) from error
        except requests.exceptions.Timeout as error:
            what = f"nothing came for {READ_TIMEOUT_S:g} s"
            if isinstance(error, requests.exceptions.ConnectTimeout):
                what = f"no connection within {CONNECT_TIMEOUT_S:g} s"
            raise _Again(
                SourceUnavailableError(f"{_host(url)}: {what}", hint=_NETWORK_HINT, url=_shown(url)), None
            ) from error
        except requests.exceptions.ConnectionError as error:
            text = f"{_host(url)} cannot be reached, or ended the connection early: {_reason(error)}"
            raise _Again(SourceUnavailableError(text, hint=_NETWORK_HINT, url=_shown(url)), None) from error
        except requests.exceptions.ChunkedEncodingError as error:
            text = f"{_host(url)} ended its answer early: {_reason(error)}"
            raise _Again(SourceUnavailableError(text, hint=_NETWORK_HINT, url=_shown(url)), None) from error
        except requests.exceptions.RequestException as error:
            raise SourceUnavailableError(f"{_host(url)}: {_reason(error)}", url=_shown(url)) from error

    def _auth(self, url: str) -> Callable[[requests.PreparedRequest], requests.PreparedRequest] | None:
        if _origin(url) in self._redirected_to:
            # A server may send us anywhere; it must not have the user's password for there sent along.
            return lambda prepared: prepared
        matching = [prefix for prefix in self._authorization if url == prefix or url.startswith(prefix + "/")]
        if not matching:
            return None  # requests looks into netrc then
        value = self._authorization[max(matching, key=len)]

        def authorize(prepared: requests.PreparedRequest) -> requests.PreparedRequest:
            prepared.headers["Authorization"] = value
            return prepared

        return authorize

    def _status_error(self, url: str, response: requests.Response) -> Exception:
        status = response.status_code
        wait_s = _retry_after_s(response.headers.get("Retry-After"))
        exhausted = response.headers.get("X-RateLimit-Remaining") == "0"
        if status == 429 or (status == 403 and (exhausted or wait_s is not None)):
            text = f"{_host(url)} limits the rate of requests (HTTP {status})"
            reset = response.headers.get("X-RateLimit-Reset", "")
            if exhausted and re.fullmatch(r"[0-9]{1,12}", reset):
                wait_s = max(0.0, float(reset) - time.time()) if wait_s is None else wait_s
                text += time.strftime("; it answers again at %Y-%m-%d %H:%M:%S UTC", time.gmtime(int(reset)))
            elif wait_s is not None:
                text += f"; it asks to wait {wait_s:.0f} s"
            hint = (
                "set GITHUB_TOKEN for a higher limit, or name the full commit id, which needs no request once fetched"
            )
            return _Again(SourceUnavailableError(text, hint=hint, url=_shown(url), status=status), wait_s)
        reason = printable(response.reason or "", limit_chars=80, newlines=False)
        text = f"{_host(url)} answers HTTP {status} {reason}".rstrip()
        refused_hint = None
        if status in (401, 403):
            sent = "Authorization" in response.request.headers
            refused_hint = (
                "the server refuses the token; renew or unset GITHUB_TOKEN and GH_TOKEN"
                if sent
                else "it may be private: set GITHUB_TOKEN, or put the password into ~/.netrc"
            )
        error = SourceUnavailableError(f"{text} for {_shown(url)}", hint=refused_hint, url=_shown(url), status=status)
        return _Again(error, wait_s) if status in _RETRIED_STATUSES else error


_NETWORK_HINT = "check the network and the proxy settings (HTTPS_PROXY); a commit that is in the store needs no network"


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
            url = _shown(response.url)
            raise SourceUnavailableError(f"{_host(url)} answers more than {limit_bytes} bytes", url=url)
        parts.append(chunk)
    return b"".join(parts)


def _retry_after_s(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


def _host(url: str) -> str:
    return printable(urlsplit(url).netloc.rpartition("@")[2], limit_chars=200, newlines=False)


def _shown(url: str) -> str:
    # Queries of redirects hold signatures, which are credentials.
    return printable(_USERINFO.sub("://", url).partition("?")[0], limit_chars=500, newlines=False)


def _reason(error: Exception) -> str:
    inner: BaseException = error
    while inner.args and isinstance(inner.args[0], BaseException):
        inner = inner.args[0]
    inner = getattr(inner, "reason", None) or inner
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>(?:: )?", "", str(inner)) or type(inner).__name__
    return printable(_USERINFO.sub("://***@", text), limit_chars=300, newlines=False)
