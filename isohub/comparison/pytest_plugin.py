"""pytest's plugin: refs against the code under test, in a worker each.

    @pytest.mark.isohub(repo=".", model="resnet", inputs="randn(1,3,224,224)")
    def test_outputs_stay(isohub_compare):
        isohub_compare()          # against each --isohub-ref; an AssertionError with the worst places if it differs

Rules:

1. Nothing of torch is imported before a test asks for the fixture.
2. A reference of ``--isohub-ref`` is whole (``./clone:main``, ``owner/repo:v1``), or a ref of the marker's repo that
   begins with a colon (``:main``).
3. Without ``--isohub-ref`` and without ``against=`` there is nothing to compare with: the test is skipped, and says so.

Side: caller.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from isohub.comparison.result import Comparison
    from isohub.hub import Session
    from isohub.repos.reference import SourceName

__all__ = ["isohub_compare", "isohub_session", "pytest_addoption", "pytest_configure"]

_MARKER = (
    "isohub(repo, model, inputs=None, against=(), **options): what the fixture isohub_compare compares; options are "
    "those of isohub.compare"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--isohub-ref."""
    group = parser.getgroup("isohub")
    group.addoption(
        "--isohub-ref",
        action="append",
        default=[],
        metavar="REF",
        help="What isohub_compare compares with: a reference, or :REF of the repo under test. May be repeated.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture(scope="session")
def isohub_session() -> Iterator[Session]:
    """One session for all comparisons: its zygote takes a second to start. Override it for another policy."""
    from isohub.hub import Session

    with Session() as session:
        yield session


@pytest.fixture
def isohub_compare(request: pytest.FixtureRequest, isohub_session: Session) -> Callable[..., list[Comparison]]:
    """A function that compares the repo under test with each ``--isohub-ref``, and raises if it differs from one.

    Its keywords are those of `isohub.assert_close`, and ``repo``, ``model``, ``inputs`` and ``against``, where the
    marker does not have them. It gives an `isohub.Comparison` for each ref; the first of its two refs is that one.
    """
    marks = list(request.node.iter_markers("isohub"))
    for mark in marks:
        if mark.args:
            raise pytest.UsageError("@pytest.mark.isohub takes keywords: repo=, model=, inputs=, ...")

    def check(**keywords: Any) -> list[Comparison]:
        __tracebackhide__ = True
        settings: dict[str, Any] = {}
        for mark in reversed(marks):  # the nearest last
            settings.update(mark.kwargs)
        settings.update(keywords)
        lacking = [f"{name}=" for name in ("repo", "model") if name not in settings]
        if lacking:
            raise pytest.UsageError(f"isohub_compare needs {' and '.join(lacking)}, here or in @pytest.mark.isohub")
        repo, against = _place(settings.pop("repo"), request.config), settings.pop("against", ())
        refs = [*request.config.getoption("--isohub-ref"), *([against] if isinstance(against, str) else against)]
        from isohub.errors import IsohubError

        if not refs:
            pytest.skip("nothing to compare with: give --isohub-ref REF")
        settings.setdefault("session", isohub_session)
        found, complaints = [], []
        for ref in refs:
            try:
                base = f"{_without_ref(repo, settings.get('source'))}{ref}" if ref.startswith(":") else ref
                found.append(_assert_close([base, repo], settings))
            except AssertionError as error:
                complaints.append(str(error))
            except IsohubError as error:
                complaints.append(f"{ref}: {type(error).__name__}: {error}")
        if complaints:
            pytest.fail("\n\n".join(complaints), pytrace=False)
        return found

    return check


def _assert_close(repos: list[Any], settings: dict[str, Any]) -> Comparison:
    from isohub.comparison.closeness import assert_close

    options = {name: value for name, value in settings.items() if name not in ("model", "inputs")}
    return assert_close(repos, settings["model"], settings.get("inputs"), **options)


def _without_ref(repo: str, source: SourceName | None) -> str:
    """A repo without the ref that it may be written with: ``./clone:v2`` is the same repo as ``./clone``."""
    from isohub.repos.reference import parse

    return repo.removesuffix(f":{parse(repo, source).ref}")


def _place(repo: Any, config: pytest.Config) -> str:
    """A repo; one that is written as a relative path is below the directory that holds pytest's settings."""
    text = os.fspath(repo)
    return str((config.rootpath / text).resolve()) if text.startswith(".") else text
