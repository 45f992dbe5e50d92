"""The rest of ``torch.nn.Module``: what a handle does by forwarding, and what it refuses in words.

`docs/handles.md` lists every public name of ``torch.nn.Module`` and what it does on a handle.

Side: caller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from isohub.errors import RemoteError

if TYPE_CHECKING:
    from isohub.session.link import Remote

__all__ = ["Surface"]


class Surface(torch.nn.Module):
    """Methods that need nothing of a handle but its remote."""

    _isohub: Remote

    def _forward_to_worker(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._isohub.call(name, args, kwargs)

    # Devices, dtypes and memory: the remote module's, in its worker. Each returns this handle.

    def type(self, dst_type: Any) -> Any:
        """Convert the remote parameters and buffers to a dtype."""
        return self._forward_to_worker("type", dst_type)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Any:
        """Move the remote module without its values."""
        return self._forward_to_worker("to_empty", device=device, recurse=recurse)

    def xpu(self, device: Any = None) -> Any:
        """Move the remote module to an XPU of its worker's."""
        return self._forward_to_worker("xpu", device)

    def ipu(self, device: Any = None) -> Any:
        """Move the remote module to an IPU of its worker's."""
        return self._forward_to_worker("ipu", device)

    def mtia(self, device: Any = None) -> Any:
        """Move the remote module to an MTIA device of its worker's."""
        return self._forward_to_worker("mtia", device)

    def share_memory(self) -> NoReturn:
        """Not across the wire: nobody could share it but processes of the worker's own."""
        self._refuse("memory of", "is shared with no process of yours", "each call copies; nothing needs to be shared")

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the remote module's forward, in its worker, with the next call."""
        self._forward_to_worker("compile", *args, **kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks of a module before it reads its code."""
        self._refuse("the code of", "cannot be scripted from here", "h.torchscript() scripts it there")

    # State.

    def extra_repr(self) -> str:
        """The remote module's own."""
        return str(self._forward_to_worker("extra_repr"))

    def get_extra_state(self) -> Any:
        """The remote module's own."""
        return self._forward_to_worker("get_extra_state")

    def set_extra_state(self, state: Any) -> None:
        """Set the remote module's own."""
        self._forward_to_worker("set_extra_state", state)

    def set_submodule(self, target: str, module: torch.nn.Module, strict: bool = False) -> None:
        """Replace a submodule; a local module is sent there."""
        self._forward_to_worker("set_submodule", target, module, **({"strict": True} if strict else {}))

    def register_state_dict_pre_hook(self, hook: Callable[..., Any]) -> NoReturn:  # noqa: ARG002 - torch's signature
        """Not from here: the state is read in the worker."""
        self._refuse_state_hook("register_state_dict_pre_hook")

    def register_state_dict_post_hook(self, hook: Callable[..., Any]) -> NoReturn:  # noqa: ARG002 - torch's signature
        """Not from here: the state is read in the worker."""
        self._refuse_state_hook("register_state_dict_post_hook")

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any]) -> NoReturn:  # noqa: ARG002 - torch's signature
        """Not from here: the state is loaded in the worker."""
        self._refuse_state_hook("register_load_state_dict_pre_hook")

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> NoReturn:  # noqa: ARG002 - torch's signature
        """Not from here: the state is loaded in the worker."""
        self._refuse_state_hook("register_load_state_dict_post_hook")

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """What ``load_state_dict`` of a local module that holds this one comes to: all of it, submodules included."""
        own = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            missing, unexpected = self.load_state_dict(own, strict=False, assign=assign)
        except RemoteError as error:
            missing, unexpected = [], []
            error_msgs.append(error.remote_message or error.message)
        self.__dict__["_isohub_loaded_by"] = threading.get_ident()
        missing_keys.extend(prefix + name for name in missing)
        if strict:
            unexpected_keys.extend(prefix + name for name in unexpected)

    def _was_just_loaded(self) -> bool:
        """Whether torch now looks for submodules to load, which were loaded with this one. Asked once."""
        return bool(self.__dict__.pop("_isohub_loaded_by", None) == threading.get_ident())

    def _refuse_state_hook(self, name: str) -> NoReturn:
        hint = f"h.run(lambda module: module.{name}(...)) does it there"
        self._refuse("a hook on the state of", "would not run", hint)

    def _refuse(self, what: str, why: str, hint: str) -> NoReturn:
        name = self._isohub.worker.name
        raise NotImplementedError(f"{what} a module in the worker of {name} {why}\nhint: {hint}")
