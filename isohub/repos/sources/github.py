"""GitHub and its Enterprise servers: refs by the git protocol, trees by archives.

To resolve costs one request outside the REST quota, for names and tips. A SHA that is no tip
must be shown to belong to a branch or tag of the very repository, since GitHub serves the
commits of all forks under each other's names: a second request brings the history of branches and
tags without files, and it is walked. Only a history beyond 64 MiB, or a server that cannot leave
files out, is asked about by the REST API.

An archive is filtered by the repository's attributes (export-ignore, export-subst, line ends), and its
commit is its own word. So what was unpacked is compared with the tree that the commit itself names: a
third request brings the commit object, whose hash is the commit's id. Where they differ, the git
protocol brings the files, so that a commit is one tree whichever way it came. A server that does not
answer that is trusted as far as TLS goes, and a warning says so.

Tokens go to the server that they belong to. Runs in the caller; executes nothing.

Source: gitprotocol-http(5); GitHub REST API 2022-11-28 (commits, "compare two commits", "download
a repository archive"); "You might see commits outside of the repository", docs.github.com.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isohub.errors import IntegrityError, RefNotFoundError, SourceUnavailableError
from isohub.repos.archive import extract_zip
from isohub.repos.credentials import Credentials
from isohub.repos.disk import remove_tree
from isohub.repos.download import download
from isohub.repos.http import HttpClient, read_limited
from isohub.repos.measure import measure
from isohub.repos.pins import Pin
from isohub.repos.reference import github_api
from isohub.repos.sources.git import GitSource
from isohub.repos.sources.packs import HISTORY_LIMIT_BYTES, history, tree_of
from isohub.repos.sources.pkt import Advertisement, PackTooLargeError
from isohub.repos.sources.refs import Refs, is_full_sha, is_sha
from isohub.repos.sources.smart_http import HttpRemote

if TYPE_CHECKING:
    import requests

    from isohub.repos.reference import Reference

__all__ = ["GitHubSource"]

_log = logging.getLogger("isohub.repos")
# What GitHub's servers can do, as they said for years: so they need not be asked at each commit.
_UNASKED = frozenset({"filter", "no-progress", "ofs-delta", "shallow", "side-band-64k"})
# What comes of a redirected POST, which HTTP clients make a GET of (RFC 9110, section 15.4.2).
_NO_POST = frozenset({400, 404, 405})
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# Each is a request of the REST quota, 60 an hour without a token and 5,000 with one.
_COMPARE_LIMIT = 100
_JSON_LIMIT_BYTES = 32 << 20
# GitHub refuses pushes above 2 GiB, and asks for repositories below 1 GB.
_ARCHIVE_LIMIT_BYTES = 2 << 30


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
            remote = self._remote(client, reference)
            refs = remote.advertisement.refs
            ref = reference.ref or "HEAD"
            match = refs.match(ref)
            if match is None and is_sha(ref):
                match = refs.match_tip(ref, reference)
            if match is not None:
                return Pin(reference, match.commit, match.name, validated=match.own)
            if not is_sha(ref):
                raise refs.not_found(reference)
            return self._pin_of_no_tip(client, remote, reference, ref.lower(), skip_validation=skip_validation)

    def fetch(self, pin: Pin, into: Path, *, progress: bool = False) -> None:
        """Download a commit's archive, unpack it, and compare it with the commit; see `Source.fetch`.

        With extras, and where the archive is not the commit's tree, by the git protocol.
        """
        if pin.extras or not self._is_unpacked(pin, into, progress=progress):
            GitSource(self._credentials).fetch(pin, into, progress=progress)

    def _is_unpacked(self, pin: Pin, into: Path, *, progress: bool) -> bool:
        """Bring the archive; whether it is the commit's tree. If not, the directory is empty again."""
        reference = pin.reference
        url = f"{reference.location}/archive/{pin.commit}.zip"
        with (
            HttpClient(self._credentials) as client,
            tempfile.TemporaryDirectory(prefix=".archive-", dir=into.parent) as scratch,
        ):
            path = Path(scratch) / "archive.zip"
            try:
                download(client, url, path, name=pin.name, limit_bytes=_ARCHIVE_LIMIT_BYTES, progress=progress)
            except SourceUnavailableError as error:
                # Private repositories give their archives to the API only.
                url = f"{_api(reference)}/repos/{reference.owner}/{reference.repo}/zipball/{pin.commit}"
                if error.status != 404 or not client.has_credentials(url):
                    raise _named(self._credentials, error, reference, f"commit {pin.commit}") from error
                try:
                    download(client, url, path, name=pin.name, limit_bytes=_ARCHIVE_LIMIT_BYTES, progress=progress)
                except SourceUnavailableError as second:
                    raise _named(self._credentials, second, reference, f"commit {pin.commit}") from second
            with path.open("rb") as archive:
                names_commit = extract_zip(archive, into, origin=url, commit=pin.commit)
            tree = self._tree(client, pin, Path(scratch))
        if tree is None:
            if not names_commit:
                raise IntegrityError(
                    f"{url} does not say of which commit it is, and {reference.host} does not show the commit",
                    hint=f"bring it by the git protocol: git+{reference.location}@{pin.commit}",
                    reference=str(reference),
                    url=url,
                    expected=pin.commit,
                )
            return True
        found = measure(into, algorithm=_object_format(pin.commit)).digest
        if found == tree:
            return True
        _log.info(
            "the archive of %s has the tree %s and its commit %s: attributes such as export-ignore and submodules "
            "make them differ; the git protocol brings the commit's",
            pin.name,
            found[:12],
            tree[:12],
        )
        remove_tree(into)
        into.mkdir()
        return False

    def _tree(self, client: HttpClient, pin: Pin, scratch: Path) -> str | None:
        """Id of the tree that the commit names, by the commit's own hash; None if the server does not show it."""
        reference = pin.reference
        base = f"{reference.location}.git"
        words = _UNASKED | {f"object-format={_object_format(pin.commit)}"}
        taken = Advertisement(Refs({}, None, None), {}, words, base)
        try:
            try:
                return tree_of(HttpRemote(client, base, taken), pin.commit, scratch)
            except SourceUnavailableError as error:
                if error.status not in _NO_POST:
                    raise
                # Of a renamed repository: it says where it is now when it is asked for its refs.
                return tree_of(HttpRemote(client, base), pin.commit, scratch)
        except (SourceUnavailableError, PackTooLargeError) as error:
            if isinstance(error, SourceUnavailableError) and error.passing:
                # What a commit is must not depend on the weather.
                raise _named(self._credentials, error, reference, f"commit {pin.commit}") from error
            _log.warning(
                "%s does not show the commit itself, so that TLS alone vouches for what the archive of %s holds: %s",
                reference.host,
                pin.name,
                error.message,
            )
            return None

    def _remote(self, client: HttpClient, reference: Reference) -> HttpRemote:
        try:
            return HttpRemote(client, f"{reference.location}.git")
        except SourceUnavailableError as error:
            raise _named(self._credentials, error, reference, "repository") from error

    def _pin_of_no_tip(
        self, client: HttpClient, remote: HttpRemote, reference: Reference, sha: str, *, skip_validation: bool
    ) -> Pin:
        refs = remote.advertisement.refs
        if is_full_sha(sha):
            remote.advertisement.refuse_tag(sha, reference)
        if skip_validation:
            commit = sha if is_full_sha(sha) else self._full_sha(client, refs, reference, sha)
            _log.warning(
                "%s is accepted without being shown to belong to %s/%s; it may be anyone's, from a fork",
                commit,
                reference.owner,
                reference.repo,
            )
            return Pin(reference, commit, None, validated=False)
        tips = refs.tips()
        found = _in_history(remote, sha)
        if found is None:
            commit = sha if is_full_sha(sha) else self._full_sha(client, refs, reference, sha)
            if self._is_behind_a_tip(client, reference, list(tips)[:_COMPARE_LIMIT], commit):
                return Pin(reference, commit, None)
        elif len(found) > 1:
            raise refs.ambiguous(sha, found, reference)
        elif found:
            return Pin(reference, found[0], None)
        else:
            commit = sha
        remote.advertisement.refuse_tag(sha, reference)
        why = f"commit {commit} is on none of its {len(tips)} branches and tags, and may live only in a fork"
        if found is None and len(tips) > _COMPARE_LIMIT:
            why = f"commit {commit} is on none of the first {_COMPARE_LIMIT} of its {len(tips)} branches and tags"
        hint = "name the branch or tag; or look at the commit and pass skip_validation=True"
        pulls = [name for name, tip in refs.commits.items() if tip.startswith(commit) and name.startswith("refs/pull/")]
        if pulls:
            number = pulls[0].split("/")[2]
            hint = f"it is the head of pull request {number}: write {reference.owner}/{reference.repo}:pull/{number}"
        raise refs.not_found(reference, why, hint)

    def _is_behind_a_tip(self, client: HttpClient, reference: Reference, tips: list[str], commit: str) -> bool:
        """Whether the API says that a commit is in a tip's history: a request of the quota for each tip."""
        for tip in tips:
            url = f"{_api(reference)}/repos/{reference.owner}/{reference.repo}/compare/{tip}...{commit}?per_page=1"
            try:
                claimed_status = _json(client, url).get("status")
            except SourceUnavailableError as error:
                if error.status != 404:  # no common ancestor
                    raise
                continue
            if claimed_status in ("behind", "identical"):
                return True
        return False

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


def _in_history(remote: HttpRemote, sha: str) -> list[str] | None:
    """Commits of branches and tags that a SHA names, or None if the git protocol cannot say within its bounds."""
    if "filter" not in remote.advertisement.capabilities:
        return None  # all files of all times would come along
    try:
        return history(remote, sha, limit_bytes=HISTORY_LIMIT_BYTES)
    except PackTooLargeError:
        return None


def _object_format(commit: str) -> str:
    return "sha1" if len(commit) == 40 else "sha256"


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


def _named(
    credentials: Credentials, error: SourceUnavailableError, reference: Reference, what: str
) -> SourceUnavailableError | RefNotFoundError:
    """The error with the repository's name, and a hint that fits its status."""
    if error.status not in (401, 404, 410, 451):  # 403 is mostly a limit on the rate, and says so itself
        return SourceUnavailableError(error.message, hint=error.hint, **{**error.fields, "reference": str(reference)})
    owner_repo = f"{reference.owner}/{reference.repo}"
    # GitHub answers 401 for repositories that do not exist, so as not to tell which are private.
    hint = "check the spelling; for a private repository set GITHUB_TOKEN, or log in with git or in ~/.netrc"
    if credentials.anonymous:
        hint = "check the spelling; it was asked for without anybody's credentials, as all is that a repo asks for"
    elif credentials.tokens() and (token := credentials.token_name(reference.location)):
        hint = f"check the spelling, and that the token in {token} is valid and may read it"
    if os.path.isdir(owner_repo):  # noqa: PTH112
        hint = f"for the directory of that name write ./{owner_repo} or pass source='local'"
    if error.status == 451:
        hint = "GitHub has taken it down for legal reasons"
    return SourceUnavailableError(
        f"{reference.host} gives no {what} of {owner_repo} (HTTP {error.status}): it does not exist, or not for you",
        hint=hint,
        **{**error.fields, "reference": str(reference)},
    )
