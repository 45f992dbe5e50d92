"""`python -m benchmarks` runs and reports. No time is asserted: those are for people."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import PARTS
from benchmarks.goals import GOALS, judge
from benchmarks.measure import Contestant, Row, compete, quantile
from benchmarks.page import render, render_goals

ROOT = Path(__file__).parents[1]
# Environments are built from an index, and have tests of their own; a soak is long even when it is short.
RUN = [name for name in PARTS if name not in ("environments", "soak")]
#: Those of isohub alone.
ALONE = {"many", "soak"}
pytestmark = pytest.mark.timeout(600)
FIGURES = ["median", "min", "p10", "p90"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=590
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    sizes = ["--rounds", "1", "--call-rounds", "1", "--call-s", "0.005", "--call-bytes", "4", "4096", "--workers", "2"]
    sizes += ["--short-rounds", "2", "--idle-s", "0.1"]
    done = run(*RUN, "--quick", *sizes, "--json", str(place / "r.json"), "--write", str(place / "r.md"))
    assert done.returncode == 0, done.stderr
    return json.loads((place / "r.json").read_text()), (place / "r.md").read_text(), done


def test_the_report_says_what_was_measured_and_on_what(report):
    figures, _, _ = report
    assert figures["parts"] == RUN
    assert figures["quick"] is True
    assert figures["command"].startswith(f"python -m benchmarks {' '.join(RUN)} --quick --rounds 1 ")
    assert figures["seconds"] > 0
    assert figures["sizes"]["call_bytes"] == [4, 4096]
    assert set(figures["machine"]) >= {"cores", "processor", "memory_gib", "kernel", "python", "torch"}
    assert {table["part"] for table in figures["tables"]} == set(RUN)


def test_each_table_has_isohub_beside_a_reference(report):
    figures, _, _ = report
    keys = [table["key"] for table in figures["tables"]]
    assert {"import", "call_4", "call_4096", "memory_uss", "memory_total"} <= set(keys)
    assert len(keys) == len(set(keys))
    for table in figures["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        assert len(rows) == len(table["rows"])
        assert rows[table["reference"]]["ratio"] is None
        assert table["part"] in ALONE or any("isohub" in name for name in rows)
        assert all("isohub" not in name or not row["gives_up"] for name, row in rows.items())


def test_figures_are_in_order_and_positive(report):
    figures, _, _ = report
    for table in figures["tables"]:
        for row in table["rows"]:
            assert 0 <= row["min"] <= row["p10"] <= row["median"] <= row["p90"], (table["key"], row)
            assert row["min"] > 0 or table["part"] in ("idle", "many"), (table["key"], row)
            assert row["samples"] >= 1
            if row["name"] != table["reference"] and row["min"] > 0 and table["part"] != "idle":
                assert row["ratio"] > 0


def test_the_page_holds_every_table_and_warns_of_a_quick_run(report):
    figures, page, done = report
    assert page == render(figures)
    assert "A quick run" in page
    for table in figures["tables"]:
        assert f"## {table['title']}\n" in page
        assert table["title"] in done.stdout
        assert all(f"| {row['name']} |" in page for row in table["rows"])


def test_the_page_names_no_directory_of_the_machine(report):
    _, page, _ = report
    assert str(Path.home()) not in page
    assert str(ROOT) not in page
    assert "/tmp/" not in page


def test_contestants_take_turns_and_the_first_changes():
    order = []

    def contestant(name):
        return Contestant(name, lambda: order.append(name) or [1.0])

    rows = compete([contestant("a"), contestant("b"), contestant("c")], rounds=3, warm_ups=1)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert [row.rounds for row in rows] == [[[1.0]] * 3] * 3  # the warm-up is not counted


def test_ratios_are_taken_within_rounds():
    # Both are slow in the second round: the ratio is not.
    reference, row = Row("reference", "", [[1.0], [10.0], [1.0]]), Row("row", "", [[2.0], [20.0], [2.0]])
    summary = row.summary(reference)
    assert (summary["ratio"], summary["ratio_p10"], summary["ratio_p90"]) == (2.0, 2.0, 2.0)
    assert (summary["median"], summary["min"], summary["samples"], summary["p99"]) == (2.0, 2.0, 3, None)


def test_quantile_interpolates():
    assert [quantile([1.0, 2.0, 3.0, 4.0, 5.0], share) for share in (0, 0.5, 1)] == [1.0, 3.0, 5.0]
    assert quantile([1.0, 2.0], 0.25) == 1.25
    assert quantile([7.0], 0.9) == 7.0


@pytest.mark.parametrize("arguments", [["no_such_part"], ["--rounds", "0"], ["--call-bytes", "-4"]])
def test_bad_arguments_are_refused(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def table(key, unit="ms", **rows):
    """A table with these rows, each of so many rounds of one sample."""
    return {
        "key": key,
        "unit": unit,
        "rows": [
            {
                "name": name,
                "median": sorted(samples)[len(samples) // 2],
                "p99": max(samples),
                "round_medians": samples,
            }
            for name, samples in rows.items()
        ],
    }


def judged(tables, what, goal):
    found = [row for row in judge(tables) if row["what"].startswith(what) and goal in row["goal"]]
    assert len(found) == 1
    return found[0]["measured"], found[0]["reached"]


ISOHUB, HERE = "isohub, a handle", "in this process"


def test_nothing_is_reached_that_was_not_measured():
    for row in judge([]):
        assert (row["value"], row["reached"], row["measured"]) == (None, None, "not in this run")


@pytest.mark.parametrize(
    ("samples", "text", "reached"),
    [([4.0, 5.0, 6.0], "1/200", True), ([5.1, 5.1, 5.1], "1/196", False)],
)
def test_a_share_is_reached_or_not(samples, text, reached):
    rows = {
        "import torch in a fresh process": [1000.0, 1000.0, 1000.0],
        "isohub, a new worker at hubconf's first line": samples,
    }
    assert judged([table("first_line", **rows)], "warm worker", "1/200") == (text, reached)


@pytest.mark.parametrize(("ours", "text", "reached"), [(115.0, "+100 µs", True), (116.0, "+101 µs", False)])
def test_a_difference_is_taken_within_rounds(ours, text, reached):
    # The second round was slow for both.
    rows = {HERE: [15.0, 900.0, 15.0], ISOHUB: [ours, 900.0 + ours - 15.0, ours]}
    assert judged([table("call_600000", "µs", **rows)], "call, 600 kB", "in-process") == (text, reached)


@pytest.mark.parametrize(("p99", "reached"), [(499.0, True), (500.0, False)])
def test_a_quantile_is_below_or_not(p99, reached):
    assert judged([table("call_600000", **{ISOHUB: [100.0, p99]})], "call, 600 kB", "p99")[1] is reached


def test_the_closest_peer_decides_and_what_is_no_peer_does_not():
    rows = {
        HERE: [10.0],
        ISOHUB: [20.0],
        "ProcessPoolExecutor (spawn)": [30.0],
        "Ray actor, arrays": [25.0],
        "Pipe to a spawned process, one tensor that lies in shared memory": [15.0],
    }
    text, reached = judged([table("call_38000000", **rows)], "call, 38 MB", "every peer")
    assert (text, reached) == ("1.25 times (Ray actor, arrays)", True)
    rows["Ray actor, arrays"] = [20.0]
    assert judged([table("call_38000000", **rows)], "call, 38 MB", "every peer")[1] is False
    # Some of the peers are not on every machine.
    del rows["Ray actor, arrays"]
    text, reached = judged([table("call_38000000", **rows)], "call, 38 MB", "every peer")
    assert (text, reached) == ("1.5 times (ProcessPoolExecutor (spawn))", True)


def test_of_two_figures_of_ray_the_faster_counts():
    rows = {ISOHUB: [10.0], "Ray actor, arrays": [299.0], "Ray actor, tensors": [900.0]}
    assert judged([table("call_4", **rows)], "call, 4 B", "Ray") == ("29.9 times (Ray actor, arrays)", False)


@pytest.mark.parametrize(("ours", "text", "reached"), [(101.9, "+1.90 %", True), (102.0, "+2.00 %", False)])
def test_what_confinement_costs_is_a_share(ours, text, reached):
    rows = {"isohub, as it is by default": [ours], "the same with sandbox='none'": [100.0]}
    assert judged([table("confinement_call_4", **rows)], "confinement's cost in a call, 4 B", "2 %") == (text, reached)


@pytest.mark.parametrize(("last", "text", "reached"), [([40.0], "2 times", True), ([41.0], "2.05 times", False)])
def test_many_refs_count_when_they_were_as_many(last, text, reached):
    first = "each of the first eight after the first"
    tables = [table("many_start", **{first: [20.0], "each of the last eight of 64": last})]
    assert judged(tables, "64 refs", "twice") == (text, reached)
    tables = [table("many_start", **{first: [20.0], "each of the last eight of 4": last})]
    assert judged(tables, "64 refs", "twice")[1] is None
    tables = [table("many_memory", "MiB", **{"64 workers and their zygote": [2048.0]})]
    assert judged(tables, "64 refs", "24 GB") == ("2 GiB", True)


def test_goals_are_in_the_page_with_yes_and_no():
    rows = {HERE: [10.0], ISOHUB: [20.0]}
    page = render_goals(judge([table("call_38000000", **rows)]))
    assert "| call, 38 MB | at most 2.0 times in-process | 2 times | yes |" in page
    rows[ISOHUB] = [20.1]
    page = render_goals(judge([table("call_38000000", **rows)]))
    assert "| call, 38 MB | at most 2.0 times in-process | 2.01 times | **no** |" in page
    assert page.count("not in this run |  |") == len(GOALS) - 1


def test_the_page_has_goals_first_and_says_which_peers_are_absent(report):
    figures, page, _ = report
    assert figures["goals"] == judge(figures["tables"])
    assert page.index("## Goals") < page.index("## The machine") < page.index("## Import")
    page = render({**figures, "absent": {"Ray": "not installed: No module named 'ray'"}})
    assert "Not in this run:\n\n- Ray: not installed: No module named 'ray'\n" in page


def test_every_part_of_the_page_has_a_runner():
    assert list(PARTS) == [
        "import",
        "first_line",
        "first_load",
        "warm_load",
        "call",
        "state_dict",
        "confinement",
        "environments",
        "memory",
        "idle",
        "close",
        "evaluate",
        "many",
        "soak",
    ]
