"""Weights: files by URL, for each repository by itself, each content once.

    <root>/weights/urls/<host>/<owner>/<repo>/<key>/{entry.json, <file name>}
    <root>/weights/blobs/                                `isohub.repos.blobs`
    <root>/weights/partial/<key>.{part, part.json, copy, lock}

Rules:
  1. The key is of the whole URL. Its last part is a name for people, and nothing is found by it.
  2. A file belongs to a scope: the (host, owner, repo) that it was fetched for, or the caller. Scopes share
     bytes, never answers: a URL that another scope has is asked for again, as that scope's own request. A
     304 to its strong ETag saves the transfer. A hash does not: eight hex digits can be forged in minutes,
     and whoever only knows a hash is not thereby allowed the file.
  3. An entry is there only if its file is. The file is placed first and the entry written last; a reader
     takes no lock.
  4. A file is used if its size, inode and times are those of its last hashing. If they are not, it is
     hashed: the same bytes get a new stamp (each new hard link changes a ctime), others count as absent.
  5. One writer a URL, by the kernel's lock. What a killed writer left is a partial download, which the next
     one resumes.

A URL's query may be a signature: entries hold the URL without it, and the key. Failures of the disk become
`SourceUnavailableError` here. Runs in the caller. Trust: repos choose URLs, servers choose the bytes.

Source: RFC 9110, 8.8 (ETags) and 13.1.2 (If-None-Match); flock(2).
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from filelock import Timeout

from isohub.errors import OfflineError
from isohub.repos.blobs import Blobs, Stamp, hash_file
from isohub.repos.disk import disk_errors, flush_directory, hold, lock_file, locked
from isohub.repos.download import download
from isohub.repos.http import HttpClient
from isohub.repos.hub_files import copy_hub_file, hub_files
from isohub.repos.layout import weights_dir
from isohub.repos.records import write_record
from isohub.repos.weights_entry import CALLER, WeightsEntry, WeightsFile, read_entries, read_entry
from isohub.repos.weights_url import ENTRY_RECORD, Hashes, parse_weights_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from isohub.repos.credentials import Credentials
    from isohub.repos.weights_entry import Scope
    from isohub.repos.weights_url import WeightsUrl

__all__ = ["CALLER", "WEIGHTS_LIMIT_BYTES", "Weights", "WeightsEntry", "WeightsFile"]

_log = logging.getLogger("isohub.repos")
#: Above the 50 GB that the largest public hub takes in one file over git; what is larger comes in parts.
WEIGHTS_LIMIT_BYTES = 64 << 30
# RFC 9110, 8.8.3. A weak one (W/) promises the same meaning, not the same bytes.
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{1,256}"')
# `hold` waits for whoever removes a scope; this often it may be removed between the making and the holding.
_HOLD_TRIES = 20


class Weights:
    """The weights of a store.

    Args:
        root: The store's directory.
        offline: Ask no server: what is not here is an `OfflineError`.
    """

    def __init__(self, root: Path, *, offline: bool = False) -> None:
        self.root = Path(root).expanduser().absolute()
        self.offline = offline
        self._blobs = Blobs(self.root)
        self._partial = self.root / "weights" / "partial"

    def lookup(self, url: str, scope: Scope) -> WeightsFile | None:
        """The file of a URL if this scope has it, whole; asks nobody and waits for nobody.

        Raises:
            InvalidReferenceError: It is no URL.
            SourceUnavailableError: The disk failed.
        """
        address = parse_weights_url(url)
        with disk_errors(self.root, address.shown):
            return self._find(address, scope)

    def fetch(
        self,
        url: str,
        scope: Scope,
        *,
        credentials: Credentials,
        hash_prefix: str | None = None,
        sha256: str | None = None,
        progress: bool = False,
        limit_bytes: int = WEIGHTS_LIMIT_BYTES,
    ) -> WeightsFile:
        """Bring the file of a URL here for a scope, unless it has it.

        Args:
            url: http or https. Trust: the repo's code, unless the scope is the caller's.
            scope: Whom it is for. Trust: the caller.
            credentials: Whom to ask as.
            hash_prefix: First hex digits that its SHA-256 must have, in the cache as well.
            sha256: The whole that it must have: from a lockfile.
            progress: Draw a bar on stderr, if that is a terminal.
            limit_bytes: The most that is downloaded or copied.

        Raises:
            InvalidReferenceError: It is no URL or no hash.
            IntegrityError: What came, or what is here and cannot be asked for again, has another hash.
            SourceUnavailableError: It could not be brought or stored.
            OfflineError: It is not here, and the network may not be used.
        """
        address = parse_weights_url(url)
        hashes = Hashes.of(sha256=sha256, hash_prefix=hash_prefix)
        with disk_errors(self.root, address.shown):
            found = self._fitting(address, scope, hashes)
            if found is not None:
                return found
            if self.offline and not hub_files(address, hashes):
                raise self._offline_error(address, scope, hashes)
            with self.held(scope), locked(self._partial, f"{address.key}.lock"):
                # Whoever had the lock before may have brought it.
                found = self._fitting(address, scope, hashes)
                if found is not None:
                    return found
                known = self._copied(address, scope, hashes, limit_bytes)
                if known is not None:
                    return known
                if self.offline:
                    raise self._offline_error(address, scope, hashes)
                return self._downloaded(address, scope, hashes, credentials, limit_bytes, progress=progress)

    @contextmanager
    def held(self, scope: Scope) -> Iterator[None]:
        """Keep a scope's files here while they are used; makes its directory.

        Raises:
            SourceUnavailableError: The disk failed.
        """
        directory = weights_dir(self.root, scope)
        with disk_errors(self.root, "/".join(scope)):
            self._make_directories()
            for attempt in range(_HOLD_TRIES):
                directory.mkdir(parents=True, exist_ok=True)
                try:
                    descriptor = hold(directory)
                    break
                except FileNotFoundError:
                    if attempt == _HOLD_TRIES - 1:
                        raise
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def entries(self) -> list[WeightsFile]:
        """All that there is an entry of, by scope and URL. Their files are not looked at."""
        with disk_errors(self.root, "its weights"):
            found = [entry.file(self.root) for entry in read_entries(self.root)]
        return sorted(found, key=lambda file: (file.scope, file.url, file.key))

    def _fitting(self, address: WeightsUrl, scope: Scope, hashes: Hashes) -> WeightsFile | None:
        found = self._find(address, scope)
        if found is None or hashes.fit(found.sha256):
            return found
        if self.offline:
            hashes.check(found.sha256, f"the copy of {address.shown} in {found.path.parent}")
        _log.info("%s has another hash here than is expected; it is asked for again", address.shown)
        return None

    def _find(self, address: WeightsUrl, scope: Scope) -> WeightsFile | None:
        place = weights_dir(self.root, scope) / address.key
        entry = read_entry(self.root, place)
        if entry is None or not self._sound(entry):
            return None
        try:
            os.utime(place)  # for `cache prune`: when it was last used
        except OSError:
            pass  # a store that is only read
        return entry.file(self.root)

    def _sound(self, entry: WeightsEntry) -> bool:
        path = entry.file(self.root).path
        try:
            status = path.lstat()
            if Stamp.of(status) == entry.stamp:
                return True
            digest = None
            if stat.S_ISREG(status.st_mode) and status.st_size == entry.stamp.bytes:
                digest, stamp = hash_file(path)
        except FileNotFoundError:
            return False
        if digest != entry.sha256:
            _log.warning("%s is damaged; it counts as absent", path)
            return False
        self._restamp(entry, stamp)
        return True

    def _restamp(self, entry: WeightsEntry, stamp: Stamp) -> None:
        """Note that a file was found whole, so that the next reader need not hash it."""
        place = entry.place(self.root)
        try:
            # Only with the lock, and without waiting: somebody may be replacing both file and entry.
            with lock_file(self._partial / f"{entry.key}.lock", timeout_s=0):
                if read_entry(self.root, place) == entry:
                    write_record(place / ENTRY_RECORD, msgspec.structs.replace(entry, stamp=stamp))
        except (OSError, NotImplementedError, Timeout) as error:
            _log.debug("%s is whole, which could not be written down: %s", place, error)

    def _copied(self, address: WeightsUrl, scope: Scope, hashes: Hashes, limit_bytes: int) -> WeightsFile | None:
        copy = self._partial / f"{address.key}.copy"
        copy.unlink(missing_ok=True)
        try:
            digest = copy_hub_file(address, hashes, copy, limit_bytes=limit_bytes)
            return None if digest is None else self._enter(address, scope, copy, digest, None)
        finally:
            copy.unlink(missing_ok=True)

    def _downloaded(
        self,
        address: WeightsUrl,
        scope: Scope,
        hashes: Hashes,
        credentials: Credentials,
        limit_bytes: int,
        *,
        progress: bool,
    ) -> WeightsFile:
        part = self._partial / f"{address.key}.part"
        with self._elsewhere(address, scope, hashes) as known, HttpClient(credentials) as client:
            done = download(
                client,
                address.text,
                part,
                name=address.name,
                limit_bytes=limit_bytes,
                progress=progress,
                hash_prefix=hashes.prefix,
                sha256=hashes.sha256,
                if_none_match=None if known is None else known.etag,
            )
            if done.not_modified:
                assert known is not None
                return self._enter(address, scope, known.file(self.root).path, known.sha256, known.etag)
        made = self._enter(address, scope, part, done.sha256, done.etag)
        _log.info("%s is here, %d bytes, SHA-256 %s", address.shown, made.bytes, made.sha256)
        return made

    @contextmanager
    def _elsewhere(self, address: WeightsUrl, scope: Scope, hashes: Hashes) -> Iterator[WeightsEntry | None]:
        """The same URL's file in another scope, held, if its server can say whether it is still the same."""
        for entry in read_entries(self.root, address.key):
            if entry.etag is None or entry.scope == scope or not hashes.fit(entry.sha256):
                continue
            with self.held(entry.scope):
                if self._sound(entry):
                    yield entry
                    return
        yield None

    def _enter(self, address: WeightsUrl, scope: Scope, source: Path, sha256: str, etag: str | None) -> WeightsFile:
        """Place a file in a scope and write its entry. The caller holds the lock.

        Args:
            address: Its URL.
            scope: Whom it is for.
            source: Its bytes: a partial file, which goes, or another scope's file, which stays.
            sha256: Of these bytes.
            etag: As the server gave it.
        """
        place = weights_dir(self.root, scope) / address.key
        place.mkdir(exist_ok=True)
        for leftover in place.glob(".*"):  # a killed writer's
            leftover.unlink(missing_ok=True)
        path = place / address.name
        # Before the file: no entry may name bytes that are not there.
        (place / ENTRY_RECORD).unlink(missing_ok=True)
        own = source.parent == self._partial
        for attempt in range(3):
            self._blobs.add(source, sha256, move=own)
            try:
                self._blobs.link(sha256, path)
                break
            except FileNotFoundError:  # somebody cleared away a blob that nothing linked to yet
                if attempt == 2:
                    raise
        if own:
            source.unlink(missing_ok=True)
        stamp = Stamp.of(path.lstat())
        entry = WeightsEntry(
            format=1,
            url=address.address,
            key=address.key,
            scope=scope,
            name=address.name,
            sha256=sha256,
            etag=etag if etag is not None and _STRONG_ETAG.fullmatch(etag) else None,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            stamp=stamp,
        )
        write_record(place / ENTRY_RECORD, entry)
        flush_directory(place)
        return entry.file(self.root)

    def _make_directories(self) -> None:
        if not self.root.is_dir():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)
        self._partial.mkdir(parents=True, exist_ok=True)

    def _offline_error(self, address: WeightsUrl, scope: Scope, hashes: Hashes) -> OfflineError:
        whose = "the caller" if scope == CALLER else "/".join(scope)
        expected = hashes.sha256 or hashes.prefix
        return OfflineError(
            f"{address.shown} is not in the cache for {whose}"
            + (f" with the SHA-256 {expected}" if expected else "")
            + ", and the network may not be used",
            hint="load it once with a network; offline comes from ISOHUB_OFFLINE or offline=True",
            url=address.shown,
        )
