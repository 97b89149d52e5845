"""Peak memory of one call."""

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What, written to ``clear_refs``, makes Linux count the peak anew (see proc(5))."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes in use at the peak of a call (weights and stores included), and before it.

    On a CPU the resident set of the process; on a GPU what torch has allocated there.
    """

    peak_bytes: int
    before_bytes: int


def peak_memory(run: Callable[[], object], device: torch.device) -> PeakMemory | None:
    """Run once and look; None where this system cannot tell (the run is made all the same)."""
    if device.type == "cuda":
        return _on_cuda(run, device)
    _release_freed_memory()
    try:
        CLEAR.write_text(RESET_PEAK, encoding="ascii")
        before = _kibibytes("VmRSS")
    except OSError:  # another system than Linux, or a container that forbids it
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
    """Give freed memory back, or what an earlier call left in the C library's pools would hide a part."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
