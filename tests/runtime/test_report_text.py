"""Reports, engines, stores, plans and profiles as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vlcache_fx
from vlcache_fx.errors import Reason
from vlcache_fx.plan import build_plan
from vlcache_fx.plan.types import Span
from vlcache_fx.policies import Profile
from vlcache_fx.policies.none import NoRows
from vlcache_fx.runtime.report import Report, ReportView, SampleReport, SpanReport
from vlcache_fx.runtime.report_text import as_html, summary
from vlcache_fx.store import Entry, FileStore, MemoryStore, TieredStore
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

HIT = SpanReport(6, 1200, "donor-a", True, "memory", donor_contexts=2)
MISS = SpanReport(1300, 20, "donor-b", False, miss_reason=Reason.NEW_ITEM, miss_detail="<b>")


def view(**changed: Any) -> ReportView:
    values: dict[str, Any] = {"mode": "warm", "reason": None, "num_tokens": 1330, "num_samples": 1}
    return Report(**{**values, **changed}).as_view()


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (
            view(
                spans=(HIT, MISS),
                token_layer_fraction=0.02,
                prefix_tokens=6,
                timings_ms={"run": 7, "plan": 1.5},
            ),
            "warm: 1,330 tokens, 1,200 in 1 of 2 spans reused, 2.0 % of them recomputed, "
            "6 in an exact prefix, 8.5 ms",
        ),
        (
            view(mode="cold", reason="no donor for its spans: new", spans=(MISS,)),
            "cold: 1,330 tokens, 1 span, no donor for its spans: new",
        ),
        (view(mode="bypass", reason="no span"), "bypass: 1,330 tokens, no span"),
        (
            view(mode="bypass", reason="no span", num_samples=3, samples=(SampleReport(5),)),
            "bypass: 1,330 tokens in each of 3 prompts, no span",
        ),
    ],
    ids=["warm", "cold", "bypass", "batch"],
)
def test_summaries(report: ReportView, text: str) -> None:
    assert summary(report) == text
    assert repr(report) == f"<Report {text}>"
    assert report.as_dict()["num_tokens"] == 1330


def test_html_has_the_spans_and_escapes() -> None:
    html = as_html(view(mode="cold", reason="<script>", spans=(HIT, MISS), encoder_hit=False))
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert html.count("<tr>") == 4 + 1 + 2
    assert "<td>new_item</td>" in html
    assert view()._repr_html_() == as_html(view())


def test_spans_stay_dicts() -> None:
    span = view(spans=(HIT,)).spans[0]
    assert repr(span).startswith("{'start': 6")
    assert span._repr_html_() is None


def test_engine() -> None:
    model = vlcache_fx.compile(tiny_vlm(), lowering="eager", salt="secret-of-a-tenant")
    with torch.no_grad():
        for before in (3, 6):
            model(**tiny_vlm_inputs(before=before, after=2, images=[(20, 0)]))
    text = repr(model.vlcache)
    assert text.startswith("<Engine policy=LayerAware() budget=0.02 store=<MemoryStore memory: ")
    assert text.endswith("calls: 1 cold, 1 warm, 0 bypass>")
    assert "secret-of-a-tenant" not in text + repr(model.vlcache.options)
    model.vlcache.close()
    assert "MemoryStore" in repr(model.vlcache)  # closed


def test_stores(tmp_path: Path) -> None:
    memory, folder = MemoryStore(1 << 21), FileStore(tmp_path, 1 << 22)
    store = TieredStore([memory, folder])
    store.put("a", Entry({"x": torch.zeros(1 << 18)}, {}))
    assert repr(memory) == "<MemoryStore memory: 1 entries, 1.0 of 2.0 MiB>"
    assert store.flush(60)
    assert repr(store).startswith(
        "<TieredStore memory: 1 entries, 1.0 of 2.0 MiB; file: 1 entries, 1.0 of 4.0 MiB"
    )
    store.close()


def test_plan() -> None:
    span = Span(0, 2, 20, "a", True)
    plan = build_plan(num_tokens=24, spans=[span], policy=NoRows(), num_layers=3, budget=0.0)
    assert repr(plan) == "<Plan 24 tokens, 3 layers, rows per layer 4 to 4, 0.0 % of the spans recomputed>"


def test_profile() -> None:
    curve = ((0.0, 0.5), (0.02, 0.25), (1.0, 0.0))
    flat = Profile("0123456789", "float32", (1.0, 1.0), curve, ((4, curve),))
    assert repr(flat) == (
        "<Profile 2 layers of 01234567 in float32, flat, error 0.5 at 0 %, 0.25 at 2 %, also for 4 contexts>"
    )
    assert repr(Profile("0123456789", "bfloat16", (0.5, 1.0))) == (
        "<Profile 2 layers of 01234567 in bfloat16, sensitivities 0.5 to 1>"
    )
