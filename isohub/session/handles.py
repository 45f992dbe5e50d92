"""Handles: objects of the caller's that stand for objects in a worker.

A `RemoteModule` is a ``torch.nn.Module`` whose parameters live elsewhere; a `RemoteObject` is anything else
that the closed set of values does not hold. What comes back from either is a plain value where it can be,
else another handle; an object that is sent twice is the same handle twice.

Refuses to: be pickled, be used after a fork, carry the caller's live objects into a worker.
Side: caller.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from isohub.errors import ProtocolError
from isohub.session.descriptions import Described, Signed
from isohub.session.likeness import Look, make_like
from isohub.session.link import Remote, Stats, refuse_pickle
from isohub.session.objects import Container, RemoteObject, is_a_protocol, names_of, object_handle, shown
from isohub.session.options import awaited, options, pipelined
from isohub.session.parameters import parameters_of, register_parameter, remote_parameter
from isohub.session.surface import Surface
from isohub.session.tracing import unseen_by_dynamo
from isohub.session.versions import check_export

if TYPE_CHECKING:
    from isohub.sandbox.policy import Confinement

__all__ = ["RemoteModule", "RemoteObject", "given_state", "make_handle", "mark_loaded"]


class RemoteModule(Surface):
    """A module that lives in a worker.

    Everything that is not defined here is looked up in the worker: methods, submodules, attributes. Inputs
    are copied to the worker and outputs to the caller; a backward pass through them goes on in the worker.
    Parameters and buffers that are read are copies; change them by `load_state_dict` or `run`.

    Made by `isohub.load`, never by hand.
    """

    _isohub: Remote
    __signature__ = Described("signature", None)

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        self.__dict__["_isohub"] = remote

    @unseen_by_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, with the hooks of this process."""
        return super().__call__(*args, **kwargs)

    @Signed
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the remote module, its own hooks included."""
        return self._isohub.call("", args, kwargs)

    # What it is.

    @property
    def reference(self) -> str:
        """The reference that was loaded."""
        return str(self._isohub.link.checkout.pin.reference)

    @property
    def commit(self) -> str:
        """The commit whose code this is."""
        return self._isohub.link.checkout.commit

    @property
    def confinement(self) -> Confinement:
        """The layers of confinement that were asked for, that the worker has, and that it has not."""
        return self._isohub.worker.confinement

    def stats(self) -> Stats:
        """The worker's memory in bytes (rss, pss, uss), processor time in seconds, threads and start time."""
        return self._isohub.stats()

    # Beyond a local module.

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``function(module, *args, **kwargs)`` in the worker, where `module` is the live one.

        Args:
            function: Sent by cloudpickle, with the module that defines it where that is the caller's own.
            *args: Sent with it.
            **kwargs: Likewise.

        Returns:
            Its result: a plain value where the closed set allows it, else a handle.
        """
        phase = f"running {getattr(function, '__name__', 'a function')}()"
        return self._isohub.ask("run", function, args, kwargs, phase=phase, record=True)

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call the module in the background; calls that were submitted earlier come first."""
        return self._isohub.link.submit(lambda: self(*args, **kwargs))

    def map(self, *iterables: Iterable[Any], ahead: int = 2) -> Iterator[Any]:
        """Results of calling the module with each item, in order; the next calls are made while one is looked at.

        Args:
            *iterables: As for Python's own ``map``: a call takes one item of each. They may be endless.
            ahead: How many calls may be made beyond the one whose result is given.
        """
        return pipelined(self._isohub.link, self, iterables, ahead)

    async def call_async(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module without holding up the event loop.

        Cancelling it interrupts the call in the worker, as Ctrl-C does; the worker stays.
        """
        return await awaited(self._isohub.link, lambda: self(*args, **kwargs))

    def options(self, *, timeout_s: float | None) -> AbstractContextManager[None]:
        """A block in which each question to this worker may take so many seconds; None is for no limit.

        It holds for this thread or task, for all handles to the worker, and for what the block submits.
        """
        return options(self._isohub.link, timeout_s)

    def torchscript(self, example_inputs: Any = None, **kwargs: Any) -> Any:
        """The module as TorchScript, made in the worker and opened here.

        Args:
            example_inputs: A tensor or a tuple of inputs to trace with; None scripts instead.
            **kwargs: For ``torch.jit.trace`` or ``torch.jit.script``.

        Raises:
            UntrustedRepoError: The repo is not trusted; opening TorchScript can run code in this process.
        """
        return self._program("torchscript", "torchscript", example_inputs, kwargs, phase="making TorchScript")

    def export(self, args: torch.Tensor | tuple[Any, ...], **kwargs: Any) -> Any:
        """The module as ``torch.export.ExportedProgram``, made in the worker and opened here.

        Args:
            args: A tensor or a tuple of inputs to export with.
            **kwargs: For ``torch.export.export``.

        Raises:
            UntrustedRepoError: The repo is not trusted; opening a program can run code in this process.
        """
        inputs = (args,) if isinstance(args, torch.Tensor) else args
        return self._program("exported_program", "export", inputs, kwargs, phase="exporting")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write its state to a safetensors file, with what it came from in the file's metadata.

        Plain safetensors reads it; docs/handles-lifecycle.md has the line that brings tied weights back.

        Args:
            path: The file. It appears whole, in place of one that may be there, or not at all.

        Raises:
            SaveError: The format cannot hold the state, or the file cannot be written.
        """
        from isohub.session.saving import metadata_of, save_state

        save_state(self.state_dict(), path, metadata_of(self._isohub.ref))

    def _program(self, form: str, op: str, *args: Any, phase: str) -> Any:
        link = self._isohub.link
        link.gate.check(form)
        if op == "export":
            check_export(self._isohub.ref.worker)
        data = self._isohub.ask(op, *args, phase=phase, parcel=True, limit_bytes=_memory_limit())
        if type(data) is not bytes:
            raise ProtocolError(f"a {form} that is none")
        return link.gate.open(form, data)

    def close(self) -> None:
        """Give the remote object back; the last handle to a worker ends its process."""
        self._isohub.close()

    def __enter__(self) -> RemoteModule:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> RemoteModule:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)

    # State.

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The remote module's state, in memory that is the caller's own.

        Args:
            *args: As torch still takes them: destination, prefix, keep_vars.
            destination: A mapping to put it in.
            prefix: Before each name.
            keep_vars: Taken for torch's sake: the values are copies, so there is no variable to keep.

        Returns:
            OrderedDict of name to CPU tensor, aliases (tied weights) and ``_metadata`` kept. The tensors share
            no memory with the worker: writing to them changes nothing there.
        """
        if args:
            given = [destination, prefix, keep_vars]
            given[: len(args)] = args
            destination, prefix, keep_vars = given
        return _state(self._isohub, "state_dict", {"prefix": prefix}, destination=destination)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state into the remote module; as ``torch.nn.Module.load_state_dict``, with its errors."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.")
        kwargs = {"strict": strict, "assign": True} if assign else {"strict": strict}
        result = self._isohub.ask(
            "load_state_dict",
            dict(state_dict),
            getattr(state_dict, "_metadata", None),
            kwargs,
            phase="loading a state",
        )
        missing, unexpected = result if isinstance(result, tuple) and len(result) == 2 else ([], [])
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Names and copies of the remote parameters; ``grad`` and ``requires_grad`` are as they are there."""
        rows = self._named("parameters", recurse, remove_duplicate)
        for name, parameter in parameters_of(self, rows):
            yield _joined(prefix, name), parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and copies of the remote buffers."""
        for name, value, _ in self._named("buffers", recurse, remove_duplicate):
            yield _joined(prefix, name), value

    # Where torch.nn.Module keeps its own; a local module that holds this one looks here.

    @property
    def _parameters(self) -> dict[str, Any]:
        return self._look(self.named_parameters(recurse=False))

    @_parameters.setter
    def _parameters(self, own: object) -> None:
        """torch.nn.Module's own __init__ sets an empty one."""

    @property
    def _buffers(self) -> dict[str, Any]:
        return self._look(self.named_buffers(recurse=False))

    @_buffers.setter
    def _buffers(self, own: object) -> None:
        """As for `_parameters`."""

    @property
    def _modules(self) -> dict[str, Any]:
        return self._look([] if self._was_just_loaded() else self.named_children())

    @_modules.setter
    def _modules(self, own: object) -> None:
        """As for `_parameters`."""

    def _look(self, rows: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return Look(dict(rows), self._isohub.worker.name)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        """What ``to``, ``half`` and their like of a local module that holds this one come to."""
        return self._change("_apply", fn, recurse)

    def _named(self, what: str, recurse: bool, remove_duplicate: bool) -> list[tuple[str, torch.Tensor, bool]]:
        rows: Any = self._isohub.ask(
            "named",
            what,
            recurse,
            remove_duplicate,
            phase=f"reading its {what}",
            parcel=True,
            limit_bytes=_memory_limit(),
        )
        if not isinstance(rows, list) or not all(_is_named_tensor(row) for row in rows):
            raise self._isohub.refuse(what, f"reading its {what}")
        return list(rows)

    # Submodules.

    def named_children(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Names of and handles to the remote module's children."""
        yield from self._modules_of("children")

    def named_modules(
        self, memo: set[torch.nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Module]]:
        """Names of and handles to the remote module and all modules within it."""
        memo = set() if memo is None else memo
        for name, module in self._modules_of("modules"):
            if not remove_duplicate or module not in memo:
                memo.add(module)
                yield _joined(prefix, name), module

    def _modules_of(self, what: str) -> list[tuple[str, torch.nn.Module]]:
        rows: Any = self._isohub.ask("modules", what, phase=f"reading its {what}")
        if not isinstance(rows, list) or not all(
            isinstance(row, tuple)
            and len(row) == 2
            and isinstance(row[0], str)
            and isinstance(row[1], (RemoteModule, type(None)))
            for row in rows
        ):
            raise self._isohub.refuse(what, f"reading its {what}")
        return [(name, module) for name, module in rows if module is not None]

    def get_submodule(self, target: str) -> torch.nn.Module:
        """A handle to the submodule of that dotted name."""
        found: torch.nn.Module = self._isohub.call("get_submodule", (target,), {})
        return found

    def get_parameter(self, target: str) -> torch.nn.Parameter:
        """A copy of the parameter of that dotted name."""
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name == target:
                return parameter
        found: torch.nn.Parameter = self._isohub.call("get_parameter", (target,), {})  # which raises torch's own error
        return found

    def get_buffer(self, target: str) -> torch.Tensor:
        """A copy of the buffer of that dotted name."""
        for name, buffer in self.named_buffers(remove_duplicate=False):
            if name == target:
                return buffer
        found: torch.Tensor = self._isohub.call("get_buffer", (target,), {})  # likewise
        return found

    def _get_name(self) -> str:
        return self._isohub.class_name.rpartition(".")[2]

    # Changes to the remote module in place. Each returns this handle, as a local module returns itself.

    def _change(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._isohub.call(name, args, kwargs)

    def train(self, mode: bool = True) -> Any:
        """Set the remote module's training mode."""
        return self._change("train", mode)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or convert the remote module, in its worker."""
        return self._change("to", *args, **kwargs)

    def half(self) -> Any:
        """Convert the remote module to float16."""
        return self._change("half")

    def float(self) -> Any:
        """Convert the remote module to float32."""
        return self._change("float")

    def double(self) -> Any:
        """Convert the remote module to float64."""
        return self._change("double")

    def bfloat16(self) -> Any:
        """Convert the remote module to bfloat16."""
        return self._change("bfloat16")

    def cpu(self) -> Any:
        """Move the remote module to its worker's host memory."""
        return self._change("cpu")

    def cuda(self, device: Any = None) -> Any:
        """Move the remote module to a GPU of its worker's."""
        return self._change("cuda", device)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Switch gradients of the remote parameters."""
        return self._change("requires_grad_", requires_grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the remote parameters."""
        self._change("zero_grad", set_to_none)

    def add_module(self, name: str, module: torch.nn.Module | None) -> None:
        """Add a child to the remote module; a local module is sent there."""
        self._change("add_module", name, module)

    def register_module(self, name: str, module: torch.nn.Module | None) -> None:
        """As `add_module`."""
        self._change("add_module", name, module)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """Add a buffer to the remote module."""
        self._change("register_buffer", name, tensor, persistent)

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Add a parameter to the remote module: one with the values of this one."""
        register_parameter(self._isohub, name, param)

    # Hooks run in this process, when *this handle* is called. A submodule is called within the worker, by its
    # parent, where no hook of this process could see it.

    def _only_on_what_was_loaded(self) -> None:
        if not self._isohub.loaded:
            raise NotImplementedError(
                f"a hook on a submodule of {self._isohub.worker.name} would never run: its parent calls it there\n"
                "hint: h.run(fn) can register one in the worker; hooks on the handle that was loaded run here"
            )

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """A hook in this process, on the handle that was loaded."""
        self._only_on_what_was_loaded()
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """A hook in this process, on the handle that was loaded."""
        self._only_on_what_was_loaded()
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """A hook in this process, on the handle that was loaded."""
        self._only_on_what_was_loaded()
        return super().register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """A hook in this process, on the handle that was loaded."""
        self._only_on_what_was_loaded()
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def register_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """A hook in this process, on the handle that was loaded."""
        self._only_on_what_was_loaded()
        return super().register_backward_hook(*args, **kwargs)

    def apply(self, fn: Callable[[Any], Any]) -> Any:
        """Apply a function to every remote submodule, in the worker."""
        return self._change("apply", fn)

    # Looking.

    @property
    def training(self) -> bool:
        """The remote module's training mode."""
        remote = self._isohub
        return bool(remote.operate("getattr", "training"))

    @training.setter
    def training(self, mode: bool) -> None:
        if "_isohub" in self.__dict__:  # torch.nn.Module's own __init__ sets it too
            self._isohub.operate("setattr", "training", mode)

    def __getattr__(self, name: str) -> Any:
        if is_a_protocol(name):
            raise AttributeError(name)
        value = self._isohub.operate("getattr", name)
        if isinstance(value, torch.Tensor):
            phase = f"reading its attribute {name!r}"
            requires_grad = self._isohub.ask("parameter", name, "describe", None, phase=phase)
            if isinstance(requires_grad, bool):  # None for what is no parameter
                return remote_parameter(self, name, value.detach(), requires_grad and _is_differentiable(value))
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            self._refuse("the class of", "is not changed from here", "h.run(fn, ...) does in the worker what does that")
        if name in self.__dict__ or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        elif isinstance(value, torch.nn.Parameter):
            register_parameter(self._isohub, name, value)
        else:
            self._isohub.operate("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
            return
        # torch.nn.utils' norms and parametrisations begin so, and put in its place what cannot come from here.
        if self._isohub.ask("parameter", name, "describe", None, phase=f"deleting its attribute {name!r}") is not None:
            self._refuse("a parameter of", "is not deleted from here", "h.run(fn, ...) works on the live module")
        self._isohub.operate("delattr", name)

    def __dir__(self) -> list[str]:
        local = [name for name in vars(RemoteModule) if not name.startswith("_")]
        return sorted({*names_of(self._isohub), *local})

    def __repr__(self) -> str:
        return shown(self._isohub, "repr")

    def __deepcopy__(self, memo: object) -> NoReturn:
        refuse_pickle(self._isohub)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle(self._isohub)


class IndexableRemoteModule(Container, RemoteModule):
    """A remote module that can be indexed: ``nn.Sequential``, ``ModuleList``, ``ModuleDict`` and their like."""


def make_handle(remote: Remote, module: bool, indexable: bool) -> RemoteModule | RemoteObject:
    """The handle for what a worker sent."""
    if not module:
        return object_handle(remote)
    made: RemoteModule = make_like(IndexableRemoteModule if indexable else RemoteModule, remote)
    return made


def mark_loaded(built: Any) -> None:
    """Note which handles an entrypoint gave; hooks may go on those."""
    if isinstance(built, RemoteModule):
        built._isohub.loaded = True
    elif isinstance(built, (list, tuple)):
        for item in built:
            mark_loaded(item)
    elif isinstance(built, dict):
        for item in built.values():
            mark_loaded(item)


def given_state(module: RemoteModule) -> Any:
    """As `RemoteModule.state_dict`, of a module that is not used after this: its worker may give its own memory."""
    return _state(module._isohub, "give_state")


def _state(remote: Remote, op: str, *args: Any, destination: Any = None) -> Any:
    phase = "reading its state"
    answer = remote.ask(op, *args, phase=phase, parcel=True, limit_bytes=_memory_limit())
    values, metadata = answer if isinstance(answer, tuple) and len(answer) == 2 else (None, None)
    if not isinstance(values, dict) or not isinstance(metadata, (dict, type(None))):
        raise remote.refuse("a state dict", phase)
    if not all(isinstance(name, str) for name in values):
        raise remote.refuse("a state dict", phase)
    state: Any = OrderedDict() if destination is None else destination
    state.update(values)
    if metadata is not None and (destination is None or hasattr(state, "_metadata")):
        if getattr(state, "_metadata", None) is None:
            state._metadata = OrderedDict()
        state._metadata.update(metadata)
    return state


def _is_named_tensor(row: Any) -> bool:
    """A name, a tensor, and whether it requires a gradient, which only floating and complex ones can."""
    if not (isinstance(row, tuple) and len(row) == 3 and isinstance(row[0], str) and isinstance(row[1], torch.Tensor)):
        return False
    return isinstance(row[2], bool) and (not row[2] or _is_differentiable(row[1]))


def _is_differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _memory_limit() -> int:
    """State is as large as the model; what the machine has left is the only sensible bound."""
    import psutil

    return int(psutil.virtual_memory().available)
