"""Several residual streams at once, stacked in front of samples and tokens, as in Gemma 3n."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vlcache_fx.testing.prompts import seeded
from vlcache_fx.testing.tiny_attention import DecoderShape, rotary_angles
from vlcache_fx.testing.tiny_vlm import TinyDecoder, TinyVlm, tiny_vlm_inputs

from .runtime.helpers import Pair, hits, own_compiler_state, with_backend

TOLERANCE = 5e-6


class StackedDecoder(TinyDecoder):
    """Three streams; a layer computes one, and changes the others by what it computed."""

    def forward(self, embeds: Tensor, position_ids: Tensor | None = None) -> Tensor:
        rotary = rotary_angles(torch.arange(embeds.shape[1]), self.shape.rotary_dim)
        x = torch.stack([embeds, embeds * 0.5, embeds.tanh()])
        for index, layer in enumerate(self.layers):
            mixed = x[index % 3] + 0.1 * x.sum(0)
            x = x + (layer(mixed, rotary, None) - mixed) * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1, 1)
        x = x.mean(0)
        if self.shape.last_only:
            x = x[:, -1:]
        logits: Tensor = self.head(self.norm(x))
        return logits


@pytest.fixture(scope="module", params=[False, True], ids=["all rows", "last row"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    shape = DecoderShape(num_layers=4, last_only=request.param)
    with seeded(0):
        model = TinyVlm(shape)
        model.decoder = StackedDecoder(shape)
    with own_compiler_state():
        yield with_backend(model.eval(), policy="layer_aware", budget=0.1, strict=True)


def batch(*prompts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}


@pytest.mark.parametrize("samples", [1, 2])
def test_full_recompute_equals_unmodified(pair: Pair, samples: int) -> None:
    pair.engine.clear()
    first = [tiny_vlm_inputs(5, 9, [(30, seed)]) for seed in range(samples)]
    moved = [tiny_vlm_inputs(11, 4, [(30, seed)], text_seed=1) for seed in reversed(range(samples))]
    off, report = pair.run(**batch(*first))
    assert (report["mode"], off <= TOLERANCE) == ("cold", True)
    with pair.engine.using(policy="full"):
        off, report = pair.run(**batch(*moved))
    assert (report["mode"], hits(report)) == ("warm", [True] * samples)
    assert off <= TOLERANCE


def test_budget_of_rows(pair: Pair) -> None:
    """Behind the same text a donor is exact, with few of its rows; behind another one it is not."""
    pair.engine.clear()
    pair.run(**tiny_vlm_inputs(5, 9, [(30, 0)]))
    for before, text, is_exact in ((5, 0, True), (8, 1, False)):
        off, report = pair.run(**tiny_vlm_inputs(before, 14, [(30, 0)], text_seed=text))
        assert report["mode"] == "warm"
        assert report["token_layer_fraction"] < 0.15
        assert (off <= TOLERANCE) is is_exact
