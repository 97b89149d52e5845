"""Reports and statistics are plain data."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vlcache_fx.errors import OptionError
from vlcache_fx.policies import get_policy
from vlcache_fx.runtime.report import Report, SpanReport
from vlcache_fx.runtime.settings import CallSettings
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..models import batch_of, padded
from .helpers import Pair, keys, settings_of, with_backend

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


def test_threads_have_last_reports_of_their_own(pair: Pair) -> None:
    pair.run(**tiny_vlm_inputs(5, 6, [(40, 0)]))
    own = pair.report
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: pair.engine.last_report).result() is None
        other = pool.submit(pair.run, **tiny_vlm_inputs(5, 9, [(40, 1)])).result()[1]
        assert pool.submit(lambda: pair.engine.last_report).result() == other
    assert pair.report == own != other


def test_reports_of_calls_in_the_body(pair: Pair) -> None:
    def ask(text: int) -> dict[str, Any]:
        return pair.run(**tiny_vlm_inputs(5, 6 + text, [(40, 0)], text_seed=text))[1]

    with pair.engine.reports() as outer:
        first = ask(0)
        with pair.engine.reports() as inner:
            second = ask(1)
        third = ask(2)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ask, 3).result()  # not a copy of the context
    ask(4)
    assert list(outer) == [first, second, third]
    assert inner[:] == [second]
    assert json.loads(json.dumps(outer.as_list()))[1]["num_tokens"] == second.num_tokens
    assert (len(outer), outer[-1].mode) == (3, third.mode)
    assert repr(inner) == f"CollectedReports([{second!r}])"


def test_reports_of_tasks(pair: Pair) -> None:
    def ask(text: int) -> None:
        pair.run(**tiny_vlm_inputs(5, 6 + text, [(40, 0)], text_seed=text))

    async def task(text: int) -> list[int]:
        with pair.engine.reports() as own:
            await asyncio.to_thread(ask, text)
            await asyncio.sleep(0)
            ask(text)
        return [report.num_tokens for report in own]

    async def serve() -> tuple[list[list[int]], int]:
        with pair.engine.reports() as every:
            found = await asyncio.gather(*(task(text) for text in range(4)))
        return found, len(every)

    assert asyncio.run(serve()) == ([[5 + 40 + 6 + text] * 2 for text in range(4)], 8)


def test_reports_leave_out_what_continues_a_prompt(pair: Pair) -> None:
    spans = (SpanReport(0, 4, "key", hit=False),)
    with pair.engine.reports() as reports:
        pair.engine.report(Report("cold", "new", spans=spans))
        pair.engine.report(Report("bypass", "a step"), continues=True)
        pair.engine.report(Report("bypass", "text"))
    assert [report.reason for report in reports] == ["new", "text"]


@pytest.fixture(scope="module")
def batches(_compiler: None) -> Pair:
    return with_backend(padded(num_layers=LAYERS, last_only=False), budget=0.1)


def test_samples_of_a_batch(batches: Pair) -> None:
    """Each prompt of a batch is reported as in a call of its own."""
    prompts = [
        tiny_vlm_inputs(5, 6, [(20, 0)]),
        tiny_vlm_inputs(2, 3, [(17, 1), (20, 0)], text_seed=1),
        tiny_vlm_inputs(12, 3, [], text_seed=2),
    ]
    batches.run(**batch_of(prompts[0], prompts[0]))
    batches.both(**batch_of(*prompts))
    report = batches.report
    assert (report.mode, report.num_samples) == ("warm", 3)
    first, second, text = (report.of_sample(index) for index in range(3))
    assert (first.mode, first.reason, first.num_tokens) == ("warm", None, 5 + 20 + 6)
    assert first.token_layer_fraction == pytest.approx(2 / 20)
    assert [span.length for span in first.spans] == [20]
    assert (second.mode, second.num_tokens) == ("warm", report.num_tokens)
    assert [(span.length, span.hit, span.miss_reason) for span in second.spans] == [
        (17, False, "new_item"),
        (20, True, None),
    ]
    assert (text.mode, text.reason_code, text.spans, text.num_tokens) == ("bypass", "no_span", (), 15)
    assert text.token_layer_fraction == 1.0
    assert json.loads(json.dumps(second.as_dict()))["num_samples"] == 1
    assert first.of_sample(0) == first
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"3 prompts has no prompt {index}"):
            report.of_sample(index)


def test_samples_of_cold_and_bypassed_calls(batches: Pair) -> None:
    batches.engine.clear()
    known = tiny_vlm_inputs(5, 6, [(20, 0)])
    batches.both(**batch_of(known, tiny_vlm_inputs(5, 6, [(24, 3)])))
    cold = [batches.report.of_sample(index) for index in range(2)]
    assert [one.reason for one in cold] == ["no donor for its spans: its content is new"] * 2
    assert len({keys(one)[0] for one in cold}) == 2
    assert [one.token_layer_fraction for one in cold] == [1.0] * 2
    batches.both(**batch_of(tiny_vlm_inputs(5, 6, [(9, 0)]), tiny_vlm_inputs(7, 6, [(9, 1)])))
    assert batches.report.num_samples == 2
    assert batches.report.of_sample(1).mode == "bypass"


def test_sample_of_one_prompt(pair: Pair) -> None:
    pair.run(**tiny_vlm_inputs(5, 6, [(40, 0)]))
    assert pair.report.of_sample(0) == pair.report
    with pytest.raises(IndexError):
        pair.report.of_sample(1)


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
