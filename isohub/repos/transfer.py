"""One URL into one file: continued where it stopped, checked, and never longer than it may be.

    1. What is written is counted and hashed; what a resume finds on the disk is hashed again.
    2. A transfer continues only on the server's word that the file is the same: by a strong ETag,
       or by a date where there is no ETag. Everything else starts anew.
    3. A body that ends early is no success, nor is one whose end cannot be told from a broken
       connection, unless a hash vouches for it.
    4. A part stays on the disk if it can be continued. Beside it lies a record of what it is part of.
       With another hash than the expected one nothing stays.

Locks are the caller's: one process at a time may write to a path. ``file://`` is not asked for.
Runs in the caller; executes nothing.

Source: RFC 9110 (validators in 8.8, conditional requests in 13, ranges in 14), RFC 9112, section 6.3
(where a body ends); torch.hub.download_url_to_file (`hash_prefix`).
"""

from __future__ import annotations

import email.utils
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import msgspec
from tqdm import tqdm

from isohub.errors import IntegrityError, SourceUnavailableError, printable
from isohub.repos.archive import RATIO_FREE_BYTES, RATIO_LIMIT
from isohub.repos.http_errors import TryAgain
from isohub.repos.naming import shown
from isohub.repos.records import read_record, write_record

if TYPE_CHECKING:
    from pathlib import Path

    import requests

    from isohub.repos.http import HttpClient

__all__ = ["Downloaded", "Transfer", "Wanted"]

# What a break loses: of a chunk that did not arrive whole, nothing is kept.
_CHUNK_BYTES = 1 << 16
_STATUSES = frozenset({200, 206, 416})
_DIGITS = re.compile(r"[0-9]{1,18}")
# Header text that is kept and sent back: visible ASCII of a sensible length.
_ETAG = re.compile(r'(?:W/)?"[!#-~]{0,500}"')
_DATE = re.compile(r"[ -~]{1,60}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


@dataclass(frozen=True)
class Wanted:
    """What to download.

    Attributes:
        url: Without credentials. Trust: whoever gave it, a worker's code perhaps.
        into: Path of the file. ``<into>.json`` beside it is used as well.
        name: What a progress bar calls it.
        limit_bytes: Counted on what is written.
        progress: Show a bar, if standard error is a terminal.
        hash_prefix: How the file's sha256 begins, in hexadecimal, as torch.hub has it.
        sha256: The whole of it.
        if_none_match: ETag of what the caller has already.
    """

    url: str
    into: Path
    name: str
    limit_bytes: int
    progress: bool = False
    hash_prefix: str | None = None
    sha256: str | None = None
    if_none_match: str | None = None


@dataclass(frozen=True)
class Downloaded:
    """What came.

    Attributes:
        sha256: Of the file, in hexadecimal; empty if `not_modified`.
        bytes: Its size.
        etag: As the server gave it, weak or strong, or None.
        last_modified: As the server gave it, or None.
        not_modified: The server still has what `if_none_match` named. There is no file then.
    """

    sha256: str
    bytes: int
    etag: str | None
    last_modified: str | None
    not_modified: bool


class _Partial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a part on the disk is part of. The address as a hash: its query may be a credential."""

    url_sha256: str
    etag: str | None
    last_modified: str | None
    total: int | None

    @property
    def validator(self) -> str:
        return self.etag or self.last_modified or ""


class Transfer:
    """One download, over as many answers as it takes."""

    def __init__(self, client: HttpClient, wanted: Wanted) -> None:
        self._client = client
        self._wanted = wanted
        self._shown = shown(wanted.url)
        self._record_path = wanted.into.with_name(f"{wanted.into.name}.json")
        self._record: _Partial | None = None  # None: what is on the disk cannot be continued
        self._may_resume = True
        self._found = 0  # bytes of an earlier call
        self._count = 0
        self._most = 0
        self._asked_from: int | None = None
        self._hash = hashlib.sha256()
        self._etag: str | None = None
        self._last_modified: str | None = None
        self._total: int | None = None

    def run(self) -> Downloaded:
        """Bring the file; see `isohub.repos.download.download`."""
        wanted = self._wanted
        with _opened(wanted.into) as file, self._bar() as bar:
            try:
                self._recall(file)
                modified = self._client.request(
                    wanted.url,
                    lambda response: self._read(response, file, bar),
                    headers=lambda: self._headers(file),
                    accept=_STATUSES if wanted.if_none_match is None else _STATUSES | {304},
                    advanced=self._advanced,
                )
                if not modified:
                    self._drop()
                    return Downloaded("", 0, self._etag, self._last_modified, not_modified=True)
                digest = self._checked_digest()
            except BaseException as error:
                if isinstance(error, IntegrityError) or self._record is None or self._count == 0:
                    self._drop()
                raise
        self._record_path.unlink(missing_ok=True)
        return Downloaded(digest, self._count, self._etag, self._last_modified, not_modified=False)

    def _bar(self) -> tqdm[Any]:
        is_shown = self._wanted.progress and sys.stderr is not None and sys.stderr.isatty()
        name = printable(self._wanted.name, limit_chars=60, newlines=False)
        return tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=not is_shown, leave=False)

    def _recall(self, file: IO[bytes]) -> None:
        """Find what an earlier call left, if it belongs to this address."""
        record = read_record(self._record_path, _Partial)
        size = os.fstat(file.fileno()).st_size
        usable = record is not None and record.url_sha256 == _sha256(self._wanted.url) and record.validator
        if record is None or not usable or size > min(self._wanted.limit_bytes, _or(record.total, size)):
            self._restart(file)
            return
        self._record = record
        self._etag, self._last_modified, self._total = record.etag, record.last_modified, record.total
        self._rewind(file, size)
        self._most = self._found = self._count

    def _rewind(self, file: IO[bytes], size: int) -> None:
        """Keep so many bytes, and hash them. Of a whole file all but one: its end is asked for again."""
        if size == self._total:
            size = max(0, size - 1)
        file.truncate(size)
        file.seek(0)
        self._hash, self._count = hashlib.sha256(), 0
        while chunk := file.read(_CHUNK_BYTES):
            self._hash.update(chunk)
            self._count += len(chunk)

    def _restart(self, file: IO[bytes]) -> None:
        self._record_path.unlink(missing_ok=True)
        self._record = None
        self._hash, self._count, self._found, self._total = hashlib.sha256(), 0, 0, None
        file.seek(0)
        file.truncate()

    def _drop(self) -> None:
        self._record_path.unlink(missing_ok=True)
        self._wanted.into.unlink(missing_ok=True)

    def _headers(self, file: IO[bytes]) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        if self._wanted.if_none_match is not None:
            headers["If-None-Match"] = self._wanted.if_none_match
        self._asked_from = None
        if self._record is not None and self._count > 0:
            if self._count == self._total:  # the connection broke at the very end
                self._rewind(file, self._count)
            self._asked_from = self._count
            headers |= {"Range": f"bytes={self._count}-", "If-Range": self._record.validator}
        return headers

    def _advanced(self) -> bool:
        """Whether more is kept than ever before: a server that breaks off each time at the same place ends us."""
        if self._record is None or self._count <= self._most:
            return False
        self._most = self._count
        return True

    def _read(self, response: requests.Response, file: IO[bytes], bar: tqdm[Any]) -> bool:
        """Take an answer; whether there is a file."""
        if response.status_code == 304:
            self._take_validators(response)
            return False
        if response.status_code == 200:
            self._begin(response, file)
        else:
            problem = self._misfit(response)
            if problem is not None:
                self._restart(file)
                self._may_resume = False
                text = f"{self._shown} does not continue the file where it stopped: {problem}"
                raise TryAgain(SourceUnavailableError(text, url=self._shown, status=response.status_code), 0.0)
        bar.total, bar.initial, bar.n = self._total, self._found, self._count
        bar.refresh()
        coded = _is_coded(response)
        for chunk in response.iter_content(_CHUNK_BYTES):
            if self._client.aborted:
                raise SourceUnavailableError(f"{self._shown} was given up", url=self._shown)
            if self._count + len(chunk) > self._wanted.limit_bytes:
                raise self._too_large(f"more than {self._wanted.limit_bytes}")
            came = response.raw.tell() if coded else self._count
            if coded and self._count > max(RATIO_FREE_BYTES, RATIO_LIMIT * came):
                raise IntegrityError(
                    f"{self._shown} is compressed, though that was not asked for, and unpacks {came} bytes "
                    f"to {self._count} so far, more than {RATIO_LIMIT} to 1",
                    url=self._shown,
                )
            _write(file, chunk)
            self._hash.update(chunk)
            self._count += len(chunk)
            bar.update(len(chunk))
        if self._total is not None and self._count != self._total:
            text = f"{self._shown} gave {self._count} of {self._total} bytes"
            too_many = self._count > self._total
            if too_many:
                self._restart(file)
            raise TryAgain(SourceUnavailableError(text, url=self._shown, passing=not too_many))
        return True

    def _begin(self, response: requests.Response, file: IO[bytes]) -> None:
        """Prepare for a whole file, from an answer's headers."""
        self._restart(file)
        headers = response.headers
        length = headers.get("Content-Length", "").strip()
        chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        coded = _is_coded(response)
        if not chunked and not _DIGITS.fullmatch(length) and not (self._wanted.sha256 or self._wanted.hash_prefix):
            raise SourceUnavailableError(
                f"{self._shown} does not say how long it is, so that a part could not be told from the whole",
                hint="give its hash, which tells as well",
                url=self._shown,
            )
        if _DIGITS.fullmatch(length) and not chunked and not coded:
            self._total = int(length)
            if self._total > self._wanted.limit_bytes:
                raise self._too_large(str(self._total))
        self._take_validators(response)
        if coded or not self._may_resume or headers.get("Accept-Ranges", "").strip().lower() == "none":
            return
        strong = self._etag is not None and not self._etag.startswith("W/")
        if strong or (self._etag is None and "ETag" not in headers and _is_strong_date(headers)):
            self._record = _Partial(_sha256(self._wanted.url), self._etag, self._last_modified, self._total)
            write_record(self._record_path, self._record)

    def _take_validators(self, response: requests.Response) -> None:
        etag, date = response.headers.get("ETag", "").strip(), response.headers.get("Last-Modified", "").strip()
        self._etag = etag if _ETAG.fullmatch(etag) else None
        self._last_modified = date if _DATE.fullmatch(date) and _time(date) is not None else None

    def _misfit(self, response: requests.Response) -> str | None:
        """What is wrong with an answer to a range, or None."""
        headers, record, first = response.headers, self._record, self._asked_from
        if record is None or first is None:
            return "a part was sent that nobody asked for"
        if response.status_code == 416:
            return "it is shorter now"
        if _is_coded(response):
            return "the part is compressed"
        said = printable(headers.get("Content-Range", "nothing"), limit_chars=80, newlines=False)
        match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
        if match is None:
            return f"Content-Range says {said}; expected a range of bytes and the size"
        start, last, size = (int(group) for group in match.groups())
        length = headers.get("Content-Length", "").strip()
        if start != first or last != size - 1 or size != _or(record.total, size):
            return f"Content-Range says {said}; expected bytes {first} to the end of {_or(record.total, size)}"
        if _DIGITS.fullmatch(length) and int(length) != size - first:
            return f"{length} bytes follow; expected {size - first}"
        # RFC 9110, section 15.3.7: with the ETag that a 200 would have.
        if record.etag is not None and headers.get("ETag", "").strip() != record.etag:
            return "it has another ETag, though the range was asked for under the first"
        if size > self._wanted.limit_bytes:
            raise self._too_large(str(size))
        self._total = size
        return None

    def _too_large(self, size: str) -> IntegrityError:
        limit = self._wanted.limit_bytes
        text = f"{self._shown} has {size} bytes; at most {limit} are read"
        return IntegrityError(text, url=self._shown, expected=f"at most {limit}", got=size)

    def _checked_digest(self) -> str:
        digest = self._hash.hexdigest()
        whole, prefix = self._wanted.sha256, self._wanted.hash_prefix
        for expected, fits in (
            (whole, whole is None or digest == whole.lower()),
            (prefix, prefix is None or digest.startswith(prefix.lower())),
        ):
            if not fits:
                hint = "it was changed at the server or on the way; ask whoever published the hash"
                if self._found:
                    hint = "a part of it was here from before, and is removed: try again"
                raise IntegrityError(
                    f"{self._shown} has the sha256 {digest}; expected {printable(str(expected), limit_chars=80)}",
                    hint=hint,
                    url=self._shown,
                    expected=expected,
                    got=digest,
                )
        return digest


def _opened(path: Path) -> IO[bytes]:
    # Unbuffered: what is counted is with the kernel, and nothing is left to fail at the end.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)


def _write(file: IO[bytes], chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:
        left = left[file.write(left) :]


def _is_coded(response: requests.Response) -> bool:
    return response.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity")


def _is_strong_date(headers: requests.structures.CaseInsensitiveDict[str]) -> bool:
    """Whether a date is as good as a strong ETag: a later change would have had another (RFC 9110, 8.8.2.2)."""
    modified, sent = _time(headers.get("Last-Modified", "")), _time(headers.get("Date", ""))
    return modified is not None and sent is not None and sent - modified >= 1


def _time(date: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _or(value: int | None, other: int) -> int:
    return other if value is None else value


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
