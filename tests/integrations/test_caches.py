"""Caches keep one layout, so that all decoding steps share a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

from vlcache_fx.integrations.caches import order_dimensions
from vlcache_fx.testing.reference_vlm import load_model, load_processor, make_questions, prepare

from ..runtime.helpers import own_compiler_state, with_api

BATCH, HEADS, TOKENS, DIM = 2, 3, 5, 4


def cache_of(keys: torch.Tensor) -> Any:
    return DynamicCache([(keys, keys.clone())])


def test_views_of_tokens_first_are_laid_out_anew() -> None:
    keys = torch.randn(BATCH, TOKENS, HEADS, DIM).transpose(1, 2)
    cache: Any = DynamicCache()
    cache.update(keys, keys * 2, 0)
    order_dimensions(cache)
    layer = cache.layers[0]
    assert layer.keys.is_contiguous()
    assert layer.values.is_contiguous()
    torch.testing.assert_close(layer.keys, keys, rtol=0, atol=0)
    torch.testing.assert_close(layer.values, keys * 2, rtol=0, atol=0)


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(torch.randn(BATCH, HEADS, TOKENS, DIM), id="in order"),
        pytest.param(torch.randn(BATCH, HEADS, 2 * TOKENS, DIM)[:, :, :TOKENS], id="cropped"),
        pytest.param(torch.randn(BATCH, TOKENS, 1, DIM).transpose(1, 2), id="one head"),
        pytest.param(torch.randn(BATCH, 1, HEADS, DIM).transpose(1, 2), id="one token"),
    ],
)
def test_other_layouts_stay(keys: torch.Tensor) -> None:
    cache = cache_of(keys)
    before = cache.layers[0].keys
    order_dimensions(cache)
    assert cache.layers[0].keys is before


@pytest.mark.parametrize("cache", [None, (), "none", DynamicCache()])
def test_what_has_no_layers_is_left_alone(cache: Any) -> None:
    order_dimensions(cache)


@pytest.mark.parametrize("batch", [1, 2])
def test_all_steps_share_one_graph(batch: int) -> None:
    """One graph for the prompt, and one for the three steps."""
    inputs = prepare(load_processor(), make_questions(count=batch, seed=1), "cpu")
    with own_compiler_state():
        pair = with_api(load_model(), policy="full")
        before = counters["stats"]["unique_graphs"]
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        with torch.inference_mode():
            ours, theirs = (model.generate(**inputs, **settings) for model in (pair.model, pair.reference))
        assert torch.equal(ours, theirs)
        assert counters["stats"]["unique_graphs"] - before == 2
