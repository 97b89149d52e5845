"""Reports and statistics are plain data."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from vlcache_fx.errors import OptionError
from vlcache_fx.policies import get_policy
from vlcache_fx.runtime.settings import CallSettings
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, settings_of, with_backend

LAYERS = 2
CONTRACT = {
    "mode", "reason", "num_tokens", "spans",
    "rows_per_layer", "token_layer_fraction", "encoder_hit", "timings_ms",
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(_compiler: None) -> Pair:
    return with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), budget=0.1)


def checked(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report after a round trip through JSON."""
    assert set(report) >= CONTRACT
    again = json.loads(json.dumps(report, allow_nan=False))
    assert all(isinstance(value, float) and value >= 0 for value in again["timings_ms"].values())
    return again


def test_last_report_before_first_call(pair: Pair) -> None:
    fresh = with_backend(tiny_vlm())
    assert fresh.engine.last_report is None
    assert fresh.engine.stats()["calls"] == {"cold": 0, "warm": 0, "bypass": 0}


def test_reports_and_stats(pair: Pair) -> None:
    engine = pair.engine
    engine.clear()
    start = engine.stats()
    one, two = tiny_vlm_inputs(5, 6, [(40, 0)]), tiny_vlm_inputs(9, 6, [(40, 0), (24, 1)], text_seed=1)
    moved = tiny_vlm_inputs(5, 6, [(40, 0)], text_seed=2)

    cold = checked(pair.run(**one)[1])
    assert (cold["mode"], cold["num_tokens"], cold["encoder_hit"]) == ("cold", 51, False)
    assert cold["rows_per_layer"] == [51] * (LAYERS + 1)
    assert cold["token_layer_fraction"] == 1.0
    (span,) = cold["spans"]
    assert (span["start"], span["length"], span["hit"], span["donor_tier"]) == (5, 40, False, None)
    assert re.fullmatch(r"donor(-[0-9a-f]{16}){2}-[0-9a-f]{64}", span["key"])
    assert {"identify", "lookup", "plan", "run", "admit"} <= set(cold["timings_ms"])

    again = checked(pair.run(**one)[1])
    assert (again["mode"], again["reason"], again["encoder_hit"]) == ("warm", None, True)
    assert (again["prefix_tokens"], again["token_layer_fraction"]) == (51, 0.0)
    assert again["rows_per_layer"] == [2] * (LAYERS + 1)

    warm = checked(pair.run(**moved)[1])
    assert (warm["mode"], warm["reason"], warm["encoder_hit"]) == ("warm", None, True)
    assert warm["rows_per_layer"][:LAYERS] == [11 + 4] * LAYERS
    assert warm["token_layer_fraction"] == pytest.approx(4 / 40)
    (span,) = warm["spans"]
    assert (span["hit"], span["donor_tier"]) == (True, MemoryStore.tier)

    mixed = checked(pair.run(**two)[1])
    assert [(s["start"], s["length"], s["hit"]) for s in mixed["spans"]] == [(9, 40, True), (51, 24, False)]
    assert mixed["rows_per_layer"][:LAYERS] == [81 - 40 + 4] * LAYERS

    bypass = checked(pair.run(**tiny_vlm_inputs(5, 6, [(15, 3)]))[1])
    assert (bypass["mode"], bypass["spans"], bypass["reason"]) == ("bypass", [], "no media span")

    stats = json.loads(json.dumps(engine.stats()))
    calls = {mode: stats["calls"][mode] - start["calls"][mode] for mode in stats["calls"]}
    assert calls == {"cold": 1, "warm": 3, "bypass": 1}
    encoder = {what: stats["encoder"][what] - start["encoder"][what] for what in stats["encoder"]}
    assert encoder == {"hits": 2, "misses": 3}
    assert sum(encoder.values()) == sum(calls.values())
    looked = {what: stats["store"][what] - start["store"][what] for what in ("hits", "misses", "admissions")}
    # Found: two encoder outputs, the donor three times, the texts around it once. Not found: three encoder
    # outputs, two donors, the first text three times. Taken in: three encoder outputs, a donor, two texts.
    assert looked == {"hits": 2 + 3 + 2, "misses": 3 + 2 + 3, "admissions": 3 + 1 + 2}
    assert stats["store"]["entries"] == 6
    assert stats["store_failures"] == 0
    assert stats["refusals"] == {}


def test_report_is_a_copy(pair: Pair) -> None:
    pair.run(**tiny_vlm_inputs(5, 6, [(40, 0)]))
    report = pair.report
    report["mode"] = "changed"
    report["timings_ms"].clear()
    assert pair.report["mode"] in ("cold", "warm")
    assert pair.report["timings_ms"]


def test_using_restores_settings(pair: Pair) -> None:
    engine = pair.engine
    with engine.using(policy="none"):
        assert engine.settings.current == CallSettings(get_policy("none"), engine.options.budget, None)
        with engine.using(budget=0.5):
            assert engine.settings.current == CallSettings(get_policy("none"), 0.5, None)
        assert engine.settings.current == CallSettings(get_policy("none"), engine.options.budget, None)
    assert engine.settings.current == CallSettings(
        get_policy(engine.options.policy), engine.options.budget, None
    )
    with settings_of(engine, budget=0.25):  # does not restore what the block changed
        assert engine.settings.current == CallSettings(get_policy(engine.options.policy), 0.25, None)
    with pytest.raises(OptionError), engine.using(budget=2.0):
        pass
