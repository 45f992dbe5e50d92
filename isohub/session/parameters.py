"""Parameters of a remote module, as copies that know where they come from.

Rules:

1. The values are those of the moment; ``grad`` is the worker's at each look, and setting it, or
   ``requires_grad``, sets it there.
2. A copy can be computed with. A gradient that arrives at it by that is added to the remote parameter's.
3. Changing a copy in place changes nothing there, and is an error that says so: an optimiser of this process
   would otherwise train nothing.

Side: caller. Trust: names, values and gradients are a worker's; the wire has checked them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from isohub.session.link import Remote

__all__ = ["RemoteParameter", "parameters_of", "register_parameter", "remote_parameter"]

_ITEM_METHODS = frozenset(
    ("__setitem__", "__delitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
     "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__")
)  # fmt: skip
_Plain: Any = torch._C.DisableTorchFunctionSubclass
_own_grad: Any = torch.Tensor.grad
_own_requires_grad: Any = torch.Tensor.requires_grad
_own_data: Any = torch.Tensor.data


class _Copy(torch.Tensor):
    """A tensor that refuses to be changed in place. What is computed from it is a plain tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _changes(func) and args:
            for changed in args[0] if isinstance(args[0], (list, tuple)) else [args[0]]:
                if isinstance(changed, _Copy):
                    raise RuntimeError(_refusal(changed))
        if isinstance(kwargs.get("out"), _Copy):
            raise RuntimeError(_refusal(kwargs["out"]))
        with _Plain():
            return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _plain(self).detach().clone()


class RemoteGradient(_Copy):
    """A copy of a remote parameter's gradient, or of its values."""


class RemoteParameter(_Copy, torch.nn.Parameter):
    """A copy of a remote parameter."""

    @property
    def grad(self) -> Any:
        """The remote parameter's gradient now, copied."""
        found = _act(self, "grad")
        # One that has a graph there has one here: what is computed from it goes on to the worker.
        plain = isinstance(found, torch.Tensor) and not found.requires_grad
        return _copied(self, found) if plain else found

    @grad.setter
    def grad(self, value: Any) -> None:
        _act(self, "set_grad", value)

    @grad.deleter
    def grad(self) -> None:
        _act(self, "set_grad", None)

    @property
    def requires_grad(self) -> bool:
        """Whether the remote parameter required a gradient when it was read, or was set to."""
        with _Plain():
            return bool(_own_requires_grad.__get__(self))

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        _act(self, "requires_grad", bool(value))
        with _Plain():
            _own_requires_grad.__set__(self, bool(value))

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Set it, here and there."""
        self.requires_grad = requires_grad
        return self

    @property
    def data(self) -> Any:
        """The values, as a copy that refuses to be changed too."""
        with _Plain():
            values = _own_data.__get__(self)
        return _copied(self, values)

    @data.setter
    def data(self, value: Any) -> None:  # noqa: ARG002 - the setter's signature
        raise RuntimeError(_refusal(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return torch.nn.Parameter(_plain(self).detach().clone(), requires_grad=self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch.nn.Parameter(_plain(self).detach(), requires_grad=self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def remote_parameter(handle: Any, name: str, value: torch.Tensor, requires_grad: bool) -> RemoteParameter:
    """A copy.

    Args:
        handle: Of the module that has it; lives as long as the copy.
        name: Its dotted name there.
        value: float32[...] or of another dtype, CPU, the copy's own.
        requires_grad: Whether the remote one does.
    """
    parameter: RemoteParameter = torch.Tensor._make_subclass(RemoteParameter, value, requires_grad)
    parameter.__dict__.update(_isohub_source=(handle, name))
    if requires_grad:
        with _Plain():
            parameter.register_post_accumulate_grad_hook(_pass_on)  # type: ignore[no-untyped-call]
    return parameter


def parameters_of(handle: Any, rows: Iterable[tuple[str, torch.Tensor, bool]]) -> Iterator[tuple[str, RemoteParameter]]:
    """Copies for what a worker listed; one that is listed under two names is one copy."""
    known: dict[tuple[Any, ...], RemoteParameter] = {}
    for name, value, requires_grad in rows:
        # Sparse ones have no one place, meta ones none at all.
        placed = value.layout is torch.strided and not value.is_meta and value.numel() > 0
        place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if placed else (name,)
        parameter = known.get(place)
        if parameter is None:
            parameter = known[place] = remote_parameter(handle, name, value, requires_grad)
        yield name, parameter


def register_parameter(remote: Remote, name: str, parameter: torch.Tensor | None) -> None:
    """Register a parameter in the remote module, with the values and ``requires_grad`` of this one."""
    if isinstance(parameter, _Copy):
        # torch.nn.utils' pruning and norms, and who ties two layers: all mean the one that lives there.
        raise RuntimeError(
            f"{parameter.__dict__['_isohub_source'][1]!r} is a copy of what the worker of {remote.worker.name} has: as "
            f"{name!r} it would be another parameter there\n"
            "hint: h.run(fn, ...) works on the live module, with torch.nn.utils too; .clone() is a tensor of your own"
        )
    given = (parameter, parameter is not None and parameter.requires_grad)
    remote.ask("parameter", name, "register", given, phase=f"registering the parameter {name!r}")


def _changes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _ITEM_METHODS


def _copied(parameter: _Copy, values: torch.Tensor) -> RemoteGradient:
    copied: RemoteGradient = torch.Tensor._make_subclass(RemoteGradient, values.detach())
    copied.__dict__.update(parameter.__dict__)
    return copied


def _plain(value: torch.Tensor) -> torch.Tensor:
    with _Plain():
        plain: torch.Tensor = value.detach().as_subclass(torch.Tensor)
        return plain


def _remote(value: _Copy) -> Remote:
    remote: Remote = value.__dict__["_isohub_source"][0]._isohub
    return remote


def _act(parameter: _Copy, act: str, value: Any = None) -> Any:
    name = parameter.__dict__["_isohub_source"][1]
    words = {"grad": "reading the gradient of", "requires_grad": "setting requires_grad of"}
    phase = f"{words.get(act, 'setting the gradient of')} {name!r}"
    return _remote(parameter).ask("parameter", name, act, value, phase=phase, record=act == "grad")


def _pass_on(parameter: Any) -> None:
    """Give the remote parameter what a local use of its copy has come to."""
    with _Plain():
        gradient = _own_grad.__get__(parameter)
        _own_grad.__set__(parameter, None)
    _act(parameter, "add_grad", gradient)


def _refusal(changed: _Copy) -> str:
    name, worker_name = changed.__dict__["_isohub_source"][1], _remote(changed).worker.name
    return (
        f"{name!r} is a copy of what the worker of {worker_name} has: changing it in place changes nothing there\n"
        "hint: h.run(fn, ...) changes the live parameters or steps an optimiser there; h.load_state_dict() sets them; "
        ".clone() gives a tensor of your own"
    )
