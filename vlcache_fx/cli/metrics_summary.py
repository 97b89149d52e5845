"""What ``vlcache top`` shows: sums, rates and shares of two samples, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vlcache_fx.cli.metrics_sample import Sample, increase, new_in_buckets, quantile

FIRST_TOKEN = "vlcache_serve_time_to_first_token_seconds"


@dataclass(frozen=True)
class Count:
    """A counter.

    Attributes:
        total: since the start of the server.
        per_second: since the sample before; None without one.
    """

    total: float
    per_second: float | None


@dataclass(frozen=True)
class Share:
    """Spans that hit, as a share of those looked up; None where there were none.

    Attributes:
        total: since the start of the server.
        recent: since the sample before.
    """

    total: float | None
    recent: float | None


@dataclass(frozen=True)
class Tier:
    """A tier of the store of one engine.

    Attributes:
        engine: labels of its engine, such as ``reference``; with replicas, ``reference 0``.
        tier: name of the kind of memory.
        entries: number of entries.
        used_bytes, capacity_bytes: size and bound.
        hits, evictions: counters.
    """

    engine: str
    tier: str
    entries: int
    used_bytes: int
    capacity_bytes: int
    hits: Count
    evictions: Count


@dataclass(frozen=True)
class Latency:
    """Time to first token, estimated from a histogram, in milliseconds; None where there were no answers.

    Attributes:
        answers: number of answers.
        p50_ms, p95_ms: median, and what 95 % of the answers did not exceed.
    """

    answers: int
    p50_ms: float | None
    p95_ms: float | None


@dataclass(frozen=True)
class Summary:
    """A sample, compared with the one before.

    Attributes:
        seconds: between the two; None if there is one only.
        waiting, running: requests at present; None if the metrics are not those of a server.
        modes: calls by what happened to them.
        reasons: calls without reuse, by reason.
        hit_share: share of spans that were reused.
        tokens: of prompts: ``reused`` from donors, ``recomputed`` in reused spans, and, of a server,
            ``computed``: all but the reused ones.
        tiers: tiers of the stores.
        first_token: over all answers.
        first_token_recent: over those since the sample before; None without one.
    """

    seconds: float | None
    waiting: int | None
    running: int | None
    modes: Mapping[str, Count]
    reasons: Mapping[str, Count]
    hit_share: Share
    tokens: Mapping[str, Count]
    tiers: tuple[Tier, ...]
    first_token: Latency
    first_token_recent: Latency | None

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        return asdict(self)


def summarize(now: Sample, before: Sample | None = None) -> Summary:
    """Summarize a sample, with rates since the one before.

    Args:
        now: the sample.
        before: an earlier sample of the same server.
    """
    seconds = None if before is None else now.taken_s - before.taken_s
    buckets = now.buckets(FIRST_TOKEN)
    recent = None if before is None else new_in_buckets(buckets, before.buckets(FIRST_TOKEN))
    return Summary(
        seconds,
        _whole(now.total("vlcache_serve_waiting")),
        _whole(now.total("vlcache_serve_running")),
        _counts(now, before, "vlcache_requests_total", "mode"),
        _counts(now, before, "vlcache_requests_without_reuse_total", "reason"),
        _hit_share(now, before),
        _tokens(now, before),
        _tiers(now, before),
        _latency(buckets),
        None if recent is None else _latency(recent),
    )


def _count(total: float, before_total: float | None, now: Sample, before: Sample | None) -> Count:
    if before is None or now.taken_s <= before.taken_s:
        return Count(total, None)
    risen = increase(total, before_total or 0.0) or 0.0
    return Count(total, risen / (now.taken_s - before.taken_s))


def _counts(now: Sample, before: Sample | None, name: str, label: str) -> dict[str, Count]:
    earlier = {} if before is None else before.by(name, label)
    return {key: _count(total, earlier.get(key), now, before) for key, total in now.by(name, label).items()}


def _hit_share(now: Sample, before: Sample | None) -> Share:
    names = ("vlcache_span_hits_total", "vlcache_span_misses_total")
    hits, misses = (now.total(name) or 0.0 for name in names)
    recent = None
    if before is not None:
        new_hits, new_misses = (
            increase(total, before.total(name) or 0.0) or 0.0
            for name, total in zip(names, (hits, misses), strict=True)
        )
        recent = _share(new_hits, new_misses)
    return Share(_share(hits, misses), recent)


def _share(hits: float, misses: float) -> float | None:
    return hits / (hits + misses) if hits + misses else None


def _tokens(now: Sample, before: Sample | None) -> dict[str, Count]:
    found = {}
    for kind in ("reused", "recomputed"):
        total = now.total(f"vlcache_tokens_{kind}_total")
        if total is not None:
            earlier = None if before is None else before.total(f"vlcache_tokens_{kind}_total")
            found[kind] = _count(total, earlier, now, before)
    computed = _computed(now)
    if computed is not None:
        found["computed"] = _count(computed, None if before is None else _computed(before), now, before)
    return found


def _computed(sample: Sample) -> float | None:
    """Tokens of prompts that a server computed: all but those from donors."""
    name = "vlcache_serve_tokens_total"
    prompt, cached = sample.total(name, kind="prompt"), sample.total(name, kind="cached")
    return None if prompt is None or cached is None else prompt - cached


def _tiers(now: Sample, before: Sample | None) -> tuple[Tier, ...]:
    found = []
    for labels, capacity in now.series.get("vlcache_store_capacity_bytes", ()):
        counts = []
        for metric in ("vlcache_store_hits_total", "vlcache_store_evictions_total"):
            earlier = None if before is None else before.total(metric, **labels)
            counts.append(_count(now.total(metric, **labels) or 0.0, earlier, now, before))
        tier = Tier(
            engine=" ".join(value for name, value in labels.items() if name != "tier"),
            tier=labels.get("tier", ""),
            entries=int(now.total("vlcache_store_entries", **labels) or 0),
            used_bytes=int(now.total("vlcache_store_bytes", **labels) or 0),
            capacity_bytes=int(capacity),
            hits=counts[0],
            evictions=counts[1],
        )
        found.append(tier)
    return tuple(found)


def _latency(buckets: tuple[tuple[float, float], ...]) -> Latency:
    middle, most = (quantile(buckets, share) for share in (0.5, 0.95))
    answers = int(buckets[-1][1]) if buckets else 0
    return Latency(answers, _milliseconds(middle), _milliseconds(most))


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
