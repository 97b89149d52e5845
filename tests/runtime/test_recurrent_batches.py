"""Several prompts in one call of a decoder with recurrent layers: each is served as in a call of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.testing.prompts import seeded
from vlcache_fx.testing.tiny_attention import DecoderShape, causal_mask, rotary_angles
from vlcache_fx.testing.tiny_hybrid import HybridDecoder, ShortConvolution
from vlcache_fx.testing.tiny_vlm import IMAGE_TOKEN, TinyVlm, tiny_vlm_inputs

from ..models import batch_of
from .helpers import Pair, hits, own_compiler_state, with_backend

A, B, C, D = (40, 0), (31, 1), (24, 2), (20, 3)
TOLERANCE = 5e-6


class PaddedHybrid(TinyVlm):
    """A hybrid for prompts of several lengths in one batch.

    Attributes:
        hides: True if padding is zero in front of recurrent layers, and no bias makes it more than that, as
            in transformers: padding in front of a prompt leaves states at zero then.
    """

    hides = True

    def forward(self, input_ids: Tensor, pixel_values: Tensor, kept: Tensor) -> Tensor:  # type: ignore[override]
        embeds = self.embed(input_ids)
        image = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
        x = embeds.masked_scatter(image, self.encoder(pixel_values))
        rotary = rotary_angles(torch.arange(x.shape[1]), self.decoder.shape.rotary_dim)
        mask = causal_mask(x.shape[1], x.device) & kept[:, None, None, :]
        for layer in self.decoder.layers:
            normed = layer.norm_1(x)
            if layer.kind in "ap":
                x = x + layer.attention(normed, rotary, mask)
            if layer.kind != "a":
                x = x + layer.mixer(normed * kept[..., None] if self.hides else normed)
            x = x + layer.mlp(layer.norm_2(x))
        logits: Tensor = self.decoder.head(self.decoder.norm(x))
        return logits


def padded_hybrid(kinds: str, *, hides: bool = True) -> PaddedHybrid:
    shape = DecoderShape(num_layers=len(kinds), last_only=False, explicit_mask=True)
    with seeded(0):
        model = PaddedHybrid(shape)
        model.decoder, model.hides = HybridDecoder(shape, kinds), hides
        for module in model.modules():
            if hides and isinstance(module, ShortConvolution):
                torch.nn.init.zeros_(module.bias)
        return model.eval()


@pytest.fixture(scope="module", params=[("cdsa", True), ("dap", False), ("sca", True)], ids=str)
def compiled(request: pytest.FixtureRequest) -> Iterator[Pair]:
    kinds, hides = request.param
    with own_compiler_state():
        yield with_backend(padded_hybrid(kinds, hides=hides), policy="none", budget=0.1, strict=True)


@pytest.fixture
def pair(compiled: Pair) -> Pair:
    compiled.engine.clear()
    return compiled


def prompt(*images: tuple[int, int], before: int = 5, after: int = 9, text: int = 0) -> dict[str, Tensor]:
    return tiny_vlm_inputs(before, after, images, text_seed=text)


def on_real_tokens(pair: Pair, call: dict[str, Tensor]) -> tuple[float, dict[str, Any]]:
    """Return the largest error of logits outside padding, and the report."""
    got, want = pair.both(**call)
    return float((got - want)[call["kept"]].abs().max()), pair.report


@pytest.mark.parametrize("left", [True, False])
def test_cold_equals_unmodified(pair: Pair, left: bool) -> None:
    off, report = on_real_tokens(pair, batch_of(prompt(A), prompt(B, before=9, text=1), left=left))
    assert (report["mode"], hits(report)) == ("cold", [False, False])
    assert off <= TOLERANCE


@pytest.mark.parametrize("left", [True, False])
def test_full_recompute_equals_unmodified(pair: Pair, left: bool) -> None:
    on_real_tokens(pair, batch_of(prompt(A), prompt(B, before=9, text=1)))
    call = batch_of(prompt(B, A, before=2, text=2), prompt(A, before=11, text=3), left=left)
    with pair.engine.using(policy="full"):
        off, report = on_real_tokens(pair, call)
    assert (report["mode"], hits(report)) == ("warm", [True, True, True])
    assert off <= TOLERANCE


@pytest.mark.parametrize("left", [True, False])
def test_donors_in_their_own_context_are_exact(pair: Pair, left: bool) -> None:
    """Samples jump over different numbers of rows; one has two items, one an item that misses."""
    on_real_tokens(pair, batch_of(prompt(A, B), prompt(C, before=7, text=1), left=False))
    call = batch_of(prompt(A, B, after=14), prompt(C, D, before=7, after=3, text=1), left=left)
    off, report = on_real_tokens(pair, call)
    assert (report["mode"], hits(report)) == ("warm", [True, True, True, False])
    if left and not pair.reference.hides:  # padding changes the states in front of the items
        assert off > TOLERANCE
    else:
        assert off <= TOLERANCE


def test_donors_of_a_batch_serve_single_prompts(pair: Pair) -> None:
    on_real_tokens(pair, batch_of(prompt(A), prompt(B, text=1), left=False))
    for item, text in ((A, 0), (B, 1)):
        one = prompt(item, after=12, text=text)
        call = one | {"kept": torch.ones_like(one["input_ids"], dtype=torch.bool)}
        off, report = on_real_tokens(pair, call)
        assert (report["mode"], hits(report)) == ("warm", [True])
        assert off <= TOLERANCE


def test_last_tokens_of_a_batch() -> None:
    """Where results need one row a sample, it is never a row that pads a shorter sample."""
    with own_compiler_state():
        model = padded_hybrid("cda")
        forward = PaddedHybrid.forward

        class LastOnly(PaddedHybrid):
            def forward(self, input_ids: Tensor, pixel_values: Tensor, kept: Tensor) -> Tensor:  # type: ignore[override]
                return forward(self, input_ids, pixel_values, kept)[:, -1:]

        model.__class__ = LastOnly
        pair = with_backend(model, policy="none", budget=0.1, strict=True)
        pair.run(**batch_of(prompt(A, B), prompt(C, before=7, text=1)))
        call = batch_of(prompt(A, B, after=14), prompt(C, before=7, after=3, text=1))
        off, report = pair.run(**call)
        assert (report["mode"], hits(report)) == ("warm", [True, True, True])
        assert off <= TOLERANCE
