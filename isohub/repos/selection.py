"""What a name means in the store: a reference, or what ``isohub cache ls`` prints.

It asks nobody: a ref means what it meant when its source was last asked, else what it was first fetched for,
else the start of a commit. Runs in the caller. Trust: names are the caller's; what is in the store is a repo's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from isohub.errors import InvalidReferenceError
from isohub.repos.reference import github_server, parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from isohub.repos.inventory import Inventory, StoredCheckout, StoredWeights
    from isohub.repos.weights_entry import Scope

__all__ = ["Selection", "commit_name", "repo_name", "select"]

_AT_COMMIT = re.compile(r"(?P<repo>.+)@(?P<commit>[0-9a-fA-F]{4,64})(?P<extras>(?:\+(?:lfs|submodules)){0,2})")


@dataclass
class Selection:
    """What some names mean in a store.

    Attributes:
        checkouts: Theirs.
        weights: Of whole repos that were named.
        scopes: These repos.
        missing: Names of which nothing is here.
    """

    checkouts: list[StoredCheckout] = field(default_factory=list)
    weights: list[StoredWeights] = field(default_factory=list)
    scopes: set[Scope] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)


def select(inventory: Inventory, texts: Iterable[str] | None) -> Selection:
    """Look names up in a store.

    Args:
        inventory: Of the store.
        texts: References, or names as `repo_name` and `commit_name` give them; None for everything. Trust: the caller.
    """
    checkouts, weights, chosen = inventory.checkouts(), inventory.weights(), Selection()
    if texts is None:
        return Selection(checkouts, weights, {file.scope for each in weights for file in each.files})
    known = {scope for scope, _ in (*inventory.repositories(), *inventory.scopes())}
    names = {name: scope for scope in known for name in ("/".join(filter(None, scope)), repo_name(scope))}
    names |= {each.url: each.scope for each in checkouts if each.scope[0] == "local"}
    for text in texts:
        scope, ref, commit = _meaning(text, names, known)
        if scope is None:
            chosen.missing.append(text)
        elif ref is None and commit is None:
            chosen.scopes.add(scope)
        else:
            found = _narrowed([each for each in checkouts if each.scope == scope], ref, commit)
            chosen.checkouts += [each for each in found if each not in chosen.checkouts]
            if not found:
                chosen.missing.append(text)
    for each in checkouts:
        if each.scope in chosen.scopes and each not in chosen.checkouts:
            chosen.checkouts.append(each)
    chosen.weights = [each for each in weights if any(file.scope in chosen.scopes for file in each.files)]
    return chosen


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


def repo_name(scope: Scope) -> str:
    """A scope as one writes it: without the host, if that is the GitHub server."""
    try:
        server = github_server().partition("://")[2]
    except InvalidReferenceError:
        server = ""
    return "/".join(filter(None, scope[1:] if scope[0] == server else scope))


def commit_name(checkout: StoredCheckout) -> str:
    """A checkout as one writes it: ``owner/repo@<commit>``, and its extras."""
    return f"{repo_name(checkout.scope)}@{checkout.path.name}"
