"""What a name means in the store: a reference, the URL of weights, or what ``isohub cache ls`` prints.

It asks nobody: a ref means what it meant when its source was last asked, else what it was first fetched for,
else the start of a commit. What names a repo that is here names nothing else. Runs in the caller. Trust: names
are the caller's; what is in the store is a repo's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from isohub.errors import InvalidReferenceError
from isohub.repos.naming import without_credentials
from isohub.repos.reference import github_server, parse
from isohub.repos.weights_url import parse_weights_url

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from isohub.repos.inventory import Inventory, StoredCheckout, StoredWeights
    from isohub.repos.weights_entry import Scope, WeightsFile

__all__ = ["Selection", "commit_name", "repo_name", "select"]

_AT_COMMIT = re.compile(r"(?P<repo>.+)@(?P<commit>[0-9a-fA-F]{4,64})(?P<extras>(?:\+(?:lfs|submodules)){0,2})")


@dataclass
class Selection:
    """What some names mean in a store.

    Attributes:
        checkouts: Theirs.
        weights: Of whole repos, and by URL or path; each with those of its files alone that were meant.
        scopes: The whole repos.
        missing: Names of which nothing is here, without credentials and queries.
        urls: Where the repos of the store came from, for `repo_name`.
    """

    checkouts: list[StoredCheckout] = field(default_factory=list)
    weights: list[StoredWeights] = field(default_factory=list)
    scopes: set[Scope] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    urls: dict[Scope, str] = field(default_factory=dict)


def select(inventory: Inventory, texts: Iterable[str] | None) -> Selection:
    """Look names up in a store.

    Args:
        inventory: Of the store.
        texts: References, or names as `repo_name` and `commit_name` give them; None for everything. Trust: the caller.
    """
    checkouts, weights = inventory.checkouts(), inventory.weights()
    urls = {each.scope: each.url for each in checkouts}
    if texts is None:
        return Selection(checkouts, weights, {file.scope for each in weights for file in each.files}, urls=urls)
    chosen = Selection(urls=urls)
    known = {scope for scope, _ in (*inventory.repositories(), *inventory.scopes())}
    names = {name: scope for scope in known for name in ("/".join(filter(None, scope)), repo_name(scope))}
    names |= {url: scope for scope, url in urls.items() if scope[0] == "local"}
    places: set[Path] = set()
    for text in texts:
        scope, ref, commit = _meaning(text, names, known)
        if scope is not None and ref is None and commit is None:
            chosen.scopes.add(scope)
            continue
        if scope is not None:
            found = _narrowed([each for each in checkouts if each.scope == scope], ref, commit)
            files: list[WeightsFile] = []
        else:
            found, files = _elsewise(text, inventory.root, checkouts, weights)
        chosen.checkouts += [each for each in found if each not in chosen.checkouts]
        places |= {file.path for file in files}
        if not found and not files:
            chosen.missing.append(without_credentials(text).partition("?")[0] if "://" in text else text)
    for each in checkouts:
        if each.scope in chosen.scopes and each not in chosen.checkouts:
            chosen.checkouts.append(each)
    for content in weights:
        meant = tuple(file for file in content.files if file.scope in chosen.scopes or file.path in places)
        if meant:
            chosen.weights.append(replace(content, files=meant))
    return chosen


def _elsewise(
    text: str, root: Path, checkouts: Sequence[StoredCheckout], weights: Sequence[StoredWeights]
) -> tuple[list[StoredCheckout], list[WeightsFile]]:
    """What a text that names no repo means: a path in the store, or the URL of weights."""
    files = [file for each in weights for file in each.files]
    if text.startswith(("/", "./", "../", "~")):
        try:
            path = root / Path(os.path.realpath(Path(text).expanduser())).relative_to(os.path.realpath(root))
        except (OSError, RuntimeError, ValueError):  # a loop, no home directory, a NUL; or not in the store
            return [], []
        return (
            [each for each in checkouts if path in (each.path, each.path / "tree")],
            [file for file in files if path in (file.path, file.path.parent)],
        )
    try:
        address = parse_weights_url(text)
    except InvalidReferenceError:
        return [], []
    if address.text != address.address:  # a query, which tells files apart that have one address
        return [], [file for file in files if file.key == address.key]
    return [], [file for file in files if file.url == address.address]


def _meaning(text: str, names: dict[str, Scope], known: set[Scope]) -> tuple[Scope | None, str | None, str | None]:
    """Scope, ref and commit of a text; no scope if the store has none such."""
    match = _AT_COMMIT.fullmatch(text)
    at_commit = None if match is None else match["commit"].lower() + match["extras"]
    for candidate, commit in ((text, None), (match["repo"] if match else text, at_commit)):
        try:
            reference = parse(candidate)
        except InvalidReferenceError:
            if candidate in names:
                return names[candidate], None, commit
            continue
        scope = (reference.host, reference.owner, reference.repo)
        if scope in known:
            return scope, reference.ref, commit
        if candidate in names:
            return names[candidate], None, commit
    return None, None, None


def _narrowed(checkouts: Sequence[StoredCheckout], ref: str | None, commit: str | None) -> list[StoredCheckout]:
    if commit is not None:
        digits, plus, _ = commit.partition("+")
        return [
            each
            for each in checkouts
            if each.commit.startswith(digits) and (not plus or each.path.name == each.commit + commit[len(digits) :])
        ]
    spellings = (ref, f"refs/heads/{ref}", f"refs/tags/{ref}")
    return (
        [each for each in checkouts if ref in each.refs]
        or [each for each in checkouts if each.ref_name in spellings]
        or ([each for each in checkouts if each.commit.startswith((ref or "").lower())] if len(ref or "") >= 4 else [])
    )


def repo_name(scope: Scope, url: str | None = None) -> str:
    """A repo as one writes it, and as every command shows it.

    Args:
        scope: Its (host, owner, repo).
        url: Where it came from, if that is known.

    Returns:
        Its path for a local one, ``owner/repo`` on the GitHub server, else with the host before it.
    """
    if scope[0] == "local" and url is not None:
        return url
    try:
        server = github_server().partition("://")[2]
    except InvalidReferenceError:
        server = ""
    return "/".join(filter(None, scope[1:] if scope[0] == server else scope))


def commit_name(checkout: StoredCheckout) -> str:
    """A checkout as one writes it: ``owner/repo@<commit>``, and its extras."""
    return f"{repo_name(checkout.scope, checkout.url)}@{checkout.path.name}"
