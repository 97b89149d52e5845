import pytest
import torch

from vlcache_fx.bench import overhead
from vlcache_fx.bench.model import DecoderSize
from vlcache_fx.bench.overhead import hash_cost, lookup_costs, splice_cost

SIZE = DecoderSize(3, 8, 4, 2, 2, 16, (30, 30, 40), 10, 4, False, 200)


def test_hash_cost_counts_all_bytes() -> None:
    cost = hash_cost(torch.zeros(10, 16, dtype=torch.bfloat16))
    assert cost.nbytes == 320
    assert cost.bytes_per_second == pytest.approx(320 / cost.seconds)


def test_splice_cost_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def once(run: object, *_: object) -> float:
        assert callable(run)
        seen.append(run())
        return 1.5

    monkeypatch.setattr(overhead, "median_seconds", once)
    cost = splice_cost(SIZE, 10, 4, 6, torch.float32, torch.device("cpu"))
    assert (cost.seconds, cost.calls) == (1.5, 2 * 3)
    assert [tuple(one.shape) for one in seen] == [(1, 14, 4)]


def test_lookup_costs_every_size() -> None:
    sizes: list[int] = []
    costs = lookup_costs([3, 10], lookups=5, after_size=lambda: sizes.append(1))
    assert [cost.entries for cost in costs] == [3, 10]
    assert all(0 < cost.median_seconds <= cost.p99_seconds for cost in costs)
    assert len(sizes) == 2
