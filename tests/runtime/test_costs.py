"""Costs of entries: measured where they are computed, but for first runs, which compile."""

from __future__ import annotations

import pytest
import torch

from vlcache_fx.runtime.costs import RunCost, nbytes_of
from vlcache_fx.store.eviction import cost_of
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import vlcache_store, with_api, with_backend


def test_first_run_is_left_out() -> None:
    cost = RunCost()
    assert cost.of(10) is None
    cost.note(1000.0, 10)
    assert cost.of(10) is None
    cost.note(20.0, 10)
    assert cost.of(5) == 10.0
    cost.note(30.0, 10)
    assert cost.of(5) == 15.0
    cost.note(30.0, 0)
    assert cost.of(5) == 15.0


def test_nbytes_of() -> None:
    assert nbytes_of([torch.zeros(3), None, 7, torch.zeros(2, dtype=torch.int8)]) == 14


@pytest.mark.parametrize("make", [with_api, with_backend])
def test_entries_have_costs(make: type) -> None:
    store = vlcache_store()
    pair = make(tiny_vlm(), store=store)
    pair.run(**tiny_vlm_inputs(5, 6, [(40, 0)]))
    assert all(cost_of(info.info) is None for info in store.entries())
    before = {info.key for info in store.entries()}
    _, report = pair.run(**tiny_vlm_inputs(5, 60, [(40, 1)], text_seed=3))
    new = [info for info in store.entries() if info.key not in before]
    costs = {info.key.partition("-")[0]: cost_of(info.info) for info in new}
    assert costs.keys() == {"donor", "text", "features"}
    assert all(cost is not None and cost > 0 for cost in costs.values())
    rows = [(cost_of(info.info), info.info["length"]) for info in new if "length" in info.info]
    run_ms = report["timings_ms"]["run"]
    for cost, length in rows:
        assert cost == pytest.approx(run_ms * length / report["num_tokens"], rel=0.01, abs=0.002)
