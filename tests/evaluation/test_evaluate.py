"""`isohub.evaluate` with real workers."""

import json
import math
import os
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import isohub
from isohub.errors import InvalidReferenceError, PolicyError, ValueNotTransferableError


def metric(model, x):
    y = model(x)
    return {"mean": y.mean(), "largest": y.max().item(), "rows": len(y), "y": y}


REDUCERS = {"mean": "mean", "largest": "max", "rows": "sum", "y": "concat"}


def evaluate(session, repos, data, fn=metric, **options):
    options = {"reducers": REDUCERS if fn is metric else "mean", "model": "model", "workers": 2, **options}
    return isohub.evaluate(fn, repos, data=data, session=session, **options)


def test_the_table_is_what_one_process_would_compute(session, refs, batches):
    found = evaluate(session, [refs["1"], refs["2"], refs["3"]], batches, kwargs={"offset": 0.5})
    assert found.complete
    assert (found.batches, found.lanes) == (21, 2)
    whole = torch.cat(batches)
    for scale, row in zip((1, 2, 3), found.rows, strict=True):
        y = whole * scale + 0.5
        assert torch.equal(row.metrics["y"], y)
        assert row.metrics["mean"] == pytest.approx(y.mean().item(), abs=1e-6)
        assert row.metrics["largest"] == y.max().item()
        assert row.metrics["rows"] == row.weight == 82
        assert row.repo == refs[str(scale)]
        assert len(row.commit) == 40
        assert [each.batch for each in row.results] == list(range(21))
        assert row.load_s > 0
        assert row.memory_bytes > 0


@pytest.mark.parametrize("workers", [1, 3])
def test_it_does_not_depend_on_the_number_of_workers(session, refs, batches, workers):
    def noisy(model, x):
        assert not model.training
        return {"noise": torch.rand(()), "y": model(x).double().sum(), "threads": torch.get_num_threads()}

    one, other = (
        evaluate(session, [refs["1"], refs["2"]], batches, noisy, workers=count, seed=5) for count in (2, workers)
    )
    for row, again in zip(one.rows, other.rows, strict=True):
        assert row.metrics["noise"] == again.metrics["noise"]
        assert row.metrics["y"] == again.metrics["y"]
    assert one.rows[0].metrics["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    third = evaluate(session, refs["1"], batches, noisy, seed=6)
    assert third.rows[0].metrics["noise"] != one.rows[0].metrics["noise"]


def test_what_is_left_of_one_ref_is_shared_by_all_lanes(session, refs, batches):
    pids = set()

    def where(model, x):
        import time

        time.sleep(0.1)
        return {"start": float(open("/proc/self/stat").read().split()[21])}

    found = evaluate(session, refs["1"], batches * 2, where, reducers="list")
    pids = set(found.rows[0].metrics["start"])
    assert len(pids) == 2  # two processes have had batches of the one ref
    assert not session.workers()


def test_failures_are_rows_and_end_nothing_else(session, refs, batches):
    def picky(model, x):
        if x[0, 0] == bad:
            raise KeyError("\x1b]0;hostile\x07")
        return {"sum": model(x).sum()}

    bad = batches[7][0, 0].item()
    found = evaluate(session, [refs["broken"], refs["2"], refs["1"].replace(":s1", ":gone")], batches, picky)
    broken, fine, missing = found.rows
    assert not found.complete
    assert broken.error == "RuntimeError: no \\x1b[31mway"
    assert broken.failures[0].tries == 2
    assert missing.error is not None
    assert missing.commit is None
    assert [(each.batch, each.kind, each.tries) for each in fine.failures] == [(7, "KeyError", 2)]
    assert len(fine.results) == 20
    assert fine.metrics["sum"] == pytest.approx(
        sum(len(x) * (x * 2).sum().item() for n, x in enumerate(batches) if n != 7) / 78, rel=1e-5
    )
    for text in (str(found), found.to_csv(), found.to_markdown(), found.to_json()):
        assert "\x1b" not in text
        assert "\x07" not in text


@pytest.mark.parametrize(
    ("how", "kind"),
    [("SIGKILL", "WorkerDiedError"), ("exit", "WorkerDiedError"), ("hang", "WorkerTimeoutError")],
)
def test_a_worker_that_ends_is_replaced(session, refs, batches, how, kind):
    def deadly(model, x):
        if x[0, 0] == bad:
            model.die(how)
        return {"sum": model(x).sum()}

    bad = batches[3][0, 0].item()
    found = evaluate(session, [refs["1"], refs["3"]], batches[:8], deadly, timeout_s=2 if how == "hang" else 30)
    for row in found.rows:
        assert [(each.batch, each.kind, each.tries) for each in row.failures] == [(3, kind, 2)]
        assert len(row.results) == 7


def test_a_failure_that_a_fresh_worker_does_not_repeat_is_none(session, refs, batches):
    def once(model, x):
        model.calls += 1
        if model.calls == 3:
            raise RuntimeError("tired")
        return {"sum": model(x).sum()}

    assert evaluate(session, refs["1"], batches[:5], once, workers=1).complete
    found = evaluate(session, refs["1"], batches[:5], once, workers=1, retries=0)
    assert [each.batch for each in found.rows[0].failures] == [2]


def test_an_exception_of_every_batch_is_not_tried_twice_for_each(session, refs, batches):
    def always(model, x):
        raise ValueError("never")

    found = evaluate(session, refs["1"], batches, always, workers=1)
    tries = [each.tries for each in found.rows[0].failures]
    assert len(tries) == 21
    assert sum(tries) <= 21 + 3
    assert found.rows[0].metrics == {}


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda model, x: 3, "fn gave a int"),
        (lambda model, x: {"a": "text"}, "fn gave a str as 'a'"),
        (lambda model, x: {"a": model}, "fn gave a Scaled as 'a'"),
        (lambda model, x: {1: 2.0}, "a metric by the name 1"),
        (lambda model, x: {str(n): n for n in range(2000)}, "at most 1000"),
        (lambda model, x: {"a": x.to_sparse()}, "expected a dense one"),
    ],
)
def test_what_is_no_metric_is_a_failure(session, refs, batches, fn, words):
    found = evaluate(session, refs["1"], batches[:1], fn)
    assert words in found.rows[0].failures[0].message
    assert found.rows[0].failures[0].tries == 1


def test_what_an_entrypoint_gives_beside_a_model_is_there(session, refs, batches):
    found = evaluate(
        session, refs["2"], batches[:2], lambda both, x: {"n": both[0](x).sum() + len(both[1]["names"])}, model="pair"
    )
    assert found.complete, found
    none = evaluate(session, refs["2"], batches[:2], lambda both, x: {"n": 1}, model="number")
    assert none.rows[0].error == "TypeError: the entrypoint gave a float, which is no model"


def test_mistakes_of_the_caller_are_raised(session, refs, batches):
    with session.load(refs["1"], "model") as handle:
        with pytest.raises(ValueNotTransferableError, match="^fn: "):
            evaluate(session, refs["1"], batches, lambda model, x: {"a": handle(x).sum()})
        with pytest.raises(ValueNotTransferableError, match="^kwargs: "):
            evaluate(session, refs["1"], batches, kwargs={"offset": handle})
    lock = threading.Lock()
    with pytest.raises(ValueNotTransferableError, match="^fn: .*a lock"):
        evaluate(session, refs["1"], batches, lambda model, x: {"a": lock.locked()})
    with pytest.raises(InvalidReferenceError):
        evaluate(session, [refs["1"], "a b c"], batches)
    with pytest.raises(ValueError, match="reducers names 'acuracy', which fn did not give; it gave largest, mean"):
        evaluate(session, refs["1"], batches, reducers={"acuracy": "sum"})
    with pytest.raises(ValueError, match="weight='n'"):
        evaluate(session, refs["1"], batches, weight="n")
    for wrong in (
        {"reducers": "median"},
        {"reducers": {"a": "median"}},
        {"retries": -1},
        {"training": "yes"},
        {"workers": 0},
        {"batch_size": 0},
        {"repos": []},
    ):
        with pytest.raises(ValueError):
            evaluate(session, **{"repos": refs["1"], "data": batches, **wrong})
    with pytest.raises(TypeError, match="x.split"):
        evaluate(session, refs["1"], torch.ones(3))
    with pytest.raises(TypeError):
        evaluate(session, refs["1"], batches, fn=3)


def test_a_worker_of_another_python_is_sent_no_code(session, refs, batches, monkeypatch):
    import isohub.evaluation.working as working
    from isohub.session.supervisor import Versions

    def older(place, seat):
        seated = take_seat(place, seat)
        next(seated.remotes()).worker.versions = Versions("3.9.18", "1.13.1")
        return seated

    take_seat = working.take_seat
    monkeypatch.setattr(working, "take_seat", older)
    found = evaluate(session, refs["1"], batches[:1])
    assert "that of clone@" in found.rows[0].error
    assert "3.9.18" in found.rows[0].error
    assert found.rows[0].failures[0].tries == 1


def test_weights(session, refs, batches):
    def fn(model, x):
        return {"mean": model(x).mean(), "n": len(x) ** 2}

    whole = evaluate(session, refs["1"], batches, fn).rows[0].metrics["mean"]
    assert whole == pytest.approx(torch.cat(batches).mean().item(), abs=1e-6)
    each = evaluate(session, refs["1"], batches, fn, weight=lambda batch: 1).rows[0].metrics["mean"]
    assert each == pytest.approx(sum(x.mean().item() for x in batches) / 21, abs=1e-6)
    named = evaluate(session, refs["1"], batches, fn, weight="n").rows[0]
    assert named.weight == 20 * 16 + 4
    assert named.metrics["mean"] == pytest.approx(sum(x.mean().item() * len(x) ** 2 for x in batches) / 324, abs=1e-6)


def test_a_weight_that_is_none_is_a_failure_or_a_mistake(session, refs, batches, tmp_path):
    def fn(model, x):
        return {"mean": model(x).mean(), "n": math.nan if len(x) == 2 else 1.0}

    for results in (None, tmp_path / "r.jsonl"):
        row = evaluate(session, refs["1"], batches, fn, weight="n", results=results).rows[0]
        assert [(each.batch, each.kind) for each in row.failures] == [(20, "ValueError")]
        assert row.weight == 20
    for wrong in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight gave .* for batch 0; expected a finite number"):
            evaluate(session, refs["1"], batches[:1], fn, weight=lambda batch, wrong=wrong: wrong)


def test_what_a_stream_says_of_its_length_is_not_believed(session, refs, tmp_path):
    class Liar(Stream):
        def __len__(self):
            return 3

    def sizes(model, batch):
        return {"rows": len(batch[0])}

    def loader():
        return DataLoader(Liar(torch.ones(6, 3)), batch_size=1)

    results = tmp_path / "r.jsonl"
    assert len(evaluate(session, refs["1"], loader(), sizes, results=results).rows[0].results) == 6
    kept = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(line for line in kept if not any(b'"batch":%d' % n in line for n in (3, 4, 5))))
    again = evaluate(session, refs["1"], loader(), sizes, results=results)
    assert (again.resumed, len(again.rows[0].results)) == (3, 6)


class Examples(Dataset):
    def __init__(self, tensor):
        self.tensor, self.read = tensor, []

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, number):
        self.read.append(number)
        return self.tensor[number], number


class Stream(IterableDataset):
    def __init__(self, tensor):
        self.tensor = tensor

    def __iter__(self):
        yield from ((x, n) for n, x in enumerate(self.tensor))


def second(model, batch):
    x, numbers = batch
    return {"sum": (model(x).sum(-1) * numbers).sum(), "rows": len(x)}


@pytest.mark.parametrize("form", ["dataset", "loader", "iterable loader", "items", "generator"])
def test_all_kinds_of_data_are_the_same_data(session, refs, form):
    tensor = torch.randn(23, 3, generator=torch.Generator().manual_seed(1))
    data, size = {
        "dataset": lambda: (Examples(tensor), 5),
        "loader": lambda: (DataLoader(Examples(tensor), batch_size=5), None),
        "iterable loader": lambda: (DataLoader(Stream(tensor), batch_size=5), None),
        "items": lambda: ([(x, n) for n, x in enumerate(tensor)], 5),
        "generator": lambda: (((x, n) for n, x in enumerate(tensor)), 5),
    }[form]()
    found = evaluate(session, [refs["1"], refs["2"], refs["3"]], data, second, batch_size=size, reducers="sum")
    assert found.batches == 5
    for scale, row in zip((1, 2, 3), found.rows, strict=True):
        assert row.metrics["rows"] == 23
        assert row.metrics["sum"] == pytest.approx((tensor.sum(-1) * torch.arange(23)).sum().item() * scale, rel=1e-4)
    if form == "dataset":
        assert sorted(data.read) == list(range(23))  # once, for all refs


def test_a_stream_is_read_no_further_than_it_is_needed(session, refs):
    """Rule 1 of batches, and rule 4 of the board: it may be longer than memory, or never end."""
    done, ahead = [0], []

    def endless():
        for number in range(10_000_000):
            if number == 60:
                raise OSError("the disk is gone")
            ahead.append(number - done[0] / 2)
            yield torch.full((1, 3), float(number))

    def told(count, total):
        done[0] = count
        assert total is None

    with pytest.raises(OSError, match="the disk is gone"):
        evaluate(session, [refs["1"], refs["2"]], endless(), progress=told)
    assert max(ahead) <= 2 * 4 + 2 + 2
    assert not session.workers()


def test_a_stream_ends_where_no_ref_can_be_loaded(session, refs):
    read = []

    def stream():
        for number in range(1000):
            read.append(number)
            yield torch.ones(1, 3)

    found = evaluate(session, [refs["broken"]], stream())
    assert found.rows[0].error is not None
    assert len(read) < 20


def test_a_policy_that_makes_no_sense_is_raised(session, refs, batches):
    with pytest.raises(PolicyError, match="is not there"):
        evaluate(session, [refs["1"], refs["2"]], batches, sandbox=isohub.Sandbox(read=["/no/such/place"]))


def test_a_loader_with_processes(session, refs):
    """They are forked before there are lanes, and read in this process's stead."""
    tensor = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(Examples(tensor), batch_size=4, num_workers=1)
    found = evaluate(session, [refs["1"], refs["2"]], loader, second, reducers="sum")
    assert found.rows[1].metrics["sum"] == pytest.approx(2 * found.rows[0].metrics["sum"])
    assert found.rows[0].metrics["rows"] == 12


def test_progress_goes_up_to_all_there_is(session, refs, batches):
    told = []
    evaluate(session, [refs["1"], refs["2"]], batches, progress=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 42)
    assert told[-1] == (42, 42)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_bar_for_a_terminal(session, refs, batches, capfd):
    evaluate(session, refs["1"], batches[:3], progress=True)
    assert "3/3" in capfd.readouterr().err
    evaluate(session, refs["1"], batches[:3])
    assert capfd.readouterr().err == ""  # nobody looks


def test_an_interruption_ends_what_runs(session, refs, batches):
    def slow(model, x):
        model.die("hang")

    def told(done, total):
        if threading.main_thread().ident != threading.get_ident():
            return
        threading.Timer(0.5, lambda: os.kill(os.getpid(), 2)).start()

    with pytest.raises(KeyboardInterrupt):
        evaluate(session, [refs["1"], refs["2"]], batches, slow, progress=told)
    assert not session.workers()


def test_the_table_in_other_forms(session, refs, batches):
    def fn(model, x):
        return {"=cmd()": model(x).mean(), "nan": float("nan"), "commit": 3, "y": model(x).sum(0), "a|<b>": 1}

    found = evaluate(session, [refs["1"], refs["broken"]], batches[:3], fn)
    data = json.loads(found.to_json(results=True))
    assert data["rows"][0]["metrics"]["nan"] == "nan"
    assert len(data["rows"][0]["results"]) == 3
    assert data["rows"][1]["failures"][0]["batch"] is None
    head, first, second = found.to_csv().splitlines()[:3]
    assert "'=cmd()" in head
    assert "metric:commit" in head
    assert "y" not in head.split(",")
    assert first.split(",")[1] == found.rows[0].commit
    assert "RuntimeError" in second
    assert len(found.to_csv(results=True).splitlines()) == 4
    assert "a\\|\\<b\\>" in found.to_markdown()
    frame = pytest.importorskip("pandas") and found.to_pandas()
    assert list(frame["repo"]) == [refs["1"], refs["broken"]]
    assert math.isnan(frame["nan"][0])
    assert len(frame["y"][0]) == 3
    assert len(found.to_pandas(results=True)) == 3
