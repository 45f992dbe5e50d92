"""Weights: files by URL, for each repository by itself, each content once.

    <root>/weights/urls/<host>/<owner>/<repo>/<key>/{entry.json, <file name>}
    <root>/weights/blobs/                                `isohub.repos.blobs`
    <root>/weights/partial/<key>.{part, part.json, copy, lock}; a copy is whole, and not yet a blob

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
  6. What is here is not asked for again, unless the caller says so (`revalidate`) or it was of no use
     (`forget`). No server's word that a file is unchanged brings back what was forgotten.

A URL's query may be a signature: entries hold the URL without it, and the key. Failures of the disk become
`SourceUnavailableError` here. Runs in the caller. Trust: repos choose URLs, servers choose the bytes.

Source: RFC 9110, 8.8 (ETags) and 13.1.2 (If-None-Match); flock(2).
"""

from __future__ import annotations

import logging
import os
import re
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from isohub.errors import OfflineError, SourceUnavailableError
from isohub.repos.blobs import Blobs, Stamp, hash_known
from isohub.repos.disk import disk_errors, flush_directory, hold, locked, make_root
from isohub.repos.download import download
from isohub.repos.http import HttpClient
from isohub.repos.hub_files import copy_hub_file, hub_files
from isohub.repos.layout import weights_dir
from isohub.repos.records import write_record
from isohub.repos.weights_entry import (
    CALLER,
    WeightsEntry,
    WeightsFile,
    is_sound,
    partial_dir,
    read_entries,
    read_entry,
)
from isohub.repos.weights_url import ENTRY_RECORD, Hashes, parse_weights_url, url_hints

if TYPE_CHECKING:
    from collections.abc import Iterator

    from isohub.repos.connections import Border
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
        border: Which servers may be asked; None is all. What is here is not held against it.
    """

    def __init__(self, root: Path, *, offline: bool = False, border: Border | None = None) -> None:
        self.root = Path(root).expanduser().absolute()
        self.offline = offline
        self._border = border
        self._blobs = Blobs(self.root)
        self._partial = partial_dir(self.root)

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
        revalidate: bool = False,
    ) -> WeightsFile:
        """Bring the file of a URL here for a scope, unless it has it.

        Args:
            url: http or https. Trust: the repo's code, unless the scope is the caller's.
            scope: Whom it is for. Trust: the caller.
            credentials: Whom to ask as.
            hash_prefix: First hex digits that its SHA-256 must have, in the cache as well; empty for none.
            sha256: The whole that it must have: from a lockfile.
            progress: Draw a bar on stderr, if that is a terminal.
            limit_bytes: The most that is downloaded or copied.
            revalidate: Ask the server whether what is here is still its file, by its strong ETag; without one it
                is downloaded again. What is here is used, with a warning, if the server is in trouble; without a
                question, if no server may be asked, or if it has the `sha256`, which leaves nothing to ask.

        Raises:
            InvalidReferenceError: It is no URL or no hash.
            IntegrityError: What came, or what is here and cannot be asked for again, has another hash.
            SourceUnavailableError: It could not be brought or stored.
            OfflineError: It is not here, and the network may not be used.
        """
        address = parse_weights_url(url)
        hashes = Hashes.of(sha256=sha256, hash_prefix=hash_prefix)
        with disk_errors(self.root, address.shown):
            ask = revalidate and not self.offline and hashes.sha256 is None
            found = self._fitting(address, scope, hashes)
            if found is not None and not ask:
                return found
            if self.offline and not hub_files(address, hashes):
                raise self._offline_error(address, scope, hashes)
            with self.held(scope), locked(self._partial, f"{address.key}.lock"):
                # Whoever had the lock before may have brought it.
                found = self._fitting(address, scope, hashes)
                if found is not None and not ask:
                    return found
                copied = self._copied(address, scope, hashes, limit_bytes) if found is None else None
                if copied is not None:
                    return copied
                if self.offline:
                    raise self._offline_error(address, scope, hashes)
                try:
                    return self._downloaded(address, scope, hashes, credentials, limit_bytes, found, progress=progress)
                except SourceUnavailableError as error:
                    if found is None or not error.passing:
                        raise
                    _log.warning("%s; going on with what is here of %s", error.message, address.shown)
                    return found

    def forget(self, url: str, scope: Scope, *, sha256: str | None = None) -> None:
        """Let go of a file that is of no use, so that the next `fetch` asks for it again.

        Only its entry goes: whoever uses the file keeps it, and `cache prune` takes it away. Nor is any server
        asked again by the ETag under which it gave these bytes, for whichever scope.

        Args:
            url: Its URL.
            scope: Whom it was fetched for.
            sha256: Only if it is of this content still; somebody may have brought another.

        Raises:
            InvalidReferenceError: It is no URL.
            SourceUnavailableError: The disk failed.
        """
        address = parse_weights_url(url)
        place = weights_dir(self.root, scope) / address.key
        with disk_errors(self.root, address.shown):
            if read_entry(self.root, place) is None:
                return
            with self.held(scope), locked(self._partial, f"{address.key}.lock"):
                entry = read_entry(self.root, place)
                if entry is None or sha256 not in (None, entry.sha256):
                    return
                (place / ENTRY_RECORD).unlink()
                for other in read_entries(self.root, address.key):
                    if other.etag is not None and other.sha256 == entry.sha256:
                        self._drop_etag(other)

    def measured(self, file: WeightsFile) -> WeightsFile:
        """A file with the hash and the size that it has now, whatever its entry says.

        It reads the disk, all of the file, at about 1.4 GB/s; once in this process, as long as the kernel says
        that nothing happened to the file since.

        Raises:
            SourceUnavailableError: It cannot be read.
        """
        with disk_errors(self.root, file.name):
            sha256, size_bytes = hash_known(file.path)
        return replace(file, sha256=sha256, bytes=size_bytes, blob=self._blobs.path(sha256))

    def hold_blob(self, file: WeightsFile) -> int | None:
        """Keep a file's content here, under `file.blob`, for as long as the descriptor is open.

        For whoever is told that path. To hold its scope is not enough: the URL may be asked again, and a blob that
        nothing links to any more is anybody's to remove. What is not under that path is put there.

        Args:
            file: As `fetch` or `measured` has just given it, its scope held.

        Returns:
            A descriptor of the caller's, or None as `Blobs.hold` has it.

        Raises:
            SourceUnavailableError: The disk failed.
        """
        with disk_errors(self.root, file.name):
            return self._blobs.hold(file.sha256, file.path)

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
        if entry is None or not is_sound(self.root, entry):
            return None
        try:
            os.utime(place)  # for `cache prune`: when it was last used
        except OSError:
            pass  # a store that is only read
        return entry.file(self.root)

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
        here: WeightsFile | None,
        *,
        progress: bool,
    ) -> WeightsFile:
        part = self._partial / f"{address.key}.part"
        with (
            self._known(address, scope, hashes, here) as known,
            HttpClient(credentials, self._border) as client,
            url_hints(),
        ):
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
                if here is not None and known.scope == scope:
                    return here
                return self._enter(address, scope, known.file(self.root).path, known.sha256, known.etag)
        # Under another name before it becomes a blob: a partial file is written to, a blob never.
        whole = self._partial / f"{address.key}.copy"
        part.replace(whole)
        made = self._enter(address, scope, whole, done.sha256, done.etag)
        _log.info("%s is here, %d bytes, SHA-256 %s", address.shown, made.bytes, made.sha256)
        return made

    @contextmanager
    def _known(
        self, address: WeightsUrl, scope: Scope, hashes: Hashes, here: WeightsFile | None
    ) -> Iterator[WeightsEntry | None]:
        """A file of the same URL, held, if its server can say whether it is still the same; the own one first."""
        for entry in sorted(read_entries(self.root, address.key), key=lambda entry: entry.scope != scope):
            if entry.etag is None or not hashes.fit(entry.sha256) or (entry.scope == scope and here is None):
                continue
            with self.held(entry.scope):
                if is_sound(self.root, entry):
                    yield entry
                    return
        yield None

    def _drop_etag(self, entry: WeightsEntry) -> None:
        place = entry.place(self.root)
        with self.held(entry.scope):
            if read_entry(self.root, place) == entry:  # else it was removed before it was held
                write_record(place / ENTRY_RECORD, msgspec.structs.replace(entry, etag=None))

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
        make_root(self.root)
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
