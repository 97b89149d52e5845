"""Caches of transformers for hybrid decoders: keys, values and states after a prefill, and decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import vlcache_fx
from vlcache_fx.testing.survey.families import FamilyModel, build_family
from vlcache_fx.testing.survey.prompts import image_prompt

from ..runtime.helpers import own_compiler_state

TOLERANCE = 1e-4
"""Of states, relative to the largest: rounding depends on shapes."""

LONG = pytest.mark.thorough
CASES = [
    pytest.param("lfm2_vl", {"cache_implementation": "static"}, id="lfm2_vl static"),
    pytest.param("lfm2_vl", {}, id="lfm2_vl dynamic", marks=LONG),
    pytest.param("qwen3_5", {}, id="qwen3_5 dynamic", marks=LONG),
    pytest.param("qwen3_5", {"cache_implementation": "static"}, id="qwen3_5 static", marks=LONG),
    pytest.param("qwen3_5_moe", {}, id="qwen3_5_moe dynamic", marks=LONG),
]


def contents(cache: Any) -> list[Tensor]:
    """Return all tensors of a cache."""
    found = []
    for layer in cache.layers:
        for name in ("keys", "values"):
            found += [getattr(layer, name)] if getattr(layer, name, None) is not None else []
        for name in ("conv_states", "recurrent_states"):
            found += [state for state in (getattr(layer, name, None) or {}).values() if state is not None]
    return found


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))


def generate(model: Any, prompt: dict[str, Any], settings: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model.generate(
            **prompt, **settings, max_new_tokens=3, min_new_tokens=3, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_states_after_a_warm_prefill(name: str, settings: dict[str, Any]) -> None:
    """With every row recomputed, cache and logits equal those of the unmodified model."""
    with own_compiler_state():
        family = build_family(name)
        model = vlcache_fx.compile(
            copy.deepcopy(family.model), lowering="eager", dynamic=True, policy="full", min_span_tokens=2
        )
        engine = model.vlcache
        for prompt, mode in ((first(family), "cold"), (moved(family), "warm"), (first(family), "warm")):
            want, got = (generate(each, dict(prompt), settings) for each in (family.model, model))
            assert engine.last_report["mode"] == mode, engine.last_report["reason"]
            pairs = list(zip(contents(got.past_key_values), contents(want.past_key_values), strict=True))
            assert len(pairs) >= 3
            assert max(off(ours, theirs) for ours, theirs in pairs) <= TOLERANCE
            assert max(off(a, b) for a, b in zip(got.logits, want.logits, strict=True)) <= TOLERANCE
            assert torch.equal(got.sequences, want.sequences)


def first(family: FamilyModel) -> dict[str, Any]:
    return image_prompt(family, 5, 9, image=1)


def moved(family: FamilyModel) -> dict[str, Any]:
    return image_prompt(family, 9, 12, image=1, text=1)


def test_next_turn_with_a_cache() -> None:
    """The second call continues the states of the first; its item is reused, and nothing of it is stored."""
    with own_compiler_state():
        family = build_family("lfm2_vl")
        model = vlcache_fx.compile(
            copy.deepcopy(family.model), lowering="eager", dynamic=True, policy="full", min_span_tokens=2
        )
        first_prompt, second = first(family), image_prompt(family, 4, 6, image=1, text=1)
        results = []
        for each in (family.model, model):
            turn = generate(each, dict(first_prompt), {})
            ids = torch.cat([turn.sequences, second["input_ids"]], 1)
            prompt = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if each is model:
                stored = len(model.vlcache.store)
            results.append(generate(each, prompt, {"past_key_values": turn.past_key_values}))
        want, got = results
        report = model.vlcache.last_report
        assert (report["mode"], [span["hit"] for span in report["spans"]]) == ("warm", [True])
        assert len(model.vlcache.store) == stored
        pairs = zip(contents(got.past_key_values), contents(want.past_key_values), strict=True)
        assert max(off(ours, theirs) for ours, theirs in pairs) <= TOLERANCE
        assert torch.equal(got.sequences, want.sequences)
