"""`compare`: what changed is told, what did not is not, and what failed is a result."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import isohub
from isohub import errors
from tests.comparison.conftest import Compared, git


def leaf(found: isohub.Comparison, path: str, number: int = 0):
    (only,) = [leaf for leaf in found.differences[number].outputs or () if leaf.path == path]
    return only


def test_equal_refs_are_no_change_and_only_their_code_differs(compared: Compared) -> None:
    found = compared("base", "same")
    assert (found.changed, found.verdict, found.max_abs) == (False, "no change", 0.0)
    (difference,) = found.differences
    assert not difference.state.any
    assert not difference.modules.any  # in spite of an address in a module's own words
    assert [(file.path, file.status, file.added, file.removed) for file in difference.code.files] == [
        ("variant.py", "modified", 1, 0)
    ]
    assert found.refs[0].deterministic is True  # dropout is seeded for each call
    assert found.refs[0].commit != found.refs[1].commit


def test_values_are_found_in_outputs_and_state(compared: Compared, variants: Path, session: isohub.Session) -> None:
    found = compared("base", "values", seed=5)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 8, generator=generator)
    with torch.no_grad():
        old, new = (session.load(f"{variants}:{name}", "model", seed=5)(x)["logits"] for name in ("base", "values"))
    place = leaf(found, "output['logits']")
    assert place.verdict == "changed"
    assert place.measures.max_abs == (old.double() - new.double()).abs().max().item()
    assert place.measures.top1 == (old.argmax(1) == new.argmax(1)).double().mean().item()
    assert place.measures.worst_pair == tuple(f"{t[place.measures.worst].item():.9g}" for t in (old, new))
    assert found.changed
    assert [change.name for change in found.differences[0].state.changed] == ["body.0.weight", "head.bias"]
    assert found.differences[0].state.changed[0].max_abs == pytest.approx(0.25)
    assert found.differences[0].state.changed[0].differing == 1


def test_a_tolerance_is_what_is_no_change(compared: Compared) -> None:
    assert compared("base", "nudged").changed
    within = compared("base", "nudged", tolerance=1e-3)
    assert not within.changed
    assert leaf(within, "output['logits']").verdict == "tolerated"
    assert within.verdict.startswith("no change beyond the tolerance: max abs 0.0001")
    assert compared("base", "nudged", tolerance=(0.0, 1e-9)).changed


def test_entries_that_are_called_otherwise_are_renamed(compared: Compared) -> None:
    state = compared("base", "renamed").differences[0].state
    assert set(state.renamed) == {
        (f"body.{layer}.{what}", f"trunk.{layer}.{what}") for layer in (0, 2) for what in ("weight", "bias")
    }
    assert (state.missing, state.added, state.changed) == ((), (), ())


def test_ties_and_shapes_and_dtypes(compared: Compared) -> None:
    found = compared("base", "tied", "wider", "half")
    tied, wider, half = (difference.state for difference in found.differences)
    assert tied.tied == ((), ("body.0.weight = body.2.weight",))
    assert wider.reshaped == (
        ("head.weight", "float32[6, 8]", "float32[7, 8]"),
        ("head.bias", "float32[6]", "float32[7]"),
    )
    assert {row[0] for row in half.retyped} == {"head.weight", "head.bias"}
    assert half.changed == ()
    assert leaf(found, "output['logits']", 1).change == "shape"
    assert (leaf(found, "output['logits']", 2).change, leaf(found, "output['logits']", 2).got) == (
        "dtype",
        "float64[4, 6]",
    )
    assert leaf(found, "output['logits']", 2).measures.max_abs < 1e-6  # compared all the same
    assert [name for name, _, _ in found.differences[1].modules.changed] == ["head"]


def test_what_is_no_number_and_what_comes_or_goes(compared: Compared) -> None:
    found = compared("base", "other_name", "fewer", "nan")
    name = leaf(found, "output['name']", 0)
    assert (name.change, name.expected, name.got) == ("value", "'net'", "'another'")
    assert leaf(found, "output['count']", 1).change == "missing"
    assert leaf(found, "output['more'][1]", 1).change == "added"
    nan = leaf(found, "output['logits']", 2).measures
    assert (nan.nan, nan.worst, nan.max_abs) == ((0, 1), (1, 2), float("inf"))
    assert "NaN 0 before, 1 after" in str(found)


def test_noise_is_no_change_and_what_exceeds_it_is(compared: Compared) -> None:
    found = compared("noisy", "noisy_again", "noisy_far")
    assert [ref.deterministic for ref in found.refs] == [False, False, False]
    assert found.refs[0].noise > 0
    assert leaf(found, "output['logits']", 0).verdict == "noise"
    assert leaf(found, "output['logits']", 1).verdict == "changed"
    assert "is not deterministic" in str(found)
    words = compared("random_words", "base")
    assert leaf(words, "output['name']").verdict == "noise"
    assert words.refs[0].unstable == ("output['name']",)
    assert words.verdict == "no change beyond noise"
    assert not words.changed


def test_failures_are_results_and_the_others_go_on(compared: Compared) -> None:
    found = compared("base", "raises", "dies", "broken", "gone", "nowhere", "values")
    assert {
        ref.reference.rpartition(":")[2]: (ref.failure.phase, ref.failure.type) for ref in found.refs if ref.failure
    } == {
        "raises": ("call", "ValueError"),
        "dies": ("call", "WorkerDiedError"),
        "broken": ("load", "RuntimeError"),
        "gone": ("load", "EntrypointNotFoundError"),
        "nowhere": ("fetch", "RefNotFoundError"),
    }
    assert found.changed
    assert found.differences[0].state is not None  # as far as it came
    assert found.differences[0].outputs is None
    assert found.differences[5].outputs_changed
    assert found.refs[1].failure.message == "a sum of \\x1b[31mred"
    assert "line" in found.refs[1].failure.traceback
    assert re.search(r'in File ".*/hubconf.py", line \d+, in forward', str(found))
    assert "\x1b" not in str(found) + found.to_markdown() + found.to_json()


def test_a_base_that_fails(compared: Compared) -> None:
    found = compared("broken", "base", "values")
    assert found.changed
    assert found.verdict == "A failed: RuntimeError (load)"
    assert found.refs[1].outputs[0] == ("output", "'dict of 4'")
    assert [difference.outputs for difference in found.differences] == [None, None]


def test_what_is_wrong_for_every_ref_is_raised(compared: Compared, variants: Path) -> None:
    with pytest.raises(errors.InvalidReferenceError):
        isohub.compare([str(variants), "a b c"], "model")
    with pytest.raises(errors.ValueNotTransferableError, match="an open file"):
        with open(variants / "hubconf.py") as file:
            compared("base", "same", inputs=(file,))
    with pytest.raises(errors.UntrustedRepoError):
        compared("base", "same", sandbox="none")
    for bad in ([str(variants)], str(variants), 3):
        with pytest.raises(ValueError, match="two references"):
            isohub.compare(bad, "model")
    for tolerance in (-1, float("nan"), (1, 2, 3), "much"):
        with pytest.raises(ValueError, match="tolerance"):
            compared("base", "same", tolerance=tolerance)
    with pytest.raises(ValueError, match="without items"):
        compared("base", "same", inputs=iter(()))
    with pytest.raises(TypeError, match="'tolerence'"):
        compared("base", "same", tolerence=1)
    with pytest.raises(ValueError, match="expected randn"):
        compared("base", "same", inputs="randn[3]")


def test_a_clone_as_it_stands_against_a_ref_of_it(variants: Path, session: isohub.Session, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(variants), str(clone))
    refs = [f"{clone}:base", str(clone)]
    git(clone, "checkout", "--quiet", "base")
    clean = isohub.compare(refs, "model", "randn(4,8)", repeats=0, session=session)
    assert (clean.changed, clean.differences[0].code.files) == (False, ())
    (clone / "variant.py").write_text('VARIANT = "nudged"\n')
    (clone / "notes.bin").write_bytes(b"\0" * 10)
    dirty = isohub.compare(refs, "model", "randn(4,8)", repeats=0, session=session)
    assert dirty.changed
    assert [(file.path, file.status, file.added) for file in dirty.differences[0].code.files] == [
        ("notes.bin", "added", None),
        ("variant.py", "modified", 1),
    ]


def test_inputs_of_many_kinds(compared: Compared, tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    torch.save({"x": x, "scale": 2.0}, tmp_path / "call.pt")
    assert compared("base", "same", inputs=x).inputs == "float32[4, 8]"
    assert compared("base", "same", inputs={"x": x, "scale": 2}).calls == 1
    assert compared("base", "same", inputs=["x=randn(4,8)", "scale=ones()"]).inputs == "x=randn(4,8), scale=ones()"
    batches = compared("base", "nudged", inputs=((x + number,) for number in range(3)))
    assert batches.calls == 3
    assert leaf(batches, "output['logits']").measures.elements == 3 * 24
    loader = torch.utils.data.DataLoader(torch.randn(10, 8), batch_size=4)
    assert compared("base", "same", inputs=loader).calls == 3
    assert compared("base", "same", method="classify").refs[0].outputs == (("output", "int64[4]"),)


def test_nothing_is_called_without_inputs(compared: Compared) -> None:
    found = compared("base", "values", inputs=None)
    assert (found.calls, found.changed, found.differences[0].outputs) == (0, True, None)
    assert not compared("base", "same", inputs=None).changed
    values = compared("base", "values", model="numbers", inputs=None, args=[4])
    assert leaf(values, "built['text']").change == "value"
    assert leaf(values, "built['values']").measures.max_abs == 1
    assert values.arguments == "4"
    assert compared("base", "same", model="function", inputs=None).verdict.startswith("nothing was compared")


def test_what_an_entrypoint_gives_besides_a_module(compared: Compared) -> None:
    assert compared("base", "values", model="pair").changed  # the module within the tuple is called
    assert compared("base", "values", model="function", inputs="ones(3)").max_abs == 1
    uncalled = compared("base", "same", model="numbers")
    assert uncalled.refs[1].failure.message == "the entrypoint gave a dict, which is no model to call"
    assert uncalled.changed


def test_what_stays_in_its_worker_is_not_said_to_be_equal(compared: Compared) -> None:
    found = compared("base", "same", model="opaque", inputs="ones(3)")
    assert found.verdict == "not compared: output['rows'] stays in its worker"
    assert leaf(found, "output['x']").verdict == "same"
    assert not found.changed


def test_calls_are_timed_in_the_worker(compared: Compared) -> None:
    found = compared("base", "slow", repeats=7)
    fast, slow = (ref.call for ref in found.refs)
    assert (fast.runs, slow.runs) == (7, 7)
    assert fast.threads >= 1
    assert slow.lower_s >= 0.03
    assert len(fast.samples_s) == 7
    assert all(ref.build_s > 0 and ref.load_s > ref.build_s and ref.round_trip_s > 0 for ref in found.refs)
    assert all(ref.peak_rss_bytes > 50_000_000 for ref in found.refs)
    assert [ref.rebuilt.runs for ref in found.refs] == [7, 7]
    assert compared("base", "same", inputs=None, repeats=2).refs[0].rebuilt.runs == 2


def test_an_answer_of_too_many_places_is_a_failure(compared: Compared) -> None:
    found = compared("base", "same", model="scattered", inputs="ones(1)")
    assert found.refs[0].failure.phase == "call"
    assert "more than 20,000 places" in found.refs[0].failure.message
    built = compared("base", "same", model="scatter", inputs=None)
    assert built.refs[1].failure.phase == "load"


def test_a_worker_that_tells_more_time_than_passed_is_refused(compared: Compared) -> None:
    found = compared("base", "lies", repeats=3)
    assert found.refs[1].failure.phase == "time"
    assert found.refs[1].failure.type == "ProtocolError"
    assert found.refs[0].call is not None


def test_it_is_plain_values_and_strict_json(compared: Compared, tmp_path: Path) -> None:
    found = compared("base", "nan", "broken")
    plain = found.to_dict()
    assert plain["schema"] == 1
    assert json.loads(found.to_json()) == plain
    assert plain["max_abs"] == "inf"
    assert plain["differences"][0]["of"].endswith(":nan")
    assert plain["refs"][2]["failure"]["phase"] == "load"
    for name in ("a.json", "a.md"):
        found.save(tmp_path / name)
    assert json.loads((tmp_path / "a.json").read_text()) == plain
    assert (tmp_path / "a.md").read_text() == found.to_markdown()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.md"]
    with pytest.raises(ValueError, match="saved as"):
        found.save(tmp_path / "a.txt")
    with pytest.raises(errors.SaveError):
        found.save(tmp_path / "nowhere" / "a.md")
    assert repr(found).startswith("<isohub.Comparison of 3 refs of 'model': ")


def test_workers_end_with_the_comparison(variants: Path) -> None:
    with isohub.Session() as session:
        isohub.compare([f"{variants}:base", f"{variants}:same"], "model", "randn(4,8)", repeats=0, session=session)
        assert session.workers() == []


def test_what_a_ref_cannot_do_to_the_disk(compared: Compared, tmp_path: Path) -> None:
    """A tree that is gone meanwhile is a fault of the code's part alone."""
    from isohub.comparison.code import compare_trees

    (tmp_path / "a").mkdir()
    shutil.rmtree(tmp_path / "a")
    assert compare_trees(tmp_path / "a", tmp_path).fault is not None
