"""Kernels in C++, compiled where they are first needed, and the operators that call them."""

import ctypes
import functools
import logging
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch

from vlcache_fx.compiling import compiling, what_is_missing

__all__ = ["define_operator", "int64_array", "native_kernel"]

_log = logging.getLogger(__name__)

_library = torch.library.Library("vlcache", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operator(implementation: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> None:
    """Define ``torch.ops.vlcache.<name of the implementation>``, without gradients.

    ``torch.library.custom_op`` does that too, but its wrappers take 7 microseconds in every call, and a
    decoding step calls an operator for each linear layer.

    Args:
        implementation: with types that a schema can be inferred from; writes to none of its arguments.
        fake: gives the form of the result.
    """
    name = implementation.__name__
    schema = torch.library.infer_schema(implementation, mutates_args=())
    _library.define(name + schema)  # type: ignore[no-untyped-call]
    _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"vlcache::{name}", fake, lib=_library)


@functools.cache
def native_kernel(name: str, argument_types: tuple[Any, ...]) -> Callable[..., None] | None:
    """``vlcache_<name>`` of ``<name>.cpp``, from torch's cache on disk where it was built before.

    Args:
        name: of the file, and in that of the functions.
        argument_types: of the kernel, in ctypes.

    Returns:
        the kernel; None where it cannot be built, or ``vlcache_<name>_serves`` says no to this processor.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    source = files("vlcache_fx.ops").joinpath(f"{name}.cpp").read_text(encoding="utf-8")
    try:
        from torch._inductor.codecache import CppCodeCache

        with compiling():
            library = CppCodeCache.load(source, device_type="cpu")
    except Exception as error:  # noqa: BLE001 (whatever a compiler raises)
        # Without a compiler nothing else can be compiled either, and that is said elsewhere.
        level = logging.WARNING if what_is_missing(error) is None else logging.DEBUG
        text = str(error).partition("\n")[0]
        _log.log(level, "the kernel of %s cannot be built, PyTorch's is used: %s", name, text)
        _log.debug("%s", error)
        return None
    if not getattr(library, f"vlcache_{name}_serves")():
        return None
    function = getattr(library, f"vlcache_{name}")
    function.argtypes = argument_types
    function.restype = None
    kernel: Callable[..., None] = function
    return kernel


def int64_array(*values: int) -> Any:
    """An array of int64, as kernels take it."""
    return (ctypes.c_int64 * len(values))(*values)
