"""Peak memory of one call."""

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Resets the peak when written to ``clear_refs``, see proc(5)."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes in use at the peak of a call (with weights and stores), and before the call.

    On a CPU the resident set of the process; on a GPU torch's allocations.
    """

    peak_bytes: int
    before_bytes: int


def peak_memory(run: Callable[[], object], device: torch.device) -> PeakMemory | None:
    """Run once and return the peak; None if the system cannot measure it."""
    if device.type == "cuda":
        return _on_cuda(run, device)
    _release_freed_memory()
    try:
        CLEAR.write_text(RESET_PEAK, encoding="ascii")
        before = _kibibytes("VmRSS")
    except OSError:  # not Linux, or forbidden in a container
        run()
        return None
    run()
    return PeakMemory(1024 * _kibibytes("VmHWM"), 1024 * before)


def _on_cuda(run: Callable[[], object], device: torch.device) -> PeakMemory:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return PeakMemory(torch.cuda.max_memory_allocated(device), before)


def _kibibytes(field: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise OSError(f"{STATUS} has no {field}")


def _release_freed_memory() -> None:
    """Return freed memory to the system: the C library's pools would hide part of the peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
