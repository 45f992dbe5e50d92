"""The search alone: which commits are asked about, and what follows from the answers."""

import math
import random

import pytest

from isohub.bisection.suspects import Suspects, ancestors, merge_bases, ordered
from isohub.errors import BisectionError
from isohub.repos.sources.commits import Commit


def graph(shape):
    """Commits by id ``c1`` ..., from parents by number."""
    return {
        f"c{number}": Commit(f"c{number}", tuple(f"c{parent}" for parent in parents), "", "", "")
        for number, parents in enumerate(shape, start=1)
    }


def line(count):
    return graph([[number] if number else [] for number in range(count)])


def random_graph(draw, count):
    shape = [[]]
    for number in range(1, count):
        parents = {number if draw.random() < 0.7 else draw.randint(max(1, number - 8), number)}
        if draw.random() < 0.25:
            parents.add(draw.randint(max(1, number - 12), number))
        shape.append(sorted(parents))
    return graph(shape)


def search(commits, good, bad, is_bad, lanes=1, skipped=frozenset()):
    suspects = Suspects(commits, good, bad)
    asked, rounds = [], 0
    while questions := suspects.questions(lanes):
        assert len(questions) <= lanes
        assert not set(questions) & {*asked, good, bad}
        rounds += 1
        for sha in questions:
            asked.append(sha)
            suspects.note(sha, None if sha in skipped else not is_bad(sha))
    return suspects, asked, rounds


@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [2, 3, 10, 500])
def test_a_line_is_cut_into_equal_parts(lanes, count):
    commits = line(count)
    for first in {2, count // 2 + 1, count}:
        suspects, asked, rounds = search(
            commits, "c1", f"c{count}", lambda sha, first=first: int(sha[1:]) >= first, lanes
        )
        assert suspects.first_bad == f"c{first}"
        assert rounds <= math.ceil(math.log(count - 1, lanes + 1)) + 1
        assert len(asked) <= rounds * lanes


@pytest.mark.parametrize("seed", range(40))
def test_any_history_is_searched_in_the_logarithm_of_its_size(seed):
    """What follows the first bad one is bad, whatever way it follows; all else is good."""
    draw = random.Random(seed)
    commits = random_graph(draw, draw.randint(30, 400))
    bad = f"c{len(commits)}"
    candidates = sorted(ancestors(commits, [bad]) - {"c1"})
    first = draw.choice(candidates)
    lanes = draw.choice([1, 1, 2, 4])
    suspects, asked, rounds = search(commits, "c1", bad, lambda sha: first in ancestors(commits, [sha]), lanes)
    assert suspects.first_bad == first
    assert not suspects.contradictions
    # A history that is wider than a line cannot always be halved; git bisect's own bound is of this kind.
    assert len(asked) <= lanes * (math.log2(suspects.total) + 3)
    assert rounds <= math.log2(suspects.total) + 3


@pytest.mark.parametrize("seed", range(20))
def test_what_cannot_be_told_is_gone_round(seed):
    draw = random.Random(seed)
    commits = random_graph(draw, 120)
    bad = "c120"
    candidates = sorted(ancestors(commits, [bad]) - {"c1"})
    first = draw.choice(candidates)
    skipped = set(draw.sample(candidates, 30)) - {bad}
    suspects, _, _ = search(commits, "c1", bad, lambda sha: first in ancestors(commits, [sha]), 2, skipped)
    assert first in suspects.left
    if suspects.first_bad is None:
        assert suspects.left & skipped
        # All but the last of what is left could not be told.
        assert len(suspects.left - skipped) == 1
    else:
        assert suspects.first_bad == first


def test_a_good_end_on_another_branch():
    #     2 - 3 (good)
    # 1 <
    #     4 - 5 - 6 (bad)
    commits = graph([[], [1], [2], [1], [4], [5]])
    suspects, _, _ = search(commits, "c3", "c6", lambda sha: sha in ("c5", "c6"))
    assert suspects.first_bad == "c5"
    assert merge_bases(commits, "c3", "c6") == ["c1"]
    assert merge_bases(commits, "c4", "c6") == ["c4"]
    assert merge_bases(graph([[], []]), "c1", "c2") == []


def test_a_criss_cross_has_two_bases():
    commits = graph([[], [1], [1], [2, 3], [3, 2]])
    assert merge_bases(commits, "c4", "c5") == ["c2", "c3"]


def test_nothing_between():
    with pytest.raises(BisectionError, match="holds the bad one"):
        Suspects(line(5), "c4", "c2")
    with pytest.raises(BisectionError):
        Suspects(line(5), "c4", "c4")


def test_a_property_that_comes_and_goes_is_noted():
    commits = line(64)
    # Bad at 10 to 20, good again until 40.
    suspects, _, _ = search(commits, "c1", "c64", lambda sha: 10 <= int(sha[1:]) <= 20 or int(sha[1:]) >= 40, 3)
    assert suspects.first_bad in ("c10", "c40")
    assert suspects.contradictions
    one, other = suspects.contradictions[0]
    assert int(one[1:]) in range(10, 21)
    assert int(other[1:]) in range(21, 40)


@pytest.mark.parametrize("seed", range(30))
def test_a_search_ends_whatever_the_answers_are(seed):
    draw = random.Random(seed)
    commits = random_graph(draw, 80)
    suspects, _, _ = search(commits, "c1", "c80", lambda sha: draw.random() < 0.5, draw.randint(1, 4))
    assert suspects.left


def test_the_order_is_the_same_in_every_run():
    commits = random_graph(random.Random(1), 200)
    order = ordered(commits, set(commits))
    assert order == ordered(dict(reversed(commits.items())), set(commits))
    place = {sha: number for number, sha in enumerate(order)}
    assert all(place[parent] < place[sha] for sha in commits for parent in commits[sha].parents)


def test_more_suspects_than_are_counted_exactly():
    commits = line(30_000)
    suspects, asked, _ = search(commits, "c1", "c30000", lambda sha: int(sha[1:]) >= 12_345)
    assert suspects.first_bad == "c12345"
    assert len(asked) <= 17
