"""Batch dimensions of several samples, and tensors without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.analysis import DecoderFacts, analyze
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

from ...models import WIRINGS, wired
from ..graphs import CALL, capture, captured_vlm

SAMPLES, TOKENS = 3, 10
ROUTER = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
EXPERTS = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1))


def three() -> dict[str, Tensor]:
    """Three prompts of ten tokens, each with an image of five."""
    prompts = [tiny_vlm_inputs(3, 2, [(5, seed)], text_seed=seed) for seed in range(SAMPLES)]
    return {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}


def facts_of(model: TinyVlm, dynamic: bool | None) -> DecoderFacts:
    return analyze(captured_graph(model, three(), dynamic=dynamic)[0])


def routed(x: Tensor) -> Tensor:
    """A mixture of experts by sorting: samples and tokens in one dimension, two experts for each."""
    rows = x.reshape(-1, 16)
    scores, chosen = (rows @ ROUTER).softmax(-1).topk(2, -1)
    keys, order = chosen.reshape(-1).sort()
    ends = torch.histc(keys.float(), 3, 0, 2).cumsum(0, dtype=torch.int32)
    sent = torch._grouped_mm(rows[order // 2].bfloat16(), EXPERTS.bfloat16(), offs=ends).float()
    sent = sent * scores.reshape(-1)[order, None]
    return sent[order.argsort()].view(-1, 2, 16).sum(1).view(x.shape)


class Routed(nn.Module):
    """Replaces an MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return routed(x)


def mixture() -> TinyVlm:
    model = tiny_vlm()
    for layer in model.decoder.layers:
        layer.mlp = Routed()
    return model


MODELS = {
    "plain": tiny_vlm,
    "mask": lambda: tiny_vlm(explicit_mask=True, last_only=False),
    "fused": lambda: tiny_vlm(fused_qkv=True, qk_norm=True),
    "mixture": mixture,
    **{kind: lambda kind=kind: wired(kind) for kind in WIRINGS},
}


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, True) for name in MODELS), ("plain", None), ("mixture", None)]
)
def test_find_batch_dims(name: str, dynamic: bool | None) -> None:
    facts = facts_of(MODELS[name](), dynamic)
    dims = facts.batch_dims
    assert dims is not None
    samples = facts.stream.boundaries[0].meta["val"].shape[0]
    for node, dim in dims.items():
        value = node.meta["val"]
        shape = (value[0] if isinstance(value, tuple | list) else value).shape
        assert str(shape[dim]) == str(samples), node
        assert node not in facts.flows or facts.flows[node].axis.dim != dim
    needed = [frontier.node for frontier in facts.frontiers] + [layer.site.node for layer in facts.layers]
    assert {*needed, *facts.stream.boundaries} <= set(dims)


def test_find_batch_dims_merged_with_tokens() -> None:
    """Sorted rows of experts: passes select no rows there."""
    facts = facts_of(mixture(), True)
    assert facts.batch_dims is not None
    sorted_rows = [node for node in facts.flows if node.target is torch.ops.aten.sort.default]
    assert sorted_rows
    assert not set(sorted_rows) & set(facts.batch_dims)


def test_find_batch_dims_single_sample() -> None:
    assert analyze(captured_vlm()).batch_dims is None


def refused(function: Any, **call: Tensor) -> UnsupportedGraphError:
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(capture(function, call, key=nn.Linear(4, 4)))
    assert refusal.value.reason is Reason.BATCHED
    assert "test_batch.py" in str(refusal.value.source_line)
    return refusal.value


X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2))


def test_check_batch_dims_refuses_merged_heads() -> None:
    """Heads and samples share a dimension, in either order."""

    def merged(x: Tensor, key: nn.Module) -> Tensor:
        x = x * 2
        keys = key(x).view(2, 6, 2, 2).permute(2, 0, 1, 3).reshape(4, 6, 2).exp()
        y = F.scaled_dot_product_attention(keys, keys.sin(), keys.sin(), is_causal=True)
        return x + y.view(2, 2, 6, 2).permute(1, 2, 0, 3).reshape(2, 6, 4)

    assert "it has no dimension over samples" in refused(merged, x=X).detail


def test_check_batch_dims_refuses_merged_table() -> None:

    def crossed(x: Tensor, key: nn.Module) -> Tensor:
        x = x * 2
        keys = key(x)[:, None]
        y = F.scaled_dot_product_attention(x[:, None], keys, keys, is_causal=True)[:, 0]
        flat = (x + y).view(12, 4) * torch.arange(12)[:, None]
        return x + flat.view(2, 6, 4)

    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(capture(crossed, {"x": X}, key=nn.Linear(4, 4)))
    assert "has other entries along the token axis" in refusal.value.detail


def test_analyze_refuses_unbatched_embeddings() -> None:
    def flat(x: Tensor, key: nn.Module) -> Tensor:
        x = x * 2
        keys = key(x)[None]
        return x + F.scaled_dot_product_attention(x[None], keys, keys, is_causal=True)[0]

    assert "want [batch, tokens, hidden]" in refused(flat, x=X[0]).detail


def test_analyze_one_and_three_samples() -> None:
    """Equal frontiers, rows and carried values, but for the batch size."""
    one = analyze(captured_graph(wired("side"), CALL)[0])
    many = facts_of(wired("side"), None)
    assert [f.slot for f in one.frontiers] == [f.slot for f in many.frontiers]
    assert [f.dim for f in one.frontiers] == [f.dim for f in many.frontiers]
    assert [(c.dim, c.made_at, c.read_at) for c in one.carried] == [
        (c.dim, c.made_at, c.read_at) for c in many.carried
    ]
