"""Processors, threads and GPUs."""

from __future__ import annotations

import os
from pathlib import Path

from vlcache_fx.doctor.check import Check, Status

DRIVER = Path("/proc/driver/nvidia/version")


def check_threads() -> Check:
    """Threads of torch, and cores that this process may use."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    found = f"{threads} of torch, {cores} cores"
    if threads > cores:
        return Check("threads", Status.WARNING, found, f"set OMP_NUM_THREADS={cores}")
    return Check("threads", Status.OK, found)


def check_gpu() -> Check:
    """GPUs that torch sees; none is needed."""
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Check("gpu", Status.OK, f"{', '.join(names)}; driver {driver or 'not found'}")
    if driver is None:
        return Check("gpu", Status.OK, "none: the CPU is used")
    found = f"torch uses none, although there is a driver, {driver}"
    if torch.version.cuda is None:
        advice = "install torch with CUDA: https://pytorch.org/get-started"
    else:
        advice = (
            f"the driver may be too old for CUDA {torch.version.cuda}, or CUDA_VISIBLE_DEVICES hides GPUs"
        )
    return Check("gpu", Status.WARNING, found, advice)


def _driver() -> str | None:
    """Return the version of NVIDIA's driver; None without one."""
    try:
        line = DRIVER.read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return None
    return next((word for word in line.split() if word[:1].isdigit() and "." in word), None)
