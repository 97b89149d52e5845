"""Keys of earlier calls, joined with keys of the call in all ways that models use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.testing.prompts import IMAGE_TOKEN
from vlcache_fx.testing.tiny_attention import repeat_heads, rotary_angles, rotate
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, distance, hits, own_compiler_state, with_backend

LAYERS, PAST = 2, 9
WINDOW = 12


class WithPast(TinyVlm):
    """Earlier keys and values are inputs, [layers, 1, 1, past, 8]; new keys and values are results."""

    kind = "behind"

    def forward(self, input_ids: Tensor, pixel_values: Tensor, keys: Tensor, values: Tensor) -> Any:
        embeds, image = self.embed(input_ids), input_ids == IMAGE_TOKEN
        x = embeds.masked_scatter(image[..., None].expand_as(embeds), self.encoder(pixel_values))
        past, tokens = keys.shape[3], x.shape[1]
        place, everywhere = torch.arange(tokens) + past, torch.arange(past + tokens)
        masks = {"mask": self.mask(place, everywhere, image[0])}
        results = []
        for index, layer in enumerate(self.decoder.layers):
            query, key, value = layer.attention.project(layer.norm_1(x))
            query = rotate(query, *rotary_angles(place, 8))
            key, value = (
                self.joined(key, keys[index], place, everywhere),
                self.with_past(value, values[index]),
            )
            results.append((key, value))
            if self.kind == "no mask":
                y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            elif self.kind == "sees all":
                y = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
            else:
                key, value = repeat_heads(key, 2), repeat_heads(value, 2)
                y = F.scaled_dot_product_attention(query, key, value, attn_mask=masks["mask"])
            x = x + layer.attention.out(y.transpose(1, 2).reshape(1, tokens, -1))
            x = x + layer.mlp(layer.norm_2(x))
        return self.decoder.head(self.decoder.norm(x)), results

    def joined(self, key: Tensor, past: Tensor, place: Tensor, everywhere: Tensor) -> Tensor:
        if self.kind == "unrotated":  # the cache has keys without positions
            return rotate(self.with_past(key, past), *rotary_angles(everywhere, 8))
        return self.with_past(rotate(key, *rotary_angles(place, 8)), past)

    def with_past(self, new: Tensor, past: Tensor) -> Tensor:
        if self.kind == "in front":
            return torch.cat([new, past], 2)
        full = torch.cat([past, new], 2)
        if self.kind == "window":
            return full[:, :, -WINDOW:]
        if self.kind == "mirrored":
            return full.flip(2)
        if self.kind == "written":
            full = torch.zeros(full.shape)
            full[:, :, : past.shape[2]] = past
            full[:, :, past.shape[2] :] = new
        return full

    def mask(self, place: Tensor, everywhere: Tensor, image: Tensor) -> Tensor:
        past = len(everywhere) - len(place)
        seen = everywhere[None, :] <= place[:, None]
        if self.kind == "image sees the question":
            seen = seen | image[:, None]
        if self.kind == "image both ways":
            both = torch.cat([torch.zeros(past, dtype=torch.bool), image])
            seen = seen | (image[:, None] & both[None, :])
        if self.kind == "in front":
            seen = torch.cat([seen[:, past:], seen[:, :past]], 1)
        if self.kind == "window":
            seen = seen[:, -WINDOW:]
        if self.kind == "mirrored":
            seen = seen.flip(1)
        return seen


def compiled(kind: str, **options: Any) -> Pair:
    model: Any = tiny_vlm(cls=WithPast, kind=kind, last_only=False, num_layers=LAYERS)
    return with_backend(model, policy="full", **options)


def call(before: int, seed: int, past: int = PAST) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, LAYERS, 1, 1, past, 8, generator=generator)
    return tiny_vlm_inputs(before, 5, [(20, 0)], text_seed=seed) | {"keys": keys, "values": values}


def check(pair: Pair, inputs: dict[str, Tensor]) -> dict[str, Any]:
    with torch.no_grad():
        (got, state), (expected, want) = pair.model(**inputs), pair.reference(**inputs)
    assert distance(got, expected) == 0.0
    for ours, theirs in zip(state, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return pair.report


@pytest.mark.parametrize(
    ("kind", "dynamic"),
    [
        *[(kind, True) for kind in ("behind", "in front", "unrotated", "window", "written")],
        ("behind", None),
        # Sizes that become symbolic are in "behind", and these kinds above.
        *[
            pytest.param(kind, None, marks=pytest.mark.thorough)
            for kind in ("in front", "unrotated", "window", "written")
        ],
    ],
)
def test_full_recompute_with_past(kind: str, dynamic: bool | None) -> None:
    pair = compiled(kind, dynamic=dynamic)
    # Nothing is stored after a past: the donor comes from another graph with the same weights.
    options = {"store": pair.engine.options.store, "policy": "full"}
    plain = with_backend(tiny_vlm(last_only=False, num_layers=LAYERS), **options)
    assert plain.run(**tiny_vlm_inputs(8, 5, [(20, 0)]))[1]["mode"] == "cold"
    for inputs in (call(3, 1), call(13, 2), call(2, 3, past=PAST + 4)):
        report = check(pair, inputs)
        assert (report["mode"], hits(report), report["prefix_tokens"]) == ("warm", [True], 0)
    assert pair.engine.refusals == []


@pytest.mark.parametrize("kind", ["no mask", "image both ways"])
def test_other_masks_find_no_donor(kind: str) -> None:
    """After a past, ``is_causal`` counts from the first key; images both ways attend to all of themselves."""
    pair = compiled(kind)
    plain = with_backend(tiny_vlm(last_only=False, num_layers=LAYERS), store=pair.engine.options.store)
    plain.run(**tiny_vlm_inputs(8, 5, [(20, 0)]))
    for inputs in (call(3, 1), call(13, 2)):
        report = check(pair, inputs)
        assert (report["mode"], hits(report)) == ("cold", [False])


@pytest.mark.parametrize("kind", ["behind", "unrotated"])
def test_cache_contains_donor_rows(kind: str) -> None:
    """Guards against tests that pass without any reuse."""
    pair = compiled(kind)
    options = {"store": pair.engine.options.store, "policy": "full"}
    plain = with_backend(tiny_vlm(last_only=False, num_layers=LAYERS), **options)
    plain.run(**tiny_vlm_inputs(8, 5, [(20, 0)]))
    inputs = call(3, 1)
    with torch.no_grad(), pair.engine.using(policy="none"):
        (got, state), (expected, want) = pair.model(**inputs), pair.reference(**inputs)
    assert pair.report["rows_per_layer"] == (8,) * (LAYERS + 1)
    assert distance(got[:, :3], expected[:, :3]) <= 1e-5
    assert distance(got[:, 23:], expected[:, 23:]) > 1e-3
    for at, (ours, theirs) in enumerate(
        zip(state, want, strict=True)
    ):  # those of the first layer do not depend on it
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a[:, :, : PAST + 3], b[:, :, : PAST + 3], rtol=0, atol=1e-5)
            assert torch.allclose(a, b, rtol=0, atol=1e-5) == (at == 0)


def test_refuses_unknown_key_order() -> None:
    pair = compiled("mirrored")
    report = check(pair, call(3, 1))
    assert f"[{Reason.MASK_FORM.value}]" in report["reason"]
    assert "the keys of this call cannot be identified" in report["reason"]


def test_refuses_image_that_attends_to_question_after_past() -> None:
    pair = compiled("image sees the question")
    report = check(pair, call(3, 1))
    assert "[mask_form]" in report["reason"]
    assert "attend to tokens after the span" in report["reason"]
    assert check(pair, call(4, 2))["mode"] == "bypass"


def test_bidirectional_tokens_are_no_decoding_step() -> None:
    report = check(compiled("sees all"), call(3, 1))
    assert "[mask_form]" in report["reason"]
    assert "attend to later tokens" in report["reason"]


def test_strict_raises_refusals() -> None:
    with pytest.raises(BackendCompilerFailed) as failed, torch.no_grad():
        compiled("mirrored", strict=True).model(**call(3, 1))
    assert isinstance(failed.value.inner_exception, UnsupportedGraphError)
    with own_compiler_state(), torch.no_grad():
        compiled("behind", strict=True).model(**call(3, 1))


class Shared(TinyVlm):
    """Counts its calls in one input, and reads another."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, count: Tensor, other: Tensor) -> Tensor:
        count.add_(1)
        return super().forward(input_ids, pixel_values) * other.sum()


def test_overlapping_inputs_run_unmodified() -> None:
    model: Any = tiny_vlm(cls=Shared, last_only=False)
    pair = with_backend(model)
    inputs = tiny_vlm_inputs(3, 5, [(20, 0)])
    for shared, mode in ((False, "cold"), (True, "bypass")):
        results = []
        for one in (pair.model, pair.reference):
            count = torch.zeros(4)
            with torch.no_grad():
                results.append(
                    (one(**inputs, count=count[:2], other=count[1:3] if shared else torch.ones(2)), count)
                )
        (got, mine), (expected, theirs) = results
        assert torch.equal(got, expected)
        assert mine.tolist() == theirs.tolist() == [1, 1, 0, 0]
        assert pair.report["mode"] == mode
    assert "shares memory" in pair.report["reason"]
