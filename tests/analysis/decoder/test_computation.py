"""Digests of the computation of stored rows: equal for graphs of one model, different for any change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlcache_fx.analysis import analyze
from vlcache_fx.analysis.decoder.computation import Computation, computation_of
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.prompts import IMAGE_TOKEN, noise
from vlcache_fx.testing.tiny_attention import causal_mask, rotary_angles
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

TOKENS, HIDDEN = 25, 16


def inputs(before: int = 7) -> dict[str, Tensor]:
    call = tiny_vlm_inputs(before, TOKENS - 12 - before, [(12, 0)])
    del call["pixel_values"]
    return call | {"features": noise(0, 12, HIDDEN)}


def computed(model: Any, *calls: dict[str, Tensor], dynamic: bool | None = None) -> Computation:
    captured, _ = captured_graph(model, *calls, dynamic=dynamic)
    return computation_of(captured, analyze(captured))


def plain(**options: Any) -> Any:
    return tiny_vlm(last_only=False, **options)


def test_computation_of_one_model_agrees() -> None:
    static = computed(plain(), inputs())
    symbolic = computed(plain(), inputs(), dynamic=True)
    other_weights = computed(plain(seed=1), inputs(3), dynamic=True)
    last_row = computed(tiny_vlm(), inputs())
    masked = computed(plain(explicit_mask=True), inputs(), dynamic=True)
    given_positions = computed(plain(), inputs() | {"position_ids": torch.arange(TOKENS)}, dynamic=True)
    found = (static, symbolic, other_weights, last_row, masked, given_positions)
    assert len({one.digests.unified for one in found}) == 1


def times(factor: float) -> Callable[..., Any]:
    return lambda module, args, result: result * factor


@pytest.mark.parametrize("place", ["embed", "decoder.layers.0.mlp", "decoder.layers.1.attention.key"])
def test_computation_of_constants(place: str) -> None:
    digests = set()
    for factor in (None, 2, 3, 2.0):
        model = plain()
        if factor is not None:
            model.get_submodule(place).register_forward_hook(times(factor))
        digests.add(computed(model, inputs(), dynamic=True).digests.unified)
    assert len(digests) == 4


def test_computation_of_decoder_shape() -> None:
    changes: list[dict[str, Any]] = [{}, {"rope": "interleaved"}, {"rope": "partial"}, {"rope": "none"}]
    changes += [{"norm_place": "branch"}, {"norm_place": "post"}, {"parallel": True}, {"embed_scale": True}]
    changes += [{"heads": 4, "kv_heads": 2}, {"attention": "math", "softcap": 0.5}]
    digests = {computed(plain(**change), inputs(), dynamic=True).digests.unified for change in changes}
    assert len(digests) == len(changes)


class Scaled(TinyVlm):
    """Multiplies positions and scales rotary tables, in either order."""

    factor, scaling, first = 1, 1.0, False

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]
        embeds, image = self.embed(input_ids), input_ids == IMAGE_TOKEN
        x = embeds.masked_scatter(image[..., None].expand_as(embeds), features)
        positions = torch.arange(x.shape[1]) * self.factor
        cos, sin = rotary_angles(positions, 8)
        rotary = (cos * self.scaling, sin * self.scaling)
        for layer in self.decoder.layers:
            x = layer(x, rotary, None)
            x = (x + 1) * 2 if self.first else x * 2 + 1
        logits: Tensor = self.decoder.head(x)
        return logits


def test_computation_of_positions_and_tables() -> None:
    def digest(**settings: Any) -> str:
        return computed(plain(cls=Scaled, **settings), inputs(), dynamic=True).digests.unified

    assert digest() == digest(factor=3)  # values of leaves are part of keys
    assert len({digest(), digest(scaling=1.5), digest(first=True)}) == 3


class PerLayer(TinyVlm):
    """Layers read further inputs, [1, tokens, hidden], and positions."""

    def forward(self, input_ids: Tensor, features: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        embeds, image = self.embed(input_ids), input_ids == IMAGE_TOKEN
        x = embeds.masked_scatter(image[..., None].expand_as(embeds), features)
        for layer in self.decoder.layers:
            x = layer(x, rotary_angles(torch.arange(x.shape[1]), 8), causal_mask(x.shape[1], x.device))
            x = x + more
        logits: Tensor = self.decoder.head(x)
        return logits


@pytest.mark.parametrize(("tokens", "dim"), [(TOKENS, 1), (HIDDEN, None)], ids=["longer", "as long as wide"])
def test_computation_of_square_inputs(tokens: int, dim: int | None) -> None:
    """The token dimension is ambiguous, so keys contain the whole input."""
    model: Any = plain(cls=PerLayer)
    call = tiny_vlm_inputs(2, tokens - 6, [(4, 0)])
    call = {"input_ids": call["input_ids"], "features": noise(0, 4, HIDDEN)}
    found = computed(model, call | {"more": noise(1, 1, tokens, HIDDEN)}, dynamic=False)
    (leaf,) = (leaf for leaf in found.leaves if leaf.node.meta["val"].is_floating_point())
    assert (leaf.token_dim, leaf.is_beside) == (dim, True)


def test_computation_of_other_weights() -> None:
    model = plain()
    captured, graph = captured_graph(model, inputs())
    found = computation_of(captured, analyze(captured))
    places = [captured.placeholders.index(node) for node in found.weights]
    assert any(graph.calls[0][place] is model.embed.weight for place in places)


@pytest.mark.parametrize("kind", ["dropout", "attention", "noise"])
def test_computation_of_random_numbers_refused(kind: str) -> None:
    class Random(TinyVlm):
        def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]
            embeds, image = self.embed(input_ids), input_ids == IMAGE_TOKEN
            embeds = F.dropout(embeds, 0.1) if kind == "dropout" else embeds
            embeds = embeds + torch.rand_like(embeds) if kind == "noise" else embeds
            x = embeds.masked_scatter(image[..., None].expand_as(embeds), features)
            for layer in self.decoder.layers:
                if kind == "attention":
                    query, key, value = layer.attention.project(x)
                    y = F.scaled_dot_product_attention(query, key, value, None, 0.5, True, enable_gqa=True)
                    x = x + layer.attention.out(y.transpose(1, 2).reshape(x.shape))
                else:
                    x = layer(x, None, None)
            logits: Tensor = self.decoder.head(x)
            return logits

    model: Any = plain(cls=Random)
    with pytest.raises(UnsupportedGraphError) as refused:
        computed(model, inputs())
    assert refused.value.reason is Reason.RANDOM


def test_computation_of_inactive_dropout() -> None:
    class Dropping(TinyVlm):
        def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids, None, F.dropout(features, 0.1, training=False))

    one, other = plain(), plain(cls=Dropping)
    assert computed(one, inputs()).digests.unified == computed(other, inputs()).digests.unified
