"""Metrics for Prometheus, and attributes for spans of OpenTelemetry.

All numbers are those of ``engine.stats()``, read when Prometheus scrapes: nothing is counted twice.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlcache_fx.errors import OptionError
from vlcache_fx.integrations.metric_families import FAMILIES, OWN_LABELS
from vlcache_fx.runtime.report import Report, SpanReport
from vlcache_fx.runtime.usage import reused_tokens

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from vlcache_fx.runtime.engine import ServingEngine

COLLECTOR = "_vlcache_collector"
"""Attribute of a registry with its collector of engines."""

LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class EngineCollector:
    """Collects the metrics of engines, which it does not keep alive.

    One collector serves a registry: Prometheus wants all series of a metric together.
    """

    def __init__(self) -> None:
        self._engines: list[tuple[weakref.ref[ServingEngine], dict[str, str]]] = []
        self._lock = threading.Lock()

    def add(self, engine: ServingEngine, labels: Mapping[str, str]) -> None:
        """Add an engine.

        Raises:
            OptionError: another engine has the same labels.
        """
        with self._lock:
            self._engines = [(ref, own) for ref, own in self._engines if ref() not in (None, engine)]
            if any(own == dict(labels) for _, own in self._engines):
                raise OptionError(
                    f"another engine of this registry has the labels {dict(labels)}: give each engine labels "
                    "of its own, such as register(engine, model='qwen')"
                )
            self._engines.append((weakref.ref(engine), dict(labels)))

    def describe(self) -> list[Metric]:
        """Return nothing: metrics are known when they are collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all engines that are alive."""
        with self._lock:
            pairs = [(ref(), labels) for ref, labels in self._engines]
        stats = [(engine.stats(), labels) for engine, labels in pairs if engine is not None]
        if stats:
            yield from _metrics(stats)


def register(
    engine: ServingEngine, registry: CollectorRegistry | None = None, **labels: str
) -> EngineCollector:
    """Export an engine's ``stats()`` through ``prometheus_client``.

    Args:
        engine: the engine; a weak reference is kept, and its series end with it.
        registry: the registry; by default that of ``prometheus_client``.
        **labels: labels of all series of this engine, such as ``model="qwen"``; needed for several engines.

    Returns:
        The registry's collector, to pass to ``registry.unregister``.

    Raises:
        OptionError: ``prometheus_client`` is not installed, a label is not valid, or another engine has the
            same labels.
    """
    try:
        from prometheus_client import REGISTRY
    except ImportError as error:
        raise OptionError("metrics need prometheus_client: pip install 'vlcache_fx[metrics]'") from error
    for name in labels:
        if not LABEL.fullmatch(name) or name.startswith("__") or name in OWN_LABELS:
            taken = ", ".join(sorted(OWN_LABELS))
            raise OptionError(f"label {name!r} is not valid: letters, digits and _, and none of {taken}")
    registry = REGISTRY if registry is None else registry
    collector: EngineCollector | None = getattr(registry, COLLECTOR, None)
    if collector is None:
        collector = EngineCollector()
        setattr(registry, COLLECTOR, collector)
    registry.register(collector)  # has no effect if it is registered
    collector.add(engine, {name: str(value) for name, value in labels.items()})
    return collector


def _metrics(stats: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    shared = list(dict.fromkeys(name for _, labels in stats for name in labels))
    for family in FAMILIES:
        kind = CounterMetricFamily if family.is_counter else GaugeMetricFamily
        metric = kind(family.name, family.text, labels=[*shared, *family.labels])
        for own, labels in stats:
            for values, number in family.read(own):
                metric.add_metric([*(labels.get(name, "") for name in shared), *values], number)
        yield metric


def otel_attributes(report: Report | Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return attributes for an OpenTelemetry span of the call that a report is about.

    Those that the semantic conventions for generative AI name begin with ``gen_ai.``: input tokens, and how
    many of them came from a cache. The others begin with ``vlcache.``. OpenTelemetry is not needed.

    Args:
        report: a report, or its data.
    """
    report = report if isinstance(report, Report) else _report(report)
    tokens = reused_tokens(report)
    samples = 1 + max((span.sample for span in report.spans), default=0)
    found: dict[str, str | int | float | bool] = {
        "gen_ai.usage.input_tokens": report.num_tokens * samples,
        "gen_ai.usage.cache_read.input_tokens": tokens.reused,
        "vlcache.mode": report.mode,
        "vlcache.spans": len(report.spans),
        "vlcache.span_hits": sum(span.hit for span in report.spans),
        "vlcache.recomputed_tokens": tokens.recomputed,
    }
    if report.reason_code is not None:
        found["vlcache.reason"] = str(report.reason_code)
    if report.encoder_hit is not None:
        found["vlcache.encoder_hit"] = report.encoder_hit
    if report.shadow_kl is not None:
        found["vlcache.shadow_kl"] = report.shadow_kl
    return found


def _report(data: Mapping[str, Any]) -> Report:
    return Report(**{**data, "spans": tuple(SpanReport(**span) for span in data["spans"])})
