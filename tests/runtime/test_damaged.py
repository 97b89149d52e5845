"""Entries whose bytes prove damaged while a request uses them: a miss, in every path that reads one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from vlcache_fx.bench.stress.faulty_store import FaultyStore
from vlcache_fx.bench.stress.settings import FaultRates
from vlcache_fx.errors import Reason
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.families import llava_inputs, tiny_llava
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, own_compiler_state, with_api

QUIET = FaultRates(0, 0, 0, 0, 0)
DAMAGED = FaultRates(0, 0, 0, 0, late_damage=1)


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def check(pair: Pair, inner: MemoryStore, first: dict[str, Any], second: dict[str, Any]) -> None:
    """After ``first``, ``second`` is right with damaged entries, and warm again with sound ones."""
    assert pair.run(**first)[0] <= 1e-5
    faults: list[str] = []
    pair.engine.store = FaultyStore(inner, 0, DAMAGED, faults.append)
    off, report = pair.run(**second)
    assert off <= 1e-5
    assert faults
    assert report["mode"] == "cold"
    assert report["reason_code"] is Reason.DAMAGED_ENTRY
    assert not any(span["hit"] for span in report["spans"])
    pair.engine.store = inner
    assert pair.run(**second)[1]["mode"] == "warm"
    assert pair.engine.refusals == []


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("images", [[(20, 0)], [(20, 0), (24, 1)]], ids=["one donor", "two donors"])
def test_damaged_donors(images: list[tuple[int, int]], strict: bool) -> None:
    inner = MemoryStore(1 << 30)
    pair = with_api(tiny_vlm(last_only=False), policy="none", store=inner, strict=strict)
    check(pair, inner, tiny_vlm_inputs(3, 5, images), tiny_vlm_inputs(9, 5, images, text_seed=1))


def test_damaged_features_and_donors() -> None:
    inner = MemoryStore(1 << 30)
    pair = with_api(tiny_llava(1), policy="none", store=inner)
    check(pair, inner, llava_inputs(3, 5, [0]), llava_inputs(9, 5, [0], text_seed=1))


def test_damaged_donor_of_a_probe() -> None:
    inner = MemoryStore(1 << 30)
    pair = with_api(tiny_vlm(num_layers=3, last_only=False), policy="cacheblend", budget=0.2, store=inner)
    check(pair, inner, tiny_vlm_inputs(3, 5, [(20, 0)]), tiny_vlm_inputs(9, 5, [(20, 0)], text_seed=1))
