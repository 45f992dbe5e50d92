"""The URL of a weights file: what of it is asked, kept, shown, and used as a name.

A URL's query may hold a signature, which is a credential: it is part of what is asked and of the key,
and is in no message, log, record or name. The last part of the path is a name for people; it is never a key.

Pure functions. Runs in the caller. Trust: a repo or its worker wrote the URL, unless the caller did.

Source: RFC 3986; torch.hub 2.13's ``load_state_dict_from_url`` (names, and hashes in names).
"""

from __future__ import annotations

import hashlib
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from posixpath import basename
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse, urlsplit

from isohub.errors import IntegrityError, InvalidReferenceError, SourceUnavailableError, printable
from isohub.repos.naming import encode_component, has_hidden, host_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ENTRY_RECORD",
    "Hashes",
    "WeightsUrl",
    "file_name",
    "hash_in_name",
    "is_single_name",
    "parse_weights_url",
    "url_hints",
]

#: Beside the file in its directory, so that no file may have the name.
ENTRY_RECORD = "entry.json"
# RFC 9110, 4.1 asks servers for 8,000 octets at least; AWS signs with about 2,000.
_LIMIT_CHARS = 8192
_KEY_DIGITS = 40  # 160 bits, as git's commit ids
# Fewer digits are too often something else: "-50.v1". torch.hub's documentation says "eight or more".
_HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,64})(?=\.)")
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,12}")
_PREFIX = re.compile(r"[0-9a-f]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NOT_THERE = frozenset({300, 404, 410})


@dataclass(frozen=True)
class WeightsUrl:
    """A checked URL.

    Attributes:
        text: What is asked for: as written, without its fragment.
        key: Directory and file name in the store: hex, of the whole `text`.
        address: `text` without its query.
        shown: `address`, made safe for messages.
        name: One safe component of a path, percent-decoded, with the URL's extension.
        hub_name: What torch.hub calls the file; a single name or empty.
    """

    text: str = field(repr=False)
    key: str
    address: str
    shown: str
    name: str
    hub_name: str


def parse_weights_url(url: str) -> WeightsUrl:
    """Check a URL.

    Raises:
        InvalidReferenceError: It is no http or https URL that can be asked, or it holds a password.
    """
    # While the URL may hold a password, no message repeats it.
    if not url or len(url) > _LIMIT_CHARS:
        raise _refusal(f"expected text of 1 to {_LIMIT_CHARS} characters", "url")
    if has_hidden(url) or any(char.isspace() for char in url):
        raise _refusal("it holds a space, a control or an invisible character; write it percent-encoded", "url")
    text = url.partition("#")[0]
    try:
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https"):
            raise _refusal(f"expected http:// or https://, got {printable(parts.scheme, limit_chars=40)!r}", "scheme")
        if "@" in parts.netloc:
            raise _refusal(
                "it holds a user name or a password",
                "userinfo",
                hint="take them out of the URL and put them into ~/.netrc, which is read for its host",
            )
        host_of(parts.scheme, parts.netloc)
    except ValueError as error:
        if isinstance(error, InvalidReferenceError):
            raise
        raise _refusal("its host or port is none", "host") from None
    address = text.partition("?")[0]
    return WeightsUrl(
        text=text,
        key=hashlib.sha256(text.encode("utf-8")).hexdigest()[:_KEY_DIGITS],
        address=address,
        shown=printable(address, limit_chars=500, newlines=False),
        name=file_name(address),
        hub_name=_hub_name(text),
    )


def file_name(address: str) -> str:
    """The name that a file gets in its directory of the store.

    Args:
        address: URL without query and fragment.

    Returns:
        ASCII, at most 255 bytes, never empty, never with a dot in front, never the record's name.
    """
    name = unquote(urlsplit(address).path.rpartition("/")[2])
    if name in ("", ".", ".."):
        return "file"
    encoded = encode_component(name)
    # A long one is cut, and its end with it: torch.load goes by the extension.
    stem, dot, ending = name.rpartition(".")
    extension = _EXTENSION.fullmatch(dot + ending)
    if "%=" in encoded and stem and extension:
        encoded = encode_component(stem) + extension[0]
    return f"file-{encoded}" if encoded.casefold() == ENTRY_RECORD else encoded


def hash_in_name(name: str) -> str | None:
    """The digits of SHA-256 that a name carries as torch.hub's convention has it: ``name-<8 or more>.ext``.

    The last such part counts: in ``model-50.v1-abcdef12.pth`` it is ``abcdef12``.
    """
    found: list[str] = _HASH_IN_NAME.findall(name)
    return found[-1] if found else None


def is_single_name(name: str) -> bool:
    """Whether a text names a file in a directory and nothing outside it."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


@dataclass(frozen=True)
class Hashes:
    """What is known of a file's SHA-256 before it is here.

    Attributes:
        sha256: The whole, or None.
        prefix: Its first digits, or None.
    """

    sha256: str | None = None
    prefix: str | None = None

    @classmethod
    def of(cls, *, sha256: str | None, hash_prefix: str | None) -> Hashes:
        """Check hashes that somebody gave; capitals are taken. An empty prefix is none, as it is for torch.hub.

        Raises:
            InvalidReferenceError: They are no hex digits, or not so many.
        """
        hash_prefix = hash_prefix or None
        for value, form, expected in (
            (sha256, _DIGEST, "64 hex digits"),
            (hash_prefix, _PREFIX, "1 to 64 hex digits, the first of the SHA-256"),
        ):
            if value is not None and not form.fullmatch(value.lower()):
                got = printable(repr(value), limit_chars=100, newlines=False)
                raise InvalidReferenceError(f"this is no SHA-256: got {got}, expected {expected}", part="hash")
        return cls(sha256 and sha256.lower(), hash_prefix and hash_prefix.lower())

    def fit(self, digest: str) -> bool:
        """Whether a file of this SHA-256 can be the one."""
        return self.sha256 in (None, digest) and digest.startswith(self.prefix or "")

    def check(self, digest: str, what: str) -> None:
        """Refuse a file that cannot be the one.

        Raises:
            IntegrityError: With `expected` and `got`.
        """
        if not self.fit(digest):
            expected = self.sha256 or f"{self.prefix}…"
            raise IntegrityError(
                f"{what} has the SHA-256 {digest}; expected {expected}",
                hint="the file was changed or damaged after its hash was written down; ask its author which is right",
                expected=self.sha256 or self.prefix,
                got=digest,
            )


@contextmanager
def url_hints() -> Iterator[None]:
    """Say what helps where a file was asked for and not a commit."""
    try:
        yield
    except SourceUnavailableError as error:
        from isohub.repos.http_errors import hint_for_file  # noqa: PLC0415 - whoever asked a server has it already

        error.hint = hint_for_file(error.hint)
        if error.status in _NOT_THERE and error.hint is None:
            error.hint = "look at the URL: the file is gone, was never there, or is shown only to whom may see it"
        raise


def _hub_name(url: str) -> str:
    # As torch.hub takes it: not decoded, and without `;parameters`.
    name = basename(urlparse(url).path)
    return name if is_single_name(name) else ""


def _refusal(why: str, part: str, *, hint: str | None = None) -> InvalidReferenceError:
    return InvalidReferenceError(f"this is no URL of a file: {why}", part=part, hint=hint)
