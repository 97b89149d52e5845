"""The metrics of a cluster: those of all replicas, and its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class ClusterMetrics:
    """Counters of the process that takes requests and hands them to replicas."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "vlcache_cluster_requests",
            "requests that clients sent, by path and status",
            ["path", "status"],
            registry=self.registry,
        )
        self.retries = Counter(
            "vlcache_cluster_retries",
            "requests that a second replica answered, since the first one died",
            registry=self.registry,
        )
        self.lost = Counter(
            "vlcache_cluster_lost",
            "answers that were not complete, since a replica died",
            registry=self.registry,
        )

    def saw_response(self, path: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(path, str(status)).inc()

    def text(self, replicas: Iterable[tuple[str, Sequence[Metric]]] = ()) -> str:
        """All numbers, as Prometheus reads them.

        Args:
            replicas: name and metrics of each replica.
        """
        registry = CollectorRegistry()
        registry.register(_Merged(self.registry.collect(), replicas))
        return generate_latest(registry).decode()


class _Merged(Collector):
    """Metrics of several registries as one: families of one name in one, with the label ``replica``."""

    def __init__(self, own: Iterable[Metric], replicas: Iterable[tuple[str, Sequence[Metric]]]) -> None:
        self._families: dict[str, Metric] = {family.name: family for family in own}
        for replica, families in replicas:
            for family in families:
                merged = self._families.get(family.name)
                if merged is None:
                    merged = Metric(family.name, family.documentation, family.type, family.unit)
                    self._families[family.name] = merged
                merged.samples.extend(
                    sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
                )

    def collect(self) -> Iterator[Metric]:
        """The families."""
        yield from self._families.values()
