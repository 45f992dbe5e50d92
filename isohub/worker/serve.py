"""A worker's life: say ready, then answer one question after another until the caller is gone.

Every operation is one method of `Server` named ``do_<op>``; what it returns is encoded from the closed set,
and what the set does not hold stays here under a number and is sent as a reference.

Side: worker. Trust: questions are the caller's; what they make run is the repo's.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import operator
import os
import reprlib
import signal
import sys
import traceback
import types
from typing import Any, Callable, Dict, FrozenSet, List, Optional, Sequence, Tuple, Union

from isohub.errors import ProtocolError
from isohub.sandbox.confine import Confined
from isohub.wire.arena import LARGEST_KEPT_BYTES, Arena, Cargo, dtype_names, make_parcel
from isohub.wire.channel import ChannelClosed
from isohub.wire.codec import Decoder, Encoder, LackedDtype, TooLargeToEncode
from isohub.wire.copies import move_by_torch
from isohub.wire.protocol import MAX_FRAME_BYTES, MAX_PARTS, MAX_REFERENCES, close_descriptors
from isohub.wire.tables import Copying, Viewing
from isohub.wire.templates import Signed, Template, Templates, signed
from isohub.worker import storages
from isohub.worker.backing import Backing
from isohub.worker.bytecode import compile_tree
from isohub.worker.caller import Caller, dump
from isohub.worker.compiling import compile_module
from isohub.worker.devices import SharedGpus, mover_to
from isohub.worker.downloads import Downloads
from isohub.worker.evaluating import Evaluator
from isohub.worker.hubconf import Hubconf, HubconfFailed, seed_everything
from isohub.worker.measuring import Measurements
from isohub.worker.modes import entered
from isohub.worker.operations import OPERATIONS, Operations, sort_of, unpickled
from isohub.worker.packages import versions
from isohub.worker.parameters import act_on_parameter, every_member
from isohub.worker.tapes import Tapes

__all__ = ["Server", "make_server", "serve"]

# An object's repr as far as it is worth reading: containers that share their parts can take for ever to print.
_summary = reprlib.Repr()
_summary.maxlevel = 4
_summary.maxlist = _summary.maxtuple = _summary.maxdict = _summary.maxset = _summary.maxfrozenset = 20
_summary.maxstring = _summary.maxother = 2000

#: What `operate` may apply to an object: Python's own operations, by name.
_OPERATIONS: Dict[str, Callable[..., Any]] = {
    **OPERATIONS,
    "len": len,
    "bool": bool,
    "repr": repr,
    "summary": _summary.repr,
    "str": str,
    "dir": dir,
    "iter": iter,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "contains": operator.contains,
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "equal": operator.eq,
}
_HERE = os.path.dirname(os.path.abspath(__file__))
_WIRE = os.path.join(os.path.dirname(_HERE), "wire")
_MAX_TEXT_CHARS = 100_000


class _TooLarge(Exception):  # noqa: N818 - turned into a message at once
    pass


def serve(caller: Caller, confined: Confined, server: Optional[Server], take_in: Callable[[], None]) -> None:
    """Answer the caller until it is gone.

    Args:
        caller: It is connected.
        confined: What confines this process, which is said before anything else is done.
        server: What answers, if it could be made before.
        take_in: Else this brings the environment's packages, which may be anybody's, on the first question
            (`Server.do_prepare`).
    """
    try:
        caller.greet(confined, None if server is None else (*versions(), dtype_names()))
        if server is not None:
            seed_everything(None)  # while the caller looks at what was said
        question, descriptors, gone = caller.hear()
        try:
            if server is None:
                take_in()
                server = make_server(caller)
                seed_everything(None)
        except BaseException as error:
            close_descriptors(descriptors)
            caller.answer(dump({**_describe(error), "kept": False}), [])
            return
        while True:
            caller.answer(*server.answer(caller.number, question, descriptors, gone))
            question, descriptors, gone = caller.hear()
    except ChannelClosed:
        pass
    except ProtocolError:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()


def make_server(caller: Caller) -> Server:
    """What answers, and what it changes of this process: torch's downloads and storages, and what Ctrl-C does."""
    downloads = Downloads(caller)
    downloads.install()
    storages.install()
    server = Server(downloads)
    signal.signal(signal.SIGINT, server.interrupted)
    return server


class Server(Operations, Measurements):
    """The objects that live here, and what may be done with them."""

    def __init__(self, downloads: Downloads) -> None:
        super().__init__()
        self._downloads = downloads
        self._hubconf = Hubconf()
        self._tapes = Tapes()
        self._gpus = SharedGpus()
        self._backing: Optional[Backing] = None  # of the last build
        self._objects: Dict[int, Tuple[Any, int]] = {}  # number: object, how often it was sent
        self._numbers: Dict[int, int] = {}  # id: number
        self._next = 1
        self._inbox: Optional[Arena] = None
        self._inbox_references = 0
        self._outbox: Optional[Arena] = None
        self._interruptible = False
        self._referred = 0
        self._graphs_keep = False  # whether the graph of a recorded call has kept an input
        self._templates = Templates()
        self._callers_torch = ""
        self._lacking: FrozenSet[str] = frozenset()  # dtypes of this torch that the caller's does not have

    def interrupted(self, *_: object) -> None:
        """The caller does not wait any more (SIGINT): stop what runs, and stay."""
        if self._interruptible:
            self._interruptible = False  # once: what follows is the way out
            raise KeyboardInterrupt("the caller was interrupted")

    def answer(
        self, number: int, question: Dict[str, Any], descriptors: Sequence[int], gone: Dict[str, Any]
    ) -> Tuple[bytes, List[int]]:
        """One answer, whatever happens: a frame's body, and descriptors that the sender then closes.

        Args:
            number: The question's.
            question: As `Caller.hear` gives it; nothing in it is changed.
            descriptors: What came with it.
            gone: Objects and graphs that nobody holds any more.
        """
        if descriptors and "arenas" in question:
            self._attach(question["arenas"], descriptors)
        self._gpus.begin()
        took = None
        if "offer" in question:
            took = self._gpus.take(question["offer"], descriptors[len(question.get("arenas", ())) :])
        try:
            self._tapes.forget(gone.get("forgotten", ()))
            if gone:
                self._release(gone["released"])
                self.loop.tidy()
            reply, parcel = self._perform(number, question)
        except BaseException as error:
            reply, parcel = _describe(error), None
        # After the exception and everything that it held are gone.
        kept = self._inbox_is_held()
        self._graphs_keep = self._graphs_keep or (kept and "record" in question)
        if kept or (self._inbox is not None and self._inbox.size_bytes > LARGEST_KEPT_BYTES):
            self._drop_inbox()
        if isinstance(reply, Template):
            if not kept and took is None:
                return reply.body, []
            reply = json.loads(reply.body)
        told = {"kept": kept, **({} if took is None else {"took": took})}
        body = dump({**reply, **told})
        if len(body) > MAX_FRAME_BYTES or body.count(b",") + body.count(b"[") > MAX_PARTS:
            if parcel is not None:
                os.close(parcel)
            too_large = _TooLarge(f"the answer takes {len(body)} bytes of text; the wire takes {MAX_FRAME_BYTES}")
            return dump({**_describe(too_large), **told}), []
        return body, [] if parcel is None else [parcel]

    def _attach(self, arenas: Sequence[str], descriptors: Sequence[int]) -> None:
        for name, descriptor in zip(arenas, descriptors):
            arena = Arena.attach(descriptor)
            if name == "inbox":
                self._drop_inbox()
                self._inbox = arena
                self._inbox_references = sys.getrefcount(arena.carrier)
            else:
                if self._outbox is not None:
                    self._outbox.close()
                self._outbox = arena

    def _drop_inbox(self) -> None:
        if self._inbox is not None:
            self._inbox.close()  # what a model kept keeps the mapping
            self._inbox = None

    def _inbox_is_held(self) -> bool:
        """Whether a tensor of the last question lives on: the model kept an input, or a view of one."""
        return self._inbox is not None and sys.getrefcount(self._inbox.carrier) > self._inbox_references

    def _release(self, released: Sequence[Sequence[int]]) -> None:
        for number, count in released:
            entry = self._objects.get(number)
            if entry is None:
                continue
            held, sent = entry
            if sent > count:
                self._objects[number] = held, sent - count
            else:
                del self._objects[number]
                self._numbers.pop(id(held), None)

    def _perform(self, number: int, question: Dict[str, Any]) -> Tuple[Union[Dict[str, Any], Template], Optional[int]]:
        args = self._arguments(question)
        operation = getattr(self, "do_" + question["op"])
        with entered(question):
            try:
                self._interruptible = True
                value = operation(*args)
            finally:
                self._interruptible = False
        del args
        if question["op"] != "give_state":
            return self._encode(value, number, question)
        built_in, self._backing = self._backing, None
        backing = Backing.to_give(built_in, question["limit"])
        with contextlib.nullcontext() if backing is None else backing.giving():
            return self._encode(value, number, question, backing)

    def _arguments(self, question: Dict[str, Any]) -> List[Any]:
        storages: List[Any] = []
        tensors: List[Any] = []
        tables = question["tables"]
        if tables.storages:
            inbox = self._inbox  # without one nothing has a size
            view = Viewing(b"" if inbox is None else inbox.carrier)
            # A graph would keep the inbox; what it keeps is its own, once one has kept it.
            record = question.get("record")
            copied = record is not None and (self._graphs_keep or record["inputs"])
            source = Copying(inbox.address, move_by_torch) if copied and inbox is not None else view
            place = None
            if tables.devices:
                if inbox is not None:
                    inbox.lock_pages()
                place = self._gpus.placing(view)
            storages, tensors = tables.build(0 if inbox is None else inbox.size_bytes, source, place)
        if question.get("record"):
            self._tapes.admit(question["record"]["inputs"], tensors)
        target = [] if question["target"] is None else [self._objects[question["target"]][0]]
        # Of a caller that has no GPU, or does not use it: the model would refuse every input.
        move = mover_to(target[0]) if question["op"] == "call" and not tables.devices else None
        if question["tensors_alone"] and move is None:
            return [*target, question["args"][0], tuple(tensors), {}]
        decoder = Decoder(storages, tensors, self._dereference, lambda data: unpickled(data, self._objects), move)
        return [*target, *(decoder.decode(argument) for argument in question["args"])]

    def _dereference(self, reference: List[Any]) -> Any:
        return self._objects[reference[0]][0]

    def _encode(
        self, value: Any, number: int, question: Dict[str, Any], backing: Optional[Backing] = None
    ) -> Tuple[Union[Dict[str, Any], Template], Optional[int]]:
        limit, parcel, record = question["limit"], question["parcel"], question.get("record")
        outbox = None if parcel else self._outbox
        recorded = record is not None
        values = None if outbox is None or "devices" in question else _signed(value, recorded)
        if values is not None and outbox is not None:
            template = self._templates.get(values.signature)
            if template is not None and template.size_bytes <= min(limit, outbox.size_bytes):
                template.fill(outbox.address, values.tensors, move_by_torch)
                if record:
                    outputs = [values.tensors[row] for row in template.differentiable]
                    self._tapes.keep(number, outputs, record["limit"])
                return template, None
        cargo = Cargo()
        self._referred = 0
        try:
            encoder = Encoder(cargo, self._refer, lacking=self._lacking)
            tree = encoder.encode(value)
        except LackedDtype as error:
            raise TypeError(
                f"the answer holds torch.{error.args[0]}, which this worker's torch {versions()[1]} has, and the "
                f"caller's torch {self._callers_torch} does not"
            ) from None
        except TooLargeToEncode:
            cargo = Cargo()
            encoder = Encoder(cargo, self._refer, lacking=self._lacking)
            self._referred = 0
            tree = self._refer(value)
        cargo.lay_out(self._gpus.room if question.get("devices") else None, backing)
        size = cargo.size_bytes
        total = size + cargo.direct_bytes
        if total > limit:
            raise _TooLarge(f"the answer holds {total} bytes of tensors; this session takes {limit}")
        cargo.write_devices(self._gpus.outboxes)
        reply = {"event": "value", "value": tree, "claims": cargo.claims[:2], "via": "none"}
        if cargo.claims.devices:
            reply["devices"] = cargo.claims.devices
        if record:
            rows = encoder.differentiable
            self._tapes.keep(number, [tensor for _, tensor in rows], record["limit"])
            if rows:
                reply["recorded"] = [number for number, _ in rows]
        if size and outbox is not None and size <= outbox.size_bytes:
            if cargo.claims.devices:
                outbox.lock_pages()
            cargo.write_to(outbox.address, move_by_torch)
            reply["via"] = "outbox"
        elif size:
            reply["via"] = "parcel"
            return reply, make_parcel(cargo) if backing is None else backing.finish(cargo)
        if values is not None:
            body = dump({**reply, "kept": False})
            rows_of_gradients = [row for row, _ in encoder.differentiable]
            self._templates.keep(values.signature, _signed(value, recorded), cargo, body, rows_of_gradients)
        return reply, None

    def _refer(self, value: Any) -> List[Any]:
        """A reference to an object that stays here: number, kind, class name, what it can do."""
        import torch

        self._referred += 1
        if self._referred > MAX_REFERENCES:
            raise TooLargeToEncode
        number = self._numbers.get(id(value))
        if number is None:
            number = self._next
            self._next += 1
            self._numbers[id(value)] = number
        self._objects[number] = value, self._objects.get(number, (None, 0))[1] + 1
        kind = type(value)
        if issubclass(kind, torch.nn.Module):
            sort = "module"
        elif issubclass(kind, (types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
            sort = "function"
        else:
            sort = sort_of(kind)
        name = f"{kind.__module__}.{kind.__qualname__}".encode("utf-8", "replace").decode()[:1000]
        return ["r", number, sort, name, hasattr(kind, "__getitem__")]

    # What can be asked for.

    def do_prepare(self, torch: str, dtypes: List[str]) -> Tuple[str, str, List[str]]:
        """Versions of Python and torch, and the dtypes that may cross and are known here.

        Args:
            torch: The caller's version of it.
            dtypes: Those that are known there.
        """
        self._callers_torch, own = torch, dtype_names()
        self._lacking = frozenset(own).difference(dtypes)
        return (*versions(), own)

    def do_open(self, path: str, dependencies: List[str], bound: bool, bytecode: Optional[bytes]) -> List[str]:
        self._downloads.bound = bound
        return self._hubconf.open(path, dependencies, bytecode)

    def do_compile_tree(self, path: str) -> bytes:
        os.nice(19)  # nobody waits for it
        return compile_tree(path)

    def do_import(self, seed: Optional[int]) -> None:
        if seed is not None:
            seed_everything(seed)
        self._hubconf.module()

    def do_entrypoints(self) -> List[str]:
        return self._hubconf.entrypoints()

    def do_help(self, name: str) -> Optional[str]:
        return self._hubconf.help(name)

    def do_build(self, name: str, seed: Optional[int], backed: bool, args: List[Any], kwargs: Dict[str, Any]) -> Any:
        """What an entrypoint gives; `backed` where nothing but its state is wanted then (`do_give_state`)."""
        entrypoint = self._hubconf.entrypoint(name)
        if self._backing is not None:
            self._backing.abandon()
        self._backing = Backing.begin() if backed else None
        if seed is not None:
            seed_everything(seed)
        try:
            return entrypoint(*args, **kwargs)
        except BaseException:
            if self._backing is not None:
                self._backing.abandon()
            raise
        finally:
            if self._backing is not None:
                self._backing.end()

    def do_call(self, target: Any, name: str, args: Sequence[Any], kwargs: Dict[str, Any]) -> Any:
        return (getattr(target, name) if name else target)(*args, **kwargs)

    def do_operate(self, target: Any, operation: str, args: Sequence[Any]) -> Any:
        return _OPERATIONS[operation](target, *args)

    def do_run(self, target: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: Dict[str, Any]) -> Any:
        return function(target, *args, **kwargs)

    def do_evaluator(self, _: Any, built: Any, code: bytes, settings: Dict[str, Any]) -> Any:
        return Evaluator(built, unpickled(code, {}), **settings)

    def do_backward(
        self, number: int, gradients: Sequence[Tuple[int, Any]], wanted: Sequence[int], accumulate: bool, keep: bool
    ) -> List[Any]:
        return self._tapes.backward(number, gradients, wanted, accumulate, keep)

    def do_parameter(self, target: Any, name: str, act: str, value: Any) -> Any:
        return act_on_parameter(target, name, act, value)

    def do_state_dict(self, target: Any, kwargs: Dict[str, Any]) -> Tuple[Any, Any]:
        _expect_module(target, "state_dict")
        state = target.state_dict(**kwargs)
        return dict(state), getattr(state, "_metadata", None)

    def do_give_state(self, target: Any) -> Tuple[Any, Any]:
        """The state of a module that is not used after this. Its memory is what is sent, as far as that can be."""
        return self.do_state_dict(target, {})

    def do_named(self, target: Any, what: str, recurse: bool, distinct: bool) -> List[Tuple[str, Any, bool]]:
        """Parameters or buffers: name, values, requires_grad."""
        _expect_module(target, what)
        method = getattr(target, f"named_{what}")
        members = method(recurse=recurse) if distinct else every_member(target, what, recurse)
        return [(name, _values(item), item.requires_grad) for name, item in members]

    def do_load_state_dict(self, target: Any, state: Dict[str, Any], metadata: Any, kwargs: Dict[str, Any]) -> Any:
        from collections import OrderedDict

        ordered: Any = OrderedDict(state)
        if metadata is not None:
            ordered._metadata = OrderedDict(metadata)
        return target.load_state_dict(ordered, **kwargs)

    def do_modules(self, target: Any, what: str) -> List[Tuple[str, Any]]:
        _expect_module(target, what)
        return list(target.named_children() if what == "children" else target.named_modules())

    def do_compile(self, target: Any, options: Dict[str, Any]) -> None:
        _expect_module(target, "compile")
        compile_module(target, options)

    def do_torchscript(self, target: Any, example_inputs: Any, kwargs: Dict[str, Any]) -> bytes:
        import warnings

        import torch

        _expect_module(target, "torchscript")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the caller says it once, in its docs
            if example_inputs is None:
                scripted = torch.jit.script(target, **kwargs)
            else:
                trace: Any = torch.jit.trace
                scripted = trace(target, example_inputs, **kwargs)
            buffer = io.BytesIO()
            torch.jit.save(scripted, buffer)
        return buffer.getvalue()

    def do_export(self, target: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> bytes:
        import torch.export

        _expect_module(target, "exported_program")
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(target, tuple(args), **kwargs), buffer)
        return buffer.getvalue()


def _expect_module(target: Any, what: str) -> None:
    import torch

    if not issubclass(type(target), torch.nn.Module):
        raise TypeError(f"{what} needs a torch.nn.Module; the entrypoint gave {type(target).__name__}")


def _values(tensor: Any) -> Any:
    """A parameter as the wire takes it: a sparse one would stay here for its gradient's sake."""
    import torch

    return tensor if tensor.layout is torch.strided else tensor.detach()


def _text(make: Callable[[], str], instead: str) -> str:
    """What a repo's own method says, if it says anything."""
    try:
        text = str.__str__(make())
    except BaseException:
        text = instead
    return text.encode("utf-8", "backslashreplace").decode()[:_MAX_TEXT_CHARS]


def _signed(value: Any, recorded: bool) -> Optional[Signed]:
    """The signature of an answer."""
    values = signed(value)
    return None if values is None else Signed((recorded, values.signature), values.tensors)


def _describe(error: BaseException) -> Dict[str, Any]:
    """An exception as text, without this package's own frames."""
    reply: Dict[str, Any] = {"event": "error", "kind": "raised", "details": [], "bases": [], "traceback": ""}
    if isinstance(error, HubconfFailed):
        return {**reply, "kind": error.kind, "details": error.details, "type": "", "message": ""}
    if isinstance(error, _TooLarge):
        return {**reply, "kind": "too_large", "type": "", "message": str(error)}
    kind = type(error)
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith((_HERE, _WIRE)):
        frames = frames.tb_next
    lines = _text(
        lambda: "".join(traceback.format_exception(kind, error, frames)),
        "(the traceback cannot be formatted)",
    )
    bases = [base.__name__ for base in kind.__mro__ if getattr(builtins, base.__name__, None) is base]
    # The stack's frames hold the question's tensors; without this an error would keep the arena.
    with contextlib.suppress(Exception):
        traceback.clear_frames(error.__traceback__)
    return {
        **reply,
        "type": _text(
            lambda: kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}",
            "?",
        ),
        "bases": bases,
        "message": _text(lambda: str(error), "(its message cannot be read)"),
        "traceback": lines,
    }
