"""Encoder results are stored separately, by the content of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.keys.digest import content_digest
from vlcache_fx.keys.digest_cache import cached_digests, is_tracked
from vlcache_fx.options import Options
from vlcache_fx.runtime.encode import EncoderRunner
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.spec.program import EncoderSpec
from vlcache_fx.store import Entry, MemoryStore
from vlcache_fx.store.codec import pack
from vlcache_fx.testing.prompts import noise

from ..store.test_codec import DAMAGES
from .helpers import settings_of

COMPUTATIONS = {
    "double": lambda pixels, weight: pixels * weight,
    "sum": lambda pixels, weight: pixels.sum() + weight,
    "rows": lambda pixels, weight: pixels.shape[0],
}


class Encoding:
    """A runner of some computations that counts its runs."""

    def __init__(self, engine: ServingEngine, *names: str) -> None:
        self.calls, self.names = 0, names
        self.runner = EncoderRunner(self.run, EncoderSpec((0,), (2,), tuple(names)), engine)

    def run(self, pixels: Tensor, other: Tensor, weight: Tensor) -> Sequence[Any]:
        self.calls += 1
        return [COMPUTATIONS[name](pixels, weight) for name in self.names]

    def check(self, pixels: Tensor, other: Tensor, weight: Tensor) -> bool:
        """Check the results; return True for a hit."""
        before = self.calls
        results, hit = self.runner([pixels, other, weight])
        assert self.calls == before + (not hit)
        for name, result in zip(self.names, results, strict=True):
            want = COMPUTATIONS[name](pixels, weight)
            assert torch.equal(result, want) if isinstance(want, Tensor) else result == want
        return hit


@pytest.fixture
def engine() -> ServingEngine:
    return ServingEngine(Options(lowering="eager", store=MemoryStore(1 << 20)))


PIXELS, OTHER, WEIGHT = noise(0, 4, 3), noise(1, 2), torch.tensor(2.0)


def test_equal_inputs_are_encoded_once(engine: ServingEngine) -> None:
    encoding = Encoding(engine, "double", "sum", "rows")
    assert not encoding.check(PIXELS, OTHER, WEIGHT)
    assert encoding.check(PIXELS.clone(), OTHER + 1, WEIGHT)  # the results do not depend on it
    assert not encoding.check(PIXELS + 1, OTHER, WEIGHT)
    assert not encoding.check(PIXELS.reshape(3, 4), OTHER, WEIGHT)
    assert not encoding.check(PIXELS, OTHER, WEIGHT + 1)
    with settings_of(engine, salt="another"):
        assert not encoding.check(PIXELS, OTHER, WEIGHT)
    assert engine.stats()["encoder"] == {"hits": 1, "misses": 5}


def test_hits_return_stored_results(engine: ServingEngine) -> None:
    """Digests of results are tracked, so that the decoder does not hash features again."""
    encoding = Encoding(engine, "double", "sum")
    want = content_digest([PIXELS * WEIGHT])
    for _ in range(3):
        double, total = encoding.runner([PIXELS, OTHER, WEIGHT])[0]
        assert cached_digests(double) == {(0, 4): want}
        assert not is_tracked(total)  # no rows
        double += 1  # the caller's copy: later hits return the stored result
        assert not is_tracked(double)


def test_graphs_share_equal_results(engine: ServingEngine) -> None:
    assert not Encoding(engine, "double", "sum").check(PIXELS, OTHER, WEIGHT)
    assert Encoding(engine, "sum", "double").check(PIXELS, OTHER, WEIGHT)
    assert Encoding(engine, "sum").check(PIXELS, OTHER, WEIGHT)
    more = Encoding(engine, "double", "rows")  # one result is missing: all are computed
    assert not more.check(PIXELS, OTHER, WEIGHT)
    assert more.check(PIXELS, OTHER, WEIGHT)
    assert len(engine.store) == 3


def test_writes_to_results_do_not_reach_store(engine: ServingEngine) -> None:
    encoding = Encoding(engine, "double")
    for hit in (False, True, True):
        results, found = encoding.runner([PIXELS, OTHER, WEIGHT])
        assert found is hit
        assert torch.equal(results[0], PIXELS * 2)
        results[0].zero_()


def test_unstorable_results_are_recomputed(engine: ServingEngine) -> None:
    small = ServingEngine(replace(engine.options, store=MemoryStore(8)))
    encoding = Encoding(small, "double")
    assert [encoding.check(PIXELS, OTHER, WEIGHT) for _ in range(3)] == [False] * 3
    COMPUTATIONS["object"] = lambda pixels, weight: print
    try:
        encoding = Encoding(engine, "double", "object")
        assert [encoding.check(PIXELS, OTHER, WEIGHT) for _ in range(2)] == [False] * 2
    finally:
        del COMPUTATIONS["object"]
    assert engine.stats()["store_failures"] == 2


def test_failing_store_costs_reuse_only(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise StoreError("gone")

    encoding = Encoding(engine, "double")
    with monkeypatch.context() as patch:
        patch.setattr(engine.store, "get", fail)
        patch.setattr(engine.store, "put", fail)
        assert not encoding.check(PIXELS, OTHER, WEIGHT)
    assert engine.stats()["store_failures"] == 2
    assert not encoding.check(PIXELS, OTHER, WEIGHT)
    assert encoding.check(PIXELS, OTHER, WEIGHT)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_entry_is_a_miss(
    damage: Callable[[Entry], Entry], engine: ServingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = Encoding(engine, "double")
    monkeypatch.setattr(engine.store, "get", lambda key: damage(pack([PIXELS])))
    assert not encoding.check(PIXELS, OTHER, WEIGHT)
