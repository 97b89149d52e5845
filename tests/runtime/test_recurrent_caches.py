"""States that a prompt returns to its cache, and prompts that continue from such states."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.testing.prompts import IMAGE_TOKEN
from vlcache_fx.testing.tiny_attention import rotary_angles
from vlcache_fx.testing.tiny_hybrid import GROUPS, HEADS, KEY, VALUE, WIDTH, DeltaRule, tiny_hybrid
from vlcache_fx.testing.tiny_vlm import tiny_vlm_inputs

from .helpers import Pair, hits, own_compiler_state, vlcache_store, with_backend

A, B = (40, 0), (31, 1)
CHANNELS = (2 * GROUPS * KEY) + HEADS * VALUE
ROUNDING = 5e-6


class Caching(nn.Module):
    """A delta rule, then attention; it reads and returns the delta rule's state and last inputs."""

    def __init__(self, continues: bool) -> None:
        super().__init__()
        self.vlm, self.continues = tiny_hybrid("da", last_only=False), continues
        with torch.no_grad():  # else states are forgotten within an item
            self.vlm.decoder.layers[0].mixer.gates.bias[:HEADS] = -6.0

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, state: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        vlm = self.vlm
        embeds, image = vlm.embed(input_ids), input_ids == IMAGE_TOKEN
        x = embeds.masked_scatter(image[..., None].expand_as(embeds), vlm.encoder(pixel_values))
        first, second = vlm.decoder.layers
        mixer: DeltaRule = first.mixer
        normed = first.norm_1(x)
        inputs = mixer.qkv(normed).transpose(1, 2)
        tokens = inputs.shape[-1]
        joined = torch.cat([past, inputs], -1) if self.continues else inputs
        weight, bias = mixer.convolution.weight, mixer.convolution.bias
        rows = F.conv1d(joined, weight, bias, padding=WIDTH - 1, groups=CHANNELS)[..., : joined.shape[-1]]
        q, k, v = F.silu(rows)[..., -tokens:].transpose(1, 2).split(mixer.sizes, -1)
        q, k = (part.reshape(1, tokens, GROUPS, KEY) for part in (q, k))
        v = v.reshape(1, tokens, HEADS, VALUE)
        decay, beta = mixer.gates(normed).chunk(2, -1)
        entering = state if self.continues else None
        rows, after, *_ = torch.ops.vlcache.recur(
            q, k, v, -F.softplus(decay), beta.sigmoid(), entering, l2norm=True
        )
        x = x + mixer.out(rows.reshape(1, tokens, -1) * F.silu(mixer.z(normed)))
        x = x + first.mlp(first.norm_2(x))
        x = second(x, rotary_angles(torch.arange(tokens), vlm.decoder.shape.rotary_dim))
        return vlm.decoder.head(vlm.decoder.norm(x)), joined[..., -WIDTH:], after


def prompt(*images: tuple[int, int], before: int = 5, after: int = 9, seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    states = {
        "state": torch.randn(1, HEADS, KEY, VALUE, generator=made),
        "past": torch.randn(1, CHANNELS, WIDTH, generator=made),
    }
    return tiny_vlm_inputs(before, after, images, text_seed=seed) | states


@pytest.fixture(scope="module")
def pairs() -> Iterator[tuple[Pair, Pair]]:
    """Return prompts that start from nothing, and prompts that continue, with one store."""
    store = vlcache_store()
    with own_compiler_state():
        yield tuple(
            with_backend(Caching(continues).eval(), store=store, policy="none", budget=0.1, strict=True)
            for continues in (False, True)
        )


@pytest.fixture
def pair(pairs: tuple[Pair, Pair]) -> Pair:
    pairs[0].engine.clear()
    return pairs[0]


@pytest.fixture
def continued(pairs: tuple[Pair, Pair]) -> Pair:
    pairs[0].engine.clear()
    return pairs[1]


def clear_text(pair: Pair) -> None:
    """Drop the entries of text: no prompt has an exact prefix then."""
    for info in list(pair.engine.store.entries()):
        if info.key.startswith("text"):
            pair.engine.store.clear(Selection(key=info.key))


def check(pair: Pair, call: dict[str, Tensor]) -> None:
    """Check that logits, last inputs and state are those of the unmodified model."""
    for got, want in zip(*pair.both(**call), strict=True):
        torch.testing.assert_close(got, want, atol=ROUNDING, rtol=1e-4)


@pytest.mark.parametrize("after", [1, 2, 3, 12])
def test_states_behind_reused_items(pair: Pair, after: int) -> None:
    """Also where some of the last inputs are stored ones."""
    check(pair, prompt(A, B))
    clear_text(pair)
    check(pair, prompt(A, B, after=after))
    assert (pair.report["mode"], hits(pair.report)) == ("warm", [True, True])


def test_states_behind_an_exact_prefix(pair: Pair) -> None:
    check(pair, prompt(A))
    check(pair, prompt(A, after=2))
    assert (pair.report["mode"], pair.report["prefix_tokens"]) == ("warm", 45)


def test_states_of_recomputed_items(pair: Pair) -> None:
    check(pair, prompt(A, B))
    with pair.engine.using(policy="full"):
        check(pair, prompt(B, A, before=11, after=3, seed=1))
    assert (pair.report["mode"], hits(pair.report)) == ("warm", [True, True])


def test_continued_prompts_store_no_rows(continued: Pair) -> None:
    """Their rows depend on states of earlier calls, which no key covers."""
    for seed in range(3):
        check(continued, prompt(A, seed=seed))
        assert hits(continued.report) == [False]
    kinds = {info.info.get("kind") for info in continued.engine.store.entries()}
    assert "donor" not in kinds


def test_continued_prompts_reuse_items(pair: Pair, continued: Pair) -> None:
    """Keys are those of prompts that start from nothing; rows in front are exact in neither."""
    check(pair, prompt(A, B))
    with continued.engine.using(policy="full"):
        check(continued, prompt(B, A, seed=3))
    report = continued.report
    assert (report["mode"], hits(report), report["prefix_tokens"]) == ("warm", [True, True], 0)
    continued.both(**prompt(A, B, after=12))
    assert continued.report["mode"] == "warm"
    assert continued.report["prefix_tokens"] == 0  # equal tokens, but other states in front


def test_states_of_continued_prompts_count_behind_items(pair: Pair, continued: Pair) -> None:
    """The map of the first layer, whose inputs are those of the donor, takes any state that enters."""
    check(pair, prompt(A))
    call = prompt(A, before=5)
    zeros = {name: torch.zeros_like(call[name]) for name in ("state", "past")}
    (_, _, without), (_, _, want) = continued.both(**call | zeros)
    torch.testing.assert_close(without, want, atol=ROUNDING, rtol=1e-4)
    (_, _, got), (_, _, want) = continued.both(**call)
    assert (continued.report["mode"], hits(continued.report)) == ("warm", [True])
    assert float((got - without).abs().max()) > 1e-2
    torch.testing.assert_close(got, want, atol=ROUNDING, rtol=1e-4)
