"""Rates of this machine: matrix products, copies and reads per second."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlcache_fx.bench.device import synchronizer
from vlcache_fx.bench.rounds import fastest_seconds

REPEATS = 15


@dataclass(frozen=True)
class Rates:
    """Measured rates: the highest of all runs, for use in lower bounds.

    Attributes:
        matmul_flops: floating-point operations per second of a square product in the benchmark's dtype.
        copy_bytes: bytes read and written per second by a copy on the device.
        read_bytes: bytes per second of a sum over host memory, the reference for digests.
    """

    matmul_flops: float
    copy_bytes: float
    read_bytes: float


def measure_rates(
    dtype: torch.dtype,
    device: torch.device,
    width: int | None = None,
    size_bytes: int | None = None,
    limit_s: float = math.inf,
) -> Rates:
    """Measure the rates; needs an idle machine.

    Args:
        dtype: dtype of the product.
        device: device of the product and the copy.
        width: width of the square product; by default large enough to keep the device busy.
        size_bytes: size of the copied and read tensors; by default larger than caches.
        limit_s: time for each rate; after it, no further run begins.
    """
    on_gpu = device.type == "cuda"
    width = width or (8192 if on_gpu else 2048)
    size_bytes = size_bytes or (2**30 if on_gpu else 2**28)

    def seconds(run: Callable[[], object]) -> float:
        return fastest_seconds(run, REPEATS, synchronizer(device), limit_s)

    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    product = seconds(lambda: left @ right)
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source))
    host = source.cpu()
    read = seconds(host.sum)
    nbytes = source.numel() * source.element_size()
    return Rates(2 * width**3 / product, 2 * nbytes / copied, nbytes / read)
