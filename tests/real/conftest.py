"""The truth about a pair of releases, once for all tests that ask."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.real.packages import SEED, alone, export, materialise


@pytest.fixture(scope="session")
def truth(tmp_path_factory):
    """A pair's git repository, and what torch.hub gives for each tag in a process of its own."""
    known = {}

    def of(pair):
        if pair.name not in known:
            directory = tmp_path_factory.mktemp(pair.name)
            repo = materialise(pair, directory)
            checkouts = [export(repo, version, directory / "at") for version in pair.versions]
            with ThreadPoolExecutor(2) as both:
                known[pair.name] = (repo, list(both.map(lambda checkout: alone(checkout, pair, SEED), checkouts)))
        return known[pair.name]

    return of
