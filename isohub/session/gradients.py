"""Backward passes that go on in the worker: what a call recorded, and the node that asks for its gradients.

Rules:

1. A call under the caller's gradient mode is recorded: the worker keeps its graph under the question's number.
2. Outputs that require a gradient there do so here. All of one call's share one node of autograd's; its backward
   pass sends the gradients of the outputs, and brings those of the inputs. Parameters' stay where they live.
3. Parameters there are given gradients when a local model's would be: by ``backward()``, and not by
   ``torch.autograd.grad`` or ``backward(inputs=...)``.
4. The worker keeps the graph until the last output of the call is gone here.
5. A backward pass under gradient mode (``create_graph=True``) is itself a call that is recorded: its inputs are the
   gradients that came and the inputs of the first call.
6. Where a gradient cannot cross, the backward pass is an error: it never lacks a part in silence.

Side: caller. Trust: which outputs require a gradient, and every gradient, is the worker's word; both are checked.
Source: torch.autograd.Function; ``torch._C._will_engine_execute_node`` (torch 2.1 and later), by which
``register_multi_grad_hook`` knows whether a node is part of a backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from isohub.errors import ProtocolError, SessionClosedError

if TYPE_CHECKING:
    from isohub.session.link import Link

__all__ = ["GRAPHS_SHARE", "Recording", "recording_for"]

#: Of the memory that a worker may have, the share from which on it drops the oldest graphs.
GRAPHS_SHARE = 0.5


class Recording:
    """One recorded call.

    Attributes:
        number: The question's, under which the worker keeps the graph.
        inputs: Tensors among the arguments that require a gradient, each once. Empty once the outputs are tied.
        hidden: Those within arguments that go by pickle: no gradient comes back for these.
        outputs: Tensors of the answer that require a gradient. Empty once they are tied.
    """

    def __init__(self, link: Link, also: Sequence[torch.Tensor] = ()) -> None:
        self.number = 0
        self._also = also
        self.inputs: list[torch.Tensor] = []
        self.hidden: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        # Outputs may outlive handles and session; they must keep neither alive.
        self._link = link.weak
        self._worker = link.worker.weak  # a link's may be another one later
        self._name = link.worker.name
        self._forgotten: Any = None  # a queue of the numbers whose graphs the worker may forget

    def begin(self, number: int, rows: Sequence[tuple[int, torch.Tensor]], forgotten: Any) -> list[Any]:
        """Note what goes out; returns, for each input, its rows in the tensor table and whether it is a leaf.

        Args:
            number: The question's.
            rows: Rows of the tensors that require a gradient, as the encoder met them.
            forgotten: A queue of the numbers whose graphs the worker may forget.
        """
        self.number = number
        places: dict[int, list[Any]] = {}
        for row, tensor in rows:
            if id(tensor) not in places:
                places[id(tensor)] = [[], tensor.is_leaf]
                self.inputs.append(tensor)
            places[id(tensor)][0].append(row)
        self.inputs.extend(self._also)
        self._also = ()
        self._forgotten = forgotten
        return list(places.values())

    def abandon(self) -> None:
        """The call has ended by an exception: the worker may have kept its graph all the same."""
        if self._forgotten is not None:
            self._forgotten.put(self.number)

    def answered(self, claimed_rows: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        """Take what the worker says of its answer.

        Args:
            claimed_rows: Rows of the outputs that require a gradient. Trust: worker.
            tensors: The answer's tensor table, checked.

        Raises:
            ProtocolError: A row is not there, comes twice, or is of a dtype that has no gradients.
        """
        for before, row in zip([-1, *claimed_rows], claimed_rows, strict=False):
            if not before < row < len(tensors):
                raise ProtocolError(f"a gradient for tensor {row} of {len(tensors)}")
            if not (tensors[row].is_floating_point() or tensors[row].is_complex()):
                raise ProtocolError(f"a gradient for a tensor of {tensors[row].dtype}")
        self.outputs = [tensors[row] for row in claimed_rows]

    def tie(self) -> None:
        """Give the outputs their node. They stay the same objects, in whatever holds them."""
        inputs, outputs, hidden = self.inputs, self.outputs, self.hidden
        self.inputs, self.outputs, self.hidden = [], [], []  # the node holds this: no circles
        if not outputs:
            return  # the worker kept nothing
        # May run at any moment: only hands over.
        weakref.finalize(self, self._forgotten.put, self.number).atexit = False
        parameters = torch.zeros((), requires_grad=True, device="cpu")
        _Backward.apply(self, outputs, len(inputs), parameters, *inputs, *hidden)  # type: ignore[no-untyped-call]

    def backward(
        self,
        gradients: list[tuple[int, torch.Tensor]],
        wanted: list[int],
        accumulate: bool,
        keep: bool,
        inputs: Sequence[torch.Tensor] | None,
    ) -> list[Any]:
        """Run the backward pass in the worker.

        Args:
            gradients: Of the outputs, by their number.
            wanted: Numbers of the inputs.
            accumulate: Whether parameters there are given theirs.
            keep: Whether the graph may be used again.
            inputs: Those of the call, where this pass is recorded too, else None.

        Returns:
            A tensor or None for each of `wanted`. Trust: worker; not checked yet.
        """
        link = self._link()
        if link is None or link.worker is not self._worker() or not link.worker.alive:
            raise SessionClosedError(
                f"a backward pass through a model of {self._name} needs its worker, which is gone",
                hint="keep the handle until the backward pass is done",
            )
        if accumulate and link.recovery is not None:
            link.recovery.note("the gradients that a backward pass brought")
        answer = link.ask(
            "backward",
            self.number,
            gradients,
            wanted,
            accumulate,
            keep,
            phase="running the backward pass",
            record=inputs is not None,
            also=inputs or (),
        )
        if not isinstance(answer, list) or len(answer) != len(wanted):
            raise self.refuse()
        return answer

    def refuse(self) -> ProtocolError:
        """Kill the worker for gradients that fit no input; returns the error to raise."""
        link = self._link()
        told = "gradients of a wrong form"
        worker = None if link is None else self._worker()
        return ProtocolError(told) if worker is None else worker.refuse(told, "running the backward pass")

    @property
    def name(self) -> str:
        """Whose worker."""
        return self._name


class _Backward(torch.autograd.Function):
    """The node of one call. Its inputs: a leaf that stands for all parameters, then the call's own."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, outputs: list[torch.Tensor], count: int, *inputs: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.recording = recording
        ctx.hidden = len(inputs) - 1 - count
        ctx.described = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs[1 : 1 + count]]
        ctx.save_for_backward(*inputs[1:])
        ctx.nodes = [_accumulator(inputs[0])]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        recording, described = ctx.recording, ctx.described
        if ctx.hidden:
            raise RuntimeError(
                f"gradients do not cross to the worker of {recording.name} for tensors within objects that go by "
                "pickle\nhint: pass the tensors as arguments, or in lists, tuples and dicts"
            )
        given = [(number, gradient) for number, gradient in enumerate(gradients) if gradient is not None]
        wanted = [number for number in range(len(described)) if ctx.needs_input_grad[4 + number]]
        found: list[Any] = [None] * len(described)
        if given:
            inputs = ctx.saved_tensors[: len(described)] if torch.is_grad_enabled() else None  # create_graph=True
            answer = recording.backward(given, wanted, _will_run(ctx.nodes[0]), _graph_is_kept(), inputs)
            for number, claimed in zip(wanted, answer, strict=True):
                found[number] = _checked(claimed, described[number], recording)
        return None, None, None, None, *found


def recording_for(link: Link, also: Sequence[torch.Tensor]) -> Recording | None:
    """A recording for a call that is made now, unless no gradients are wanted; `also` are inputs that do not travel."""
    return Recording(link, also) if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() else None


def _checked(claimed: Any, described: tuple[torch.Size, torch.dtype, torch.device], recording: Recording) -> Any:
    """A gradient that fits its input, on its device. Trust: worker."""
    if claimed is None:
        return None
    shape, dtype, device = described
    if not isinstance(claimed, torch.Tensor) or claimed.shape != shape or claimed.dtype != dtype:
        raise recording.refuse()
    return claimed if device.type == "cpu" else claimed.to(device)


def _accumulator(leaf: torch.Tensor) -> Any:
    """The node that would add to a leaf's ``grad``."""
    with torch.enable_grad():
        node: Any = leaf.view_as(leaf).grad_fn
    return node.next_functions[0][0]


def _will_run(node: Any) -> bool:
    """Whether the backward pass that is under way comes to this node."""
    will: Any = getattr(torch._C, "_will_engine_execute_node", None)
    return will is None or bool(will(node))


def _graph_is_kept() -> bool:
    """Whether the backward pass that is under way has ``retain_graph=True``."""
    kept: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is None or bool(kept())
