"""The metrics of an engine: names, labels, and where ``stats()`` has the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Series: TypeAlias = Iterable[tuple[tuple[str, ...], float]]
"""Values of labels, with the number."""


@dataclass(frozen=True)
class Family:
    """A metric.

    Attributes:
        name: without ``_total``, which Prometheus appends to the names of counters.
        text: one sentence for ``# HELP``.
        read: returns its series, given ``stats()``.
        labels: names of its labels.
        is_counter: a number that only rises; otherwise a current value.
    """

    name: str
    text: str
    read: Callable[[Mapping[str, Any]], Series]
    labels: tuple[str, ...] = ()
    is_counter: bool = True


def _number(*path: str) -> Callable[[Mapping[str, Any]], Series]:
    """Read one number of ``stats()``."""

    def read(stats: Mapping[str, Any]) -> Series:
        value: Any = stats
        for name in path:
            value = value[name]
        return [((), float(value))]

    return read


def _mapping(*path: str) -> Callable[[Mapping[str, Any]], Series]:
    """Read a mapping of ``stats()``: a series for each of its keys."""

    def read(stats: Mapping[str, Any]) -> Series:
        value: Any = stats
        for name in path:
            value = value[name]
        return [((str(label),), float(number)) for label, number in value.items()]

    return read


def _tiers(field: str) -> Callable[[Mapping[str, Any]], Series]:
    """Read a field of the store: a series for each tier. Tiers of one name are added up."""

    def read(stats: Mapping[str, Any]) -> Series:
        store = stats["store"]
        numbers: dict[str, float] = {}
        for tier in store.get("tiers") or [store]:
            numbers[tier["tier"]] = numbers.get(tier["tier"], 0.0) + tier[field]
        return [((name,), number) for name, number in numbers.items()]

    return read


def _store(field: str) -> Callable[[Mapping[str, Any]], Series]:
    """Read a field that only the store as a whole has."""
    return _number("store", field)


_BY_TIER = ("tier",)

FAMILIES = (
    Family("vlcache_requests", "Calls, by what happened to them.", _mapping("calls"), ("mode",)),
    Family(
        "vlcache_requests_without_reuse",
        "Calls without reuse, by reason.",
        _mapping("reasons"),
        ("reason",),
    ),
    Family("vlcache_span_hits", "Spans that were reused, by tier.", _mapping("spans", "hits"), _BY_TIER),
    Family("vlcache_span_misses", "Spans that were not reused.", _mapping("spans", "misses"), ("reason",)),
    Family("vlcache_encoder_lookups", "Lookups of encoder outputs.", _mapping("encoder"), ("result",)),
    Family("vlcache_tokens_reused", "Tokens read from donors.", _number("tokens", "reused")),
    Family(
        "vlcache_tokens_recomputed",
        "Tokens of reused spans that were computed.",
        _number("tokens", "recomputed"),
    ),
    Family(
        "vlcache_seconds_saved",
        "Estimated seconds saved, from cold calls of the same model.",
        _number("seconds_saved"),
    ),
    Family("vlcache_store_bytes", "Bytes stored.", _tiers("used_bytes"), _BY_TIER, is_counter=False),
    Family(
        "vlcache_store_capacity_bytes",
        "Bound in bytes.",
        _tiers("capacity_bytes"),
        _BY_TIER,
        is_counter=False,
    ),
    Family("vlcache_store_entries", "Entries stored.", _tiers("entries"), _BY_TIER, is_counter=False),
    Family("vlcache_store_hits", "Reads that found an entry.", _tiers("hits"), _BY_TIER),
    Family("vlcache_store_misses", "Reads that found none.", _tiers("misses"), _BY_TIER),
    Family("vlcache_store_admissions", "Entries taken in.", _tiers("admissions"), _BY_TIER),
    Family("vlcache_store_evictions", "Entries dropped to make room.", _tiers("evictions"), _BY_TIER),
    Family("vlcache_store_rejections", "Entries too large for the tier.", _tiers("rejections"), _BY_TIER),
    Family("vlcache_store_removals", "Entries dropped by clear().", _tiers("removals"), _BY_TIER),
    Family("vlcache_store_failures", "Reads and writes that failed.", _tiers("failures"), _BY_TIER),
    Family("vlcache_store_damaged", "Entries whose bytes were damaged.", _tiers("damaged"), _BY_TIER),
    Family("vlcache_store_promotions", "Entries copied to a faster tier.", _store("promotions")),
    Family("vlcache_store_write_downs", "Entries written to a slower tier.", _store("write_downs")),
    Family("vlcache_store_queue_drops", "Writes that the queue did not take.", _store("queue_drops")),
    Family("vlcache_store_errors", "Store errors that cost a call its reuse.", _number("store_failures")),
    Family("vlcache_plan_failures", "Plans that could not be made.", _number("plan_failures")),
    Family("vlcache_uncompiled_calls", "Calls that Dynamo ran uncompiled.", _number("uncompiled_calls")),
    Family("vlcache_refusals", "Refused graphs and calls.", _mapping("refusals"), ("reason",)),
    Family("vlcache_compilations", "Compilations.", _number("compilations")),
    Family("vlcache_compile_seconds", "Seconds spent compiling.", _number("compile_seconds")),
    Family("vlcache_shadow_runs", "Shadow runs.", _number("shadow", "runs")),
    Family("vlcache_shadow_flips", "Shadow runs with another next token.", _number("shadow", "flips")),
    Family("vlcache_shadow_violations", "Shadow runs out of bounds.", _number("shadow", "violations")),
    Family(
        "vlcache_shadow_mean_kl",
        "Mean KL divergence, in nats.",
        _number("shadow", "mean_kl"),
        is_counter=False,
    ),
    Family(
        "vlcache_shadow_max_kl",
        "Largest KL divergence, in nats.",
        _number("shadow", "max_kl"),
        is_counter=False,
    ),
    Family("vlcache_budget", "Budget, as set or found by the gate.", _number("budget"), is_counter=False),
    Family(
        "vlcache_bypassed_models",
        "Models whose reuse shadow runs or the gate turned off.",
        _number("shadow", "bypassed_models"),
        is_counter=False,
    ),
)

OWN_LABELS = frozenset(name for family in FAMILIES for name in family.labels)
"""Labels that belong to metrics; engines cannot have them."""
