"""A comparison as blocks of a report, the verdict first; what does not fit is counted, never left out in silence.

Side: caller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from isohub.comparison.code import CodeDifference
from isohub.comparison.document import Block, Heading, Line, Named, Table, Words
from isohub.comparison.modules import ModulesDifference
from isohub.comparison.outputs import LeafDifference
from isohub.comparison.result import Comparison, Difference, RefResult
from isohub.comparison.states import EntryChange, StateDifference
from isohub.comparison.timing import Timing

__all__ = ["blocks_of", "letter", "seconds_words", "size_words", "verdict_of"]

_PLACES, _ENTRIES, _LISTED, _FILES = 20, 12, 5, 12


def letter(number: int) -> str:
    """A short name of a ref: A is the base."""
    return chr(ord("A") + number) if number < 26 else f"R{number + 1}"


def verdict_of(comparison: Comparison) -> str:
    """All of it in a line."""
    return Line(_verdict(comparison)).text


def blocks_of(comparison: Comparison) -> list[Block]:
    """The report."""
    blocks: list[Block] = [Line(_verdict(comparison), "bad" if comparison.changed else "good")]
    rows = [
        (letter(number), Named(ref.reference), Named(ref.name or "not fetched"), _notes(number, ref))
        for number, ref in enumerate(comparison.refs)
    ]
    blocks.append(Table(("", "ref", "commit", ""), rows))
    blocks.append(_figures(comparison))
    blocks.append(Line(_asked(comparison)))
    for number, ref in enumerate(comparison.refs):
        blocks += _troubles(letter(number), ref)
    for number, difference in enumerate(comparison.differences, start=1):
        parts = list(_difference(letter(number), difference))
        if parts:
            blocks += [Heading(f"{letter(number)} against A"), *parts]
    return blocks


def _notes(number: int, ref: RefResult) -> str:
    notes = ["base"] if number == 0 else []
    if ref.environment not in (None, "host"):
        notes.append(f"environment {ref.environment[:12]}")
    return ", ".join(notes)


def _verdict(comparison: Comparison) -> list[Words]:
    parts: list[Words] = []
    if comparison.base.failure is not None:
        parts = ["A failed: ", Named(comparison.base.failure.type), f" ({comparison.base.failure.phase})"]
    for number, (ref, difference) in enumerate(zip(comparison.refs[1:], comparison.differences, strict=True), start=1):
        if comparison.base.failure is not None and ref.failure is None:
            continue
        if parts:
            parts.append("; ")
        if ref.failure is not None:
            parts += [f"{letter(number)} failed: ", Named(ref.failure.type), f" ({ref.failure.phase})"]
        else:
            parts += [f"{letter(number)}: "] if len(comparison.differences) > 1 else []
            parts += _verdict_on(difference)
    return parts


def _verdict_on(difference: Difference) -> list[Words]:
    found: list[list[Words]] = []
    worst = difference.worst
    beyond = ""
    if worst is not None and worst.verdict == "changed":
        found.append(["outputs changed: ", *_worst_words(worst)])
    elif worst is not None:
        size = max(leaf.max_abs for leaf in difference.outputs or ())
        if worst.verdict == "tolerated":
            beyond = f" beyond the tolerance: max abs {_number(size)}"
        else:
            beyond = f" beyond noise of {_number(size)}" if size else " beyond noise"
    opaque = next((leaf for leaf in difference.outputs or () if leaf.verdict == "opaque"), None)
    if opaque is not None:
        found.append(["not compared: ", Named(opaque.path), " stays in its worker"])
    if difference.state is not None and difference.state.any:
        found.append([f"state changed: {_state_counts(difference.state)}"])
    if difference.modules is not None and difference.modules.any:
        found.append([f"modules changed: {_modules_counts(difference.modules)}"])
    if difference.outputs is None and difference.state is None and difference.modules is None:
        found.append(["nothing was compared: it is no module, and there were no inputs"])
    elif not found:
        found.append([f"no change{beyond}"])
    elif worst is None and difference.outputs and opaque is None:
        found.insert(0, ["outputs equal"])
    elif beyond:
        found.insert(0, [f"outputs not changed{beyond}"])
    if difference.time_ratio is not None:
        ratio = difference.time_ratio
        found.append([f"slower {ratio:.2f}x" if ratio > 1 else f"faster {1 / ratio:.2f}x"])
    joined = found[0]
    for each in found[1:]:
        joined = [*joined, "; ", *each]
    return joined


def _worst_words(worst: LeafDifference) -> list[Words]:
    place = Named(worst.path)
    if worst.change == "values" and worst.measures is not None:
        return [f"max abs {_number(worst.measures.max_abs)} at ", place]
    if worst.change in ("missing", "added"):
        return [place, f" is {worst.change}"]
    return [f"{worst.change} of ", place]


def _figures(comparison: Comparison) -> Table:
    ratios = [None, *(difference.time_ratio for difference in comparison.differences)]
    rows = []
    for number, (ref, ratio) in enumerate(zip(comparison.refs, ratios, strict=True)):
        rows.append(
            (
                letter(number),
                "" if ref.parameters is None else f"{ref.parameters:,}",
                _call_words(ref.rebuilt) if ref.rebuilt else "" if ref.build_s is None else seconds_words(ref.build_s),
                "" if ref.call is None else _call_words(ref.call),
                _ratio_words(comparison.base.call, ref.call, ratio) if number else "",
                "" if ref.peak_rss_bytes is None else size_words(ref.peak_rss_bytes),
                _twice_words(ref),
            )
        )
    columns = ("", "parameters", "build", "call", "time", "memory", "asked twice")
    return Table(columns, rows, right=frozenset({1, 2, 3, 4, 5}))


def _ratio_words(base: Timing | None, timing: Timing | None, ratio: float | None) -> str:
    if base is None or timing is None:
        return ""
    if ratio is not None:
        return f"{ratio:.2f}x"
    return "same" if base.steady and timing.steady else "unsteady"


def _twice_words(ref: RefResult) -> str:
    if ref.deterministic is None:
        return ""
    if ref.deterministic:
        return "same"
    return "differs in form" if ref.unstable else f"differs by {_number(ref.noise)}"


def _call_words(timing: Timing) -> str:
    half = (timing.upper_s - timing.lower_s) / 2 / timing.median_s if timing.median_s > 0 else 0.0
    return f"{seconds_words(timing.median_s)} ± {half:.0%}"


def _asked(comparison: Comparison) -> list[Words]:
    parts: list[Words] = [Named(f"{comparison.model}({comparison.arguments})")]
    if comparison.calls == 1:
        parts += [", called with ", Named(comparison.inputs)]
    elif comparison.calls:
        parts += [f", called {comparison.calls:,} times, first with ", Named(comparison.inputs)]
    else:
        parts.append(", not called")
    tolerance = ", ".join(
        f"{name} {_number(value)}" for name, value in (("atol", comparison.atol), ("rtol", comparison.rtol)) if value
    )
    parts.append(f"; {'no seed' if comparison.seed is None else f'seed {comparison.seed}'}")
    parts.append(f"; {tolerance or 'tolerance 0'}")
    threads = sorted({ref.call.threads for ref in comparison.refs if ref.call is not None})
    if threads:
        parts.append(f"; {' and '.join(map(str, threads))} thread{'s' * (threads != [1])}")
    return parts


def _troubles(name: str, ref: RefResult) -> Iterator[Block]:
    if ref.failure is not None:
        yield Line([f"{name} failed ({ref.failure.phase}): ", Named(f"{ref.failure.type}: {ref.failure.message}")])
        frames = [line.strip() for line in (ref.failure.traceback or "").splitlines() if line.startswith("  File ")]
        if frames:
            # The repo's own, if any: that is where one looks first.
            own = [frame for frame in frames if "/site-packages/" not in frame and "/lib/python" not in frame]
            yield Line(["  in ", Named((own or frames)[-1])])
        if ref.failure.hint:
            yield Line(["hint: ", Named(ref.failure.hint)])
    if ref.unstable:
        places = ", ".join(ref.unstable[:3]) + ", ..." * (len(ref.unstable) > 3)
        yield Line([f"{name} is not deterministic, in form or value, at ", Named(places)])
    elif ref.deterministic is False:
        yield Line([f"{name} is not deterministic: asked twice with one seed, it differs by {_number(ref.noise)}"])


def _difference(name: str, difference: Difference) -> Iterator[Block]:
    if difference.outputs is not None:
        yield from _outputs(name, difference.outputs)
    if difference.state is not None:
        yield Line([f"state: {_state_words(difference.state)}"])
        yield from _state(difference.state)
    if difference.modules is not None:
        yield Line([f"modules: {_modules_words(difference.modules)}"])
        yield from _modules(difference.modules)
    if difference.code is not None:
        yield Line(_code_words(difference.code))
        yield from _code(difference.code)


def _outputs(name: str, leaves: Sequence[LeafDifference]) -> Iterator[Block]:
    order = ("changed", "opaque", "tolerated", "noise", "same")
    measured = [leaf for leaf in leaves if leaf.verdict != "same" or leaf.measures is not None]
    ranked = sorted(measured, key=lambda leaf: (order.index(leaf.verdict), -leaf.max_abs))
    shown = ranked[:_PLACES]
    ranks = [leaf.measures for leaf in shown if leaf.measures is not None and leaf.measures.top1 is not None]
    top = () if not ranks else ("top-1, -5",) if any(each.top_k is not None for each in ranks) else ("top-1",)
    if shown:
        columns = ("output", "verdict", "max abs", "mean abs", "max rel", "cosine", *top)
        rows = [_place(leaf)[: len(columns)] for leaf in shown]
        yield Table(columns, rows, right=frozenset({2, 3, 4, 5, 6}))
    if len(ranked) > _PLACES:
        more = ranked[_PLACES:]
        yield Line(
            [f"and {len(more):,} places more, {sum(leaf.verdict != 'same' for leaf in more):,} of them differing"]
        )
    for leaf in shown:
        if leaf.change not in (None, "values"):
            yield Line(_form_words(leaf))
        measures = leaf.measures
        if measures is None or leaf.verdict == "same":
            continue
        if measures.nan[0] != measures.nan[1] or measures.infinite[0] != measures.infinite[1]:
            words = f": NaN {measures.nan[0]:,} before, {measures.nan[1]:,} after; infinite {measures.infinite[0]:,}"
            yield Line([Named(leaf.path), f"{words} before, {measures.infinite[1]:,} after"])
    worst = next(
        (leaf for leaf in ranked if leaf.verdict != "same" and leaf.measures and leaf.measures.worst_pair), None
    )
    if worst is not None and worst.measures is not None and worst.measures.worst_pair is not None:
        index = f"[{', '.join(map(str, worst.measures.worst or ()))}]" if worst.measures.worst else ""
        expected, got = worst.measures.worst_pair
        share = f"{worst.measures.differing:,} of {worst.measures.elements:,} numbers differ"
        yield Line(["worst: ", Named(f"{worst.path}{index}"), f": A {expected}, {name} {got}; {share}"])


def _place(leaf: LeafDifference) -> tuple[Words, ...]:
    found = leaf.measures
    verdict = leaf.verdict if leaf.change in (None, "values") else f"{leaf.change}: {leaf.verdict}"
    place = Named(leaf.path.removeprefix("output") or "output")
    if found is None:
        return place, verdict, "", "", "", "", ""
    top = "" if found.top1 is None else f"{found.top1:.1%}"
    if found.top_k is not None:
        top += f", {found.top_k:.1%}"
    figures = (_number(found.max_abs), _number(found.mean_abs), _number(found.max_rel))
    return place, verdict, *figures, "" if found.cosine is None else f"{found.cosine:.6f}", top


def _form_words(leaf: LeafDifference) -> list[Words]:
    before, after = leaf.expected or "nothing", leaf.got or "nothing"
    return [Named(leaf.path), ": ", Named(before), " before, ", Named(after), " after"]


def _state_counts(state: StateDifference) -> str:
    counts = (
        (len(state.changed), "with other values"),
        (len(state.reshaped), "reshaped"),
        (len(state.retyped), "of another dtype"),
        (len(state.missing), "missing"),
        (len(state.added), "added"),
        (len(state.renamed), "renamed"),
        (len(state.tied[0]), "no longer tied"),
        (len(state.tied[1]), "newly tied"),
    )
    return ", ".join(f"{count:,} {what}" for count, what in counts if count)


def _state_words(state: StateDifference) -> str:
    words = _state_counts(state)
    if not words:
        return f"all {state.expected:,} entries equal"
    return f"{words}; {state.equal:,} of {state.expected:,} equal"


def _state(state: StateDifference) -> Iterator[Block]:
    def weight(entry: EntryChange) -> float:
        return -(math.inf if entry.relative_norm is None else entry.relative_norm)

    rows: list[tuple[Words, ...]] = [
        (
            Named(entry.name),
            _number(entry.max_abs),
            _number(entry.norm),
            "" if entry.relative_norm is None else _number(entry.relative_norm),
            f"{entry.differing:,} of {entry.elements:,}",
        )
        for entry in sorted(state.changed, key=weight)[:_ENTRIES]
    ]
    if rows:
        yield Table(("entry", "max abs", "norm", "relative", "differing"), rows, right=frozenset({1, 2, 3, 4}))
    lists: tuple[tuple[str, list[tuple[str, str, str]]], ...] = (
        ("missing", [(entry.name, entry.form, "") for entry in state.missing]),
        ("added", [(entry.name, "", entry.form) for entry in state.added]),
        ("renamed", [("", before, after) for before, after in state.renamed]),
        ("reshaped", list(state.reshaped)),
        ("dtype", list(state.retyped)),
        ("no longer tied", [(names, "", "") for names in state.tied[0]]),
        ("newly tied", [(names, "", "") for names in state.tied[1]]),
    )
    rows, more = _listed(lists)
    if rows:
        yield Table(("entry is", "name", "before", "after"), rows)
    if len(state.changed) > _ENTRIES:
        more.insert(0, f"{len(state.changed) - _ENTRIES:,} with other values")
    if more:
        yield Line([f"and more entries: {', '.join(more)}"])


def _modules_counts(modules: ModulesDifference) -> str:
    counts = ((len(modules.changed), "other"), (len(modules.removed), "removed"), (len(modules.added), "added"))
    return ", ".join(f"{count:,} {what}" for count, what in counts if count)


def _modules_words(modules: ModulesDifference) -> str:
    words = _modules_counts(modules)
    return f"{words}, of {modules.expected:,}" if words else f"all {modules.expected:,} the same"


def _modules(modules: ModulesDifference) -> Iterator[Block]:
    changed = [(name or "the whole", *_shortened(before, after)) for name, before, after in modules.changed]
    rows, more = _listed(
        (
            ("other", changed),
            ("removed", [(name, _shortened(what, "")[0], "") for name, what in modules.removed]),
            ("added", [(name, "", _shortened("", what)[1]) for name, what in modules.added]),
        )
    )
    if rows:
        yield Table(("module is", "name", "before", "after"), rows)
    if more:
        yield Line([f"and more modules: {', '.join(more)}"])


def _shortened(before: str, after: str) -> tuple[str, str]:
    """Classes without the modules that define them, unless that is all the difference."""
    short = tuple(re.sub(r"^[\w.<>]*\.", "", words.partition("(")[0]) + "".join(words.partition("(")[1:])
                  for words in (before, after))  # fmt: skip
    return (before, after) if short[0] == short[1] else (short[0], short[1])


def _listed(lists: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]) -> tuple[list[tuple[Words, ...]], list[str]]:
    """The first rows of each list, and how many more each has."""
    rows: list[tuple[Words, ...]] = []
    more = []
    for what, entries in lists:
        rows += [(what, *map(Named, entry)) for entry in entries[:_LISTED]]
        if len(entries) > _LISTED:
            more.append(f"{len(entries) - _LISTED:,} {what}")
    return rows, more


def _code_words(code: CodeDifference) -> list[Words]:
    if code.fault is not None:
        return ["code: it could not be compared: ", Named(code.fault)]
    if not code.files:
        return ["code: no file differs"]
    files = f"{len(code.files):,} file{'s' * (len(code.files) > 1)}"
    return [f"code: {files} differ{'s' * (len(code.files) == 1)}, +{code.added:,} -{code.removed:,} lines"]


def _code(code: CodeDifference) -> Iterator[Block]:
    ranked = sorted(code.files, key=lambda file: -((file.added or 0) + (file.removed or 0)))
    rows = [
        (
            file.status,
            "binary" if file.added is None else f"+{file.added:,}",
            "" if file.removed is None else f"-{file.removed:,}",
            Named(file.path),
        )
        for file in ranked[:_FILES]
    ]
    if rows:
        yield Table(("file is", "lines", "", "path"), rows, right=frozenset({1, 2}))
    if len(ranked) > _FILES:
        yield Line([f"and {len(ranked) - _FILES:,} files more"])


def _number(value: float) -> str:
    return f"{value:.3g}"


def seconds_words(seconds: float) -> str:
    """In three digits: ``1.23 ms``."""
    for name, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {name}" if seconds < 1000 * factor else f"{seconds / factor:.0f} {name}"
    return f"{seconds * 1e9:.3g} ns"


def size_words(count: int) -> str:
    """In three digits: ``223 MB``."""
    for name, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {name}"
    return f"{count} B"
