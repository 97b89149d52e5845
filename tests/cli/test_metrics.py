"""Samples of metrics, and what two of them say; the texts are those of the package's own exporters."""

from __future__ import annotations

import asyncio
import copy
import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from vlcache_fx.cli.metrics_sample import (
    increase,
    metrics_url,
    new_in_buckets,
    parse_sample,
    quantile,
)
from vlcache_fx.cli.metrics_summary import Summary, summarize
from vlcache_fx.cli.metrics_tables import summary_tables
from vlcache_fx.errors import OptionError
from vlcache_fx.options import Options
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.serve.metrics import ServeMetrics

from ..serve.fakes import make_job


class Exporter:
    """The exporters of a server, for an engine whose counts a test sets."""

    def __init__(self, *models: str) -> None:
        self.metrics = ServeMetrics()
        self.engines = {name: ServingEngine(Options(capacity_bytes=1 << 30)) for name in models}
        self.stats: dict[str, dict[str, Any]] = {}
        for name, engine in self.engines.items():
            self.stats[name] = engine.stats()
            engine.stats = lambda name=name: self.stats[name]  # type: ignore[method-assign]
            self.metrics.add_engine(name, engine)

    def set(self, model: str, **changes: Any) -> None:
        self.stats[model] = copy.deepcopy(self.stats[model]) | changes

    def set_store(self, model: str, *tiers: Mapping[str, Any]) -> None:
        own = self.stats[model]["store"]
        self.set(model, store={**own, "tiers": [{**own, **tier} for tier in tiers]})

    def answer(self, model: str, *seconds: float) -> None:
        """Count answers whose first token took so long."""

        async def main() -> None:
            for one in seconds:
                job = make_job(1, 2, 3, loop=asyncio.get_running_loop())
                job.arrived_s, job.first_token_s, job.ended_s = 100.0, 100.0 + one, 200.0
                self.metrics.saw_answer(model, job)

        asyncio.run(main())

    def sample(self, taken_s: float) -> Any:
        return parse_sample(self.metrics.text(), taken_s)


@pytest.fixture
def exporter() -> Exporter:
    found = Exporter("m")
    found.set(
        "m",
        calls={"cold": 2, "warm": 6, "bypass": 1},
        reasons={"new_item": 2, "no_span": 1},
        spans={"hits": {"memory": 5, "file": 1}, "misses": {"new_item": 2}},
        tokens={"reused": 500.0, "recomputed": 12.5},
    )
    return found


def test_first_sample_has_totals_and_no_rates(exporter: Exporter) -> None:
    exporter.metrics.show_load("m", waiting=3, running=2)
    found = summarize(exporter.sample(10.0))
    assert {name: (count.total, count.per_second) for name, count in found.modes.items()} == {
        "cold": (2, None),
        "warm": (6, None),
        "bypass": (1, None),
    }
    assert {name: count.total for name, count in found.reasons.items()} == {"new_item": 2, "no_span": 1}
    assert (found.hit_share.total, found.hit_share.recent) == (0.75, None)
    assert {name: count.total for name, count in found.tokens.items()} == {"reused": 500, "recomputed": 12.5}
    assert (found.waiting, found.running) == (3, 2)
    assert found.seconds is None
    assert found.first_token_recent is None
    assert (found.first_token.answers, found.first_token.p50_ms) == (0, None)


def test_rates_since_the_sample_before(exporter: Exporter) -> None:
    before = exporter.sample(10.0)
    exporter.set(
        "m",
        calls={"cold": 2, "warm": 16, "bypass": 1},
        reasons={"new_item": 2, "no_span": 1, "evicted": 4},
        spans={"hits": {"memory": 8, "file": 1}, "misses": {"new_item": 3}},
        tokens={"reused": 1500.0, "recomputed": 22.5},
    )
    found = summarize(exporter.sample(14.0), before)
    assert found.seconds == 4.0
    rates = {name: count.per_second for name, count in found.modes.items()}
    assert rates == {"cold": 0.0, "warm": 2.5, "bypass": 0.0}
    assert found.reasons["evicted"].per_second == 1.0  # a label that is new
    assert found.hit_share.total == 9 / 12
    assert found.hit_share.recent == 3 / 4
    assert found.tokens["reused"].per_second == 250.0
    assert found.tokens["recomputed"].per_second == 2.5


def test_no_lookups_between_two_samples(exporter: Exporter) -> None:
    found = summarize(exporter.sample(14.0), exporter.sample(10.0))
    assert found.hit_share.recent is None
    assert found.first_token_recent is not None
    assert (found.first_token_recent.answers, found.first_token_recent.p95_ms) == (0, None)


def test_restart_of_the_server(exporter: Exporter) -> None:
    """Counters begin at 0 again: what they have counted since is new."""
    exporter.answer("m", 0.02, 0.02)
    before = exporter.sample(10.0)
    after = Exporter("m")
    after.set("m", calls={"cold": 1, "warm": 4, "bypass": 0})
    after.answer("m", 0.2)
    found = summarize(after.sample(12.0), before)
    assert found.modes["warm"].per_second == 2.0
    assert found.modes["bypass"].per_second == 0.0
    assert found.first_token_recent is not None
    assert found.first_token_recent.answers == 1


def test_tokens_that_a_server_computed(exporter: Exporter) -> None:
    before = exporter.sample(10.0)
    exporter.answer("m", 0.01, 0.01)  # 3 tokens each, none of them reused
    found = summarize(exporter.sample(12.0), before)
    assert (found.tokens["computed"].total, found.tokens["computed"].per_second) == (6, 3.0)


def test_time_to_first_token(exporter: Exporter) -> None:
    """In all, and of the last interval."""
    exporter.answer("m", *[0.02] * 10)  # in the bucket from 10 to 25 ms
    before = exporter.sample(10.0)
    exporter.answer("m", *[0.2] * 10)  # 100 to 250 ms
    found = summarize(exporter.sample(12.0), before)
    assert (found.first_token.answers, found.first_token.p50_ms) == (20, pytest.approx(25.0))
    assert found.first_token.p95_ms == pytest.approx(100 + 0.9 * 150)
    assert found.first_token_recent is not None
    assert (found.first_token_recent.answers, found.first_token_recent.p50_ms) == (10, pytest.approx(175.0))


def test_tiers_of_several_models() -> None:
    exporter = Exporter("m", "n")
    memory = {"tier": "memory", "entries": 3, "used_bytes": 100, "capacity_bytes": 1000, "hits": 7}
    disk = {"tier": "file", "entries": 9, "used_bytes": 800, "capacity_bytes": 9000, "evictions": 2}
    exporter.set_store("m", memory, disk)
    before = exporter.sample(0.0)
    exporter.set_store("m", {**memory, "hits": 17}, {**disk, "evictions": 6})
    found = summarize(exporter.sample(2.0), before)
    first, second, other = found.tiers
    assert [(tier.engine, tier.tier) for tier in found.tiers] == [
        ("m", "memory"),
        ("m", "file"),
        ("n", "memory"),
    ]
    assert (first.entries, first.used_bytes, first.capacity_bytes) == (3, 100, 1000)
    assert (first.hits.total, first.hits.per_second, first.evictions.total) == (17, 5.0, 0)
    assert (second.entries, second.evictions.total, second.evictions.per_second) == (9, 6, 2.0)
    assert (other.entries, other.capacity_bytes) == (0, 1 << 30)


def test_metrics_of_an_engine_alone() -> None:
    """Without a server there are no requests, and no times."""
    from prometheus_client import CollectorRegistry, generate_latest

    from vlcache_fx.integrations.metrics import register

    registry, engine = CollectorRegistry(), ServingEngine()
    register(engine, registry)
    found = summarize(parse_sample(generate_latest(registry).decode(), 0.0))
    assert (found.waiting, found.running) == (None, None)
    assert "computed" not in found.tokens
    assert found.first_token.answers == 0
    assert [tier.engine for tier in found.tiers] == [""]
    assert "requests running" not in shown(found)


def shown(summary: Summary) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(summary_tables(summary, "a title"))
    return capture.get()


def row(output: str, name: str) -> list[str]:
    """The cells of a table's row."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_tables(exporter: Exporter) -> None:
    exporter.metrics.show_load("m", waiting=0, running=1)
    before = exporter.sample(10.0)
    exporter.set("m", calls={"cold": 2, "warm": 2006, "bypass": 1})
    exporter.answer("m", 0.2)
    first, second = shown(summarize(before)), shown(summarize(exporter.sample(14.0), before))
    assert second.startswith(
        "a title\nspans reused: 75.0 %; in the last 4.0 s: -; requests running: 1, waiting: 0\n"
    )
    assert row(first, "warm") == ["warm", "6", "-"]
    assert row(second, "warm") == ["warm", "2,006", "500.0"]
    assert row(second, "without reuse: new_item") == ["without reuse: new_item", "2", "0.0"]
    assert row(second, "tokens reused") == ["tokens reused", "500", "0.0"]
    assert row(second, "m memory")[1:4] == ["0", "0 B", "1.0 GiB"]
    assert row(first, "all") == ["all", "0", "-", "-"]
    assert row(second, "last 4.0 s") == ["last 4.0 s", "1", "175", "242"]


def test_summary_is_json(exporter: Exporter) -> None:
    found = json.loads(json.dumps(summarize(exporter.sample(1.0), exporter.sample(0.0)).as_dict()))
    assert found["modes"]["warm"] == {"total": 6.0, "per_second": 0.0}
    assert found["tiers"][0]["capacity_bytes"] == 1 << 30


# parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000/metrics", "http://127.0.0.1:8000/metrics"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/metrics"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/metrics"),
        ("https://host/", "https://host/metrics"),
        ("host:9000", "http://host:9000/metrics"),
        ("http://host/behind/a/proxy/metrics?x=1", "http://host/behind/a/proxy/metrics?x=1"),
    ],
)
def test_metrics_url(url: str, expected: str) -> None:
    assert metrics_url(url) == expected


@pytest.mark.parametrize("url", ["ftp://host", "file:///etc/passwd", "http://", "http://host:70000", ""])
def test_bad_url(url: str) -> None:
    with pytest.raises(OptionError, match="is not valid: it must be like http://"):
        metrics_url(url)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>no</html>", "this is no text of Prometheus"),
        ("", "no metrics of vlcache_fx"),
        ("other_total 1.0\n", "no metrics of vlcache_fx"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_sample(text, 0.0)


def test_parser_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.parser", None)
    with pytest.raises(OptionError, match=r"needs prometheus_client: pip install 'vlcache_fx\[metrics\]'"):
        parse_sample("", 0.0)


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ([], 0.5, None),
        ([(1.0, 0.0), (INFINITE, 0.0)], 0.5, None),
        ([(1.0, 4.0), (2.0, 4.0), (INFINITE, 4.0)], 0.5, 0.5),
        ([(1.0, 0.0), (2.0, 4.0), (INFINITE, 4.0)], 0.25, 1.25),
        ([(1.0, 2.0), (2.0, 2.0), (4.0, 4.0), (INFINITE, 4.0)], 0.75, 3.0),
        ([(1.0, 1.0), (2.0, 1.0), (INFINITE, 4.0)], 0.95, 2.0),  # beyond the last bound
        ([(1.0, 4.0), (INFINITE, 4.0)], 1.0, 1.0),
    ],
)
def test_quantile(buckets: list[tuple[float, float]], share: float, expected: float | None) -> None:
    assert quantile(buckets, share) == expected


def test_new_in_buckets() -> None:
    now, before = ((1.0, 3.0), (INFINITE, 5.0)), ((1.0, 1.0), (INFINITE, 2.0))
    assert new_in_buckets(now, before) == ((1.0, 2.0), (INFINITE, 3.0))
    assert new_in_buckets(now, ()) == now
    assert new_in_buckets(before, now) == before  # after a restart


def test_increase() -> None:
    assert increase(5.0, 3.0) == 2.0
    assert increase(1.0, 3.0) == 1.0
    assert increase(5.0, None) == 5.0
    assert increase(None, 3.0) is None
