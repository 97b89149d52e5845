"""Reasons in reports: of each call and of each span."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.errors import Reason
from vlcache_fx.runtime.report import Report, SpanReport, one_line, why_cold
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, with_backend

ONE, TWO = (40, 0), (24, 1)


def ask(pair: Pair, *images: tuple[int, int], before: int = 5, text_seed: int = 0) -> list[Any]:
    """Return ``[reason_code, *(hit, miss_reason) of each span]`` of a prompt with these images."""
    off, report = pair.run(**tiny_vlm_inputs(before, 6, images, text_seed=text_seed))
    assert off < 1e-5 or report["mode"] == "warm"
    assert report["reason"] is None or "\n" not in report["reason"]
    assert (report["reason"] is None) == (report["mode"] == "warm") == (report["reason_code"] is None)
    return [report["reason_code"], *((s["hit"], s["miss_reason"]) for s in report["spans"])]


@pytest.fixture
def pair(_compiler: None) -> Pair:
    return with_backend(tiny_vlm(last_only=False), budget=0.1)


def test_miss_reason_per_span(pair: Pair) -> None:
    assert ask(pair, ONE) == ["new_item", (False, "new_item")]
    assert ask(pair, ONE, text_seed=1) == [None, (True, None)]
    # After a first miss, the hit is reused; a second miss makes the call cold.
    assert ask(pair, ONE, TWO, text_seed=2) == [None, (True, None), (False, "new_item")]
    told = ask(pair, ONE, TWO, text_seed=3)
    assert told == ["not_recorded", (False, "recomputed_to_record"), (False, "not_recorded")]
    donors = [(span["donor_tier"], span["donor_contexts"]) for span in pair.report["spans"]]
    assert donors == [(MemoryStore.tier, 1), (None, 0)]
    assert pair.report["token_layer_fraction"] == 1.0
    assert ask(pair, ONE, TWO, text_seed=4) == [None, (True, None), (True, None)]
    pair.engine.clear()
    assert ask(pair, ONE) == ["new_item", (False, "new_item")]


def test_miss_reason_after_eviction(pair: Pair) -> None:
    ask(pair, ONE)
    pair.engine.store.clear()
    assert ask(pair, ONE) == ["not_recorded", (False, "not_recorded")]


def test_miss_reason_of_repeated_new_item(pair: Pair) -> None:
    assert ask(pair, ONE, ONE) == ["new_item", (False, "new_item"), (False, "new_item")]


def test_other_weights(pair: Pair) -> None:
    ask(pair, ONE)
    weight = pair.model.decoder.layers[0].mlp.up.weight
    for model in (pair.model, pair.reference):
        with torch.no_grad():
            model.decoder.layers[0].mlp.up.weight.mul_(2.0)
    assert weight is pair.model.decoder.layers[0].mlp.up.weight
    assert ask(pair, ONE) == ["other_weights", (False, "other_weights")]
    assert ask(pair, TWO) == ["new_item", (False, "new_item")]


@pytest.mark.usefixtures("_compiler")
def test_miss_reason_too_large() -> None:
    pair = with_backend(tiny_vlm(last_only=False), store=MemoryStore(4096))
    assert ask(pair, ONE) == ["new_item", (False, "new_item")]
    assert ask(pair, ONE) == ["too_large", (False, "too_large")]


def test_miss_reason_of_closed_or_failing_store(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlcache_fx.errors import StoreError

    def fails(self: MemoryStore, key: str) -> None:
        raise StoreError("out of\norder")

    ask(pair, ONE)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "get", fails)
        assert ask(pair, ONE) == ["store_failed", (False, "store_failed")]
    pair.engine.store.close()
    assert ask(pair, ONE) == ["store_closed", (False, "store_closed")]


@pytest.mark.usefixtures("_compiler")
def test_miss_reason_of_incompatible_entry() -> None:
    store = MemoryStore(1 << 24)
    last = with_backend(tiny_vlm(last_only=True), store=store)
    every = with_backend(tiny_vlm(last_only=False), store=store)
    ask(last, ONE)
    assert ask(every, ONE) == ["incompatible_entry", (False, "incompatible_entry")]
    assert ask(every, ONE) == [None, (True, None)]
    assert ask(last, ONE) == [None, (True, None)]  # the donor with more slots serves both


def test_reason_of_bypass(pair: Pair) -> None:
    assert ask(pair, (15, 3)) == [Reason.NO_SPAN]
    refused = with_backend(tiny_vlm(learned_positions=True))
    assert ask(refused, ONE) == [Reason.POSITION_IN_STREAM]


def test_report_view(pair: Pair) -> None:
    ask(pair, ONE)
    report = pair.engine.last_report
    assert report is not None
    assert (report.mode, report["mode"]) == ("cold", "cold")
    assert report.spans[0].miss_reason is report["spans"][0]["miss_reason"] is Reason.NEW_ITEM
    again = json.loads(json.dumps(report))
    assert again == json.loads(json.dumps(report.as_dict()))
    assert type(report.as_dict()) is type(report.as_dict()["spans"][0]) is dict
    assert copy.deepcopy(report) == report
    with pytest.raises(AttributeError, match="no 'modes'; it has mode, reason"):
        report.modes  # noqa: B018


def test_continuation_keeps_report_of_prefill() -> None:
    engine = Engine()
    prefill = Report("warm", None, spans=(SpanReport(0, 16, "key", True),))
    step = Report("bypass", "no media", reason_code=Reason.NO_MERGE)
    engine.report(step, continues=True)
    assert engine.last_report == step.as_dict()
    engine.report(prefill)
    engine.report(step, continues=True)
    assert engine.last_report == prefill.as_dict()
    assert engine.stats()["calls"] == {"cold": 0, "warm": 1, "bypass": 2}
    engine.report(step)
    assert engine.last_report == step.as_dict()


def test_why_cold() -> None:
    new, left = Reason.NEW_ITEM, Reason.RECOMPUTED_TO_RECORD
    assert why_cold([new]) == ("no donor for its spans: its content is new", new)
    text, code = why_cold([left, new, new])
    assert code is new
    assert text.endswith(
        "1 x it has a donor, but is recomputed to record another context; 2 x its content is new"
    )
    assert one_line("a\n  b\tc ") == "a b c"


def test_reason_values() -> None:
    of_graphs = [
        "no_attention", "no_merge", "no_stream", "unknown_op", "token_axis_lost", "token_mixing",
        "position_in_stream", "batched", "mutated_inputs", "past_keys", "attention_form", "mask_form",
        "capture_failed", "grad_required", "lowering_failed", "random", "no_compiler", "data_dependent",
        "weights_unreadable", "uncompiled", "no_logits",
    ]  # fmt: skip
    of_calls_and_spans = [
        "new_item", "not_recorded", "other_weights", "too_large", "store_closed", "store_failed",
        "incompatible_entry", "recomputed_to_record", "recomputed_to_refine", "no_span", "one_token",
        "mismatch", "cannot_write",
        "too_few_rows", "guarded", "no_plan", "program_failed", "other_encoding", "other_positions",
        "other_computation", "evicted", "damaged_entry", "other_text", "no_prefix",
        "dry_run",
    ]  # fmt: skip
    assert sorted(str(one) for one in Reason) == sorted(of_graphs + of_calls_and_spans)
    assert len(set(of_graphs + of_calls_and_spans)) == len(Reason.__members__)
