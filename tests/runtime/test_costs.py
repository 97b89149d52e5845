"""Costs of entries: measured where they are computed, but for first runs, which compile."""

from __future__ import annotations

import pytest

from vlcache_fx.runtime.pace import Pace
from vlcache_fx.store.eviction import cost_of
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import vlcache_store, with_api, with_backend


def test_pace_gives_costs() -> None:
    pace = Pace()
    assert pace.cost_ms(10) is None
    pace.add(10, 0.02)
    assert pace.cost_ms(5) == pytest.approx(10.0)
    assert pace.cost_ms(5, share=0.5) == pytest.approx(5.0)


@pytest.mark.parametrize("make", [with_api, with_backend])
def test_entries_have_costs(make: type) -> None:
    store = vlcache_store()
    pair = make(tiny_vlm(), store=store)
    pair.run(**tiny_vlm_inputs(5, 6, [(40, 0)]))
    before = {info.key for info in store.entries()}
    pair.run(**tiny_vlm_inputs(5, 60, [(40, 1)], text_seed=3))
    new = [info for info in store.entries() if info.key not in before]
    costs = {info.key.partition("-")[0]: cost_of(info.info) for info in new}
    assert costs.keys() == {"donor", "text", "features"}
    assert all(cost is not None and cost > 0 for cost in costs.values())
    rows = [(cost_of(info.info), info.info["length"]) for info in new if "length" in info.info]
    per_token = [cost / length for cost, length in rows if cost is not None]
    assert len(per_token) == len(rows)
    assert max(per_token) == pytest.approx(min(per_token), rel=0.05, abs=1e-3)
