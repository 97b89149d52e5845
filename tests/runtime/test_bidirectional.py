"""Pictures that attend to the question, as with a prefix-LM mask: exact reuse of whole equal prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlcache_fx.errors import Reason
from vlcache_fx.testing.prompts import IMAGE_TOKEN
from vlcache_fx.testing.tiny_attention import repeat_heads, rotary_angles, rotate
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, hits, keys, own_compiler_state, settings_of, with_api

TOLERANCE = 1e-5
SUFFIX = 3
"""Tokens after the prefix, in the kind ``prefix``."""


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


class PrefixLm(TinyVlm):
    """Tokens of the prefix attend to each other; those of the suffix are causal.

    Kinds: ``all`` (the prompt is the prefix), ``prefix`` (all but the last tokens are), ``image`` (the image
    attends to all tokens; text is causal).
    """

    kind = "all"

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        embeds, image = self.embed(input_ids), input_ids == IMAGE_TOKEN
        x = embeds.masked_scatter(image[..., None].expand_as(embeds), self.encoder(pixel_values))
        place = torch.arange(x.shape[1])
        mask = self.mask(place, image[:, None, :, None])
        rotary = rotary_angles(place, 8)
        for layer in self.decoder.layers:
            query, key, value = layer.attention.project(layer.norm_1(x))
            query, key = rotate(query, *rotary), repeat_heads(rotate(key, *rotary), 2)
            y = F.scaled_dot_product_attention(query, key, repeat_heads(value, 2), attn_mask=mask)
            x = x + layer.attention.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))
            x = x + layer.mlp(layer.norm_2(x))
        return self.decoder.head(self.decoder.norm(x))

    def mask(self, place: Tensor, image: Tensor) -> Tensor:
        causal = place[None, :] <= place[:, None]
        if self.kind == "image":
            return causal | image
        prefix = place < len(place) - (SUFFIX if self.kind == "prefix" else 0)
        return (causal | (prefix[:, None] & prefix[None, :]))[None, None]


def prefix_lm(kind: str = "all", **options: Any) -> Pair:
    return with_api(tiny_vlm(cls=PrefixLm, kind=kind, last_only=False), **options)


def question(
    seed: int = 1, *, before: int = 2, text: int = 4, images: tuple[int, ...] = (0,)
) -> dict[str, Tensor]:
    return tiny_vlm_inputs(before, text, [(20, image) for image in images], text_seed=seed)


@pytest.mark.parametrize("kind", ["all", "image"])
@pytest.mark.parametrize("images", [(0,), (0, 1), (0, 0)])
def test_equal_prompt_is_reused_whole(kind: str, images: tuple[int, ...]) -> None:
    pair = prefix_lm(kind)
    off, report = pair.run(**question(images=images))
    assert (report["mode"], off <= TOLERANCE) == ("cold", True)
    assert {span["miss_reason"] for span in report["spans"]} == {Reason.NEW_ITEM}
    off, report = pair.run(**question(images=images))
    assert off <= TOLERANCE
    assert (report["mode"], hits(report)) == ("warm", [True] * len(images))
    assert report["prefix_tokens"] == report["num_tokens"]
    assert pair.engine.refusals == []


@pytest.mark.parametrize("kind", ["all", "image"])
def test_other_question_computes_the_image_again(kind: str) -> None:
    pair = prefix_lm(kind)
    pair.run(**question(1))
    for seed, expected in ((2, ("cold", [False])), (1, ("warm", [True])), (2, ("warm", [True]))):
        off, report = pair.run(**question(seed))
        assert off <= TOLERANCE
        assert (report["mode"], hits(report)) == expected
        if expected[0] == "cold":
            assert report["reason_code"] is Reason.OTHER_TEXT
            (explained,) = pair.engine.explain_miss()
            assert explained.differs == ("text that its tokens attend to",)


def test_question_of_the_same_length_and_start_is_another() -> None:
    pair = prefix_lm()
    first, second = question(), question()
    second["input_ids"][0, -1] += 1
    pair.run(**first)
    off, report = pair.run(**second)
    assert (report["mode"], off <= TOLERANCE) == ("cold", True)


@pytest.mark.parametrize("change", ["before", "image", "order"])
def test_all_before_the_question_counts(change: str) -> None:
    pair = prefix_lm("image")
    pair.run(**question(images=(0, 1)))
    other = {
        "before": question(images=(0, 1), before=3),
        "image": question(images=(0, 2)),
        "order": question(images=(1, 0)),
    }[change]
    off, report = pair.run(**other)
    assert (report["mode"], hits(report)) == ("cold", [False, False])
    assert off <= TOLERANCE


def test_text_before_the_range_is_a_block_of_its_own() -> None:
    pair = prefix_lm("image")
    pair.run(**question(before=20))
    text = [key for key in (entry.key for entry in pair.engine.store.entries()) if key.startswith("text")]
    assert len(text) == 3  # 16 and 4 tokens, and the range
    assert keys(pair.report) == [next(key for key in text if key in keys(pair.report))]


def test_prefix_serves_other_suffixes() -> None:
    """Of a prompt with an answer after the prefix, the prefix is reused with another answer."""
    pair = prefix_lm("prefix")
    first = question(text=6)
    other = {name: value.clone() for name, value in first.items()}
    other["input_ids"][0, -SUFFIX:] = torch.tensor([3, 1, 2])
    pair.run(**first)
    off, report = pair.run(**other)
    assert off <= TOLERANCE
    assert (report["mode"], hits(report)) == ("warm", [True])
    assert report["prefix_tokens"] == report["num_tokens"] - SUFFIX


@pytest.mark.parametrize("donor_dtype", ["model", "int8"])
@pytest.mark.parametrize("policy", ["layer_aware", "none"])
def test_ranges_are_exact_with_all_donors(donor_dtype: str, policy: str) -> None:
    pair = prefix_lm(policy=policy, donor_dtype=donor_dtype)
    pair.run(**question())
    off, report = pair.run(**question())
    assert (report["mode"], off <= TOLERANCE) == ("warm", True)
    assert report["token_layer_fraction"] == 0.0


def test_policy_without_prefixes_computes_all() -> None:
    pair = prefix_lm("image")
    pair.run(**question())
    with settings_of(pair.engine, policy="full"):
        off, report = pair.run(**question())
    assert (report["mode"], report["reason_code"]) == ("cold", Reason.NO_PREFIX)
    assert off <= TOLERANCE


def test_lost_text_before_the_range() -> None:
    pair = prefix_lm("image")
    pair.run(**question(before=20))
    own = keys(pair.report)
    for entry in pair.engine.store.entries():
        if entry.key not in own:
            pair.engine.clear(key=entry.key)
    off, report = pair.run(**question(before=20))
    assert (report["mode"], report["reason_code"]) == ("cold", Reason.NO_PREFIX)
    assert off <= TOLERANCE
    assert pair.run(**question(before=20))[1]["mode"] == "warm"


def test_batches_are_refused() -> None:
    pair = prefix_lm()
    prompts = [question(seed) for seed in (1, 2)]
    both = {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}
    for _ in range(2):
        off, report = pair.run(**both)
        assert (report["mode"], off) == ("bypass", 0.0)
        assert "attend to tokens after the span" in report["reason"]


def test_salts_do_not_share() -> None:
    pair = prefix_lm()
    pair.run(**question())
    with pair.engine.using(salt="another tenant"):
        assert pair.run(**question())[1]["mode"] == "cold"
        assert pair.report["reason_code"] is Reason.NEW_ITEM
