"""Graphs of recorded calls, kept for the backward pass that their caller may ask for.

Rules:

1. A call that is recorded gets its inputs as autograd would have them: those that are leaves in the caller are
   leaves here, the others are not, so that a model may change them in place.
2. A graph is kept under its question's number until the caller lets it go. The oldest go first when there are too
   many, or when this process has taken more memory than the caller allows for it.
3. A backward pass that is recorded is a call: its inputs are the gradients, and then those of the first call.
4. A gradient that arrives at an input of another call is an error: it would have to go to the caller, who did not
   ask for it, and would be lost.

Side: worker. Trust: numbers and tensors are the caller's; what a backward pass runs may be the repo's.
Source: torch.autograd; proc_pid_statm(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import OrderedDict
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

__all__ = ["Tapes"]

#: Recurrent models are unrolled for some thousand steps; small graphs take some kilobytes.
_MOST_TAPES = 4096
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _Tape:
    """One call: what gradients come back for, and what they start from."""

    def __init__(self) -> None:
        self.inputs: List[Any] = []  # leaves: the tensors themselves, or what stands before them
        self.outputs: List[Any] = []
        self.openings = [True]  # whether a gradient may arrive at an input now
        self.parents: List[List[bool]] = []  # the same of the calls whose inputs are this one's too
        self.shared = False  # whether another call's graph leads through this one's

    def guard(self, leaf: Any) -> None:
        """Refuse gradients that arrive outside of this call and its own backward pass."""
        openings = self.openings  # not the tape: a hook that held it would keep both for ever

        def arrives(_: Any) -> None:
            if not openings[0]:
                raise RuntimeError(
                    "a backward pass has reached an input of an earlier call, by something that the model or an "
                    "object of it kept; that gradient does not cross\n"
                    "hint: h.run(fn, ...) can make both calls and the backward pass in the worker"
                )

        leaf.register_hook(arrives)


class Tapes:
    """The recorded calls of one worker."""

    def __init__(self) -> None:
        self._kept: Dict[int, _Tape] = OrderedDict()
        self._under_way: Optional[_Tape] = None
        self._dropped = 0  # the highest number of those that went for room

    def admit(self, inputs: Sequence[Tuple[List[int], bool]], tensors: List[Any]) -> None:
        """Begin a call: let the inputs require gradients.

        Args:
            inputs: For each its rows in the table, and whether it is a leaf in the caller.
            tensors: The table, changed in place. No other question's memory.
        """
        tape = self._under_way = _Tape()
        for rows, is_leaf in inputs:
            tensor = tensors[rows[0]]
            if is_leaf:
                leaf = tensor.requires_grad_()
            else:
                leaf, tensor = _entered(tensor)
            tape.guard(leaf)
            tape.inputs.append(leaf)
            for row in rows:
                tensors[row] = tensor

    def keep(self, number: int, outputs: List[Any], limit_bytes: int) -> None:
        """End the call: keep its graph.

        Args:
            number: The question's.
            outputs: Those that require a gradient.
            limit_bytes: Resident memory from which on older graphs go.
        """
        tape, self._under_way = self._under_way, None
        if tape is None:
            return
        tape.openings[0] = False
        if not outputs:
            return
        tape.outputs = outputs
        self._kept[number] = tape
        if len(self._kept) > _MOST_TAPES:
            self._drop(1)
        while len(self._kept) > 1 and _resident_bytes() > limit_bytes:
            self._drop(len(self._kept) // 2)

    def forget(self, numbers: Sequence[int]) -> None:
        """Let go what the caller cannot ask for any more."""
        if self._under_way is not None:  # a call that ended in an exception
            self._under_way.openings[0] = False
            self._under_way = None
        for number in numbers:
            self._kept.pop(number, None)

    def _drop(self, count: int) -> None:
        for number in list(self._kept)[:count]:
            del self._kept[number]
            self._dropped = max(self._dropped, number)
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is freed, and it would count as taken

    def backward(
        self, number: int, gradients: Sequence[Tuple[int, Any]], wanted: Sequence[int], accumulate: bool, keep: bool
    ) -> List[Any]:
        """Run a backward pass.

        Args:
            number: The call's.
            gradients: Of its outputs, by their number.
            wanted: Numbers of its inputs.
            accumulate: Whether parameters, too, are given theirs.
            keep: Whether the graph may be used again.

        Returns:
            A gradient or None for each of `wanted`.
        """
        import torch

        tape = self._kept.get(number)
        if tape is None:
            why = f": a worker keeps {_MOST_TAPES}, and fewer where memory is short" if number <= self._dropped else ""
            raise RuntimeError(
                f"the graph of this call is not kept any more{why}\n"
                "hint: call backward() sooner, or calls that need no gradients under torch.no_grad()"
            )
        following = self._under_way  # where this pass is recorded
        if following is not None:
            following.inputs += tape.inputs
            following.parents = [tape.openings, *tape.parents]
            tape.shared = following.shared = True
        create = following is not None
        # One pass of the caller's may come to both, one after the other: the first must not use up the second's.
        keep = keep or tape.shared
        outputs = [tape.outputs[place] for place, _ in gradients]
        given = [gradient.to(output.device) for output, (_, gradient) in zip(outputs, gradients)]
        with _opened(tape):
            if not accumulate:
                leaves = [tape.inputs[place] for place in wanted]
                if not leaves:
                    return []
                return list(
                    torch.autograd.grad(
                        outputs, leaves, given, retain_graph=keep, create_graph=create, allow_unused=True
                    )
                )
            for leaf in tape.inputs:
                leaf.grad = None
            torch.autograd.backward(outputs, given, retain_graph=keep, create_graph=create)
            found = [tape.inputs[place].grad for place in wanted]
            for leaf in tape.inputs:
                leaf.grad = None
            return found


@contextlib.contextmanager
def _opened(tape: _Tape) -> Iterator[None]:
    openings = [tape.openings, *tape.parents]
    for opening in openings:
        opening[0] = True
    try:
        yield
    finally:
        for opening in openings:
            opening[0] = False


_functions: List[Any] = []  # made once, with torch, which is imported late


def _entered(tensor: Any) -> Tuple[Any, Any]:
    """A leaf of no memory, and the tensor as something that was computed from it."""
    import torch

    if not _functions:

        class Entered(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, leaf: Any, held: List[Any]) -> Any:  # noqa: ARG004 - autograd's signature
                return held[0]

            @staticmethod
            def backward(ctx: Any, gradient: Any) -> Any:  # noqa: ARG004 - likewise
                return gradient, None

        _functions.append(Entered)
    leaf = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape).requires_grad_()
    return leaf, _functions[0].apply(leaf, [tensor])


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES
