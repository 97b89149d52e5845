"""C++ kernels, compiled on first use, and the operators that call them."""

import ctypes
import functools
import logging
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch

from vlcache_fx.compiling import compiling, missing_tool

__all__ = ["define_operator", "int64_array", "native_kernel"]

_log = logging.getLogger(__name__)

_library = torch.library.Library("vlcache", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operator(
    implementation: Callable[..., Any], fake: Callable[..., Any], has_gradients: bool = False
) -> None:
    """Define ``torch.ops.vlcache.<implementation.__name__>``.

    ``torch.library.custom_op`` adds 7 microseconds per call, and a decoding step calls an operator for every
    linear layer.

    Args:
        implementation: function with type annotations for the schema; mutates none of its arguments.
        fake: fake implementation.
        has_gradients: autograd differentiates ``implementation`` as it is, outside of compiled graphs.
            Otherwise the operator has no gradients.
    """
    name = implementation.__name__
    schema = torch.library.infer_schema(implementation, mutates_args=())
    _library.define(name + schema)  # type: ignore[no-untyped-call]
    _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    if has_gradients:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"vlcache::{name}", fake, lib=_library)


@functools.cache
def native_kernel(name: str, argument_types: tuple[Any, ...]) -> Callable[..., None] | None:
    """Return ``vlcache_<name>`` of ``<name>.cpp``, built once and kept in torch's cache on disk.

    Args:
        name: name of the file and the function.
        argument_types: ctypes of the kernel's arguments.

    Returns:
        the kernel; None if it cannot be built, or if ``vlcache_<name>_is_supported`` returns 0.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    source = files("vlcache_fx.ops").joinpath(f"{name}.cpp").read_text(encoding="utf-8")
    try:
        from torch._inductor.codecache import CppCodeCache

        with compiling():
            library = CppCodeCache.load(source, device_type="cpu")
    except Exception as error:  # noqa: BLE001 (compilers raise any type)
        # The lowering reports a missing compiler, because it needs one too.
        level = logging.WARNING if missing_tool(error) is None else logging.DEBUG
        text = str(error).partition("\n")[0]
        _log.log(level, "vlcache: cannot build the %s kernel, using PyTorch's: %s", name, text)
        _log.debug("%s", error)
        return None
    if not getattr(library, f"vlcache_{name}_is_supported")():
        return None
    function = getattr(library, f"vlcache_{name}")
    function.argtypes = argument_types
    function.restype = None
    kernel: Callable[..., None] = function
    return kernel


def int64_array(*values: int) -> Any:
    """Return a C array of int64."""
    return (ctypes.c_int64 * len(values))(*values)
