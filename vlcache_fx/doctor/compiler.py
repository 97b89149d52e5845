"""torch's compiler: the backend, the C++ compiler, Inductor, its cache on disk, and the package's kernels."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

from vlcache_fx.compiling import missing_tool
from vlcache_fx.doctor.check import Check, Status, text_of

if TYPE_CHECKING:
    from torch import Tensor

EAGER = 'or use lowering="eager"'


def check_backend() -> Check:
    """The entry point by which ``torch.compile(model, backend="vlcache")`` finds this package."""
    import torch
    from torch._dynamo.backends.registry import lookup_backend

    from vlcache_fx.backend import vlcache

    name = "torch.compile backend"
    if "vlcache" not in torch._dynamo.list_backends():
        advice = "install the package (pip install, or pip install -e in a checkout)"
        return Check(name, Status.FAILED, "torch finds no backend 'vlcache'", advice)
    if lookup_backend("vlcache") is not vlcache:
        advice = "pip list shows whether it is installed twice"
        return Check(name, Status.FAILED, "the backend 'vlcache' is that of another package", advice)
    return Check(name, Status.OK, "'vlcache' is found")


def check_inductor(device: str = "cpu") -> Check:
    """Compile a small function anew, with the compiler that Inductor finds, and run it."""
    import torch

    name = f"inductor on {device}"
    tool = "Triton" if device != "cpu" else "?"
    begin_s = time.perf_counter()
    try:
        if device == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            tool = get_cpp_compiler()
        sample = _new_sample()
        values = torch.linspace(0, 1, 1000, device=device)
        with torch.no_grad():
            compiled = torch.compile(sample, backend="inductor", fullgraph=True)(values)
    except Exception as error:  # noqa: BLE001 (compilers raise any type)
        advice = missing_tool(error) or f"VLCACHE_LOG=debug and TORCH_LOGS=+inductor say more; {EAGER}"
        return Check(name, Status.FAILED, text_of(error), advice)
    seconds = time.perf_counter() - begin_s
    if not torch.allclose(compiled, sample(values), rtol=1e-4):
        return Check(name, Status.FAILED, f"{tool}: wrong results", f"try another compiler, {EAGER}")
    return Check(name, Status.OK, f"{tool}: compiled a function in {seconds:.1f} s")


def _sample(values: Tensor) -> Tensor:
    return (values.sin() * 0.25 + 1).exp() * values


def _new_sample() -> Callable[[Tensor], Tensor]:
    """Return a function with a constant of its own: no cache has its kernel."""
    code = _sample.__code__
    factor = 0.25 + random.random()  # noqa: S311 (no secret)
    constants = tuple(factor if constant == 0.25 else constant for constant in code.co_consts)
    return FunctionType(code.replace(co_consts=constants), _sample.__globals__)


def check_kernels() -> Check:
    """The kernels for CPUs in this package; without them PyTorch's run."""
    import torch

    from vlcache_fx.ops.attention import _kernel as attention
    from vlcache_fx.ops.linear import _kernel as linear

    name = "kernels of vlcache_fx"
    if not torch.cpu._is_avx512_bf16_supported():
        return Check(name, Status.OK, "not for this processor (no AVX512-BF16): PyTorch's are used")
    kernels = {"attention": attention, "linear": linear}
    built = [kernel for kernel, load in kernels.items() if load() is not None]
    if len(built) == len(kernels):
        return Check(name, Status.OK, f"built: {', '.join(built)}")
    found = f"built: {', '.join(built) or 'none'} of {', '.join(kernels)}; PyTorch's are used"
    return Check(name, Status.WARNING, found, "VLCACHE_LOG=debug shows the compiler's output")


def check_cache() -> Check:
    """Inductor's cache on disk, which keeps compiled programs between processes."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    name = "cache of compiled programs"
    folder = Path(cache_dir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "set TORCHINDUCTOR_CACHE_DIR to a folder that you can write to"
        return Check(name, Status.FAILED, f"{folder}: {error.strerror}", advice)
    return Check(name, Status.OK, str(folder))
