"""Parameters of a module here: one by its name, with its gradient; and all of them, as often as they are there.

Side: worker. Trust: the caller's.
"""

from __future__ import annotations

from typing import Any, Iterable, Iterator, Tuple

__all__ = ["act_on_parameter", "every_member"]


def every_member(module: Any, what: str, recurse: bool) -> Iterable[Tuple[str, Any]]:
    """Parameters or buffers with their names, those that are there twice given twice.

    Args:
        module: Whose.
        what: ``parameters`` or ``buffers``.
        recurse: Whether those of its submodules too.
    """
    method = getattr(module, f"named_{what}")
    try:
        members: Iterable[Tuple[str, Any]] = method(recurse=recurse, remove_duplicate=False)
    except TypeError:  # the keyword came with torch 2.0
        return _walked(module, what, recurse)
    return members


def _walked(module: Any, what: str, recurse: bool) -> Iterator[Tuple[str, Any]]:
    for prefix, part in module.named_modules(remove_duplicate=False) if recurse else [("", module)]:
        for name, item in vars(part)[f"_{what}"].items():
            if item is not None:
                yield (f"{prefix}.{name}" if prefix else name), item


def act_on_parameter(module: Any, name: str, act: str, value: Any) -> Any:
    """Do one thing to a parameter.

    Args:
        module: Whose.
        name: Dotted.
        act: ``describe`` (None if there is none of that name), ``grad``, ``set_grad``, ``add_grad`` or
            ``requires_grad``, or ``register`` (a tensor or None, and whether it requires a gradient).
        value: For all but the first two.
    """
    parameter = _find(module, name)
    if act == "describe":
        return None if parameter is None else parameter.requires_grad
    if act == "register":
        return module.register_parameter(name, _made(*value))
    if parameter is None:
        raise AttributeError(f"{type(module).__name__} has no parameter {name!r} any more")
    if act == "grad":
        return parameter.grad
    if act == "requires_grad":
        parameter.requires_grad = value
    elif act == "set_grad":
        parameter.grad = None if value is None else _own(value, parameter)
    elif act == "add_grad":
        parameter.grad = _own(value, parameter) if parameter.grad is None else parameter.grad + value
    return None


def _find(module: Any, name: str) -> Any:
    import torch

    path, _, last = name.rpartition(".")
    found: Any = module
    for part in path.split(".") if path else []:
        found = getattr(found, part, None)
    parameters = getattr(found, "_parameters", None) if isinstance(found, torch.nn.Module) else None
    return None if parameters is None else parameters.get(last)


def _made(value: Any, requires_grad: bool) -> Any:
    import torch

    return None if value is None else torch.nn.Parameter(value.clone(), requires_grad=requires_grad)


def _own(value: Any, like: Any) -> Any:
    """A copy: what came lies in memory that the next question overwrites."""
    return value.to(like.device).clone()
