"""Invariants of all requests, against an unmodified copy of the model.

Full recompute and cold requests equal the model at any offset. A request that repeats its donor's prompt is
exact at any budget. The KV cache is complete after a warm prefill.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlcache_fx.plan import token_layer_allowance
from vlcache_fx.policies import get_policy
from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .runtime.helpers import (
    Pair,
    cache_distance,
    distance,
    hits,
    own_compiler_state,
    with_api,
    with_backend,
)

LAYERS = 3
TOLERANCE = 1e-5

befores, afters = st.integers(0, 24), st.integers(2, 14)
# For tiny_vlm: (tokens, seed) of each image of a prompt.
image_lists = st.lists(st.tuples(st.integers(16, 40), st.integers(0, 3)), min_size=1, max_size=2)
# For Qwen: an even grid of at least 16 tokens.
grids = st.sampled_from([(8, 8), (8, 12), (12, 8), (16, 4), (4, 16), (10, 12)])
policies = st.sampled_from(["layer_aware", "uniform", "first_k", "none"])
budgets = st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


@pytest.fixture(scope="module")
def vlm(_compiler: None) -> Pair:
    """Returns the logits of every position."""
    return with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), policy="full")


@pytest.fixture(scope="module")
def qwen(_compiler: None) -> Pair:
    return with_api(tiny_qwen2_5_vl(LAYERS), policy="full")


@pytest.fixture(scope="module")
def llava(_compiler: None) -> Pair:
    return with_api(tiny_llava(LAYERS), policy="full")


def encoded(pair: Pair, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return Qwen's arguments as in ``generate()``, with encoder outputs and positions."""
    reference = pair.reference
    with torch.no_grad():
        features = reference.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    positions, _ = reference.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    rest = {name: inputs[name] for name in ("input_ids", "image_grid_thw", "mm_token_type_ids")}
    return rest | {"mm_encoder_outputs": {"image": features}, "position_ids": positions}


def generate(model: nn.Module, inputs: dict[str, Any], tokens: int = 5) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def reused_rows(report: dict[str, Any]) -> int:
    """Return the number of token-layers that were computed in hit spans."""
    spans = sum(span["length"] for span in report["spans"])
    return sum(rows - (report["num_tokens"] - spans) for rows in report["rows_per_layer"][:-1])


# Full recompute and cold requests: bitwise ------------------------------------------------------------------


@settings(max_examples=15)
@given(befores, afters, befores, afters, image_lists)
def test_full_recompute_bitwise_at_another_offset(
    vlm: Pair, before: int, after: int, before_2: int, after_2: int, images: list[tuple[int, int]]
) -> None:
    vlm.engine.clear()
    off, report = vlm.run(**tiny_vlm_inputs(before, after, images, text_seed=1))
    assert report["mode"] == "cold"
    assert off == 0.0
    off, report = vlm.run(**tiny_vlm_inputs(before_2, after_2, images, text_seed=2))
    assert report["mode"] == "warm"
    assert hits(report) == [True] * len(images)
    assert report["token_layer_fraction"] == 1.0
    assert off == 0.0


@settings(max_examples=8)
@given(befores, afters, befores, afters, grids)
def test_full_recompute_bitwise_with_mrope(
    qwen: Pair, before: int, after: int, before_2: int, after_2: int, grid: tuple[int, int]
) -> None:
    qwen.engine.clear()
    for place, (b, a) in enumerate([(before, after), (before_2, after_2)]):
        inputs = encoded(qwen, qwen_inputs(b, a, [(*grid, 0)], text_seed=place))
        got, expected = qwen.both(**inputs)
        assert qwen.report["mode"] == ("cold", "warm")[place]
        assert distance(got, expected) == 0.0
        assert cache_distance(got.past_key_values, expected.past_key_values) == 0.0
    assert hits(qwen.report) == [True]
    assert qwen.report["spans"][0]["start"] == before_2 + 1


@settings(max_examples=6)
@given(befores, afters, befores, afters, st.integers(0, 2))
def test_full_recompute_bitwise_of_llava(
    llava: Pair, before: int, after: int, before_2: int, after_2: int, image: int
) -> None:
    llava.engine.clear()
    for place, (b, a) in enumerate([(before, after), (before_2, after_2)]):
        got, expected = llava.both(**llava_inputs(b, a, [image], text_seed=place))
        assert llava.report["mode"] == ("cold", "warm")[place]
        assert distance(got, expected) == 0.0
        assert cache_distance(got.past_key_values, expected.past_key_values) == 0.0


@pytest.mark.parametrize(
    "shape",
    [
        {"rope": "partial", "explicit_mask": True, "norm": "layer", "bias": True},
        {"rope": "none", "qk_norm": True, "norm_place": "post"},
        {"parallel": True, "kv_heads": 2},
        {"fused_qkv": True},
    ],
    ids=str,
)
def test_full_recompute_of_every_decoder(shape: dict[str, Any]) -> None:
    pair = with_backend(tiny_vlm(last_only=False, **shape), policy="full")
    assert pair.run(**tiny_vlm_inputs(3, 5, [(20, 0)]))[0] == 0.0
    off, report = pair.run(**tiny_vlm_inputs(17, 2, [(20, 0)], text_seed=1))
    assert report["mode"] == "warm"
    assert off == 0.0


def test_full_recompute_of_padded_prompt(llava: Pair) -> None:
    """Padding before the prompt: an explicit mask, and positions that depend on the mask."""
    llava.engine.clear()
    inputs = llava_inputs(9, 5, [0])
    inputs["attention_mask"][:, :4] = 0
    for mode in ("cold", "warm"):
        off, report = llava.run(**inputs)
        assert report["mode"] == mode
        assert off <= TOLERANCE


# Budgets ----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(befores, afters, image_lists, policies, budgets)
def test_same_prompt_exact_at_any_budget(
    vlm: Pair, before: int, after: int, images: list[tuple[int, int]], policy: str, budget: float
) -> None:
    """Also if a policy chooses rows of an identical prefix."""
    asking = type("Asking", (type(get_policy(policy)),), {"keeps_prefix": False})
    vlm.engine.clear()
    if len({seed for _, seed in images}) < len(images):
        images = images[:1]  # equal pixels twice in a prompt have one donor for two contexts
    inputs = tiny_vlm_inputs(before, after, images)
    assert vlm.run(**inputs)[0] == 0.0
    with vlm.engine.using(policy=asking(), budget=budget):
        off, report = vlm.run(**inputs)
    assert (report["mode"], report["prefix_tokens"]) == ("warm", 0)
    assert off <= TOLERANCE
    check_budget(report, policy, budget)
    with vlm.engine.using(policy=policy, budget=budget):
        off, report = vlm.run(**inputs)
    assert report["prefix_tokens"] == report["num_tokens"]
    assert report["rows_per_layer"][:LAYERS] == (2,) * LAYERS
    assert off <= TOLERANCE


@settings(max_examples=25)
@given(befores, afters, befores, image_lists, policies, budgets)
def test_budget_holds_after_other_prompt(
    vlm: Pair,
    before: int,
    after: int,
    before_2: int,
    images: list[tuple[int, int]],
    policy: str,
    budget: float,
) -> None:
    vlm.engine.clear()
    vlm.run(**tiny_vlm_inputs(before, after, images, text_seed=1))
    inputs = tiny_vlm_inputs(before_2, after, images, text_seed=2)
    with vlm.engine.using(policy=policy, budget=budget):
        got, expected = vlm.both(**inputs)
    assert got.shape == expected.shape
    assert got.isfinite().all()
    check_budget(vlm.report, policy, budget)
    if before_2:
        # Text before the first span depends on no donor.
        torch.testing.assert_close(got[:, :before_2], expected[:, :before_2], rtol=0, atol=TOLERANCE)


def check_budget(report: dict[str, Any], policy: str, budget: float) -> None:
    lengths = [span["length"] for span in report["spans"]]
    share = 0.0 if policy == "none" else budget
    allowed = sum(token_layer_allowance(share, length, LAYERS) for length in lengths)
    assert reused_rows(report) <= allowed
    assert report["token_layer_fraction"] == pytest.approx(reused_rows(report) / (sum(lengths) * LAYERS))
    if policy in ("uniform", "first_k", "layer_aware"):
        assert reused_rows(report) >= LAYERS * len(lengths) * bool(share)  # the budget has an effect
    if share == 1.0:
        assert report["token_layer_fraction"] == 1.0


def test_small_budget_is_approximate(vlm: Pair) -> None:
    """Without this, other tests could pass because nothing is reused."""
    vlm.engine.clear()
    vlm.run(**tiny_vlm_inputs(3, 5, [(40, 0)], text_seed=1))
    with vlm.engine.using(policy="none"):
        off, report = vlm.run(**tiny_vlm_inputs(20, 5, [(40, 0)], text_seed=2))
    assert report["mode"] == "warm"
    assert report["rows_per_layer"][:-1] == (25,) * LAYERS
    assert off > 1e-3


# Entry points -----------------------------------------------------------------------------------------------


# With symbolic sizes from the first call on, test_compile_generate.
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.thorough)])
def test_backend_generate(dynamic: bool | None) -> None:
    pair = with_backend(tiny_qwen2_5_vl(2), dynamic=dynamic, policy="full")
    check_generate(pair, lambda before, seed: qwen_inputs(before, 5, [(8, 12, 0)], text_seed=seed))


def test_backend_generate_llava() -> None:
    pair = with_backend(tiny_llava(2), dynamic=None, policy="full")
    check_generate(pair, lambda before, seed: llava_inputs(before, 5, [0], text_seed=seed))


def test_compile_generate(qwen: Pair) -> None:
    qwen.engine.clear()
    check_generate(qwen, lambda before, seed: qwen_inputs(before, 5, [(8, 12, 0)], text_seed=seed))


def check_generate(pair: Pair, make: Any) -> None:
    """Tokens, logits and the KV cache of cold and warm requests, and of the tokens decoded after them."""
    for place, (before, mode) in enumerate([(4, "cold"), (11, "warm"), (7, "warm")]):
        inputs = make(before, place)
        got, expected = generate(pair.model, inputs), generate(pair.reference, inputs)
        assert pair.report["mode"] == mode
        assert pair.report["num_tokens"] == inputs["input_ids"].shape[1]
        assert torch.equal(got.sequences, expected.sequences)
        for a, b in zip(got.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
        assert cache_distance(got.past_key_values, expected.past_key_values) <= TOLERANCE
    assert pair.engine.refusals == []
    assert pair.engine.stats()["calls"]["bypass"] == 0


@pytest.mark.parametrize("name", ["qwen", "llava"])
def test_decoding_after_prefill_at_two_percent(name: str, request: pytest.FixtureRequest) -> None:
    pair = request.getfixturevalue(name)
    pair.engine.clear()
    make = {
        "qwen": lambda before: qwen_inputs(before, 5, [(8, 12, 0), (10, 12, 1)]),
        "llava": lambda before: llava_inputs(before, 5, [0, 1]),
    }[name]
    with pair.engine.using(policy="layer_aware", budget=0.02):
        generate(pair.model, make(4))
        inputs = make(13)
        got, expected = generate(pair.model, inputs, 8), generate(pair.reference, inputs, 8)
    assert pair.report["mode"] == "warm"
    assert reused_rows(pair.report) == 2 * LAYERS  # one row of each image
    assert got.sequences.shape == expected.sequences.shape
    assert all(logits.isfinite().all() for logits in got.logits)
    for a, b in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert a.keys.shape == b.keys.shape
        assert a.values.shape == b.values.shape
        assert a.keys.isfinite().all()
        # Rows before the first image are exact in every layer.
        torch.testing.assert_close(a.keys[:, :, :13], b.keys[:, :, :13], rtol=0, atol=TOLERANCE)
    # The first layer's keys and values depend on token and position only, so moved rows are exact too.
    first, first_expected = got.past_key_values.layers[0], expected.past_key_values.layers[0]
    tokens = inputs["input_ids"].shape[1]
    torch.testing.assert_close(
        first.keys[:, :, :tokens], first_expected.keys[:, :, :tokens], rtol=0, atol=TOLERANCE
    )
    torch.testing.assert_close(
        first.values[:, :, :tokens], first_expected.values[:, :, :tokens], rtol=0, atol=TOLERANCE
    )
