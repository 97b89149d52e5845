"""All facts about a decoder, and refused graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from vlcache_fx.analysis import analyze
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import InputKind
from vlcache_fx.ir.copies import copy_captured

from ..graphs import attend, capture, captured_vlm

X = torch.randn(1, 6, 4)


def test_analyze_repeatable() -> None:
    captured = captured_vlm()
    before = str(captured.graph_module.graph)
    first, second = analyze(captured), analyze(captured)
    assert str(captured.graph_module.graph) == before
    assert first == second


@pytest.mark.parametrize("options", [{}, {"explicit_mask": True}, {"last_only": True, "fused_qkv": True}])
def test_on_equals_analysis_of_copy(options: dict[str, bool]) -> None:
    captured = captured_vlm(**options)
    nodes: dict[Node, Node] = {}
    copy = copy_captured(captured, nodes)
    assert analyze(captured).on(nodes) == analyze(copy)


def test_weights_after_embeddings() -> None:
    captured = captured_vlm(fused_qkv=True)
    facts = analyze(captured)
    kinds = dict(zip(captured.placeholders, captured.kinds, strict=True))
    assert all(kinds[weight] is InputKind.WEIGHT for weight in facts.weights)
    shapes = sorted(tuple(weight.meta["val"].shape) for weight in facts.weights)
    assert shapes == sorted([(16,), (32, 16), (16, 16), (16,), (32, 16), (16, 32)] * 2)


def test_encoder_computes_features() -> None:
    facts = analyze(captured_vlm())
    assert sorted(str(node.target) for node in facts.encoder) == [
        "aten.gelu.default", "aten.linear.default", "aten.linear.default",
    ]  # fmt: skip


def test_flows_of_every_computed_node() -> None:
    facts = analyze(captured_vlm(explicit_mask=True))
    for layer in facts.layers:
        assert {*layer.kv_part, *layer.q_part} <= set(facts.flows)
        assert facts.flows[layer.site.node].gathers == ((layer.site.mask, 2),)
        assert facts.flows[layer.site.node].dim == 2
    assert facts.num_layers == 2


def bidirectional(x: Tensor) -> Tensor:
    x = x * 2
    return x + attend(x, is_causal=False)


def mask_from_the_stream(x: Tensor) -> Tensor:
    x = x * 2
    mask = (x[..., :1] > 0).transpose(1, 2)[:, None].expand(1, 1, 6, 6)
    return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]


def past(x: Tensor) -> Tensor:
    x = x * 2
    keys = torch.cat([torch.zeros(1, 3, 4), x], 1)[:, None]
    return x + F.scaled_dot_product_attention(x[:, None], keys, keys)[:, 0]


def decoding_step(x: Tensor) -> Tensor:
    return past(x[:, :1])


def between_graph_breaks(x: Tensor) -> Tensor:
    heads = x[:, None].transpose(1, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads)[:, 0] * 2


def cross_attention(x: Tensor) -> Tensor:
    x = x * 2
    x = x + attend(x)
    other, mask = torch.ones(1, 1, 5, 4), torch.ones(6, 5, dtype=torch.bool)
    return x + F.scaled_dot_product_attention(x[:, None], other, other, attn_mask=mask)[:, 0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.exp(), Reason.NO_ATTENTION),
        (bidirectional, Reason.MASK_FORM),
        (mask_from_the_stream, Reason.MASK_FORM),
        (past, Reason.MASK_FORM),
        (decoding_step, Reason.PAST_KEYS),
        (between_graph_breaks, Reason.NO_ATTENTION),
    ],
    ids=["none", "bidirectional", "mask_from_the_stream", "past", "decoding_step", "between_graph_breaks"],
)
def test_analyze_refusals(function: Callable[[Tensor], Tensor], reason: Reason) -> None:
    captured = capture(function, {"x": X})
    before = str(captured.graph_module.graph)
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(captured)
    assert refusal.value.reason is reason
    assert str(captured.graph_module.graph) == before


def test_frontiers_of_foreign_attention() -> None:
    facts = analyze(capture(cross_attention, {"x": X}))
    assert [layer.key_frontier is None for layer in facts.layers] == [False, True]
    assert facts.caches[1] == (None, None)
    assert facts.past == frozenset()


def test_flows_of_mask_with_one_row() -> None:
    def padded(x: Tensor, keep: Tensor, key: nn.Module) -> Tensor:
        x = x * 2
        keys = key(x)[:, None]
        return x + F.scaled_dot_product_attention(x[:, None], keys, keys, attn_mask=keep)[:, 0]

    call = {"x": X, "keep": torch.ones(1, 1, 1, 6, dtype=torch.bool)}
    facts = analyze(capture(padded, call, key=nn.Linear(4, 4)))
    assert facts.flows[facts.layers[0].site.node].gathers == ()


def test_analyze_ignores_input_names() -> None:
    """An input with the name of a weight is data."""

    def odd_names(weight: Tensor, parameters: Tensor) -> Tensor:
        x = parameters * 2
        return x + attend(x) * weight

    captured = capture(odd_names, {"weight": torch.ones(4), "parameters": X})
    assert set(captured.kinds) == {InputKind.DATA}
    assert analyze(captured).weights == ()
