"""The truth about a pair of releases, once for all tests that ask."""

from __future__ import annotations

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
            known[pair.name] = (
                repo,
                [alone(export(repo, version, directory / "at"), pair, SEED) for version in pair.versions],
            )
        return known[pair.name]

    return of
