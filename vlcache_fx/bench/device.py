"""Device and dtype of a benchmark, and synchronisation with the device."""

from collections.abc import Callable

import torch

from vlcache_fx.bench.machine import faster_dtype
from vlcache_fx.bench.rounds import do_nothing
from vlcache_fx.errors import OptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = "'auto', 'cpu', 'cuda' or 'cuda:<number>'"


def resolve_device(name: str) -> torch.device:
    """Return the device; ``auto`` is a GPU if there is one.

    Raises:
        OptionError: an unknown type of device, or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device={name!r} is not valid: it must be {DEVICES}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"device={name!r} does not exist: torch finds {torch.cuda.device_count()} CUDA devices"
        )
    return device


def resolve_dtype(name: str, device: torch.device, rows: int, width: int) -> torch.dtype:
    """Return the dtype; ``auto`` is bfloat16 on a GPU, and the faster of float32 and bfloat16 on a CPU.

    Args:
        name: one of ``DTYPES``, or ``auto``.
        device: the model's device.
        rows, width: ``auto`` times a product ``[rows, width] @ [width, width]`` on a CPU.

    Raises:
        OptionError: no such dtype.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else faster_dtype(rows, width)
    if name not in DTYPES:
        raise OptionError(f"dtype={name!r} is not valid: it must be 'auto', " + ", ".join(map(repr, DTYPES)))
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name without ``torch.``, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for all work on ``device``; it does nothing for a CPU."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return do_nothing


def device_name(device: torch.device, processor: str) -> str:
    """Return the GPU's name, or ``processor``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor
