"""Attention without a canonical form: named, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.analysis import analyze
from vlcache_fx.analysis.attention.noncanonical import noncanonical_attention
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_attention import Attention
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ...runtime.helpers import distance, own_compiler_state, with_backend
from ..graphs import attend, capture, captured_vlm

X = torch.randn(1, 6, 4)


@pytest.fixture
def flash() -> Iterator[Any]:
    """Operators with the schemas of flash attention packages and arbitrary results."""
    with torch.library._scoped_library("tests_flash_attn", "DEF") as library:
        library.define("fwd(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> Tensor[]")
        library.define("fwd_into(Tensor(a!) out, Tensor q, Tensor k, Tensor v) -> ()")
        library.define("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> Tensor")

        def fwd(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> list[Tensor]:
            heads = (one.transpose(1, 2) for one in (q, k, v))
            result = nn.functional.scaled_dot_product_attention(*heads, is_causal=causal, scale=scale)
            return [result.transpose(1, 2).contiguous(), q.new_zeros(q.shape[:3])]

        def fake(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> list[Tensor]:
            return [torch.empty_like(q), q.new_empty(q.shape[:3])]

        library.impl("fwd", fwd, "CPU")
        torch.library.register_fake("tests_flash_attn::fwd", fake, lib=library)
        library.impl("rotary", lambda q, k, cos, sin: q * cos, "CPU")
        torch.library.register_fake(
            "tests_flash_attn::rotary", lambda q, k, cos, sin: torch.empty_like(q), lib=library
        )
        yield torch.ops.tests_flash_attn


def refusal_of(function: Any, **parts: Any) -> UnsupportedGraphError:
    captured = capture(function, {"x": X}, **parts)
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(captured)
    return refusal.value


def test_refusal_names_flash_attention(flash: Any) -> None:
    def layer(x: Tensor) -> Tensor:
        heads = x[:, :, None]
        return x + flash.fwd(heads, heads, heads, 0.5, True)[0][:, :, 0]

    refusal = refusal_of(layer)
    assert refusal.reason is Reason.ATTENTION_FORM
    assert "tests_flash_attn.fwd.default" in refusal.detail
    assert refusal.node is not None
    assert refusal.source_line is not None
    assert "flash.fwd(heads, heads, heads" in refusal.source_line


def test_flash_attention_in_model_runs_unmodified(flash: Any) -> None:
    """Through the backend, in a model whose decoder has no other attention."""

    class Flash(Attention):
        def forward(self, x: Tensor, rotary: Any, mask: Any) -> Tensor:
            query, key, value = (part.transpose(1, 2) for part in self.project(x))
            result: Tensor = self.out(flash.fwd(query, key, value, 0.3, True)[0].flatten(2))
            return result

    model = tiny_vlm(kv_heads=2, last_only=False)
    for layer in model.decoder.layers:
        layer.attention = Flash(model.decoder.shape)
    with own_compiler_state():
        pair = with_backend(model)
        for before in (3, 9):
            got, expected = pair.both(**tiny_vlm_inputs(before, 4, [(20, 0)]))
            assert distance(got, expected) == 0.0
            assert pair.report["mode"] == "bypass"
            assert "[attention_form]: tests_flash_attn.fwd.default" in pair.report["reason"]
            assert "flash.fwd(query, key, value" in pair.report["reason"]
    assert {refusal.reason for refusal in pair.engine.refusals} == {Reason.ATTENTION_FORM}


@pytest.mark.parametrize("kernel", ["_scaled_dot_product_flash_attention_for_cpu"])
def test_refusal_names_aten_kernels(kernel: str) -> None:
    def layer(x: Tensor) -> Tensor:
        heads = x[:, None]
        return x + getattr(torch.ops.aten, kernel)(heads, heads, heads)[0][:, 0]

    refusal = refusal_of(layer)
    assert refusal.reason is Reason.ATTENTION_FORM
    assert kernel in refusal.detail


def test_noncanonical_attention_other_operators(flash: Any) -> None:
    def layer(x: Tensor) -> Tensor:
        return x + attend(flash.rotary(x, x, x, x))

    captured = capture(layer, {"x": X})
    assert list(noncanonical_attention(captured.graph_module.graph)) == []


def returns_weights(x: Tensor) -> tuple[Tensor, Tensor]:
    weights = (x[:, None] @ x[:, None].mT).softmax(-1)
    return x + (weights @ x[:, None])[:, 0], weights


def reads_scores(x: Tensor) -> Tensor:
    scores = x[:, None] @ x[:, None].mT
    return x + (scores.softmax(-1) @ x[:, None] * scores.logsumexp(-1, keepdim=True))[:, 0]


def gated(x: Tensor) -> Tensor:
    return x + ((x[:, None] @ x[:, None].mT).softmax(-1) * 0.5 @ x[:, None])[:, 0]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (returns_weights, "is returned too"),
        (reads_scores, "is read by logsumexp too"),
        (gated, "its probabilities go through aten.mul.Tensor"),
    ],
)
def test_refusal_of_eager_attention_says_why(function: Any, why: str) -> None:
    refusal = refusal_of(function)
    assert refusal.reason is Reason.ATTENTION_FORM
    assert why in refusal.detail
    assert refusal.source_line is not None
    assert function.__name__ in refusal.source_line


def test_refusal_of_noncanonical_after_canonical() -> None:
    def two_layers(x: Tensor) -> Tensor:
        x = x + attend(x * 2)
        return gated(x)

    assert refusal_of(two_layers).reason is Reason.ATTENTION_FORM


def test_noncanonical_attention_in_encoder() -> None:
    """Before the merge; it runs unchanged."""

    class Encoder(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return gated(pixels.repeat(1, 3)[None, :, :16])[0]

    model = tiny_vlm()
    model.encoder = Encoder()  # type: ignore[assignment]
    captured, _ = captured_graph(model, tiny_vlm_inputs(3, 2, [(5, 0)]))
    assert len(list(noncanonical_attention(captured.graph_module.graph))) == 1
    facts = analyze(captured)
    assert facts.num_layers == 2
    assert len(facts.merges) == 1


def test_noncanonical_attention_mixture_of_experts() -> None:
    """A softmax of a projection, and products with weights."""

    def layer(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
        weights = (x @ router).softmax(-1)
        parts = torch.bmm(x.expand(3, 6, 4), experts)
        return x + torch.einsum("bte,etd->btd", weights, parts)

    captured = capture(layer, {"x": X}, router=torch.randn(4, 3), experts=torch.randn(3, 4, 4))
    assert list(noncanonical_attention(captured.graph_module.graph)) == []


def test_noncanonical_attention_canonical_graph() -> None:
    for options in ({}, {"attention": "math", "softcap": 1.0, "sinks": True}):
        assert list(noncanonical_attention(captured_vlm(**options).graph_module.graph)) == []
