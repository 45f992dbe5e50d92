"""`python -m benchmarks` runs and reports. No time is asserted: those are for people."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import PARTS
from benchmarks.measure import Contestant, Row, compete, quantile
from benchmarks.page import render

ROOT = Path(__file__).parents[1]
CHEAP = ["import", "call", "memory"]
FIGURES = ["median", "min", "p10", "p90"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=110
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    sizes = ["--rounds", "1", "--call-rounds", "1", "--call-s", "0.005", "--call-bytes", "4", "4096", "--workers", "2"]
    done = run(*CHEAP, "--quick", *sizes, "--json", str(place / "r.json"), "--write", str(place / "r.md"))
    assert done.returncode == 0, done.stderr
    return json.loads((place / "r.json").read_text()), (place / "r.md").read_text(), done


def test_the_report_says_what_was_measured_and_on_what(report):
    figures, _, _ = report
    assert figures["parts"] == CHEAP
    assert figures["quick"] is True
    assert figures["command"].startswith("python -m benchmarks import call memory --quick --rounds 1 ")
    assert figures["seconds"] > 0
    assert figures["sizes"]["call_bytes"] == [4, 4096]
    assert set(figures["machine"]) >= {"cores", "processor", "memory_gib", "kernel", "python", "torch"}
    assert {table["part"] for table in figures["tables"]} == set(CHEAP)


def test_each_table_has_isohub_beside_a_reference(report):
    figures, _, _ = report
    keys = [table["key"] for table in figures["tables"]]
    assert {"import", "call_4", "call_4096", "memory_uss", "memory_total"} <= set(keys)
    assert len(keys) == len(set(keys))
    for table in figures["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        assert len(rows) == len(table["rows"])
        assert rows[table["reference"]]["ratio"] is None
        assert any("isohub" in name for name in rows)
        assert all("isohub" not in name or not row["gives_up"] for name, row in rows.items())


def test_figures_are_in_order_and_positive(report):
    figures, _, _ = report
    for table in figures["tables"]:
        for row in table["rows"]:
            assert 0 < row["min"] <= row["p10"] <= row["median"] <= row["p90"], (table["key"], row)
            assert row["samples"] >= 1
            if row["name"] != table["reference"]:
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


def test_every_part_of_the_page_has_a_runner():
    assert list(PARTS) == [
        "import",
        "first_load",
        "warm_load",
        "call",
        "state_dict",
        "confinement",
        "environments",
        "memory",
        "close",
        "evaluate",
    ]
