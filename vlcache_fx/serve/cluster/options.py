"""The options of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from vlcache_fx.errors import OptionError
from vlcache_fx.serve.options import check_number


@dataclass(frozen=True)
class ClusterOptions:
    """Checked options of ``vlcache serve --replicas``.

    Attributes:
        replicas: number of replicas; with ``max_replicas`` the least number.
        max_replicas: largest number of replicas, which Ray starts as load grows; None for a fixed number.
        cpus_per_replica: CPU cores that Ray sets aside for a replica.
        gpus_per_replica: GPUs, or the share of one, that Ray sets aside for a replica; None divides those
            that the cluster has.
        threads: threads of torch in each replica; None divides the cores of this machine.
        imbalance: how many requests more than the least busy replica one with a request's pictures may have
            and still get the request; None for half of the batch size, and at least 1.
        ray_address: address of a Ray cluster that runs, or ``auto``; None starts one on this machine alone.

    Raises:
        OptionError: an option has a bad value; the message names it and the valid ones.
    """

    replicas: int
    max_replicas: int | None = None
    cpus_per_replica: float = 1.0
    gpus_per_replica: float | None = None
    threads: int | None = None
    imbalance: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        _check_count("replicas", self.replicas, 1)
        if self.imbalance is not None:
            _check_count("imbalance", self.imbalance, 0)
        if self.max_replicas is not None:
            _check_count("max_replicas", self.max_replicas, self.replicas)
        if self.threads is not None:
            _check_count("threads", self.threads, 1)
        check_number("cpus_per_replica", self.cpus_per_replica)
        if self.gpus_per_replica is not None:
            check_number("gpus_per_replica", self.gpus_per_replica)

    @property
    def most_replicas(self) -> int:
        """The largest number of replicas."""
        return self.max_replicas or self.replicas


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name}={value!r} is not valid: it must be an integer >= {least}")
