from __future__ import annotations

import pytest

from isohub.errors import RefNotFoundError
from isohub.repos.reference import parse
from isohub.repos.sources.refs import Match, Refs, is_full_sha, is_sha

SHA = "0123456789abcdef0123456789abcdef01234567"


def refs(*names: str, head: str = "main", remote: str | None = None) -> Refs:
    commits = {name: f"{number:040x}" for number, name in enumerate(names, 1)}
    return Refs(commits, commits.get(f"refs/heads/{head}", "f" * 40), f"refs/heads/{head}", remote)


def hint(found: Refs, ref: str) -> str:
    error = found.not_found(parse(f"o/r:{ref}"))
    assert isinstance(error, RefNotFoundError)
    return error.hint or ""


def test_shas() -> None:
    assert is_sha("abcd") and is_sha(SHA) and is_full_sha(SHA.upper()) and is_full_sha("a" * 64)
    assert not is_sha("abc") and not is_sha("xyzw") and not is_full_sha(SHA[:-1])


def test_order_is_gits() -> None:
    found = refs("refs/heads/main", "refs/heads/x", "refs/tags/x", "refs/pull/7/head", "refs/x/y")
    assert found.match("x") == Match(found.commits["refs/tags/x"], "refs/tags/x")
    assert found.match("heads/x") == Match(found.commits["refs/heads/x"], "refs/heads/x")
    assert found.match("x/y") == Match(found.commits["refs/x/y"], "refs/x/y", own=False)
    assert found.match("pull/7") == Match(found.commits["refs/pull/7/head"], "refs/pull/7/head", own=False)
    assert found.match("HEAD") == Match(found.commits["refs/heads/main"], "refs/heads/main")
    assert found.match("pull/8") is None


def test_what_there_is_is_listed_usefully() -> None:
    tags = [f"refs/tags/v1.{number}" for number in (9, 10, 2)]
    found = refs("refs/heads/zeta", "refs/heads/alpha", "refs/heads/main", *tags, "refs/pull/1/head")
    assert hint(found, "qqq") == "it has 6 branches and tags: main, alpha, zeta, v1.10, v1.9, v1.2"
    many = refs(*(f"refs/heads/b{number}" for number in range(20)), *(f"refs/tags/t{number}" for number in range(20)))
    assert hint(many, "qqq") == "it has 40 branches and tags: b0, b1, b2, b3, t19, t18, t17, t16, ..."
    only = refs(*(f"refs/tags/t{number}" for number in range(9)))
    assert hint(only, "qqq").endswith("t8, t7, t6, t5, t4, t3, t2, t1, ...")
    clone = refs("refs/heads/main", "refs/remotes/origin/main", "refs/remotes/origin/next", remote="origin")
    assert hint(clone, "qqq") == "it has 2 branches and tags: main, next"
    assert "\x1b" not in hint(refs("refs/heads/a\x1b[1m", "refs/heads/²"), "qqq")


def test_near_names_and_short_shas() -> None:
    found = refs("refs/heads/main", "refs/tags/v1")
    assert hint(found, "mian") == "near names: main"
    assert hint(found, "abc").endswith("a commit is named with at least 4 digits")
    assert "digits" not in hint(found, "abcd")
    assert "digits" not in hint(found, "xyz")


def test_ambiguous_tips() -> None:
    found = Refs({"refs/heads/a": "ab" + "0" * 38, "refs/heads/b": "ab" + "1" * 38}, None, None)
    assert found.match_tip("AB0000", parse("o/r")) == Match("ab" + "0" * 38, None)
    with pytest.raises(RefNotFoundError, match="short for 2 commits"):
        found.match_tip("ab", parse("o/r"))
    assert found.match_tip("cd", parse("o/r")) is None
