"""Results of an encoder are kept one by one, under the content that they are computed from."""

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
    """A runner of some computations, and how often it ran."""

    def __init__(self, engine: ServingEngine, *names: str) -> None:
        self.calls, self.names = 0, names
        self.runner = EncoderRunner(self.run, EncoderSpec((0,), (2,), tuple(names)), engine)

    def run(self, pixels: Tensor, other: Tensor, weight: Tensor) -> Sequence[Any]:
        self.calls += 1
        return [COMPUTATIONS[name](pixels, weight) for name in self.names]

    def check(self, pixels: Tensor, other: Tensor, weight: Tensor) -> bool:
        """The results must be those of the computations; True on a hit."""
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


def test_the_same_bytes_are_not_encoded_again(engine: ServingEngine) -> None:
    encoding = Encoding(engine, "double", "sum", "rows")
    assert not encoding.check(PIXELS, OTHER, WEIGHT)
    assert encoding.check(PIXELS.clone(), OTHER + 1, WEIGHT)  # of what it does not depend on
    assert not encoding.check(PIXELS + 1, OTHER, WEIGHT)
    assert not encoding.check(PIXELS.reshape(3, 4), OTHER, WEIGHT)
    assert not encoding.check(PIXELS, OTHER, WEIGHT + 1)
    with settings_of(engine, salt="another"):
        assert not encoding.check(PIXELS, OTHER, WEIGHT)
    assert engine.stats()["encoder"] == {"hits": 1, "misses": 5}


def test_what_is_given_out_is_known(engine: ServingEngine) -> None:
    """So that the decoder's part need not read features that the encoder's part had read."""
    encoding = Encoding(engine, "double", "sum")
    want = content_digest([PIXELS * WEIGHT])
    for _ in range(3):
        double, total = encoding.runner([PIXELS, OTHER, WEIGHT])[0]
        assert cached_digests(double) == {(0, 4): want}
        assert not is_tracked(total)  # it has no rows
        double += 1  # of a caller's own: others are given what was stored
        assert not is_tracked(double)


def test_graphs_share_the_results_that_they_compute_alike(engine: ServingEngine) -> None:
    assert not Encoding(engine, "double", "sum").check(PIXELS, OTHER, WEIGHT)
    assert Encoding(engine, "sum", "double").check(PIXELS, OTHER, WEIGHT)
    assert Encoding(engine, "sum").check(PIXELS, OTHER, WEIGHT)
    more = Encoding(engine, "double", "rows")  # one is missing: all are computed
    assert not more.check(PIXELS, OTHER, WEIGHT)
    assert more.check(PIXELS, OTHER, WEIGHT)
    assert len(engine.store) == 3


def test_results_may_be_written_to(engine: ServingEngine) -> None:
    encoding = Encoding(engine, "double")
    for hit in (False, True, True):
        results, found = encoding.runner([PIXELS, OTHER, WEIGHT])
        assert found is hit
        assert torch.equal(results[0], PIXELS * 2)
        results[0].zero_()


def test_what_cannot_be_stored_is_computed_each_time(engine: ServingEngine) -> None:
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


def test_a_store_that_fails_costs_only_the_reuse(
    engine: ServingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_a_damaged_entry_is_a_miss(
    damage: Callable[[Entry], Entry], engine: ServingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = Encoding(engine, "double")
    monkeypatch.setattr(engine.store, "get", lambda key: damage(pack([PIXELS])))
    assert not encoding.check(PIXELS, OTHER, WEIGHT)
