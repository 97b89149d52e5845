"""Metrics for Prometheus and OpenTelemetry."""

from __future__ import annotations

import builtins
import gc
import json
import weakref
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="needs the extra metrics")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vlcache_fx.errors import OptionError, Reason, UnsupportedGraphError
from vlcache_fx.integrations.metric_families import FAMILIES
from vlcache_fx.integrations.metrics import otel_attributes, register
from vlcache_fx.options import Options
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.runtime.report import Report, SpanReport
from vlcache_fx.store.base import StoreStats

MODEL = "a" * 64


def cold(ms: float, reason: Reason = Reason.NEW_ITEM) -> Report:
    span = SpanReport(0, 80, "key", False, miss_reason=reason)
    return Report(
        "cold", "why", 100, (span,), timings_ms={"run": ms}, model_fingerprint=MODEL, reason_code=reason
    )


def warm(ms: float, **more: Any) -> Report:
    span = SpanReport(10, 80, "key", True, "memory")
    return Report(
        "warm", None, 100, (span,), token_layer_fraction=0.05, timings_ms={"run": ms},
        model_fingerprint=MODEL, **more,
    )  # fmt: skip


@pytest.fixture
def engine() -> ServingEngine:
    engine = ServingEngine()
    for report in (cold(900), cold(100), warm(20), warm(300), cold(200, Reason.EVICTED), warm(25)):
        engine.report(report)
    engine.refuse(UnsupportedGraphError(Reason.NO_MERGE, "no merge"))
    return engine


def scraped(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the number of each series by name and labels; fails if two series are equal."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    text = generate_latest(registry).decode()
    assert text.count("# HELP") == len({line for line in text.splitlines() if line.startswith("# HELP")})
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = (sample.name, tuple(sorted(sample.labels.items())))
            assert series not in found
            found[series] = sample.value
    return found


def test_usage(engine: ServingEngine) -> None:
    stats = json.loads(json.dumps(engine.stats()))
    assert stats["calls"] == {"cold": 3, "warm": 3, "bypass": 0}
    assert stats["spans"] == {"hits": {"memory": 3}, "misses": {"new_item": 2, "evicted": 1}}
    assert stats["reasons"] == {"new_item": 2, "evicted": 1}
    assert stats["tokens"] == {"reused": 3 * 76, "recomputed": 3 * 4}
    # The first cold call does not count, as its programs ran for the first time: 1 ms a token, then 1.25.
    assert stats["seconds_saved"] == pytest.approx((100 - 20) / 1e3 + 0 + (125 - 25) / 1e3)


def test_exact_prefix_and_shadow_runs() -> None:
    engine = ServingEngine()
    engine.report(warm(1, prefix_tokens=95))
    assert engine.stats()["tokens"] == {"reused": 76 + 15, "recomputed": 4}
    engine.report(warm(1, shadow_kl=0.1))
    assert engine.stats()["tokens"] == {"reused": 76 + 15, "recomputed": 4}


def test_cold_calls_that_compile_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ServingEngine()
    for compilations, report in enumerate([cold(900), cold(800), warm(10)]):
        monkeypatch.setattr(ServingEngine, "num_compilations", compilations)
        engine.report(report)
    assert engine.stats()["seconds_saved"] == 0.0


def test_scrape_equals_stats(engine: ServingEngine) -> None:
    registry = CollectorRegistry()
    register(engine, registry)
    found, stats = scraped(registry), engine.stats()

    def number(name: str, **labels: str) -> float:
        return found[name, tuple(sorted(labels.items()))]

    for mode, count in stats["calls"].items():
        assert number("vlcache_requests_total", mode=mode) == count
    for reason, count in stats["spans"]["misses"].items():
        assert number("vlcache_span_misses_total", reason=reason) == count
    assert number("vlcache_span_hits_total", tier="memory") == 3
    assert number("vlcache_tokens_reused_total") == stats["tokens"]["reused"]
    assert number("vlcache_tokens_recomputed_total") == stats["tokens"]["recomputed"]
    assert number("vlcache_seconds_saved_total") == stats["seconds_saved"]
    assert number("vlcache_store_capacity_bytes", tier="memory") == stats["store"]["capacity_bytes"]
    assert number("vlcache_store_bytes", tier="memory") == stats["store"]["used_bytes"]
    assert number("vlcache_refusals_total", reason="no_merge") == 1
    assert number("vlcache_budget") == engine.options.budget
    names = {name.removesuffix("_total") for name, _ in found}
    assert names >= {family.name for family in FAMILIES if not family.labels}


def test_numbers_of_each_tier(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = (StoreStats(1, 10, 100, tier="memory"), StoreStats(2, 20, 200, evictions=3, tier="file"))
    whole = StoreStats(3, 30, 300, evictions=3, promotions=4, queue_drops=5, tier="memory, file", tiers=tiers)
    monkeypatch.setattr(engine.store, "stats", lambda: whole)
    registry = CollectorRegistry()
    register(engine, registry)
    found = scraped(registry)
    assert found["vlcache_store_entries", (("tier", "file"),)] == 2
    assert found["vlcache_store_evictions_total", (("tier", "file"),)] == 3
    assert found["vlcache_store_evictions_total", (("tier", "memory"),)] == 0
    assert found["vlcache_store_promotions_total", ()] == 4
    assert found["vlcache_store_queue_drops_total", ()] == 5
    json.dumps(engine.stats())


def test_two_engines_in_one_registry(engine: ServingEngine) -> None:
    registry, other = CollectorRegistry(), ServingEngine(Options(budget=0.5))
    assert register(engine, registry, model="one") is register(other, registry, model="two", zone="b")
    found = scraped(registry)
    assert found["vlcache_requests_total", (("mode", "warm"), ("model", "one"), ("zone", ""))] == 3
    assert found["vlcache_requests_total", (("mode", "warm"), ("model", "two"), ("zone", "b"))] == 0
    with pytest.raises(OptionError, match="another engine of this registry has the labels"):
        register(ServingEngine(), registry, model="one")
    register(engine, registry, model="three")  # replaces its labels
    assert {dict(labels).get("model") for _, labels in scraped(registry)} == {"two", "three"}


def test_closed_engine(engine: ServingEngine) -> None:
    registry = CollectorRegistry()
    register(engine, registry)
    engine.close()
    found = scraped(registry)
    assert found["vlcache_store_entries", (("tier", "memory"),)] == 0
    assert found["vlcache_requests_total", (("mode", "warm"),)] == 3


def test_registry_does_not_keep_engines_alive() -> None:
    registry, engine = CollectorRegistry(), ServingEngine()
    collector = register(engine, registry)
    alive = weakref.ref(engine)
    del engine
    gc.collect()
    assert alive() is None
    assert scraped(registry) == {}
    next_engine = ServingEngine()
    assert register(next_engine, registry) is collector  # the labels are free again
    registry.unregister(collector)
    assert scraped(registry) == {}
    register(next_engine, registry)
    assert scraped(registry)


@pytest.mark.parametrize("name", ["tier", "reason", "mode", "1st", "__name"])
def test_labels_that_are_not_valid(engine: ServingEngine, name: str) -> None:
    with pytest.raises(OptionError, match="is not valid"):
        register(engine, CollectorRegistry(), **{name: "x"})


def test_missing_package(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match=r"pip install 'vlcache_fx\[metrics\]'"):
        register(engine)


def test_otel_attributes() -> None:
    attributes = otel_attributes(warm(10, encoder_hit=True))
    assert attributes == {
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.cache_read.input_tokens": 76,
        "vlcache.mode": "warm",
        "vlcache.spans": 1,
        "vlcache.span_hits": 1,
        "vlcache.recomputed_tokens": 4,
        "vlcache.encoder_hit": True,
    }
    of_data = otel_attributes(json.loads(json.dumps(cold(1).as_dict())))
    assert of_data == otel_attributes(cold(1))
    assert of_data["vlcache.reason"] == "new_item"
    assert otel_attributes(warm(1, shadow_kl=0.5))["vlcache.shadow_kl"] == 0.5
    assert otel_attributes(cold(1).as_view())["gen_ai.usage.cache_read.input_tokens"] == 0
