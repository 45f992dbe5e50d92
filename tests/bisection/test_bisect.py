"""`isohub.bisect` with a real repository of more than 500 commits, and real workers."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import isohub
from isohub.errors import BisectionError, InvalidReferenceError, RefNotFoundError, ResultsError
from tests.bisection.conftest import write_history

INPUT = "randn(2,3)"


def bisect(session, history, test=None, **options):
    given = {"good": history.commits[1], "bad": "main", "workers": 1, "session": session}
    if not isinstance(test, list):
        given["model"] = "model"
    if test is None:
        given["inputs"] = INPUT
    return isohub.bisect(str(history.path), test=test, **{**given, **options})


def truth(history, mark):
    return history.first_bad in history.leads_to(mark)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_output_s_change_is_found_in_the_logarithm_of_the_history(session, history, workers):
    found = bisect(session, history, workers=workers)
    assert found.first_bad.id == history.commits[history.first_bad]
    assert found.total == len(history.commits) - 1 == 550
    between = [probe for probe in found.probes if probe.commit not in (found.good.id, found.bad.id)]
    assert len(between) <= workers * (math.log(550, workers + 1) + 2) + 1
    marks = {sha: mark for mark, sha in history.commits.items()}
    for probe in found.probes:
        assert (probe.verdict == "bad") == truth(history, marks[probe.commit])
    assert found.before.id == history.commits[history.parents[history.first_bad][0]]
    assert found.probe_of(found.before.id).verdict == "good"
    assert not found.notes
    text = str(found)
    assert text.startswith(f"{found.first_bad.id} is the first bad commit\nauthor: A. Uthor <author@example.org>\n")
    assert f"change {history.first_bad}\n\n    body of {history.first_bad}" in text
    assert "date:   2023-11-15 06:28:20+01:30" in text
    assert "output differs by" in text
    assert f"{len(found.probes)} commits asked in {found.rounds} rounds to tell 550 apart" in text
    assert not session.workers()


def test_within_the_tolerance_nothing_is_bad(session, history):
    with pytest.raises(BisectionError, match="the bad end .* is good") as caught:
        bisect(session, history, tolerance=10.0)
    assert caught.value.commit == history.commits[max(history.commits)]
    with pytest.raises(BisectionError, match="the good end .* is bad"):
        bisect(session, history, lambda model: False)


def test_a_metric_is_held_against_that_of_the_good_end(session, history):
    x = torch.ones(3)
    found = bisect(session, history, lambda model: model(x).sum(), tolerance=1e-3)
    assert found.first_bad.id == history.commits[history.first_bad]
    assert found.probe_of(found.first_bad.id).value == 4.5
    assert found.probe_of(found.good.id).value == 3.0
    assert found.to_dict()["first_bad"]["author"] == "A. Uthor <author@example.org>"
    assert json.loads(found.to_json())["total"] == 550


def test_a_function_says_good_or_bad(session, history):
    def test(model):
        return model.run(lambda live, x: bool(live(x).sum() < 4), torch.ones(3))

    assert bisect(session, history, test, workers=2).first_bad.id == history.commits[history.first_bad]
    with pytest.raises(TypeError, match="test gave a str"):
        bisect(session, history, lambda model: "good")
    with pytest.raises(ZeroDivisionError):
        bisect(session, history, lambda model: 1 / 0)


def test_a_command_says_it_by_its_exit_status(session, history, tmp_path):
    program = tmp_path / "check.py"
    program.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "values = {}\n"
        "exec((Path(os.environ['ISOHUB_CHECKOUT']) / 'factor.py').read_text(), values)\n"
        "assert os.environ['ISOHUB_REPO'].endswith('@' + os.environ['ISOHUB_COMMIT'])\n"
        "open(sys.argv[1], 'a').write(os.environ['ISOHUB_COMMIT'] + '\\n')\n"
        "sys.exit(3 if values['FACTOR'] == 1.5 else 0)\n"
    )
    asked = tmp_path / "asked"
    found = bisect(session, history, [sys.executable, str(program), str(asked)])
    assert found.first_bad.id == history.commits[history.first_bad]
    assert asked.read_text().split() == [probe.commit for probe in found.probes]
    assert found.probe_of(found.first_bad.id).message == "exit status 3"
    for status in ("200", "128"):
        with pytest.raises(BisectionError, match=f"ended with {status}"):
            bisect(session, history, ["sh", "-c", f"exit {status}"])
    with pytest.raises(BisectionError, match="was ended by signal 9"):
        bisect(session, history, ["sh", "-c", "kill -9 $$"])
    with pytest.raises(BisectionError, match="cannot be run: No such file"):
        bisect(session, history, ["no-such-program"])


SHAPE = [[], [1], [2], [3], [4], [5], [6], [7], [8], [9]]


def small(tmp_path, factors, broken=()):
    return write_history(tmp_path / "clone", SHAPE, factors, frozenset(broken)), str(tmp_path / "clone")


def test_commits_that_do_not_build_are_skipped(session, tmp_path):
    commits, path = small(tmp_path, {5: "1.5"}, broken={3, 7})
    found = isohub.bisect(path, commits[1], "main", model="model", inputs=INPUT, workers=2, session=session)
    assert found.first_bad.id == commits[5]
    commits, path = small(tmp_path / "b", {5: "1.5"}, broken={4})
    found = isohub.bisect(path, commits[1], "main", model="model", inputs=INPUT, workers=1, session=session)
    assert found.first_bad is None
    assert [commit.id for commit in found.candidates] == [commits[4], commits[5]]
    assert found.before is None
    assert "one of 2; those before the last could not be told" in str(found)
    assert "(RuntimeError: broken)" in str(found)
    with pytest.raises(BisectionError, match="the good end .* cannot be told: RuntimeError"):
        isohub.bisect(path, commits[4], "main", model="model", inputs=INPUT, session=session)


@pytest.mark.parametrize("errors", ["skip", "bad"])
def test_a_model_that_raises(session, tmp_path, errors):
    commits, path = small(tmp_path, {6: "None"})
    options = {"model": "model", "inputs": INPUT, "session": session, "errors": errors}
    if errors == "skip":
        with pytest.raises(BisectionError, match="the bad end .* cannot be told: TypeError"):
            isohub.bisect(path, commits[1], "main", **options)
        return
    assert isohub.bisect(path, commits[1], "main", **options).first_bad.id == commits[6]


def test_a_change_that_comes_and_goes_is_said(session, tmp_path):
    commits, path = small(tmp_path, {3: "1.5", 5: "1.0", 8: "1.5"})
    found = isohub.bisect(path, commits[1], "main", model="model", inputs=INPUT, workers=4, session=session)
    assert found.first_bad.id in (commits[3], commits[8])
    assert "not the only change" in str(found)


def test_a_search_goes_on_from_its_log(session, history, tmp_path):
    log = tmp_path / "log.jsonl"

    def stop_after(probe, left):
        if left < 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bisect(session, history, log=log, progress=stop_after)
    asked = [json.loads(line)["commit"] for line in log.read_text().splitlines()[1:]]
    assert 3 < len(asked) < 9
    found = bisect(session, history, log=log)
    assert found.first_bad.id == history.commits[history.first_bad]
    # The good end's outputs are in no log: it is asked again, and nothing else.
    assert [probe.commit for probe in found.probes if probe.resumed] == asked[1:]
    asked = [json.loads(line)["commit"] for line in log.read_text().splitlines()[1:]]
    assert len(asked) == len(set(asked)) == len(found.probes)
    again = bisect(session, history, log=log)
    assert [probe.verdict for probe in again.probes] == [probe.verdict for probe in found.probes]
    for options in ({"tolerance": 0.5}, {"inputs": "randn(3,3)"}, {"seed": 1}, {"errors": "bad"}):
        with pytest.raises(ResultsError, match="another question"):
            bisect(session, history, log=log, **options)


def test_a_metric_s_log_is_enough_without_any_worker(history, tmp_path):
    log = tmp_path / "log.jsonl"

    def score(model):
        return model(torch.ones(1)).sum()

    with isohub.Session() as one:
        first = bisect(one, history, score, log=log)
    with isohub.Session() as other:
        again = bisect(other, history, score, log=log)
        assert all(probe.resumed for probe in again.probes)
        assert [(probe.commit, probe.value) for probe in again.probes] == [
            (probe.commit, probe.value) for probe in first.probes
        ]


def test_killed_and_resumed_it_finds_the_same(session, history, tmp_path):
    log = tmp_path / "log.jsonl"
    program = [
        sys.executable,
        "-m",
        "isohub",
        "bisect",
        str(history.path),
        "--good",
        history.commits[1],
        "--bad",
        "main",
    ]
    program += ["--log", str(log), "--workers", "1", "--run", "--", "sh", "-c"]
    check = "sleep 0.1; ! grep -q 1.5 $ISOHUB_CHECKOUT/factor.py"
    with subprocess.Popen([*program, check], stdout=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 60
        while (not log.exists() or log.read_bytes().count(b"\n") < 5) and time.monotonic() < deadline:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
    kept = log.read_bytes().count(b"\n") - 1
    found = bisect(session, history, ["sh", "-c", check], log=log)
    assert found.first_bad.id == history.commits[history.first_bad]
    assert sum(probe.resumed for probe in found.probes) >= kept - 1 > 0


def test_mistakes(session, history, tmp_path):
    path = str(history.path)
    for wrong, kind in (
        ({"repo": f"{path}:main"}, InvalidReferenceError),
        ({"good": "no-such-tag"}, RefNotFoundError),
        ({"good": "main", "bad": history.commits[1]}, BisectionError),
        ({"inputs": None}, ValueError),
        ({"model": None}, ValueError),
        ({"test": []}, TypeError),
        ({"test": ["true"]}, ValueError),
        ({"test": len, "model": "model"}, ValueError),
        ({"tolerance": -1}, ValueError),
        ({"tolerance": "a"}, ValueError),
        ({"errors": "ignore"}, ValueError),
    ):
        given = {"repo": path, "good": history.commits[1], "bad": "main", "model": "model", "inputs": INPUT}
        with pytest.raises(kind):
            isohub.bisect(session=session, **{**given, **wrong})


def test_words_of_the_repo_are_escaped(session, tmp_path):
    commits = write_history(Path(tmp_path) / "clone", [[], [1]], {2: "1.5"})
    repo = str(tmp_path / "clone")
    from tests.servers.git_repo import GitRepo

    git = GitRepo.__new__(GitRepo)
    git.path = Path(repo)
    git.git("config", "i18n.commitEncoding", "utf-8")
    tree = git.git("rev-parse", "main^{tree}")
    hostile = git.git("commit-tree", tree, "-p", commits[1], "-m", "\x1b]0;title\x07 <b>\u202e")
    git.git("update-ref", "refs/heads/main", hostile)
    found = isohub.bisect(repo, commits[1], "main", model="model", inputs=INPUT, session=session)
    assert found.first_bad.id == hostile
    assert not {"\x1b", "\x07", "\u202e"} & set(str(found))
    assert found.first_bad.message.startswith("\x1b]0;title")
    assert "\x1b" not in found.to_json()


def test_places_and_numbers_that_look_the_same_stay_apart(session, tmp_path):
    """Two long keys that are cut to the same, and whole numbers that are one number in float64."""
    from tests.servers.git_repo import GitRepo

    repo = GitRepo(tmp_path / "clone")
    lines = "import torch\n\n\ndef model():\n    return {key}\n"
    key = '{"k" * 60 + "%s" + "k" * 60: 1, "k" * 60 + "b" + "k" * 60: 1, "n": torch.tensor([2**60 + %d])}'
    versions = [("a", 0, "1"), ("a", 0, "2"), ("a", 1, "3"), ("a", 1, "4")]
    commits = []
    for middle, number, note in versions:
        repo.commit({"hubconf.py": lines.format(key=key % (middle, number)), "note": note})
        commits.append(repo.git("rev-parse", "HEAD").strip())
    repo.commit({"hubconf.py": lines.format(key=(key % ("a", 0)).replace(": 1", ": 2", 1))})
    last = repo.git("rev-parse", "HEAD").strip()
    for good, bad, first in ((commits[0], commits[3], commits[2]), (commits[0], last, commits[2])):
        found = isohub.bisect(str(repo.path), good, bad, model="model", inputs=INPUT, session=session)
        assert found.first_bad.id == first
