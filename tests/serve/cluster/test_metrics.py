"""The metrics of several replicas in one text."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from vlcache_fx.serve.cluster.metrics import ClusterMetrics
from vlcache_fx.serve.metrics import ServeMetrics


def test_replicas_are_told_apart_by_a_label() -> None:
    own = ClusterMetrics()
    own.saw_response("/live", 200)
    replicas = []
    for name, waiting in (("a", 1), ("b", 2)):
        metrics = ServeMetrics()
        metrics.show_load("m", waiting, 0)
        metrics.saw_response("/v1/models", 200)
        replicas.append((name, list(metrics.registry.collect())))
    text = own.text(replicas)
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    samples = {
        (sample.name, sample.labels.get("replica")): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["vlcache_serve_waiting", "a"] == 1
    assert samples["vlcache_serve_waiting", "b"] == 2
    assert samples["vlcache_serve_requests_total", "a"] == 1
    assert samples["vlcache_cluster_requests_total", None] == 1


def test_no_replica_leaves_the_own_numbers() -> None:
    assert "vlcache_cluster_retries_total 0.0" in ClusterMetrics().text()
