"""Layers of decoding steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.analysis import analyze, analyze_decode_step
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.passes.standard import decode_step_program
from vlcache_fx.testing.graphs import captured_graph

from ...runtime.helpers import own_compiler_state

LAYERS, WIDTH = 3, 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        past = torch.cat([past, torch.stack([key, value])], -2)
        attended = F.scaled_dot_product_attention(query, past[0], past[1])
        return x + self.out(attended.transpose(1, 2).flatten(2)), past


class Decoder(nn.Module):
    """A decoding step: one token, and past keys and values [2, batch, heads, tokens, dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, embeds: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        kept = []
        for layer, before in zip(self.layers, past, strict=True):
            embeds, after = layer(embeds, before)
            kept.append(after)
        return self.head(embeds), kept


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    past = [torch.randn(2, 1, 2, 7, WIDTH // 2, generator=generator) for _ in range(LAYERS)]
    return {"embeds": torch.randn(1, 1, WIDTH, generator=generator), "past": past}


def test_analyze_decode_step_layers() -> None:
    captured, _ = captured_graph(Decoder(), inputs(), dynamic=True)
    facts = analyze_decode_step(captured)
    assert len(facts.sites) == LAYERS
    assert len(facts.stream.boundaries) == LAYERS + 1
    for site, members in zip(facts.sites, facts.stream.members, strict=True):
        assert site.node in members
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(captured)
    assert refusal.value.reason is Reason.PAST_KEYS


def test_decode_step_program_segments() -> None:
    model = Decoder()
    captured, graph = captured_graph(model, inputs(), dynamic=True)
    before = str(captured.graph_module.graph)
    program = decode_step_program(captured)
    assert str(captured.graph_module.graph) == before
    tags = {node.meta.get("segment") for node in program.graph.nodes if node.op == "call_function"}
    assert {f"layer.{index}" for index in range(LAYERS)} | {"tail"} <= tags
    with torch.no_grad():
        logits, kept = model(**inputs())
    for got, want in zip(program.graph_module(*graph.calls[0]), [logits, *kept], strict=True):
        assert torch.equal(got, want)


def test_analyze_decode_step_without_attention() -> None:
    class Head(nn.Module):
        def forward(self, embeds: Tensor) -> Tensor:
            return embeds * 2

    captured, _ = captured_graph(Head(), {"embeds": torch.ones(1, 1, WIDTH)}, dynamic=True)
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze_decode_step(captured)
    assert refusal.value.reason is Reason.NO_ATTENTION
