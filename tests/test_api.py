"""``vlcache_fx.compile`` and ``mark_spans``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vlcache_fx
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.errors import OptionError, PlanError, Reason, UnsupportedGraphError
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .runtime.helpers import hits, keys, own_compiler_state, with_api

FIRST = tiny_vlm_inputs(3, 5, [(20, 0)], text_seed=1)
SECOND = tiny_vlm_inputs(13, 4, [(20, 0)], text_seed=2)


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def test_compile_returns_model_with_engine() -> None:
    model = tiny_vlm(last_only=False)
    names = set(model.state_dict())
    compiled = vlcache_fx.compile(model, lowering="eager", policy="full")
    assert compiled is model
    assert isinstance(model.vlcache, Engine)
    assert model.vlcache.last_report is None
    assert set(model.state_dict()) == names
    assert "vlcache" not in dict(model.named_modules())
    with torch.no_grad():
        assert torch.equal(model(**FIRST), tiny_vlm(last_only=False)(**FIRST))
    assert model.vlcache.last_report["mode"] == "cold"


def test_compile_twice_is_an_error() -> None:
    model = vlcache_fx.compile(tiny_vlm(), lowering="eager")
    with pytest.raises(OptionError, match=r"TinyVlm is compiled already; its engine is model\.vlcache"):
        vlcache_fx.compile(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bugdet": 0.1}, r"did you mean 'budget'\?.*valid options are: policy, budget"),
        ({"budget": 5}, "5 % is 0.05|share in"),
        ({"lowering": "eagre"}, "one of 'eager', 'inductor'"),
        ({"store": "redis://x"}, "redis"),
    ],
)
def test_compile_bad_options(options: dict[str, Any], message: str) -> None:
    model = tiny_vlm()
    with pytest.raises(OptionError, match=message):
        vlcache_fx.compile(model, **options)
    assert not hasattr(model, "vlcache")
    assert "forward" not in vars(model)


def test_compile_two_models_two_engines() -> None:
    one, two = (with_api(tiny_vlm(num_layers=1, last_only=False), policy="none") for _ in range(2))
    assert one.engine is not two.engine
    assert one.run(**FIRST)[1]["mode"] == "cold"
    assert two.run(**FIRST)[1]["mode"] == "cold"
    assert two.engine.stats()["calls"]["warm"] == 0


@pytest.mark.works("torch.compile", "`dynamic=False`")
def test_compile_static_graphs() -> None:
    pair = with_api(tiny_vlm(last_only=False), policy="full", dynamic=False)
    for place, inputs in enumerate((FIRST, SECOND)):
        off, report = pair.run(**inputs)
        assert report["mode"] == ("cold", "warm")[place]
        assert off == 0.0


def test_strict_raises_refusal() -> None:
    pair = with_api(tiny_vlm(learned_positions=True), strict=True)
    where = r"node 'add', from .*tiny_vlm\.py"
    with pytest.raises(UnsupportedGraphError, match=where) as refused, torch.no_grad():
        pair.model(**FIRST)
    assert refused.value.reason is Reason.POSITION_IN_STREAM


@pytest.mark.works("torch.compile", "`inference_mode` and `no_grad`")
def test_inference_mode_shares_donors() -> None:
    pair = with_api(tiny_vlm(last_only=False), policy="full")
    with torch.inference_mode():
        assert torch.equal(pair.model(**FIRST), pair.reference(**FIRST))
    assert pair.report["mode"] == "cold"
    off, report = pair.run(**SECOND)
    assert report["mode"] == "warm"
    assert off == 0.0
    with torch.inference_mode():
        assert torch.equal(pair.model(**FIRST), pair.reference(**FIRST))
    assert pair.report["mode"] == "warm"


def test_explain_names_layers_and_merges() -> None:
    pair = with_api(tiny_vlm(num_layers=2))
    (explanation,) = pair.engine.explain(**FIRST)
    assert explanation.kind == "decoder"
    assert explanation.num_layers == 2
    assert len(explanation.merges) == 1
    assert explanation.encoder_in_graph
    assert len(set(explanation.key_frontiers)) == 2
    assert pair.engine.last_report is None
    (explanation,) = with_api(tiny_vlm(learned_positions=True)).engine.explain(**FIRST)
    assert explanation.kind == "unmodified"
    assert "[position_in_stream]" in explanation.reason


def test_explain_traces_like_a_call() -> None:
    """Grids cannot be traced: the encoder runs first, and is not in the next report."""
    pair = with_api(tiny_qwen2_5_vl(2), min_span_tokens=4, policy="full")
    inputs = qwen_inputs(4, 5, [(8, 12, 0), (8, 8, 1)])
    for _ in range(2):
        (explanation,) = pair.engine.explain(**inputs)
        assert (explanation.kind, explanation.num_layers) == ("decoder", 2)
    assert pair.engine.last_report is None
    ids = {"input_ids": inputs["input_ids"][:, :3]}
    (explanation,) = pair.engine.explain(**ids)
    assert explanation.reason is None or "[no_merge]" in explanation.reason
    pair.run(**ids)
    assert pair.report["encoder_hit"] is None


def test_compile_qwen_equals_model() -> None:
    """Without encoder features, unlike in ``generate()``, ``forward`` breaks into many graphs."""
    pair = with_api(tiny_qwen2_5_vl(2), policy="full")
    for before in (4, 9):
        got, expected = pair.both(**qwen_inputs(before, 5, [(8, 12, 0)]))
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5)
    assert pair.engine.stats()["encoder"] == {"hits": 1, "misses": 1}


# Marked spans -----------------------------------------------------------------------------------------------


def embeddings(before: int, seed: int) -> Tensor:
    """Return text before and after 20 constant rows."""
    item = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(99))
    text = torch.randn(1, before + 5, 16, generator=torch.Generator().manual_seed(seed))
    return torch.cat([text[:, :before], item, text[:, before:]], 1)


@pytest.mark.works("Inputs", "spans that the caller marks (`mark_spans`)")
def test_mark_spans_reuses_spans() -> None:
    pair = with_api(tiny_vlm(last_only=False).decoder, policy="full")
    seen = []
    for before, mode in [(4, "cold"), (11, "warm")]:
        embeds = embeddings(before, before)
        assert vlcache_fx.mark_spans(embeds, [(0, before, 20)]) is embeds
        off, report = pair.run(embeds=embeds)
        assert report["mode"] == mode
        assert [(span["start"], span["length"]) for span in report["spans"]] == [(before, 20)]
        assert off == 0.0
        seen += keys(report)
    assert len(set(seen)) == 1
    off, report = pair.run(embeds=embeddings(7, 1))
    assert report["mode"] == "bypass"
    assert report["reason"] == "no span is marked"
    assert off == 0.0
    changed = embeddings(4, 4)
    changed[0, 4, 0] += 1
    off, report = pair.run(embeds=vlcache_fx.mark_spans(changed, [(0, 4, 20)]))
    assert hits(report) == [False]
    assert off == 0.0


def test_mark_spans_repeated_prompt_is_prefix() -> None:
    pair = with_api(tiny_vlm(num_layers=2, last_only=False).decoder, policy="none")
    for prefix in (0, 29):
        off, report = pair.run(embeds=vlcache_fx.mark_spans(embeddings(4, 0), [(0, 4, 20)]))
        assert report["prefix_tokens"] == prefix
        assert off < 1e-5
    other = embeddings(4, 0)
    other[0, 26] += 1
    off, report = pair.run(embeds=vlcache_fx.mark_spans(other, [(0, 4, 20)]))
    assert report["prefix_tokens"] == 24
    assert off < 1e-5


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(1, 0, 5)], "sample 1.*lies outside 1 x 29 tokens"),
        ([(0, 25, 5)], "lies outside"),
        ([(0, -1, 5)], "lies outside"),
        ([(0, 3, 0)], "lies outside"),
        ([(0, 3, 5), (0, 7, 5)], "overlaps"),
    ],
)
def test_mark_spans_invalid_spans(spans: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        vlcache_fx.mark_spans(embeddings(4, 0), spans)


def test_mark_spans_requires_embeddings() -> None:
    with pytest.raises(PlanError, match=r"\[batch, tokens, hidden\]"):
        vlcache_fx.mark_spans(torch.zeros(3, 4), [(0, 0, 1)])
