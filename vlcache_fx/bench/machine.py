"""Description of the machine that runs a measurement."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from vlcache_fx.bench.rounds import System, time_once


@dataclass(frozen=True)
class Machine:
    """Processor, usable cores, threads of torch, and versions."""

    processor: str
    cores: int
    threads: int
    torch: str
    transformers: str


def describe_machine() -> Machine:
    """Describe the machine of this process."""
    import transformers

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    return Machine(_processor(), cores, threads, torch.__version__, transformers.__version__)


def machine_line(machine: Machine) -> str:
    """Format the description in one line."""
    return (
        f"{machine.processor}, {machine.cores} cores, {machine.threads} threads, torch {machine.torch},"
        f" transformers {machine.transformers}"
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def faster_dtype(rows: int, width: int) -> torch.dtype:
    """Return float32 or bfloat16: the dtype with the faster product ``[rows, width] @ [width, width]``."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(rows, width, dtype=dtype), torch.randn(width, width, dtype=dtype)
        product = System(lambda left=left, right=right: left @ right)  # type: ignore[misc]
        time_once(product)
        seconds[dtype] = median(time_once(product) for _ in range(3))
    return min(seconds, key=lambda dtype: seconds[dtype])
