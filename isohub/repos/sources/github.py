"""GitHub and its Enterprise servers: refs by the git protocol, trees by archives.

To resolve costs one request outside the REST quota, for names and tips. A SHA that is no tip
must be shown to belong to a branch or tag of the very repository, since GitHub serves the
commits of all forks under each other's names. Tokens go to the server that they belong to.
Runs in the caller; executes nothing.

Source: gitprotocol-http(5); GitHub REST API 2022-11-28 (commits, "compare two commits", "download
a repository archive"); "You might see commits outside of the repository", docs.github.com.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from isohub.errors import IntegrityError, RefNotFoundError, SourceUnavailableError
from isohub.repos.archive import extract_zip
from isohub.repos.credentials import Credentials
from isohub.repos.http import HttpClient, read_limited
from isohub.repos.pins import Pin
from isohub.repos.reference import github_api
from isohub.repos.sources.refs import Refs, is_full_sha, is_sha
from isohub.repos.sources.smart_http import read_advertisement

if TYPE_CHECKING:
    from pathlib import Path

    import requests

    from isohub.repos.reference import Reference

__all__ = ["GitHubSource"]

_log = logging.getLogger("isohub.repos")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# Each is a request of the REST quota, 60 an hour without a token and 5,000 with one.
_COMPARE_LIMIT = 100
_JSON_LIMIT_BYTES = 32 << 20
# GitHub refuses pushes above 2 GiB, and asks for repositories below 1 GB.
_ARCHIVE_LIMIT_BYTES = 2 << 30
_CHUNK_BYTES = 1 << 18


class GitHubSource:
    """Repositories on a GitHub server, as `isohub.repos.sources.Source`.

    Args:
        credentials: Whom to ask as.
    """

    def __init__(self, credentials: Credentials | None = None) -> None:
        self._credentials = credentials or Credentials()

    def resolve(self, reference: Reference, *, skip_validation: bool = False) -> Pin:
        """Find the commit that a reference means now; see `Source.resolve`."""
        with HttpClient(self._credentials) as client:
            refs = self._refs(client, reference)
            ref = reference.ref or "HEAD"
            match = refs.match(ref)
            if match is None and is_sha(ref):
                match = refs.match_tip(ref, reference)
            if match is not None:
                return Pin(reference, match.commit, match.name)
            if not is_sha(ref):
                raise refs.not_found(reference)
            return self._pin_of_no_tip(client, refs, reference, ref.lower(), skip_validation=skip_validation)

    def fetch(self, pin: Pin, into: Path, *, progress: bool = False) -> None:
        """Download a commit's archive and unpack it; see `Source.fetch`."""
        reference = pin.reference
        url = f"{reference.location}/archive/{pin.commit}.zip"
        with HttpClient(self._credentials) as client, tempfile.TemporaryFile(dir=into.parent) as archive:
            try:
                _download(client, url, archive, pin.name, progress=progress)
            except SourceUnavailableError as error:
                if error.status != 404 or not self._credentials.tokens():
                    raise _named(error, reference, f"commit {pin.commit}") from error
                # Private repositories give their archives to the API only.
                url = f"{_api(reference)}/repos/{reference.owner}/{reference.repo}/zipball/{pin.commit}"
                try:
                    _download(client, url, archive, pin.name, progress=progress)
                except SourceUnavailableError as second:
                    raise _named(second, reference, f"commit {pin.commit}") from second
            extract_zip(archive, into, origin=url, commit=pin.commit)

    def _refs(self, client: HttpClient, reference: Reference) -> Refs:
        try:
            return read_advertisement(client, f"{reference.location}.git").refs
        except SourceUnavailableError as error:
            raise _named(error, reference, "repository") from error

    def _pin_of_no_tip(
        self, client: HttpClient, refs: Refs, reference: Reference, sha: str, *, skip_validation: bool
    ) -> Pin:
        commit = sha
        if not (skip_validation and is_full_sha(sha)):
            commit = self._full_sha(client, refs, reference, sha)
        if skip_validation:
            _log.warning(
                "%s is accepted without being shown to belong to %s/%s; it may be anyone's, from a fork",
                commit,
                reference.owner,
                reference.repo,
            )
            return Pin(reference, commit, None, validated=False)
        pulls = [name for name, tip in refs.commits.items() if tip == commit and name.startswith("refs/pull/")]
        tips = refs.tips()
        for tip in list(tips)[:_COMPARE_LIMIT]:
            url = f"{_api(reference)}/repos/{reference.owner}/{reference.repo}/compare/{tip}...{commit}?per_page=1"
            try:
                claimed_status = _json(client, url).get("status")
            except SourceUnavailableError as error:
                if error.status != 404:  # no common ancestor
                    raise
                continue
            if claimed_status in ("behind", "identical"):
                return Pin(reference, commit, None)
        why = f"commit {commit} is on none of its {len(tips)} branches and tags, and may live only in a fork"
        if len(tips) > _COMPARE_LIMIT:
            why = f"commit {commit} is on none of the first {_COMPARE_LIMIT} of its {len(tips)} branches and tags"
        hint = "name the branch or tag; or look at the commit and pass skip_validation=True"
        if pulls:
            number = pulls[0].split("/")[2]
            hint = f"it is the head of pull request {number}: write {reference.owner}/{reference.repo}:pull/{number}"
        raise refs.not_found(reference, why, hint)

    def _full_sha(self, client: HttpClient, refs: Refs, reference: Reference, sha: str) -> str:
        url = f"{_api(reference)}/repos/{reference.owner}/{reference.repo}/commits/{sha}"
        try:
            claimed_sha = _json(client, url).get("sha")
        except SourceUnavailableError as error:
            if error.status in (404, 409, 422):  # 422: no commit for the SHA; 409: the repository is empty
                raise refs.not_found(reference) from error
            raise
        # The API also takes names there: only a commit that the digits begin is an answer to them.
        if not isinstance(claimed_sha, str) or not _COMMIT.fullmatch(claimed_sha) or not claimed_sha.startswith(sha):
            raise refs.not_found(reference)
        return claimed_sha


def _api(reference: Reference) -> str:
    return github_api(reference.location.removesuffix(f"/{reference.owner}/{reference.repo}"))


def _json(client: HttpClient, url: str) -> dict[str, Any]:
    def read(response: requests.Response) -> dict[str, Any]:
        data = read_limited(response, _JSON_LIMIT_BYTES)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SourceUnavailableError(f"{url} answers what is no JSON", url=url) from error
        if not isinstance(value, dict):
            raise SourceUnavailableError(f"{url} answers JSON that is no object", url=url)
        return value

    return client.request(url, read, headers={"Accept": "application/vnd.github+json"})


def _download(client: HttpClient, url: str, into: IO[bytes], name: str, *, progress: bool) -> None:
    def read(response: requests.Response) -> None:
        into.seek(0)
        into.truncate()
        length = response.headers.get("Content-Length", "")
        encoded = "Content-Encoding" in response.headers
        total = int(length) if re.fullmatch(r"[0-9]{1,15}", length) and not encoded else None
        if total is not None and total > _ARCHIVE_LIMIT_BYTES:
            raise IntegrityError(f"{url} has {total} bytes; at most {_ARCHIVE_LIMIT_BYTES} are read", url=url)
        count = 0
        shown = progress and sys.stderr.isatty()
        with tqdm(desc=name, total=total, unit="B", unit_scale=True, disable=not shown, leave=False) as bar:
            for chunk in response.iter_content(_CHUNK_BYTES):
                count += len(chunk)
                if count > _ARCHIVE_LIMIT_BYTES:
                    raise IntegrityError(f"{url} has more than {_ARCHIVE_LIMIT_BYTES} bytes", url=url)
                into.write(chunk)
                bar.update(len(chunk))
        # urllib3 raises on a short body by itself; this holds whatever its settings become.
        if total is not None and count != total:
            raise IntegrityError(f"{url} gave {count} of {total} bytes", url=url, expected=str(total), got=str(count))

    client.request(url, read)


def _named(error: SourceUnavailableError, reference: Reference, what: str) -> SourceUnavailableError | RefNotFoundError:
    """The error with the repository's name, and a hint that fits its status."""
    if error.status not in (401, 404, 410, 451):  # 403 is mostly a limit on the rate, and says so itself
        return SourceUnavailableError(
            error.message, hint=error.hint, reference=str(reference), url=error.url, status=error.status
        )
    owner_repo = f"{reference.owner}/{reference.repo}"
    # GitHub answers 401 for repositories that do not exist, so as not to tell which are private.
    hint = "check the spelling; for a private repository set GITHUB_TOKEN"
    if Credentials().tokens():
        hint = "check the spelling, and that the token in GITHUB_TOKEN or GH_TOKEN is valid and may read it"
    if os.path.isdir(owner_repo):  # noqa: PTH112
        hint = f"for the directory of that name write ./{owner_repo} or pass source='local'"
    if error.status == 451:
        hint = "GitHub has taken it down for legal reasons"
    return SourceUnavailableError(
        f"{reference.host} gives no {what} of {owner_repo} (HTTP {error.status}): it does not exist, or not for you",
        hint=hint,
        reference=str(reference),
        url=error.url,
        status=error.status,
    )
