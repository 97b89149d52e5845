"""A small model for each kind of graph, with a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.compiler.traced import Traced
from vlcache_fx.errors import UnsupportedGraphError
from vlcache_fx.testing.graphs import traced_graphs
from vlcache_fx.testing.prompts import IMAGE_TOKEN
from vlcache_fx.testing.tiny_hybrid import tiny_hybrid
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.test_cross_attention import Attending as CrossAttending
from ..runtime.test_cross_attention import call as cross_call
from ..runtime.test_merge import cut

PROMPT = tiny_vlm_inputs(3, 5, [(20, 0)])


class Merging(nn.Module):
    """A merge alone."""

    def forward(self, x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        return x.masked_scatter(mask, features)


class Looking(nn.Module):
    """An encoder alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.linear(pixels)
        return F.scaled_dot_product_attention(x, x, x)


class LookingAndWriting(Looking):
    """An encoder that counts its calls in an input."""

    def forward(self, pixels: Tensor, count: Tensor) -> Tensor:  # type: ignore[override]
        count.add_(1)
        return super().forward(pixels)


class LookingAtRandom(Looking):
    """An encoder with dropout."""

    def forward(self, pixels: Tensor) -> Tensor:
        return F.dropout(super().forward(pixels), 0.5)


class Adding(nn.Module):
    """A part of a model, without attention."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Stepping(nn.Module):
    """A decoding step of two layers: one token attends to cached keys, which are also its values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        for layer in self.layers:
            heads = layer(x)[:, None]
            keys = torch.cat([past, heads], 2)
            x = x + F.scaled_dot_product_attention(heads, keys, keys)[:, 0]
        return x


class SteppingOnFolded(Stepping):
    """A decoding step that cannot be captured."""

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return super().forward(x, torch.func.vmap(torch.func.grad(lambda row: (row**2).sum()))(past))


class SteppingOnStates(Stepping):
    """A decoding step with a recurrent layer first, whose state it continues."""

    def forward(self, x: Tensor, past: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        heads = self.layers[0](x)[:, :, None]
        decay = -heads.square().sum(-1)
        rows, state, *_ = torch.ops.vlcache.recur(heads, heads, heads, decay, None, state)
        return super().forward(x + rows[:, :, 0], past), state


class Dropping(nn.Module):
    """A decoder with attention dropout: refused when its programs are built."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = tiny_vlm()

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        embeds, image = self.vlm.embed(input_ids), input_ids == IMAGE_TOKEN
        x = embeds.masked_scatter(image[..., None].expand_as(embeds), self.vlm.encoder(pixel_values))
        for layer in self.vlm.decoder.layers:
            query, key, value = layer.attention.project(x)
            y = F.scaled_dot_product_attention(query, key, value, None, 0.5, True, enable_gqa=True)
            x = x + layer.attention.out(y.transpose(1, 2).reshape(x.shape))
        logits: Tensor = self.vlm.decoder.head(x)
        return logits


MERGE = {
    "x": torch.zeros(1, 7, 4),
    "mask": torch.ones(1, 7, 4, dtype=torch.bool),
    "features": torch.ones(7, 4),
}
PIXELS = {"pixels": torch.ones(1, 2, 5, 8)}
STEP = {"x": torch.ones(1, 1, 8), "past": torch.ones(1, 1, 7, 8)}

CASES: dict[str, tuple[Callable[[], Any], dict[str, Tensor], list[str]]] = {
    "encoder": (Looking, PIXELS, ["encoder"]),
    "merge": (Merging, MERGE, ["merge"]),
    "merge and decoder": (cut, PROMPT, ["merge", "decoder"]),
    "cross-attention": (lambda: CrossAttending().eval(), cross_call(0, 0), ["cross-attending decoder"]),
    "prefill": (tiny_vlm, PROMPT, ["decoder"]),
    "prefill with recurrent layers": (lambda: tiny_hybrid("dcap"), PROMPT, ["decoder"]),
    "recurrent layers alone": (lambda: tiny_hybrid("dc"), PROMPT, ["unmodified"]),
    "recurrent layers of two prompts": (
        lambda: tiny_hybrid("da"),
        {name: torch.cat([value, value]) for name, value in PROMPT.items()},
        ["decoder"],
    ),
    "decoding step": (Stepping, STEP, ["decoding step"]),
    "decoding step with recurrent layers": (
        SteppingOnStates,
        STEP | {"state": torch.ones(1, 1, 8, 8)},
        ["decoding step"],
    ),
    "decoding step that cannot be captured": (SteppingOnFolded, STEP, ["decoding step"]),
    "piece": (Adding, {"x": torch.ones(2)}, ["unmodified"]),
    "text": (tiny_vlm, tiny_vlm_inputs(9, 3, []), ["unmodified"]),
    "positions in the stream": (lambda: tiny_vlm(learned_positions=True), PROMPT, ["unmodified"]),
    "random attention": (Dropping, PROMPT, ["unmodified"]),
    "encoder that writes": (LookingAndWriting, PIXELS | {"count": torch.zeros(1)}, ["unmodified"]),
    "random encoder": (LookingAtRandom, PIXELS, ["unmodified"]),
}
"""Per name: the model, a call, and the kinds of its graphs."""


def traced(model: nn.Module, call: dict[str, Tensor], dynamic: bool | None = None) -> Traced:
    """Return the only graph of ``model``, captured if possible."""
    return traced_call(model, call, dynamic)[0]


def traced_call(
    model: nn.Module, call: dict[str, Tensor], dynamic: bool | None = None
) -> tuple[Traced, tuple[Any, ...]]:
    """Return the graph and its arguments in ``call``."""
    graphs: list[Traced] = []

    def trace(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> None:
        graphs.append(Traced.by_dynamo(graph_module, example_inputs))
        with contextlib.suppress(UnsupportedGraphError):
            _ = graphs[-1].captured

    (own,) = traced_graphs(model, call, dynamic=dynamic, seen=trace)
    (graph,) = graphs
    return graph, own.calls[0]
