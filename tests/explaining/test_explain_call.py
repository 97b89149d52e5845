"""Explanations of calls of compiled models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vlcache_fx.errors import Reason
from vlcache_fx.explaining import Explanation
from vlcache_fx.explaining.tokens import count
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.tiny_hybrid import tiny_hybrid
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import own_compiler_state, with_api
from .test_page import checked, counts_of, shown

FIRST = tiny_vlm_inputs(3, 2, [(20, 0)])
SECOND = tiny_vlm_inputs(6, 4, [(20, 0)], text_seed=1)


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def agree(explanation: Explanation, report: dict[str, Any]) -> None:
    """Check that an explanation and the report of the same call agree."""
    assert explanation.report is not None
    for name in ("mode", "reason_code", "num_tokens", "rows_per_layer", "prefix_tokens", "encoder_hit"):
        assert explanation.report[name] == report[name], name
    assert [span["hit"] for span in explanation.report.spans] == [span["hit"] for span in report["spans"]]
    data = json.loads(explanation.to_json())
    assert data["counts"] == counts_of(explanation.to_html())
    assert sum(data["counts"].values()) == explanation.report.num_tokens
    checked(explanation)
    assert f"mode {report['mode']}" in shown(explanation)
    (sample,) = explanation.samples
    rows = [sum(end - start for start, end in ranges) for ranges in sample.rows]
    assert rows == list(report["rows_per_layer"][:-1])


def test_cold_then_warm_call() -> None:
    pair = with_api(tiny_vlm(), budget=0.1)
    cold = pair.engine.explain(**FIRST)
    assert (cold.mode, cold.donors) == ("cold", ())
    assert {kind.value: number for kind, number in cold.counts.items()} == {"text": 5, "computed": 20}
    assert [(found.subject, found.reason) for found in cold.refusals] == [
        ("image at token 3", Reason.NEW_ITEM)
    ]
    agree(cold, pair.run(**FIRST)[1])
    warm = pair.engine.explain(**SECOND)
    agree(warm, pair.run(**SECOND)[1])
    assert {kind.value: number for kind, number in warm.counts.items()} == {
        "text": 10,
        "reused": 18,
        "recomputed": 2,
    }
    (donor,) = warm.donors
    assert (donor.start, donor.length, donor.contexts, donor.rank) == (6, 20, 1, 0)
    assert (donor.tier, donor.dtypes, donor.is_exact) == ("memory", ("float32",), False)
    entry = pair.engine.store.get(donor.key)
    assert entry is not None
    assert donor.nbytes == entry.nbytes
    assert donor.unused_s is not None
    assert 0 <= donor.unused_s < 600
    assert (warm.misses, warm.refusals) == ((), ())
    assert {"encoder", "identify", "lookup", "plan", "bind", "run"} == {stage.name for stage in warm.stages}


def test_explaining_leaves_no_trace() -> None:
    """Nothing is stored, counted, reported or remembered: the next calls are as they would have been."""
    pair = with_api(tiny_vlm(), budget=0.1, exact_returns=1)
    for _ in range(2):
        assert pair.engine.explain(**FIRST).report.reason_code is Reason.NEW_ITEM  # type: ignore[union-attr]
    assert pair.engine.last_report is None
    assert len(pair.engine.store) == 0
    assert pair.run(**FIRST)[1]["reason_code"] is Reason.NEW_ITEM
    before = pair.engine.stats()["calls"]
    for _ in range(2):
        found = pair.engine.explain(**SECOND)
        assert found.report.reason_code is Reason.RECOMPUTED_TO_REFINE  # type: ignore[union-attr]
    assert pair.engine.stats()["calls"] == before
    assert pair.engine.last_report is not None
    assert pair.engine.last_report.num_tokens == 25
    assert pair.run(**SECOND)[1]["reason_code"] is Reason.RECOMPUTED_TO_REFINE
    assert pair.run(**SECOND)[1]["mode"] == "warm"


def test_ordinary_calls_collect_nothing() -> None:
    pair = with_api(tiny_vlm())
    with pair.engine.observing() as observations:
        pair.run(**FIRST)
    pair.run(**SECOND)
    assert len(observations.calls) == 1
    assert pair.engine.observed.get() is None


def test_exact_prefix() -> None:
    pair = with_api(tiny_vlm(), budget=0.1)
    first = tiny_vlm_inputs(32, 2, [(20, 0)])
    longer = {**first, "input_ids": torch.cat([first["input_ids"], torch.tensor([[7, 8, 9]])], 1)}
    pair.run(**first)
    found = pair.engine.explain(**longer)
    agree(found, pair.run(**longer)[1])
    assert {kind.value: number for kind, number in found.counts.items()} == {"text": 5, "prefix": 52}
    (donor,) = found.donors
    assert (donor.is_exact, donor.start) == (True, 32)


def test_hit_and_miss_in_one_prompt() -> None:
    pair = with_api(tiny_vlm(), budget=0.1)
    pair.run(**FIRST)
    both = tiny_vlm_inputs(5, 4, [(20, 0), (24, 1)], text_seed=2)
    found = pair.engine.explain(**both)
    agree(found, pair.run(**both)[1])
    counts = {kind.value: number for kind, number in found.counts.items()}
    assert counts == {"text": 11, "reused": 18, "recomputed": 2, "computed": 24}
    (miss,) = found.misses
    assert (miss.reason, miss.start) == (Reason.NEW_ITEM, 27)
    (refusal,) = found.refusals
    assert refusal.subject == "image at token 27"
    assert refusal.advice == Reason.NEW_ITEM.advice


def test_donors_that_learned() -> None:
    pair = with_api(tiny_vlm(hidden=64, heads=4), budget=0.1, donor_rank=2, exact_returns=3)
    for seed in range(4):
        assert pair.run(**tiny_vlm_inputs(4 + seed, 3, [(64, 0)], text_seed=seed))[1]["mode"] == "cold"
    asked = tiny_vlm_inputs(9, 3, [(64, 0)], text_seed=9)
    found = pair.engine.explain(**asked)
    report = pair.run(**asked)[1]
    agree(found, report)
    (donor,) = found.donors
    assert donor.contexts == report["spans"][0]["donor_contexts"] == 4
    assert donor.rank == 2


def test_hybrid_decoder() -> None:
    pair = with_api(tiny_hybrid("dcda"), budget=0.1)
    pair.run(**FIRST)
    found = pair.engine.explain(**SECOND)
    agree(found, pair.run(**SECOND)[1])
    assert found.mode == "warm"
    assert len(found.donors) == 1
    text = checked(found).text
    assert "Layer 0, before and after the passes" in text
    assert "recurrent" in text


def test_refused_graph() -> None:
    pair = with_api(tiny_vlm(learned_positions=True))
    found = pair.engine.explain(**FIRST)
    assert found.mode == "bypass"
    assert {kind.value: number for kind, number in found.counts.items()} == {"unmodified": 25}
    (refusal,) = found.refusals
    assert (refusal.reason, refusal.advice) == (
        Reason.POSITION_IN_STREAM,
        "keys depend on positions: no reuse for this model",
    )
    text = checked(found).text
    assert refusal.text in text
    assert "self.positions(position_ids)" in text  # the source line
    assert refusal.advice in text
    assert pair.run(**FIRST)[0] == 0.0


def test_text_alone() -> None:
    pair = with_api(tiny_vlm())
    found = pair.engine.explain(**tiny_vlm_inputs(9, 3, []))
    assert found.mode == "bypass"
    assert found.refusals[0].reason is Reason.NO_MERGE
    checked(found)


def test_closed_store() -> None:
    pair = with_api(tiny_vlm(), store=MemoryStore(1 << 20))
    pair.run(**FIRST)
    pair.engine.store.close()
    found = pair.engine.explain(**SECOND)
    assert found.mode == "cold"
    assert [refusal.reason for refusal in found.refusals] == [Reason.STORE_CLOSED]


def test_batch() -> None:
    pair = with_api(tiny_vlm(), budget=0.1)
    two = {name: torch.cat([value, value]) for name, value in FIRST.items()}
    pair.run(**two)
    found = pair.engine.explain(**two)
    report = pair.run(**two)[1]
    assert found.mode == report["mode"] == "warm"
    assert [sum(count(sample.ranges).values()) for sample in found.samples] == [25, 25]
    assert [donor.sample for donor in found.donors] == [0, 1]
    assert "Prompt 1: " in checked(found).text


def test_dry_run_is_explained() -> None:
    pair = with_api(tiny_vlm(), dry_run=True)
    pair.run(**FIRST)
    found = pair.engine.explain(**FIRST)
    assert found.mode == "cold"  # as it would be without the option
    assert len(pair.engine.store) == 0


def test_sequence_of_graphs() -> None:
    pair = with_api(tiny_vlm())
    found = pair.engine.explain(**FIRST)
    (graph,) = found
    assert found[0] is graph
    assert found[:1] == (graph,)
    assert len(found) == 1
    assert "<iframe srcdoc=" in found._repr_html_()
    assert graph.layer is not None
    assert [line.marks for line in graph.layer.before].count(("frontier",)) == 2
    assert [line.marks for line in graph.layer.after].count(("lookup",)) == 2
    gathers = [line.text for line in graph.layer.after if "rows" in line.marks]
    assert len(gathers) > 2
    assert all(text.startswith("aten.index_select(") for text in gathers)
    assert any("decoder.layers.0.attention.key.weight" in line.text for line in graph.layer.before)
    assert any("tiny_attention.py" in line.source for line in graph.layer.before)
