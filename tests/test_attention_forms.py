"""Models with different forms of attention: cold and fully recomputed calls equal the model.

``test_invariants.py`` tests this bitwise for models with ``scaled_dot_product_attention``. Here a fused
kernel may replace separate operators, so results agree within rounding: logits and keys are around 1, and
float32 rounds at 1e-7.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_fx.errors import Reason
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

TOLERANCE = 1e-5

pytestmark = [
    # The unmodified model runs flex attention uncompiled, and transformers compiles its mask.
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*_compile flag on create_block_mask.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

CAP, SINKS = {"attention": "math", "softcap": 1.5}, {"attention": "math", "sinks": True}
FLEX = {"attention": "flex", "hidden": 32}

SHAPES = [
    {"attention": "math"},
    {"attention": "math", "kv_heads": 2, "rope": "partial", "norm": "layer", "bias": True},
    CAP,
    SINKS,
    {**CAP, "sinks": True, "qk_norm": True},
    {**SINKS, "parallel": True, "kv_heads": 2},
    FLEX,
    {**FLEX, "rope": "none", "fused_qkv": True},
]


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def check_moves(pair: Pair) -> None:
    """Run a cold request, then one at another offset after another prompt, with all rows recomputed."""
    off, report = pair.run(**tiny_vlm_inputs(3, 5, [(20, 0)]))
    assert report["mode"] == "cold"
    assert off <= TOLERANCE
    off, report = pair.run(**tiny_vlm_inputs(17, 2, [(20, 0)], text_seed=1))
    assert report["mode"] == "warm"
    assert hits(report) == [True]
    assert off <= TOLERANCE
    assert pair.engine.refusals == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forms_at_another_offset(shape: dict[str, Any]) -> None:
    check_moves(with_backend(tiny_vlm(last_only=False, num_layers=3, **shape), policy="full"))


@pytest.mark.parametrize("shape", [CAP, SINKS, {**FLEX, "softcap": 1.5}], ids=str)
def test_forms_in_static_graphs(shape: dict[str, Any]) -> None:
    """Dynamo cannot trace a cap of flex attention with a symbolic number."""
    check_moves(with_backend(tiny_vlm(last_only=False, **shape), dynamic=None, policy="full"))


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [{**CAP, "sinks": True}, FLEX], ids=str)
def test_forms_with_inductor(shape: dict[str, Any]) -> None:
    check_moves(with_backend(tiny_vlm(last_only=False, **shape), policy="full", lowering="inductor"))


@settings(max_examples=3)
@given(
    softcap=st.sampled_from([None, 0.7]), sinks=st.booleans(), budget=st.sampled_from([0.0, 0.1, 0.5]),
    before=st.integers(1, 20), seed=st.integers(0, 3),
)  # fmt: skip
def test_same_prompt_exact_at_any_budget(
    softcap: float | None, sinks: bool, budget: float, before: int, seed: int
) -> None:
    pair = with_backend(tiny_vlm(seed=seed, attention="math", softcap=softcap, sinks=sinks), policy="full")
    inputs = tiny_vlm_inputs(before, 4, [(24, seed)])
    pair.run(**inputs)
    with pair.engine.using(policy="layer_aware", budget=budget):
        off, report = pair.run(**inputs)
    assert report["mode"] == "warm"
    assert off <= TOLERANCE


def test_small_budget_is_approximate() -> None:
    """Without this, other tests could pass because nothing is reused."""
    pair = with_backend(tiny_vlm(last_only=False, num_layers=3, **CAP, sinks=True), policy="none")
    pair.run(**tiny_vlm_inputs(3, 5, [(40, 0)], text_seed=1))
    off, report = pair.run(**tiny_vlm_inputs(20, 5, [(40, 0)], text_seed=2))
    assert report["mode"] == "warm"
    assert report["rows_per_layer"][:-1] == (25,) * 3
    assert off > 1e-3


def test_softcap_is_part_of_keys() -> None:
    """Models with equal weights and another cap share a store but no donors."""
    from vlcache_fx.store import MemoryStore

    store = MemoryStore(1 << 28)
    for softcap, mode in ((1.5, "cold"), (1.25, "cold"), (1.5, "warm")):
        torch._dynamo.reset()  # the graph is specialised to the cap
        pair = with_backend(tiny_vlm(attention="math", softcap=softcap), policy="none", store=store)
        off, report = pair.run(**tiny_vlm_inputs(3, 5, [(20, 0)]))
        assert report["mode"] == mode
        assert off <= TOLERANCE


# Models of transformers -------------------------------------------------------------------------------------


def check_model(pair: Pair, calls: list[dict[str, Any]]) -> None:
    for place, inputs in enumerate(calls):
        got, expected = pair.both(**inputs)
        assert pair.report["mode"] == ("cold", "warm")[place > 0]
        assert distance(got, expected) <= TOLERANCE
        assert cache_distance(got.past_key_values, expected.past_key_values) <= TOLERANCE
    assert hits(pair.report) == [True]
    assert pair.engine.refusals == []
    assert pair.engine.stats()["calls"]["bypass"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "compiled"),
    [
        pytest.param("eager", with_api, id="eager-compile"),
        pytest.param("eager", with_backend, id="eager-backend", marks=pytest.mark.thorough),
        pytest.param("flex_attention", with_backend, id="flex_attention-backend", marks=pytest.mark.thorough),
        pytest.param("flex_attention", with_api, id="flex_attention-compile", marks=pytest.mark.thorough),
    ],
)
def test_forms_of_llava(attention: str, compiled: Any) -> None:
    pair = compiled(tiny_llava(2, attention=attention), policy="full")
    check_model(pair, [llava_inputs(before, 5, [0], text_seed=before) for before in (4, 11)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiled", [with_api, pytest.param(with_backend, marks=pytest.mark.thorough)], ids=["compile", "backend"]
)
def test_forms_of_qwen(compiled: Any) -> None:
    """Transformers has no flex attention for it."""
    pair = compiled(tiny_qwen2_5_vl(2, attention="eager"), policy="full")
    check_model(pair, [qwen_inputs(before, 5, [(8, 12, 0)], text_seed=before) for before in (4, 11)])


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", pytest.param("flex_attention", marks=pytest.mark.thorough)])
def test_forms_with_padded_prompt(attention: str) -> None:
    """Padding before the prompt; its rows equal the model's as well."""
    pair = with_api(tiny_llava(2, attention=attention), policy="full")
    inputs = llava_inputs(9, 5, [0])
    inputs["attention_mask"][:, :4] = 0
    check_model(pair, [inputs, inputs])


# test_forms_of_llava compares prefills and caches; test_invariants.py generates.
@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_forms_generate(attention: str) -> None:
    pair = with_api(tiny_llava(2, attention=attention), policy="full")
    for before, mode in ((4, "cold"), (11, "warm")):
        inputs = llava_inputs(before, 5, [0], text_seed=before)
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        got, expected = (model.generate(**inputs, **settings) for model in (pair.model, pair.reference))
        assert torch.equal(got, expected)
        assert pair.report["mode"] == mode
    assert pair.engine.refusals == []


# Refusals ---------------------------------------------------------------------------------------------------


def test_returned_probabilities_refused() -> None:
    pair = with_api(tiny_llava(2, attention="eager"))
    inputs = llava_inputs(4, 5, [0])
    got, expected = pair.both(**inputs, output_attentions=True)
    assert distance(got, expected) <= TOLERANCE
    assert pair.report["mode"] == "bypass"
    reasons = {refusal.reason for refusal in pair.engine.refusals}
    assert reasons == {Reason.ATTENTION_FORM}
    assert "is returned too" in pair.report["reason"]
    assert "eager_attention_forward" in pair.report["reason"]
