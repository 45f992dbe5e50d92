"""Evaluations that are killed with SIGKILL go on from their files; see rule 3 of `isohub.evaluation.evaluate`."""

import importlib.util
import json
import random
import signal
import subprocess
import sys
import textwrap
import time
import weakref

import pytest
import torch

import isohub
from isohub.errors import ResultsError
from isohub.execution.journal import Journal

PROGRAM = textwrap.dedent("""
    import json, os, sys
    import torch
    import isohub


    def metric(model, batch):
        import time

        time.sleep(0.01)
        if batch[0, 0] == 7:
            raise ValueError("always")
        y = model(batch)
        return {"y": y.sum(0), "noise": torch.rand(()), "m": y.mean()}


    def stream():
        for number in range(40):
            yield torch.full((1 + number % 3, 3), float(number)) / 7 if number != 7 else torch.full((1, 3), 7.0)


    def evaluate(repos, results, kind, **options):
        return isohub.evaluate(
            metric,
            repos.split(","),
            "model",
            stream() if kind == "stream" else list(stream()),
            results=results,
            reducers={"y": "concat"},
            workers=2,
            retries=0,
            **options,
        )


    if __name__ == "__main__":
        repos, results, kind, counted = sys.argv[1:]

        def told(done, total):
            with open(counted, "w") as file:
                file.write(str(done))

        evaluate(repos, results, kind, progress=told)
""")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The file of the program, and what it defines."""
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    spec = importlib.util.spec_from_file_location("program_of_test_resume", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield path, module
    del sys.modules[spec.name]


def kill_at(share, path, repos, results, kind):
    """Run the program and kill it once so much of its work is done."""
    counted = results.with_suffix(".count")
    counted.write_text("0")
    with subprocess.Popen([sys.executable, path, repos, results, kind, counted]) as killed:
        deadline = time.monotonic() + 60
        while float(counted.read_text() or 0) < share * 120 and time.monotonic() < deadline:
            time.sleep(0.005)
        killed.send_signal(signal.SIGKILL)


def table(found):
    rows = [row.to_dict(results=True) for row in found.rows]
    for row in rows:
        for name in ("load_s", "call_s", "memory_bytes"):
            del row[name]
        for result in row["results"]:
            del result["seconds"]
    return rows


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_killed_at_random_and_resumed_the_table_is_the_same(session, program, refs, tmp_path, kind):
    path, module = program
    repos = ",".join([refs["1"], refs["2"], refs["3"], refs["broken"]])
    expected = module.evaluate(repos, None, kind, session=session)
    assert len(expected.rows[0].failures) == 1
    results = tmp_path / "killed.jsonl"
    for share in [(0.05, 0.5), (0.6, 0.95)][: 2 if kind == "list" else 1]:
        kill_at(random.uniform(*share), path, repos, results, kind)
        # What a crash of the machine could leave: half a line.
        with results.open("ab") as file:
            file.write(b'{"ref":0,"batch":3')
    kept = [json.loads(line) for line in results.read_bytes().splitlines()[:-1]]
    kept = {(line["ref"], line["batch"]) for line in kept if "metrics" in line}
    found = module.evaluate(repos, results, kind, session=session)
    assert table(found) == table(expected)
    assert found.resumed == len(kept) > 0
    # Nothing was computed twice: each result is in the file once.
    lines = [json.loads(line) for line in results.read_bytes().splitlines()]
    places = [(line["ref"], line["batch"]) for line in lines if "metrics" in line]
    assert len(places) == len(set(places)) == 3 * 39


def metric(model, x):
    return {"mean": model(x).mean()}


def evaluate(session, refs, results, **options):
    given = {"fn": metric, "repos": [refs["1"], refs["2"]], "model": "model", "workers": 1, **options}
    return isohub.evaluate(session=session, results=results, **given)


def test_a_whole_file_is_the_table_without_any_worker(session, refs, batches, tmp_path):
    results = tmp_path / "r.jsonl"
    one = evaluate(session, refs, results, data=batches)
    with isohub.Session() as fresh:
        other = evaluate(fresh, refs, results, data=batches)
        assert fresh._pool is None  # not even a zygote
    assert other.resumed == 42
    assert [row.metrics for row in one.rows] == [row.metrics for row in other.rows]
    reduced = evaluate(session, refs, results, data=batches, reducers="max")
    assert reduced.rows[0].metrics["mean"] == max(each.metrics["mean"] for each in one.rows[0].results)


def other_metric(model, x):
    return {"mean": model(x).mean() + 0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fn": other_metric}, "fn was"),
        ({"model": "pair"}, "model was"),
        ({"seed": 1}, "seed was 0, and is 1"),
        ({"kwargs": {"offset": 1.0}}, "args was"),
        ({"weight": "mean"}, "weight was"),
        ({"training": None}, "training was"),
    ],
)
def test_another_question_is_refused(session, refs, batches, tmp_path, options, words):
    results = tmp_path / "r.jsonl"
    evaluate(session, refs, results, data=batches[:2])
    before = results.read_bytes()
    with pytest.raises(ResultsError, match=words):
        evaluate(session, refs, results, data=batches[:2], **options)
    with pytest.raises(ResultsError, match="commits"):
        evaluate(session, {**refs, "2": refs["3"]}, results, data=batches[:2])
    assert results.read_bytes() == before


def test_other_data_is_refused(session, refs, batches, tmp_path):
    results = tmp_path / "r.jsonl"
    evaluate(session, refs, results, data=batches[:3])
    with pytest.raises(ResultsError, match="data"):
        evaluate(session, refs, results, data=batches[:4])
    with pytest.raises(ResultsError, match="data"):
        evaluate(session, refs, results, data=[batches[1], batches[0], batches[2]])
    # What is in memory costs no reading: a whole file does not stand for a list with another batch in it.
    with pytest.raises(ResultsError, match="batch 1 is not what it was"):
        evaluate(session, refs, results, data=[batches[0], batches[3], batches[2]])

    def stream(order):
        for number in order:
            yield batches[number]

    other = tmp_path / "s.jsonl"
    evaluate(session, refs, other, data=stream([0, 1, 2]))
    with pytest.raises(ResultsError, match="batch 1 is not what it was"):
        evaluate(session, refs, other, data=stream([0, 2, 1]))
    with pytest.raises(ResultsError, match="it has batch 2, and the data ended after 2"):
        evaluate(session, refs, other, data=stream([0, 1]))


def test_what_failed_is_tried_again_and_a_ref_that_comes_late_is_taken(session, refs, batches, tmp_path, git_ref):
    results = tmp_path / "r.jsonl"
    late = git_ref(make=False)
    one = evaluate(session, {"1": refs["1"], "2": late}, results, data=batches[:3])
    assert one.rows[1].error is not None
    git_ref(make=True)
    other = evaluate(session, {"1": refs["1"], "2": late}, results, data=batches[:3])
    assert other.complete
    assert other.resumed == 3
    git_ref(make=True, scale="2")
    with pytest.raises(ResultsError, match="ref 2 was"):
        evaluate(session, {"1": refs["1"], "2": late}, results, data=batches[:3])


def test_batches_that_nobody_needs_any_more_are_let_go_of(session, refs, tmp_path):
    """The one ref that lacks them cannot be loaded: the stream is read for its digests, and nothing is kept."""
    results = tmp_path / "r.jsonl"
    alive, most = [], [0]

    def stream():
        for number in range(60):
            batch = torch.full((1, 3), float(number))
            alive[:] = [each for each in alive if each() is not None]
            most[0] = max(most[0], len(alive))
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    both = {"1": refs["1"], "2": refs["broken"]}
    evaluate(session, both, results, data=stream())
    most[0] = 0
    again = evaluate(session, both, results, data=stream())
    assert again.resumed == 60
    assert again.rows[1].error is not None
    assert most[0] <= 4 + 2 + 3


@pytest.fixture
def git_ref(refs):
    from tests.servers.git_repo import GitRepo

    path = refs["1"].rpartition(":")[0]
    repo = GitRepo.__new__(GitRepo)
    repo.path = path

    def act(*, make, scale="3"):
        if make:
            repo.git("branch", "--force", "late", f"s{scale}")
        return f"{path}:late"

    yield act
    repo.git("branch", "-D", "late")


def test_a_file_in_use_is_refused(session, refs, batches, tmp_path):
    results = tmp_path / "r.jsonl"
    caught = []

    def told(done, total):
        if done == 1:
            try:
                evaluate(session, refs, results, data=batches[:2])
            except ResultsError as error:
                caught.append(error)

    evaluate(session, refs, results, data=batches[:2], progress=told)
    assert "in use" in str(caught[0])


def test_a_damaged_result_is_an_error(session, refs, batches, tmp_path):
    results = tmp_path / "r.jsonl"
    evaluate(session, refs, results, data=batches[:2])
    whole = results.read_text()
    results.write_text(whole.replace('"ref":0,"batch":1', '"ref":9,"batch":1'))
    with pytest.raises(ResultsError, match="cannot be read"):
        evaluate(session, refs, results, data=batches[:2])
    results.write_text(whole)
    header = {key: value for key, value in json.loads(whole.splitlines()[0]).items() if key not in ("kind", "crc32")}
    journal = Journal(results, "isohub evaluation", header)
    journal.append({"ref": 9, "batch": 1, "digest": "", "weight": 1.0, "seconds": 1.0, "metrics": {}})
    journal.close()
    with pytest.raises(ResultsError, match="is no result"):
        evaluate(session, refs, results, data=batches[:2])
    assert torch.is_tensor(batches[0])
