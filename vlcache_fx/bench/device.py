"""Which device and dtype a benchmark runs on, and how to wait for the device."""

from collections.abc import Callable

import torch

from vlcache_fx.bench.machine import faster_dtype
from vlcache_fx.bench.rounds import do_nothing
from vlcache_fx.errors import OptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = "'auto', 'cpu', 'cuda' or 'cuda:<number>'"


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        OptionError: no such kind of device, or this machine has none.
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
            f"device={name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def resolve_dtype(name: str, device: torch.device, rows: int, width: int) -> torch.dtype:
    """The dtype of that name; ``auto`` is bfloat16 on a GPU, and on a CPU what multiplies faster there.

    Args:
        name: one of ``DTYPES``, or ``auto``.
        device: where the model will run.
        rows: of the product that ``auto`` times on a CPU.
        width: the same product's other sizes.

    Raises:
        OptionError: no such dtype.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else faster_dtype(rows, width)
    if name not in DTYPES:
        raise OptionError(f"dtype={name!r} is not valid: it must be 'auto', " + ", ".join(map(repr, DTYPES)))
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits for all work on ``device``; does nothing for a CPU."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return do_nothing


def device_name(device: torch.device, processor: str) -> str:
    """The GPU's name, or ``processor``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor
