"""``torch.compile`` of a module that lives here, in place: its class, its state and its submodules stay.

Side: worker. Trust: options are the caller's; what is compiled and run is the repo's.
Source: ``torch.nn.Module.compile`` (torch 2.1 and later), ``torch._inductor.cpp_builder``.
"""

from __future__ import annotations

from typing import Any, Dict

__all__ = ["compile_module"]


def compile_module(module: Any, options: Dict[str, Any]) -> None:
    """Compile a module; the compiler runs at the first call.

    Args:
        module: Changed in place.
        options: As ``torch.compile`` takes them.

    Raises:
        RuntimeError: There is no compiler for what the module's device needs.
    """
    compile_in_place = getattr(module, "compile", None)
    if compile_in_place is None:
        raise RuntimeError("this torch has no Module.compile; it came with torch 2.1")
    if options.get("backend", "inductor") == "inductor":
        _check_compiler(module)
    compile_in_place(**options)


def _check_compiler(module: Any) -> None:
    """Look for what the default backend needs, before a call of the caller's finds out."""
    devices = {item.device.type for item in (*module.parameters(), *module.buffers())} or {"cpu"}
    if "cpu" not in devices:
        return  # Triton's compiler comes with it
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:
        return  # another torch; the first call tells
    try:
        get_cpp_compiler()
    except Exception as error:
        raise RuntimeError(
            "torch.compile needs a C++ compiler on the CPU, and this worker finds none on its PATH "
            f"({type(error).__name__}); install g++, or load without compile=, or with compile={{'backend': 'eager'}}"
        ) from None
