"""What a comparison found: frozen, of plain values, without handles or tensors.

Rules:

1. The first ref is the base: what is expected. Each other ref has one `Difference` from it, in order.
2. A failure is a result. A ref that failed is compared as far as it came.
3. `Comparison.changed` says whether a CI should stop: see there.
4. Texts of a repo's are escaped where they come in; nothing in here moves a cursor.

Side: caller. Trust: figures and texts are the workers', checked by `wire` and by who read them; times and memory as
`timing` and `subject` say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isohub.comparison.code import CodeDifference
from isohub.comparison.modules import ModulesDifference
from isohub.comparison.outputs import LeafDifference
from isohub.comparison.states import StateDifference
from isohub.comparison.timing import Timing

if TYPE_CHECKING:
    import os

__all__ = ["SCHEMA", "Comparison", "Difference", "Failure", "RefResult"]

#: Of `Comparison.to_dict`: another number means that a reader of it has to be changed.
SCHEMA = 1

Phase = Literal["fetch", "load", "modules", "state", "call", "time"]


@dataclass(frozen=True)
class Failure:
    """Why a ref has no answer.

    Attributes:
        phase: What was done: "fetch", "load" (dependencies, import and build), "modules", "state", "call", "time".
        type: Name of the error's class; of an exception of the repo's, that one's.
        message: What it says, at most some hundred characters.
        hint: What helps, or None.
        traceback: The end of the repo's own, for an exception of its code; else None.
    """

    phase: Phase
    type: str
    message: str
    hint: str | None = None
    traceback: str | None = None


@dataclass(frozen=True)
class RefResult:
    """One ref.

    Attributes:
        reference: As it was written.
        name: ``repo@1a2b3c4``; None if it could not be fetched.
        commit: The whole commit; None likewise.
        failure: Why it was not asked to the end, or None.
        environment: What it ran on: "host", or the key of an environment; None if it was not built.
        class_name: Of what the entrypoint gave.
        parameters: Numbers in its parameters; None for what is no module.
        state_bytes: Of its state; None likewise.
        outputs: Places of its first answer and what is there, in order.
        deterministic: Whether it gave the same bits when it was asked the same twice; None if it was not.
        noise: The largest difference of its own answers to the same question.
        unstable: Places of its answers that are not comparable with themselves.
        load_s: Worker, import and build. The first ref's has the time of starting torch in it.
        build_s: The entrypoint alone, the first time.
        rebuilt: Times of building it again; None for what is large or slow, or cannot be built twice.
        call: Times of calls, by the worker's clock; None if none was timed.
        round_trip_s: The quickest of the calls that were compared, from here: there and back.
        peak_rss_bytes: The most memory that the worker's process ever had in use, as the kernel counts it: pages that
            it shares with others, such as torch's own, are in it; children are not.
    """

    reference: str
    name: str | None = None
    commit: str | None = None
    failure: Failure | None = None
    environment: str | None = None
    class_name: str | None = None
    parameters: int | None = None
    state_bytes: int | None = None
    outputs: tuple[tuple[str, str], ...] = ()
    deterministic: bool | None = None
    noise: float = 0.0
    unstable: tuple[str, ...] = ()
    load_s: float | None = None
    build_s: float | None = None
    rebuilt: Timing | None = None
    call: Timing | None = None
    round_trip_s: float | None = None
    peak_rss_bytes: int | None = None

    @property
    def label(self) -> str:
        """How it is called in a table: as it was written, and the commit unless that says it."""
        short = (self.name or "").rpartition("@")[2]
        return f"{self.reference} ({short})" if short and short not in self.reference else self.reference


@dataclass(frozen=True)
class Difference:
    """A ref against the base.

    Attributes:
        outputs: Places of their answers; None if one of them gave none.
        state: None if one of them has none, or failed before.
        modules: None likewise.
        code: None if one of them could not be fetched.
        time_ratio: How many times the base's time a call takes; None where the spread is larger than the difference,
            or nothing was timed.
    """

    outputs: tuple[LeafDifference, ...] | None = None
    state: StateDifference | None = None
    modules: ModulesDifference | None = None
    code: CodeDifference | None = None
    time_ratio: float | None = None

    @property
    def outputs_changed(self) -> bool:
        """Whether a place of the outputs differs beyond tolerance and noise."""
        return any(leaf.verdict == "changed" for leaf in self.outputs or ())

    @property
    def max_abs(self) -> float | None:
        """The largest difference of the outputs' numbers; None if there are none to compare."""
        found = [leaf.measures.max_abs for leaf in self.outputs or () if leaf.measures is not None]
        return max(found, default=None)

    @property
    def worst(self) -> LeafDifference | None:
        """The place that differs most: what changed first, then by the largest difference."""
        order = ("changed", "tolerated", "noise")
        differing = [leaf for leaf in self.outputs or () if leaf.verdict in order]
        return min(differing, key=lambda leaf: (order.index(leaf.verdict), -leaf.max_abs), default=None)


@dataclass(frozen=True)
class Comparison:
    """Two refs or more that were asked the same.

    Attributes:
        model: The entrypoint.
        refs: The base first.
        differences: Of each ref but the base, from the base; in the order of `refs`.
        calls: How many calls were compared; 0 if the models were only built.
        seed: Of builds, calls and random inputs; None: none.
        atol: Absolute tolerance.
        rtol: Relative tolerance.
        arguments: What the entrypoint was given, as text.
        inputs: What the models were called with, as text.
        machine: Versions and processors of where this was measured.
    """

    model: str
    refs: tuple[RefResult, ...]
    differences: tuple[Difference, ...]
    calls: int
    seed: int | None
    atol: float
    rtol: float
    arguments: str
    inputs: str
    machine: Mapping[str, str | int]

    @property
    def base(self) -> RefResult:
        """What the others are held against."""
        return self.refs[0]

    @property
    def failures(self) -> dict[str, Failure]:
        """By the reference, those that failed."""
        return {ref.reference: ref.failure for ref in self.refs if ref.failure is not None}

    @property
    def changed(self) -> bool:
        """Whether any ref failed, or has other outputs than the base, beyond tolerance and noise.

        Where nothing was called, or a model's answers are no values, what was built is what counts: state and modules.
        Time, memory and code do not.
        """
        if self.failures:
            return True
        for difference in self.differences:
            if difference.outputs_changed:
                return True
            if not self.calls and any(part is not None and part.any for part in (difference.state, difference.modules)):
                return True
        return False

    @property
    def max_abs(self) -> float | None:
        """The largest difference of any output's numbers from the base's; None if there are none to compare."""
        return max((each.max_abs for each in self.differences if each.max_abs is not None), default=None)

    @property
    def verdict(self) -> str:
        """All of it in a line."""
        from isohub.comparison.words import verdict_of

        return verdict_of(self)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, in the form that docs/compare.md has; NaN and infinities are texts: JSON has none."""
        plain: dict[str, Any] = _plain(asdict(self))
        differences = [
            {
                **each,
                "outputs_changed": difference.outputs_changed,
                "max_abs": _plain(difference.max_abs),
                "against": self.base.reference,
                "of": ref.reference,
            }
            for each, difference, ref in zip(plain["differences"], self.differences, self.refs[1:], strict=True)
        ]
        head = {"schema": SCHEMA, "verdict": self.verdict, "changed": self.changed, "max_abs": _plain(self.max_abs)}
        return {**head, **plain, "differences": differences}

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as strict JSON, in ASCII."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False).replace("\x7f", "\\u007f")

    def to_markdown(self) -> str:
        """For a comment on a pull request."""
        from isohub.comparison.render import as_markdown
        from isohub.comparison.words import blocks_of

        return as_markdown(blocks_of(self))

    def to_html(self) -> str:
        """One page with plots, which loads nothing and runs nothing.

        Raises:
            MissingExtraError: What ``isohub[report]`` brings is not installed.
        """
        from isohub.comparison.page import page_of

        return page_of(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, whole or not at all: ``.html``, ``.json`` or ``.md``, as the name ends.

        Raises:
            ValueError: It ends in something else.
            SaveError: The file cannot be written.
        """
        from isohub.comparison.page import write_whole

        target = Path(path)
        forms = {".html": self.to_html, ".json": self.to_json, ".md": self.to_markdown}
        if target.suffix not in forms:
            raise ValueError(f"a comparison is saved as .html, .json or .md, got {target.name!r}")
        write_whole(target, forms[target.suffix]().rstrip("\n") + "\n")

    def __str__(self) -> str:
        from isohub.comparison.render import as_text
        from isohub.comparison.words import blocks_of

        return as_text(blocks_of(self))

    def __repr__(self) -> str:
        return f"<isohub.Comparison of {len(self.refs)} refs of {self.model!r}: {self.verdict}>"

    def _repr_html_(self) -> str:
        from isohub.comparison.render import as_html
        from isohub.comparison.words import blocks_of

        return as_html(blocks_of(self))


def _plain(value: Any) -> Any:
    """As JSON has it: lists for tuples, and a text for a number that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
