"""Overheads of reuse: digests, splices, lookups."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns

import torch
from torch import Tensor

import vlcache_fx.ops  # noqa: F401 - defines torch.ops.vlcache
from vlcache_fx.bench.device import synchronizer
from vlcache_fx.bench.model import DecoderSize
from vlcache_fx.bench.rounds import median_seconds
from vlcache_fx.keys import content_digest
from vlcache_fx.store import Entry, MemoryStore

LOOKUPS = 2000
ENTRY_BYTES = 64


@dataclass(frozen=True)
class HashCost:
    """Digest of the features of one image: their bytes, seconds, and bytes per second."""

    nbytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Throughput of the digest."""
        return self.nbytes / self.seconds


@dataclass(frozen=True)
class SpliceCost:
    """Time to splice stored and recomputed rows with calls of the bare operator.

    An upper bound: compiled programs fuse the splice with neighbouring operators.

    Attributes:
        seconds: duration of one call, for K or V of one layer.
        calls: number of calls per prefill.
    """

    seconds: float
    calls: int


@dataclass(frozen=True)
class LookupCost:
    """Seconds of a lookup in a store of ``entries`` entries: median and 99th percentile."""

    entries: int
    median_seconds: float
    p99_seconds: float


def hash_cost(features: Tensor) -> HashCost:
    """Time the digest of a span's features, which is part of a donor's key."""
    seconds = median_seconds(lambda: content_digest([features]), 5, synchronizer(features.device))
    return HashCost(features.numel() * features.element_size(), seconds)


def splice_cost(
    size: DecoderSize,
    vision_tokens: int,
    text_tokens: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> SpliceCost:
    """Time ``torch.ops.vlcache.splice_rows`` at the shape of a warm run.

    Args:
        size: sizes of the decoder.
        vision_tokens: number of stored rows.
        text_tokens: number of computed text rows after them.
        rows: number of computed rows, with text.
        dtype, device: dtype and device of the rows.
    """
    width = size.kv_heads * size.head_dim
    donor = torch.zeros(1, vision_tokens, width, dtype=dtype, device=device)
    fresh = torch.zeros(1, rows, width, dtype=dtype, device=device)
    recomputed = rows - text_tokens
    source = torch.cat([torch.arange(vision_tokens), -1 - torch.arange(recomputed, rows)])
    source[:recomputed] = -1 - torch.arange(recomputed)
    source = source.to(device)

    def splice() -> object:
        return torch.ops.vlcache.splice_rows(donor, fresh, source, 1)

    return SpliceCost(median_seconds(splice, 5, synchronizer(device)), 2 * size.attention_layers)


def lookup_costs(
    entries: Sequence[int], lookups: int = LOOKUPS, after_size: Callable[[], None] = lambda: None
) -> list[LookupCost]:
    """Time ``MemoryStore.get`` of existing keys at each number of entries.

    Args:
        entries: sizes of the store, ascending.
        lookups: number of timed lookups of random keys per size.
        after_size: called after each size.
    """
    store = MemoryStore(2 * ENTRY_BYTES * max(entries))
    keys: list[str] = []
    draw = random.Random(0)  # noqa: S311 - not a secret
    found = []
    for number in entries:
        for index in range(len(keys), number):
            keys.append(content_digest([index]))
            store.put(keys[-1], Entry({"rows": torch.empty(ENTRY_BYTES // 4)}, {}, copy=False))
        seconds = sorted(_lookup_seconds(store, draw.choice(keys)) for _ in range(lookups))
        found.append(LookupCost(number, median(seconds), seconds[min(lookups - 1, lookups * 99 // 100)]))
        after_size()
    store.close()
    return found


def _lookup_seconds(store: MemoryStore, key: str) -> float:
    start = perf_counter_ns()
    store.get(key)
    return (perf_counter_ns() - start) * 1e-9
