"""What went wrong in a request, in words that hold no secret.

Passwords in addresses, queries (signatures and tokens stand in them) and what the network says are cut
out or escaped before they are in a message or in the cause that a traceback shows. Asks nothing of the
network. Runs in the caller.

Source: RFC 9110 (status codes, Retry-After in 10.2.3), RFC 3986 (userinfo in 3.2.1); GitHub's
documentation of rate limits.
"""

from __future__ import annotations

import email.utils
import http.client
import os
import re
import ssl
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import requests

from isohub.errors import SourceUnavailableError, printable
from isohub.repos.naming import host_of, shown, without_credentials

if TYPE_CHECKING:
    from isohub.repos.credentials import Authorization, Credentials

__all__ = [
    "TryAgain",
    "authorities",
    "hint_for_file",
    "host_in",
    "reason",
    "require_plain",
    "status_error",
    "stumble",
    "tls_error",
    "without_secrets",
]

_RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_AUTHORITIES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
_CERTIFICATES_HINT = "set it to a file of certificates in the form that `openssl x509` writes, or unset it"
# To the last sign: a password may hold what ends an address, and then stands in the error that says so.
_USERINFO = re.compile(r"://\S*@")
# urllib3 begins with the connection, as an object or by its class's name.
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-f]+>(?:: )?|\b\w*(?:Connection|Pool)\(host=[^()]*\): ")
_QUERY = re.compile(r"\?[^\s'\")]*")
# What a proxy says to a CONNECT that it will not do, whenever it is asked.
_NO_TUNNEL = re.compile(r"Tunnel connection failed: 4(?!08|29)")
_COMMIT_ASKS_NOBODY = "; a commit that is in the store needs no network"
_NETWORK_HINT = f"check the network and the proxy settings (HTTPS_PROXY){_COMMIT_ASKS_NOBODY}"
_OR_BY_COMMIT = ", or name the full commit id, which needs no request once fetched"
_SEVERAL_HINT = "name the full commit id, or refs/heads/... or refs/tags/..."


class TryAgain(Exception):  # noqa: N818  # a signal between two functions, not an error
    """Raised by `read`: this answer is of no use, another may be.

    Args:
        error: What to raise when the tries are used up.
        wait_s: Before the next try; None is the usual back-off.
    """

    def __init__(self, error: SourceUnavailableError, wait_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s


def status_error(
    url: str, response: requests.Response, sent: Authorization | None, credentials: Credentials
) -> SourceUnavailableError | TryAgain:
    """What a status means that nobody asked for.

    Args:
        url: What was asked.
        response: Its status and headers. Trust: the network.
        sent: What the request carried.
        credentials: Whom it was asked as.
    """
    status = response.status_code
    wait_s = _retry_after_s(response.headers.get("Retry-After"))
    exhausted = response.headers.get("X-RateLimit-Remaining") == "0"
    token = credentials.token_name(url)
    if status == 429 or (status == 403 and (exhausted or wait_s is not None)):
        text = f"{host_in(url)} limits the rate of requests (HTTP {status})"
        reset = response.headers.get("X-RateLimit-Reset", "")
        if exhausted and re.fullmatch(r"[0-9]{1,12}", reset):
            wait_s = max(0.0, float(reset) - time.time()) if wait_s is None else wait_s
            text += time.strftime("; it answers again at %Y-%m-%d %H:%M:%S UTC", time.gmtime(int(reset)))
        elif wait_s is not None:
            text += f"; it asks to wait {wait_s:.0f} s"
        hint = f"wait{_OR_BY_COMMIT}"
        if token is not None and sent is None:
            hint = f"set {token} for a higher limit{_OR_BY_COMMIT}"
        limited = SourceUnavailableError(text, hint=hint, url=shown(url), status=status, passing=True)
        return TryAgain(limited, wait_s)
    phrase = printable(response.reason or "", limit_chars=80, newlines=False)
    text = f"{host_in(url)} answers HTTP {status} {phrase}".rstrip() + f" for {shown(url)}"
    refused_hint = None
    if status in (401, 403) and sent is not None:
        refused_hint = f"the server refuses what {sent.given_by} gives; renew it, or take it away"
    elif status in (401, 403) and not credentials.anonymous:
        refused_hint = f"it may be private: {f'set {token}, or ' if token else ''}put the password into ~/.netrc"
    elif status == 300:
        text += ": the name means several things there"
        refused_hint = _SEVERAL_HINT
    passing = status in _RETRIED_STATUSES or status >= 500
    error = SourceUnavailableError(text, hint=refused_hint, url=shown(url), status=status, passing=passing)
    return TryAgain(error, wait_s) if status in _RETRIED_STATUSES else error


def hint_for_file(hint: str | None) -> str | None:
    """What is left of a hint where a file was asked for, which has no commit."""
    if hint is None or hint == _SEVERAL_HINT:
        return None
    return hint.removesuffix(_OR_BY_COMMIT).removesuffix(_COMMIT_ASKS_NOBODY)


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


def host_in(url: str) -> str:
    """Host and port of a URL, as messages have them."""
    return printable(urlsplit(url).netloc.rpartition("@")[2], limit_chars=200, newlines=False)


def require_plain(url: str) -> None:
    """Refuse what is no http address, and what holds a password.

    Args:
        url: Trust: whoever gave it, a worker's code perhaps.
    """
    bare = url.partition("#")[0].partition("?")[0]
    if without_credentials(bare) != bare:
        raise SourceUnavailableError(
            f"the address {shown(url)} holds a user name or a password, which would end up in logs",
            hint="write it without, and put the password into ~/.netrc",
            url=shown(url),
        )
    try:
        parts = urlsplit(url)
        host_of(parts.scheme, parts.netloc.encode("idna").decode("ascii"))
        usable = parts.scheme in ("http", "https")
    except ValueError:
        usable = False
    if not usable:
        raise SourceUnavailableError(
            f"{shown(url)!r} is no address that can be asked; expected https://host/path", url=shown(url)
        )


def authorities(url: str) -> str | bool:
    """Where the trusted certificates are: what the environment names, or True for those of requests."""
    for name in _AUTHORITIES:
        path = os.environ.get(name)
        if path and not os.path.exists(path):  # noqa: PTH110  # as requests does
            raise SourceUnavailableError(
                f"{name} names {printable(path, limit_chars=300, newlines=False)!r}, which is not there",
                hint=_CERTIFICATES_HINT,
                url=shown(url),
            )
        if path:
            return path
    return True


def tls_error(url: str, error: requests.exceptions.SSLError) -> SourceUnavailableError | TryAgain:
    """What failed under TLS: the server's certificate, our list of authorities, or the connection."""
    if isinstance(_root(error), ssl.SSLCertVerificationError):
        return SourceUnavailableError(
            f"{host_in(url)} has a certificate that is not trusted here: {reason(error)}",
            hint="behind a proxy that has its own authority, set REQUESTS_CA_BUNDLE to the certificate file of that",
            url=shown(url),
        )
    path = authorities(url)
    if isinstance(path, str) and os.path.isfile(path):  # noqa: PTH113
        try:
            ssl.create_default_context(cafile=path)
        except OSError:
            name = next(name for name in _AUTHORITIES if os.environ.get(name))
            return SourceUnavailableError(
                f"{name} names {printable(path, limit_chars=300, newlines=False)!r}, which holds no certificates",
                hint=_CERTIFICATES_HINT,
                url=shown(url),
            )
    return stumble(f"{host_in(url)} cannot be spoken to by TLS: {reason(error)}", url, error)


def stumble(text: str, url: str, error: requests.exceptions.RequestException) -> TryAgain:
    """What the network did to a try. It passes, unless something answers and does not speak our language."""
    root = _root(error)
    passing = not _NO_TUNNEL.search(str(root))
    if isinstance(root, ssl.SSLError):
        passing = isinstance(root, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
    elif isinstance(root, http.client.HTTPException):
        passing = isinstance(root, (http.client.RemoteDisconnected, http.client.IncompleteRead))
    return TryAgain(SourceUnavailableError(text, hint=_NETWORK_HINT, url=shown(url), passing=passing))


def _root(error: BaseException) -> BaseException:
    inner = error
    while True:
        # urllib3 puts what happened behind its own words: ("Connection aborted.", RemoteDisconnected(...)).
        within = next((each for each in inner.args if isinstance(each, BaseException)), None)
        behind = getattr(inner, "reason", None)  # as urllib3 names it
        if isinstance(behind, BaseException):
            inner = behind
        elif isinstance(within, BaseException):
            inner = within
        else:
            return inner


def reason(error: BaseException) -> str:
    """What an exception says at its bottom, without addresses' passwords and queries."""
    root = _root(error)
    text = _OBJECT.sub("", str(root)) or type(root).__name__
    text = _QUERY.sub("?***", _USERINFO.sub("://***@", text))
    return printable(text, limit_chars=300, newlines=False)


def without_secrets(error: BaseException) -> requests.exceptions.RequestException:
    """The cause to show: what requests raises holds the request, and its text whole addresses."""
    return requests.exceptions.RequestException(f"{type(error).__name__}: {reason(error)}")
